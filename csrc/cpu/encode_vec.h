// Registers of fp32 lanes for the encode kernels, hard and soft, in the instruction set of the including file.
//
// No standard library or torch header here: see row_kernels.h.
#pragma once

#include "../row_format.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dre_fast {
namespace {

// A tile of kTileRows rows times two registers of codewords fills the accumulators that there are. Half holds as many
// floats as fill a register as doubles; kAtOnce of those are added up at once.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
typedef __m512 Vec;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

constexpr int kAtOnce = 8;
typedef __m256 Half;
typedef __m512d Wide;
inline Half load_half(const float* p) { return _mm256_loadu_ps(p); }
inline Wide widen(Half v) { return _mm512_maskz_cvtps_pd(0xff, v); }
inline Wide load_wide(const double* p) { return _mm512_loadu_pd(p); }
inline void store_wide(double* p, Wide v) { _mm512_storeu_pd(p, v); }
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
typedef __m256 Vec;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

constexpr int kAtOnce = 4;
typedef __m128 Half;
typedef __m256d Wide;
inline Half load_half(const float* p) { return _mm_loadu_ps(p); }
inline Wide widen(Half v) { return _mm256_cvtps_pd(v); }
inline Wide load_wide(const double* p) { return _mm256_loadu_pd(p); }
inline void store_wide(double* p, Wide v) { _mm256_storeu_pd(p, v); }
#else
constexpr int kTileRows = 4;
typedef float Vec __attribute__((vector_size(16)));
inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline Vec all(float x) { return Vec{x, x, x, x}; }
#if defined(__FP_FAST_FMAF)
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

constexpr int kAtOnce = 4;
typedef float Half __attribute__((vector_size(8)));
typedef double Wide __attribute__((vector_size(16)));
inline Half load_half(const float* p) { return Half{p[0], p[1]}; }
inline Wide widen(Half v) { return Wide{static_cast<double>(v[0]), static_cast<double>(v[1])}; }
inline Wide load_wide(const double* p) { return Wide{p[0], p[1]}; }
inline void store_wide(double* p, Wide v) { p[0] = v[0], p[1] = v[1]; }
#endif
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
constexpr int kWidth = sizeof(Vec) / sizeof(float), kHalf = kWidth / 2;

inline float sum_of(Vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

inline float largest_of(Vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// Fetches one line of memory a step, so that reading rows hides behind arithmetic.
struct Lines {
  const char *next, *end;
  inline void fetch() {
    if (next < end) __builtin_prefetch(next, 0, 2);
    next += 64;
  }
};

}  // namespace
}  // namespace dre_fast
