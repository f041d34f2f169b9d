// The arithmetic of soft encoding on the CPU, compiled once for each x86 level and chosen when the library loads.
//
// All matrices are fp32. Columns come in multiples of kLanes (row_kernels.h), so that there are no remainders. Results
// do not depend on the number of threads; levels differ by round-off.
#pragma once

#include "row_kernels.h"

namespace dre_fast {

// The left factor of a product: value (i, p) lies at[i * row + p * step], and row or step is one.
struct Left {
  const float* at;
  int64_t row, step;
};

// The right factor: value (p, j) lies at[p * row + j / kPanel * panel + j % kPanel].
constexpr int64_t kPanel = 2 * kLanes;
struct Right {
  const float* at;
  int64_t row, panel;
};

// A matrix in rows of `ld` values as a right factor.
inline Right rows_of(const float* at, int64_t ld) { return {at, ld, kPanel}; }

// Short chains keep the digits of a long sum; a panel of the right factor stays in the first-level cache under long
// ones, which are faster by a quarter.
constexpr int64_t kShort = 32, kLong = 192;

struct SoftKernels {
  // c [rows, columns], rows c_row apart: start [columns] + a b, or c + a b where start is null; `inner` products, at
  // least one, make a value, and `chain` of them are added up before they join what is there. The lines of memory
  // from `ahead` to `ahead_end` are fetched into cache meanwhile.
  void (*product)(
      Left a, int64_t rows, int64_t inner, Right b, int64_t columns, const float* start, float* c, int64_t c_row,
      int64_t chain, const char* ahead, const char* ahead_end);

  // ||x||^2, x [ld].
  float (*square)(const float* x, int64_t ld);

  // out += factor x, [ld].
  void (*add)(float factor, const float* x, int64_t ld, float* out);

  // a [rows, words] = softmax over words of z, or of minus_scale[k] z_ik after z_ik += squares[i] where there are
  // squares. A z of -infinity (infinity with squares) has weight zero.
  void (*softmax)(float* z, int64_t rows, int64_t words, const float* squares, const float* minus_scale, float* a);

  // d [rows, words], the gradient of a -> that of the logits.
  void (*softmax_backward)(const float* a, int64_t rows, int64_t words, float* d);

  // d [rows, words], the gradient of the logits minus_scale[k] z_ik -> that of z. Adds that of minus_scale [words],
  // and puts the sums of rows of the result into row_sum [rows].
  void (*scale_backward)(
      float* d, int64_t rows, int64_t words, const float* z, const float* minus_scale, double* d_minus_scale,
      float* row_sum);

  // sum[k] += sum_i a_ik, a [rows, words].
  void (*add_columns)(const float* a, int64_t rows, int64_t words, double* sum);
};

extern const SoftKernels soft_kernels_default;
#if defined(__x86_64__)
extern const SoftKernels soft_kernels_avx2;
extern const SoftKernels soft_kernels_avx512;
#endif

}  // namespace dre_fast
