// The arithmetic of hard encoding on the CPU, compiled once for each x86 level and chosen when the library loads.
//
// Rows and codewords are fp32 in rows of `ld` floats, a multiple of kLanes (row_kernels.h), zeros past the dimension.
#pragma once

#include "row_kernels.h"

namespace dre_fast {

// Approximate scores <y_i, w_k> - b_k of prepared rows y_i and codewords w_k, for screening: the operands may be
// rounded to a narrower format, and what that loses is measured.
struct Screen {
  int64_t element;  // bytes of one value of a prepared row
  int64_t panel;    // the codewords are padded to a multiple of this

  // Packs w [words, ld], words a multiple of `panel`, into as many elements. lost[k] = ||w_k - packed w_k||.
  void (*pack)(const float* w, int64_t words, int64_t ld, void* packed, float* lost);

  // y = factor x - shift [ld], its norm, and the norm of what the element type loses of it.
  void (*prepare)(
      const float* x, int64_t ld, float factor, const float* shift, void* y, float* norm, float* lost);

  // out[i * words + k] for `rows` prepared rows `pitch` elements apart. Rows are read, and out is written, up to a
  // multiple of kScreenRows. The lines of memory from `ahead` to `ahead_end` are fetched into cache meanwhile.
  void (*scores)(
      const void* y, int64_t rows, int64_t pitch, int64_t ld, const void* packed, const float* minus_b, int64_t words,
      float* out, const char* ahead, const char* ahead_end);
};

constexpr int64_t kScreenRows = 12;

struct EncodeKernels {
  const char* name;
  const Screen* wide;    // fp32
  const Screen* narrow;  // bfloat16, null where the processor has no products of it

  // ||x|| of a bfloat16 row [ld], which needs no preparation for the narrow screen; null as that is.
  float (*norm_bfloat16)(const void* x, int64_t ld);

  // code[i] = k where score k alone lies within slack[i] of row i's largest, -1 where others do too. words is a
  // multiple of kLanes.
  void (*choose)(const float* scores, int64_t rows, int64_t words, const float* slack, float* best, int32_t* code);

  // ||x - c||^2 from differences, in fp32 and in float64; the float64 one has the same bits on every level.
  float (*distance)(const float* x, const float* c, int64_t ld);
  double (*exact_distance)(const float* x, const float* c, int64_t ld);

  // x [dim] in a row format, times scale -> z [padded(dim)]. Unlike that of the row kernels, this keeps what is not
  // finite: rows of a bank always are.
  void (*decode)(Format format, const void* x, float scale, int64_t dim, float* z);

  // x / max(||x||, 1e-12), in place; the same bits on every level.
  void (*unit)(float* x, int64_t ld);

  // sum += x_i - c for n rows one after the other, the differences in fp32. The second takes bfloat16 rows
  // and is null as norm_bfloat16 is.
  void (*add)(double* sum, const void* const* x, int64_t n, const float* c, int64_t ld);
  void (*add_bfloat16)(double* sum, const void* const* x, int64_t n, const float* c, int64_t ld);

  // out[j] = g[j] / n - u[j] <g, u> / n with u = x / n, n = ||x||, in float64; zeros where n <= 1e-12.
  void (*unit_backward)(const float* g, const float* x, int64_t ld, float* out);
};

extern const EncodeKernels encode_kernels_default;
#if defined(__x86_64__)
extern const EncodeKernels encode_kernels_avx2;
extern const EncodeKernels encode_kernels_avx512;
extern const EncodeKernels encode_kernels_avx512bf16;
#endif

}  // namespace dre_fast
