// Gradient of hard encoding on the CPU: row i takes grad[bag_i, code_i], with `unit` carried through the normalisation.
// The specification is dre_fast/reference/hard.py:hard_encode_backward.

#include <algorithm>
#include <cstring>
#include <vector>

#include "encode.h"

namespace dre_fast {
Tensor hard_encode_backward_cpu(
    const Tensor& grad, const Tensor& codes, const Tensor& cu_seqlens, const OptionalTensor& x,
    const OptionalTensor& index, bool unit) {
  const char* op = "hard_encode_backward";
  STD_TORCH_CHECK(grad.dim() == 3, op, ": grad must be [B, K, D]");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Long && codes.dim() == 1, op, ": codes must be int64 [M]");
  STD_TORCH_CHECK(!unit || x, op, ": unit rows need x");
  const int64_t rows = codes.size(0), bags = grad.size(0), words = grad.size(1), dim = grad.size(2);
  const Tensor offsets = checked_offsets(op, cu_seqlens, rows), code_kept = torch::stable::contiguous(codes);
  STD_TORCH_CHECK(offsets.size(0) == bags + 1, op, ": cu_seqlens must have one entry more than grad has bags");
  // the gradient of the bags, as rows of D
  const Tensor table = torch::stable::reshape(torch::stable::contiguous(grad), {bags * words, dim});
  const RowSource gradient(op, table, dim, std::nullopt, std::nullopt, false);
  STD_TORCH_CHECK(!has_scale(gradient.format()), op, ": grad must be float32, float16 or bfloat16");
  std::optional<RowSource> source;
  if (unit) {
    source.emplace(op, *x, dim, index, std::nullopt, false);
    STD_TORCH_CHECK(source->rows() == rows, op, ": codes must have one entry for each of the ", source->rows(), " rows");
    STD_TORCH_CHECK(!has_scale(source->format()), op, ": x must be float32, float16 or bfloat16");
  }
  const Format format = source ? source->format() : gradient.format();

  Tensor out = torch::stable::new_empty(grad, {rows, dim}, unit ? x->scalar_type() : grad.scalar_type());
  char* written = static_cast<char*>(out.mutable_data_ptr());
  const auto* cu = static_cast<const int64_t*>(offsets.const_data_ptr());
  const auto* code = static_cast<const int64_t*>(code_kept.const_data_ptr());
  const int64_t bytes = dim * element_bytes(format), total = cu[bags];
  const int64_t grain = std::max<int64_t>(1, (64 << 10) / std::max<int64_t>(bytes, 1));
  bool inside = true;
  for (int64_t i = 0; i < total; ++i) inside = inside && code[i] < words;
  STD_TORCH_CHECK(inside, op, ": codes must be below the ", words, " codewords");

  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> g(unit ? padded(dim) : 0), y(g.size()), d(g.size());
    int64_t bag = std::upper_bound(cu, cu + bags + 1, begin) - cu - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (bag < bags && i >= cu[bag + 1]) ++bag;
      char* to = written + i * bytes;
      const int64_t r = source ? source->at(i) : 0;
      if (i >= total || code[i] < 0 || r < 0) {
        std::memset(to, 0, bytes);
        continue;
      }
      const int64_t cell = bag * words + code[i];
      if (!unit) {
        std::memcpy(to, gradient.stored(cell), bytes);
        continue;
      }
      const float *gi = gradient.decoded(cell, g.data()), *xi = source->decoded(r, y.data());
      encode_kernels_here().unit_backward(gi, xi, padded(dim), d.data());
      store_row(format, d.data(), dim, to);
    }
  });
  return out;
}

}  // namespace dre_fast
