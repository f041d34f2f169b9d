// Soft assignment of rows on the CPU, a block of rows at a time. The specification is dre_fast/reference/soft.py.
#pragma once

#include <vector>

#include "encode_assign.h"
#include "soft_kernels.h"

namespace dre_fast {

// The kernels of this processor.
const SoftKernels& soft_kernels_here();

// <a, b> in float64; the lanes let the compiler work on several at a time.
inline double dot(const float* a, const float* b, int64_t ld) {
  double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t j = 0; j < ld; j += 8)
    for (int i = 0; i < 8; ++i) lane[i] += static_cast<double>(a[j + i]) * b[j + i];
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

// From one row of a matrix to the next where many are read side by side: rows of 2^n bytes would get in each other's way
// in the cache.
inline int64_t pitch_of(int64_t ld) { return ld + kLanes; }

// A matrix [rows, ld] whose transpose [ld, padded(rows)] is a right factor.
class Transposed {
 public:
  Transposed(int64_t rows, int64_t ld) : ld_(ld), values_(round_up(padded(rows) * ld, kPanel * ld), 0.0f) {}
  void fill(const float* matrix, int64_t rows, int64_t pitch);
  Right get() const { return {values_.data(), kPanel, kPanel * ld_}; }

 private:
  int64_t ld_;
  std::vector<float> values_;
};

// What assigns: Deep-TEN scales of distances, or NetVLAD weights and biases.
class SoftAssignment {
 public:
  // Rows of one block that are not skipped, and what is known of them.
  struct Block {
    Block(const SoftAssignment& owner, int64_t rows);
    float* row(int64_t n) { return x.data() + n * pitch; }
    int64_t pitch, words, taken = 0;
    std::vector<float> x;        // x_i - m [taken, pitch]
    std::vector<float> squares;  // of the rows, [taken]
    std::vector<float> z;        // distances, or logits, [taken, words]
    std::vector<float> a;        // the assignment, [taken, words]
    std::vector<int64_t> at;     // which rows these are
  };

  SoftAssignment(
      const char* op, const Tensor& codebook, const OptionalTensor& scale, const OptionalTensor& weight,
      const OptionalTensor& bias);

  bool by_distance() const { return !minus_scale_.empty(); }
  const float* minus_scale() const { return by_distance() ? minus_scale_.data() : nullptr; }  // [padded_words]

  // Rows that are best assigned together.
  int64_t block_rows() const { return block_rows_; }

  // Reads rows [first, past) and assigns them. The rows up to `end` may be fetched meanwhile.
  void assign(const RowSource& source, int64_t first, int64_t past, int64_t end, Block& block) const;

  // V and distances are those of rows and codewords less their middle m, the mean codeword: what all share takes no
  // digits from the differences.
  const std::vector<float> middle;  // m [ld]
  const Codewords centre;           // c_k - m
  const int64_t padded_words;

  // z_ik = (x_i - m) . points_k + start_k (+ |x_i - m|^2 where z is a distance), [words, pitch_of(ld)]
  const std::vector<float>& points() const { return points_; }

 private:
  std::vector<float> points_, start_, minus_scale_;
  Transposed packed_;
  int64_t block_rows_;
};

// Calls run(bag, from, to) for the rows of each bag in a block; `bag` is the first that may be there.
template <class Run>
void for_each_bag(const int64_t* cu, int64_t bag, const SoftAssignment::Block& block, Run run) {
  for (int64_t n = 0; n < block.taken;) {
    while (block.at[n] >= cu[bag + 1]) ++bag;
    const int64_t from = n;
    while (n < block.taken && block.at[n] < cu[bag + 1]) ++n;
    run(bag, from, n);
  }
}

constexpr int64_t kLeastSoftRows = 128;  // of a segment: its sums, and what it prepares, cost about as much as ten rows

}  // namespace dre_fast
