// Definition of the row kernels for the instruction set of the including file, which defines ROW_KERNELS (the table's
// name) and ROW_KERNELS_NAME.
//
// Sums run over 16 fixed lanes (8 in float64) that are added up in a fixed tree, whatever the register width, and
// fused multiply-adds are written out. So AVX2 and AVX-512 give the same bits; without fused multiply-adds only the
// fp32 scores of `assign` and the float64 sums can differ, by round-off.

#include "row_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dre_fast {
namespace {

// ---- 16 lanes of fp32 in the registers there are --------------------------------------------------------------
typedef float Quad __attribute__((vector_size(16)));

#if defined(__AVX512F__)
constexpr int kWordTile = 4;
typedef __m512 Vec;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__)
constexpr int kWordTile = 2;
typedef __m256 Vec;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
#else
constexpr int kWordTile = 2;
typedef Quad Vec;
inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
#if defined(__FP_FAST_FMAF)
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
#endif
constexpr int kRowTile = 4;
constexpr int kWidth = sizeof(Vec) / sizeof(float);
constexpr int kParts = static_cast<int>(kLanes) / kWidth;
static_assert(kWordMultiple % kWordTile == 0 && kRowMultiple % kRowTile == 0, "tiles must divide the padding");

// Lanes i, i+4, i+8, i+12 of 16, added up as (i + (i+8)) + ((i+4) + (i+12)).
inline Quad fold(const Vec (&v)[kParts]) {
  Quad q[4];
  __builtin_memcpy(q, v, sizeof(q));
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// Element r is the sum of the four lanes of v[r], as (0 + 2) + (1 + 3).
inline Quad sum_each(const Quad (&v)[4]) {
  Quad t[4];
#if defined(__x86_64__)
  __m128 a = v[0], b = v[1], c = v[2], d = v[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  t[0] = a, t[1] = b, t[2] = c, t[3] = d;
#else
  for (int i = 0; i < 4; ++i) t[i] = Quad{v[0][i], v[1][i], v[2][i], v[3][i]};
#endif
  return (t[0] + t[2]) + (t[1] + t[3]);
}

#if defined(__FMA__) || defined(__FP_FAST_FMA)
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
inline double fma(double a, double b, double c) { return a * b + c; }
#endif

inline double tree_sum(const double* lane) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

template <Format F>
void decode_as(const void* __restrict q, float scale, int64_t dim, float* __restrict z) {
  const auto* v = static_cast<const typename Value<F>::type*>(q);
  for (int64_t j = 0; j < dim; ++j) z[j] = has_scale(F) ? Value<F>::decode(v[j]) * scale : Value<F>::decode(v[j]);
  for (int64_t j = dim; j < padded(dim); ++j) z[j] = 0.0f;
}

double norm(const float* x, int64_t dim) {
  double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t j = 0;
  for (; j + 8 <= dim; j += 8)
    for (int i = 0; i < 8; ++i) lane[i] = fma(double(x[j + i]), double(x[j + i]), lane[i]);
  for (int i = 0; j + i < dim; ++i) lane[i] = fma(double(x[j + i]), double(x[j + i]), lane[i]);
  return __builtin_sqrt(tree_sum(lane));
}

// max |f| by comparing bit patterns, which order like the values.
float largest(const float* f, int64_t dim) {
  int32_t top = 0;
  for (int64_t j = 0; j < dim; ++j) {
    const int32_t a = static_cast<int32_t>(bits(f[j]) & 0x7fffffffu);
    top = a > top ? a : top;
  }
  return from_bits(static_cast<uint32_t>(top));
}

template <Format F>
void encode_as(const float* __restrict f, float divisor, int64_t dim, void* __restrict q) {
  auto* v = static_cast<typename Value<F>::type*>(q);
  for (int64_t j = 0; j < dim; ++j) v[j] = Value<F>::encode(has_scale(F) ? f[j] / divisor : f[j]);
}

void decode(Format format, const void* q, float scale, int64_t dim, float* z) {
  switch (format) {
    case Format::kFloat32: return decode_as<Format::kFloat32>(q, scale, dim, z);
    case Format::kFloat16: return decode_as<Format::kFloat16>(q, scale, dim, z);
    case Format::kBFloat16: return decode_as<Format::kBFloat16>(q, scale, dim, z);
    case Format::kInt8: return decode_as<Format::kInt8>(q, scale, dim, z);
    case Format::kE4M3: return decode_as<Format::kE4M3>(q, scale, dim, z);
  }
}

void encode_values(Format format, const float* f, float divisor, int64_t dim, void* q) {
  switch (format) {
    case Format::kFloat32: return encode_as<Format::kFloat32>(f, divisor, dim, q);
    case Format::kFloat16: return encode_as<Format::kFloat16>(f, divisor, dim, q);
    case Format::kBFloat16: return encode_as<Format::kBFloat16>(f, divisor, dim, q);
    case Format::kInt8: return encode_as<Format::kInt8>(f, divisor, dim, q);
    case Format::kE4M3: return encode_as<Format::kE4M3>(f, divisor, dim, q);
  }
}

void encode(Format format, const float* __restrict x, int64_t dim, void* q, float* scale, float* __restrict z) {
  const double length = norm(x, dim);
  const double inverse = 1.0 / (length > kNormEps ? length : kNormEps);
  for (int64_t j = 0; j < dim; ++j) z[j] = static_cast<float>(x[j] * inverse);
  *scale = has_scale(format) ? largest(z, dim) / format_limit(format) : 0.0f;
  if (has_scale(format) && *scale == 0.0f)
    __builtin_memset(q, 0, dim * element_bytes(format));  // zeros of either sign are stored as 0
  else
    encode_values(format, z, *scale, dim, q);
  decode(format, q, *scale, dim, z);
}

// ---- assignment ---------------------------------------------------------------------------------------------------
// Dot products of four rows with kWordTile codewords: out[w] holds those of codeword w.
inline void dots(const float* z, int64_t ld, const float* c, Quad (&out)[kWordTile]) {
  Vec sum[kRowTile][kWordTile][kParts];
  for (int p = 0; p < kParts; ++p) {
    Vec part[kRowTile][kWordTile] = {};
    for (int64_t j = p * kWidth; j < ld; j += kLanes) {
      Vec a[kRowTile];
      for (int r = 0; r < kRowTile; ++r) a[r] = load(z + r * ld + j);
      for (int w = 0; w < kWordTile; ++w) {
        const Vec b = load(c + w * ld + j);
        for (int r = 0; r < kRowTile; ++r) part[r][w] = fma(a[r], b, part[r][w]);
      }
    }
    for (int r = 0; r < kRowTile; ++r)
      for (int w = 0; w < kWordTile; ++w) sum[r][w][p] = part[r][w];
  }
  for (int w = 0; w < kWordTile; ++w) {
    const Quad quarter[4] = {fold(sum[0][w]), fold(sum[1][w]), fold(sum[2][w]), fold(sum[3][w])};
    out[w] = sum_each(quarter);
  }
}

void assign(
    const float* z, int64_t rows, int64_t ld, const float* c, const float* half_norm, int64_t codewords,
    int32_t* code) {
  typedef int32_t Mask __attribute__((vector_size(16)));
  Quad best[kGroup / kRowTile];
  Mask word[kGroup / kRowTile];
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile;
  for (int64_t t = 0; t < tiles; ++t) {
    best[t] = Quad{} - __builtin_inff();
    word[t] = Mask{};
  }
  for (int64_t k = 0; k < codewords; k += kWordTile)
    for (int64_t t = 0; t < tiles; ++t) {
      Quad dot[kWordTile];
      dots(z + t * kRowTile * ld, ld, c + k * ld, dot);
      for (int w = 0; w < kWordTile; ++w) {
        const Quad score = dot[w] - half_norm[k + w];
        const Mask better = score > best[t];  // strictly: ties keep the lowest codeword
        best[t] = better ? score : best[t];
        word[t] = better ? Mask{} + static_cast<int32_t>(k + w) : word[t];
      }
    }
  __builtin_memcpy(code, word, tiles * sizeof(Mask));
}

float half_square(const float* c, int64_t ld) {
  Vec sum[kParts] = {};
  for (int64_t j = 0; j < ld; j += kLanes)
    for (int p = 0; p < kParts; ++p) {
      const Vec v = load(c + j + p * kWidth);
      sum[p] = fma(v, v, sum[p]);
    }
  const Quad q = fold(sum);
  return 0.5f * ((q[0] + q[2]) + (q[1] + q[3]));
}

// ---- drift and running sums ---------------------------------------------------------------------------------------
float drift(const float* a, const float* b, int64_t ld) {
  double aa[8] = {}, bb[8] = {}, ab[8] = {};
  for (int64_t j = 0; j < ld; j += 8)
    for (int i = 0; i < 8; ++i) {
      const double x = a[j + i], y = b[j + i];
      aa[i] = fma(x, x, aa[i]);
      bb[i] = fma(y, y, bb[i]);
      ab[i] = fma(x, y, ab[i]);
    }
  const double na = tree_sum(aa), nb = tree_sum(bb);
  if (na == 0.0 && nb == 0.0) return 0.0f;
  const double power = na * nb;
  const double d = 1.0 - tree_sum(ab) / __builtin_sqrt(power > 0.0 ? power : 1.0);
  return static_cast<float>(d < 0.0 ? 0.0 : (d > 2.0 ? 2.0 : d));
}

void add_fixed(int64_t* __restrict s, const float* __restrict z, int64_t dim, int64_t sign) {
  if (sign > 0)
    for (int64_t j = 0; j < dim; ++j) s[j] += to_fixed(z[j]);
  else
    for (int64_t j = 0; j < dim; ++j) s[j] -= to_fixed(z[j]);
}

void swap_fixed(int64_t* __restrict s, const float* __restrict old_z, const float* __restrict new_z, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) s[j] += to_fixed(new_z[j]) - to_fixed(old_z[j]);
}

template <typename Out>
void residual(const int64_t* __restrict s, const float* __restrict c, double n, int64_t dim, Out* __restrict V) {
  for (int64_t j = 0; j < dim; ++j)
    V[j] = static_cast<Out>(static_cast<double>(s[j]) * 5.9604644775390625e-8 - n * static_cast<double>(c[j]));
}

}  // namespace

extern const RowKernels ROW_KERNELS;
const RowKernels ROW_KERNELS = {
    ROW_KERNELS_NAME, encode,    decode,     assign,           half_square,
    drift,            add_fixed, swap_fixed, residual<double>, residual<float>};

}  // namespace dre_fast
