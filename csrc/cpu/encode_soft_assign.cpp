#include <algorithm>
#include <limits>

#include "encode_soft.h"
#include "bank.h"

namespace dre_fast {
namespace {

constexpr int64_t kBlockBytes = 512 << 10;  // rows, logits and assignment of a block stay in a core's cache
constexpr int64_t kLeastBlock = 192, kMostBlock = 384;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const SoftKernels& choose_soft_kernels() {
#if defined(__x86_64__)
  const std::string level = cpu_level();
  if (level == "avx512") return soft_kernels_avx512;
  if (level == "avx2") return soft_kernels_avx2;
#endif
  return soft_kernels_default;
}

std::vector<float> mean_of(const Codewords& c) {
  std::vector<double> sum(c.ld, 0.0);
  for (int64_t k = 0; k < c.words; ++k)
    for (int64_t j = 0; j < c.ld; ++j) sum[j] += c[k][j];
  std::vector<float> mean(c.ld);
  for (int64_t j = 0; j < c.ld; ++j) mean[j] = static_cast<float>(sum[j] / static_cast<double>(c.words));
  return mean;
}

Codewords less(Codewords c, const std::vector<float>& middle) {
  for (int64_t k = 0; k < c.words; ++k)
    for (int64_t j = 0; j < c.ld; ++j) c.values[k * c.ld + j] -= middle[j];
  return c;
}

}  // namespace

const SoftKernels& soft_kernels_here() {
  static const SoftKernels& chosen = choose_soft_kernels();
  return chosen;
}

void Transposed::fill(const float* matrix, int64_t rows, int64_t pitch) {
  for (int64_t first = 0; first < rows; first += kPanel) {
    float* panel = values_.data() + first * ld_;
    const int64_t taken = std::min(kPanel, rows - first);
    for (int64_t j = 0; j < ld_; ++j)
      for (int64_t k = 0; k < taken; ++k) panel[j * kPanel + k] = matrix[(first + k) * pitch + j];
  }
}

SoftAssignment::Block::Block(const SoftAssignment& owner, int64_t rows)
    : pitch(pitch_of(owner.centre.ld)),
      words(owner.padded_words),
      x(rows * pitch),
      squares(rows),
      z(rows * words),
      a(rows * words),
      at(rows) {}

SoftAssignment::SoftAssignment(
    const char* op, const Tensor& codebook, const OptionalTensor& scale, const OptionalTensor& weight,
    const OptionalTensor& bias)
    : middle(mean_of(Codewords(codebook))),
      centre(less(Codewords(codebook), middle)),
      padded_words(padded(centre.words)),
      points_(centre.words * pitch_of(centre.ld), 0.0f),
      start_(padded_words, scale ? kInfinity : -kInfinity),  // padding has no weight
      packed_(centre.words, centre.ld) {
  const int64_t words = centre.words, ld = centre.ld;
  STD_TORCH_CHECK(scale.has_value() != weight.has_value(), op, ": give either scale, or weight and perhaps bias");
  STD_TORCH_CHECK(weight || !bias, op, ": bias goes with weight");
  STD_TORCH_CHECK(
      !weight || (weight->dim() == 2 && weight->size(0) == words && weight->size(1) == centre.dim), op,
      ": weight must be [", words, ", ", centre.dim, "]");
  const auto vector = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == words, op, ": ", name, " must have ", words, " entries");
    return as_float(t);
  };
  const Codewords w = weight ? Codewords(*weight) : centre;
  for (int64_t k = 0; k < words; ++k)
    for (int64_t j = 0; j < ld; ++j) points_[k * pitch_of(ld) + j] = (scale ? -2.0f : 1.0f) * w[k][j];
  if (scale) {
    const Tensor s = vector("scale", *scale);
    minus_scale_.assign(padded_words, -1.0f);
    for (int64_t k = 0; k < words; ++k) {
      minus_scale_[k] = -floats(s)[k];
      start_[k] = soft_kernels_here().square(centre[k], ld);
    }
  } else {
    const Tensor b = bias ? vector("bias", *bias) : codebook;
    for (int64_t k = 0; k < words; ++k)
      start_[k] = static_cast<float>((bias ? floats(b)[k] : 0.0) + dot(w[k], middle.data(), ld));
  }
  packed_.fill(points_.data(), words, pitch_of(ld));
  const int64_t row_bytes = (ld + 2 * padded_words) * static_cast<int64_t>(sizeof(float));
  block_rows_ = std::clamp(kBlockBytes / row_bytes, kLeastBlock, kMostBlock);
}

void SoftAssignment::assign(
    const RowSource& source, int64_t first, int64_t past, int64_t end, Block& block) const {
  const SoftKernels& kernels = soft_kernels_here();
  block.taken = 0;
  for (int64_t i = first; i < past; ++i) {
    const int64_t r = source.at(i);
    if (r < 0) continue;
    float* x = block.row(block.taken);
    source.decoded(r, x);
    kernels.add(-1.0f, middle.data(), centre.ld, x);
    if (by_distance()) block.squares[block.taken] = kernels.square(x, centre.ld);
    block.at[block.taken++] = i;
  }
  const int64_t next = std::min(past + block_rows_, end);
  const char *ahead = nullptr, *ahead_end = nullptr;
  if (source.in_order() && past < next) {
    ahead = source.stored(past);
    ahead_end = source.stored(next - 1) + source.dim() * element_bytes(source.format());
  }
  if (block.taken == 0) return;
  // the exponential multiplies the errors of logits
  kernels.product(
      {block.x.data(), block.pitch, 1}, block.taken, centre.ld, packed_.get(), padded_words, start_.data(), block.z.data(),
      padded_words, kShort, ahead, ahead_end);
  kernels.softmax(
      block.z.data(), block.taken, padded_words, by_distance() ? block.squares.data() : nullptr, minus_scale(),
      block.a.data());
}

}  // namespace dre_fast
