#include "encode_rows.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>

#include "bank.h"

namespace dre_fast {
namespace {

// A power of two of segments shares out evenly.
constexpr int64_t kFairRows = 16384, kFairSegments = 16, kMostSegments = 64;
constexpr int64_t kPartialBytes = int64_t{256} << 20;  // about how much the sums of all segments may take

const EncodeKernels& choose_encode_kernels() {
#if defined(__x86_64__)
  const std::string level = cpu_level();
  // avx512 names the level without the bfloat16 products, for tests of both
  if (level == "avx512" && !std::getenv("DRE_FAST_CPU") && __builtin_cpu_supports("avx512bf16"))
    return encode_kernels_avx512bf16;
  if (level == "avx512") return encode_kernels_avx512;
  if (level == "avx2") return encode_kernels_avx2;
#endif
  return encode_kernels_default;
}

Tensor with_unit_columns(const Tensor& x) {
  return x.dim() != 2 || x.stride(1) == 1 || x.size(1) <= 1 ? x : torch::stable::contiguous(x);
}

// Gradients are not bounded by their format: what lies outside becomes infinite.
uint16_t to_half_or_inf(float x) {
  const float a = std::fabs(x);
  if (a < 65520.0f) return to_half(x);  // rounds to 65504 at most
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  return std::isnan(x) ? 0x7e00 : static_cast<uint16_t>(sign | 0x7c00);
}

uint16_t to_bfloat16_or_nan(float x) { return std::isnan(x) ? 0x7fc0 : to_bfloat16(x); }

}  // namespace

const EncodeKernels& encode_kernels_here() {
  static const EncodeKernels& chosen = choose_encode_kernels();
  return chosen;
}

Tensor as_float(const Tensor& t) {
  return torch::stable::contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

Tensor checked_offsets(const char* op, const Tensor& cu_seqlens, int64_t rows) {
  STD_TORCH_CHECK(
      cu_seqlens.scalar_type() == ScalarType::Long && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op,
      ": cu_seqlens must be int64 [B+1]");
  const Tensor offsets = torch::stable::contiguous(cu_seqlens);
  const auto* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t bags = offsets.size(0) - 1;
  bool ascending = at[0] == 0;
  for (int64_t b = 0; b < bags; ++b) ascending = ascending && at[b] <= at[b + 1];
  STD_TORCH_CHECK(
      ascending && at[bags] <= rows, op, ": cu_seqlens must ascend from 0 to at most the ", rows, " rows");
  return offsets;
}

int64_t rows_of_segment(int64_t rows, int64_t least, int64_t bytes) {
  int64_t segments = 1;
  const auto one_more = [&] {
    return rows / (2 * segments) >= (segments < kFairSegments ? least : kFairRows) &&
        2 * segments <= kMostSegments && (segments < 4 || 2 * segments * bytes <= kPartialBytes);
  };
  while (one_more()) segments *= 2;
  return std::max<int64_t>((rows + segments - 1) / segments, 1);
}

void store_row(Format format, const float* x, int64_t dim, char* out) {
  if (format == Format::kFloat32) {
    std::memcpy(out, x, dim * sizeof(float));
    return;
  }
  auto* v = reinterpret_cast<uint16_t*>(out);
  for (int64_t j = 0; j < dim; ++j)
    v[j] = format == Format::kFloat16 ? to_half_or_inf(x[j]) : to_bfloat16_or_nan(x[j]);
}

RowSource::RowSource(
    const char* op, const Tensor& x, int64_t dim, const OptionalTensor& index, const OptionalTensor& row_scale,
    bool unit)
    : x_kept_(with_unit_columns(x)), index_(nullptr), scale_(nullptr), dim_(dim), unit_(unit) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must have 2 dimensions, has ", x.dim());
  switch (x.scalar_type()) {
    case ScalarType::Float: format_ = Format::kFloat32; break;
    case ScalarType::Half: format_ = Format::kFloat16; break;
    case ScalarType::BFloat16: format_ = Format::kBFloat16; break;
    case ScalarType::Char: format_ = Format::kInt8; break;
    case ScalarType::Float8_e4m3fn: format_ = Format::kE4M3; break;
    default: STD_TORCH_CHECK(false, op, ": x must be float32, float16, bfloat16, int8 or float8_e4m3fn");
  }
  STD_TORCH_CHECK(x.size(1) >= dim, op, ": x has ", x.size(1), " columns, the codebook ", dim);
  x_ = static_cast<const char*>(x_kept_.const_data_ptr());
  stored_ = x.size(0);
  stride_ = x_kept_.stride(0) * element_bytes(format_);
  rows_ = stored_;
  if (index) {
    STD_TORCH_CHECK(
        index->scalar_type() == ScalarType::Long && index->dim() == 1, op, ": index must be int64 [M]");
    index_kept_ = torch::stable::contiguous(*index);
    index_ = static_cast<const int64_t*>(index_kept_->const_data_ptr());
    rows_ = index->size(0);
    bool inside = true;
    for (int64_t i = 0; i < rows_; ++i) inside = inside && index_[i] < stored_;
    STD_TORCH_CHECK(inside, op, ": index must lie below the ", stored_, " rows of x");
  }
  if (row_scale) {
    STD_TORCH_CHECK(
        row_scale->scalar_type() == ScalarType::Float && row_scale->dim() == 1 && row_scale->size(0) == stored_, op,
        ": row_scale must be float32 [", stored_, "]");
    scale_kept_ = torch::stable::contiguous(*row_scale);
    scale_ = floats(*scale_kept_);
  }
  const bool readable = format_ == Format::kFloat32 || (format_ == Format::kBFloat16 && encode_kernels_here().narrow);
  direct_ = readable && !scale_ && !unit_ && dim_ == ld();
}

const float* RowSource::decoded(int64_t r, float* buffer) const {
  const EncodeKernels& kernels = encode_kernels_here();
  kernels.decode(format_, stored(r), scale_ ? scale_[r] : 1.0f, dim_, buffer);
  if (unit_) kernels.unit(buffer, ld());
  return buffer;
}

}  // namespace dre_fast
