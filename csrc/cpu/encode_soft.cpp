// Soft encoding on the CPU: V_bk = sum_i a_ik (x_i - m) - (sum_i a_ik) (c_k - m) for a middle m of the codewords. Rows are read once, a block at a time; while a
// block is in cache it is assigned and added to the sums. The specification is dre_fast/reference/soft.py.

#include "encode_soft.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "encode.h"
#include "encode_segments.h"

namespace dre_fast {
namespace {

// sum_i a_ik (x_i - m) and sum_i a_ik of one bag.
struct Sums {
  explicit Sums(const SoftAssignment& by) : sum(by.centre.words * by.centre.ld, 0.0f), mass(by.padded_words, 0.0) {}
  void clear() {
    std::fill(sum.begin(), sum.end(), 0.0f);
    std::fill(mass.begin(), mass.end(), 0.0);
  }
  std::vector<float> sum;    // [words, ld]
  std::vector<double> mass;  // [padded_words]
};

class SoftEncode {
 public:
  SoftEncode(const RowSource& source, const SoftAssignment& by, const Tensor& offsets)
      : source_(source),
        by_(by),
        segments_(offsets, kLeastSoftRows, by.centre.words * by.centre.ld * static_cast<int64_t>(sizeof(float))) {}

  void run(float* residuals, float* mass) {
    residuals_ = residuals, mass_ = mass;
    const int64_t words = by_.centre.words, cells = words * by_.centre.dim;
    segments_.for_each_empty([&](int64_t bag) {
      std::memset(residuals + bag * cells, 0, cells * sizeof(float));
      std::memset(mass + bag * words, 0, words * sizeof(float));
    });
    torch::stable::parallel_for(0, segments_.count(), 1, [&](int64_t begin, int64_t end) {
      SoftAssignment::Block block(by_, std::min(by_.block_rows(), segments_.rows));
      auto sums = std::make_unique<Sums>(by_);
      for (int64_t s = begin; s < end; ++s) segment(s, block, sums);
    });
    segments_.add_parts(words, *this);
  }

  // Row k of a bag from the sums of its segments.
  void write(int64_t bag, int64_t k, const Sums* const* sums, int64_t n) {
    const int64_t dim = by_.centre.dim, ld = by_.centre.ld, cell = bag * by_.centre.words + k;
    double mass = 0.0;
    for (int64_t p = 0; p < n; ++p) mass += sums[p]->mass[k];
    mass_[cell] = static_cast<float>(mass);
    const float* c = by_.centre[k];
    float* out = residuals_ + cell * dim;
    if (n == 1) {
      const float* sum = &sums[0]->sum[k * ld];
      for (int64_t j = 0; j < dim; ++j) out[j] = static_cast<float>(sum[j] - mass * c[j]);
      return;
    }
    std::vector<double> total(dim, 0.0);
    for (int64_t p = 0; p < n; ++p)
      for (int64_t j = 0; j < dim; ++j) total[j] += sums[p]->sum[k * ld + j];
    for (int64_t j = 0; j < dim; ++j) out[j] = static_cast<float>(total[j] - mass * c[j]);
  }

  std::unique_ptr<Sums> make() const { return std::make_unique<Sums>(by_); }

 private:
  void segment(int64_t s, SoftAssignment::Block& block, std::unique_ptr<Sums>& sums) {
    const SoftKernels& kernels = soft_kernels_here();
    const int64_t end = segments_.end(s), ld = by_.centre.ld, words = by_.centre.words;
    const auto finish = [&](int64_t bag) {
      segments_.finish(bag, s, sums, words, *this);
    };
    int64_t open = segments_.first_bag(s);
    for (int64_t first = segments_.begin(s); first < end; first += by_.block_rows()) {
      by_.assign(source_, first, std::min(first + by_.block_rows(), end), end, block);
      for_each_bag(segments_.cu, open, block, [&](int64_t bag, int64_t from, int64_t to) {
        for (; open < bag; ++open) finish(open);
        const float* a = block.a.data() + from * block.words;
        kernels.product(
            {a, 1, block.words}, words, to - from, rows_of(block.row(from), block.pitch), ld, nullptr, sums->sum.data(), ld,
            kLong, nullptr, nullptr);
        kernels.add_columns(a, to - from, block.words, sums->mass.data());
      });
    }
    for (; open < segments_.bags && segments_.cu[open] < end; ++open) finish(open);
  }

  const RowSource& source_;
  const SoftAssignment& by_;
  Segments<Sums> segments_;
  float *residuals_ = nullptr, *mass_ = nullptr;
};

}  // namespace

std::tuple<Tensor, Tensor> soft_encode_cpu(
    const Tensor& x, const Tensor& codebook, const Tensor& cu_seqlens, const OptionalTensor& scale,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& index,
    const OptionalTensor& row_scale, bool unit) {
  STD_TORCH_CHECK(
      codebook.dim() == 2 && codebook.size(0) >= 1, "soft_encode: codebook must be [K, D] with at least one codeword");
  const SoftAssignment by("soft_encode", codebook, scale, weight, bias);
  const RowSource source("soft_encode", x, by.centre.dim, index, row_scale, unit);
  const Tensor offsets = checked_offsets("soft_encode", cu_seqlens, source.rows());
  const int64_t bags = offsets.size(0) - 1, words = by.centre.words;
  Tensor residuals = torch::stable::new_empty(x, {bags, words, by.centre.dim}, ScalarType::Float);
  Tensor mass = torch::stable::new_empty(x, {bags, words}, ScalarType::Float);
  SoftEncode(source, by, offsets)
      .run(static_cast<float*>(residuals.mutable_data_ptr()), static_cast<float*>(mass.mutable_data_ptr()));
  return {residuals, mass};
}

}  // namespace dre_fast
