// The arithmetic of one bank row on the CPU, compiled once for each x86 level and chosen when the library loads.
//
// No standard library or torch header is included here or in the files that define the kernels: an inline function
// compiled there with AVX-512 could otherwise be the copy that the linker keeps for everybody.
#pragma once

#include "../row_format.h"

namespace dre_fast {

// Scratch and the copy of the codebook are padded, so that the kernels have no remainders: rows to whole lanes of
// zeros, groups of rows and the codebook to whole tiles.
constexpr int64_t kLanes = 16, kGroup = 16, kRowMultiple = 4, kWordMultiple = 4;
static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
static inline int64_t padded(int64_t dim) { return round_up(dim, kLanes); }

struct RowKernels {
  const char* name;

  // x [dim] -> q: x / max(||x||, 1e-12) in the row format, its scale, and z [padded(dim)], the row q stands for.
  void (*encode)(Format format, const float* x, int64_t dim, void* q, float* scale, float* z);

  // q [dim] and scale -> z [padded(dim)].
  void (*decode)(Format format, const void* q, float scale, int64_t dim, float* z);

  // code[i] = argmax_k <z_i, c_k> - half_norm[k], ties to the lowest k, for at most kGroup rows: z and code are
  // readable and writable up to a multiple of kRowMultiple rows, c [codewords, ld] holds a multiple of
  // kWordMultiple codewords. The result of a row does not depend on the rows beside it.
  void (*assign)(
      const float* z, int64_t rows, int64_t ld, const float* c, const float* half_norm, int64_t codewords,
      int32_t* code);

  // ||c||^2 / 2 in the arithmetic of `assign`, c [ld].
  float (*half_square)(const float* c, int64_t ld);

  // 1 - cos(a, b) in float64, [ld]; 1 where one is zero, 0 where both are.
  float (*drift)(const float* a, const float* b, int64_t ld);

  // s[j] += sign * round(z[j] 2^24), half to even, j < dim; sign is 1 or -1.
  void (*add_fixed)(int64_t* s, const float* z, int64_t dim, int64_t sign);

  // s[j] += round(new[j] 2^24) - round(old[j] 2^24).
  void (*swap_fixed)(int64_t* s, const float* old_z, const float* new_z, int64_t dim);

  // V[j] = s[j] 2^-24 - n c[j] in float64, as it is or rounded once, j < dim.
  void (*residual)(const int64_t* s, const float* c, double n, int64_t dim, double* V);
  void (*residual_float)(const int64_t* s, const float* c, double n, int64_t dim, float* V);
};

extern const RowKernels row_kernels_default;
#if defined(__x86_64__)
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_avx512;
#endif

}  // namespace dre_fast
