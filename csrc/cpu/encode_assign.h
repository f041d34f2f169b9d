// Nearest codewords on the CPU: the k with the least ||x - c_k||^2 in float64, ties to the lowest k, whatever the
// processor's instruction set and whatever rows are beside it.
#pragma once

#include <mutex>
#include <vector>

#include "encode_rows.h"

namespace dre_fast {

// The codebook in padded fp32 rows.
struct Codewords {
  explicit Codewords(const Tensor& codebook);
  const float* operator[](int64_t k) const { return values.data() + k * ld; }

  int64_t words, dim, ld;
  std::vector<float> values;
};

// A range of memory to fetch into cache, empty by default.
struct Ahead {
  const char *begin = nullptr, *end = nullptr;
};

// Scores of all codewords are formed approximately, with a bound on how far rounding moves them. Codewords that might
// be the nearest are compared by fp32 distances from differences, whose error is relative to the distance, and those
// that are still too close by float64 ones.
class Nearest {
 public:
  class Scratch {
   public:
    Scratch(const Nearest& owner, int64_t rows);

   private:
    friend class Nearest;
    std::vector<char> prepared;
    std::vector<float> scores, slack, best, distance, row;
    std::vector<int32_t> candidates;
    int64_t wide_blocks = 0;
  };

  // `rows` is how many will be assigned in all: few are not worth the packing of the codebook. `bfloat16`: they are
  // bfloat16, not fp32.
  Nearest(const Codewords& codewords, int64_t rows, bool bfloat16);

  // Rows that are best assigned together.
  int64_t block_rows() const { return block_rows_; }

  // code[i] of n <= block_rows() rows [ld]; 0 for a row with NaN or infinities, the first codeword with NaN if there
  // is one. Memory `ahead` is fetched meanwhile.
  void assign(const void* const* rows, int64_t n, int32_t* code, Scratch& scratch, Ahead ahead) const;

  // A row as fp32 [ld]: itself, or written to the scratch.
  const float* as_float(const void* row, Scratch& scratch) const;

 private:
  // How rows are screened: as fp32 or rounded to bfloat16, both centred, or as the bfloat16 values they are.
  enum Mode { kWide, kNarrow, kAsIs, kModes };

  // The codebook made ready for a mode. Scores <y, w_k> - b_k of rows y = factor x - shift.
  struct Packed {
    std::once_flag once;
    float factor = 1.0f;
    std::vector<float> shift, minus_b;
    std::vector<char> words;
    float reach = 0.0f, bias = 0.0f, lost = 0.0f;  // the largest ||w_k||, |b_k|, ||w_k - packed w_k||
  };

  const Screen& screen_of(Mode mode) const { return mode == kWide ? *kernels_.wide : *kernels_.narrow; }
  const Packed& packed(Mode mode) const;
  void pack(Mode mode, Packed& p) const;
  void screen(Mode mode, const void* const* rows, int64_t n, int32_t* code, Scratch& scratch, Ahead ahead) const;
  int32_t compare(const float* row, int64_t candidates, Scratch& scratch) const;

  const Codewords& codewords_;
  const EncodeKernels& kernels_;
  int64_t padded_words_, block_rows_, pitch_;
  bool bfloat16_, screened_;
  std::vector<double> mean_;
  double spread_ = 0.0;  // the largest ||c_k - mean||
  mutable Packed packed_[kModes];
};

}  // namespace dre_fast
