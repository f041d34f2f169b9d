// Definition of the encode kernels for the instruction set of the including file, which defines ENCODE_KERNELS (the
// table's name) and ENCODE_KERNELS_NAME.
//
// What decides a code or enters a sum adds up in a fixed order of float64 lanes without fused multiply-adds, so codes
// and sums have the same bits on every level. Scores for screening may differ: their rounding is bounded.

#include "encode_kernels.h"
#include "encode_vec.h"

namespace dre_fast {
namespace {

static_assert(kScreenRows % kTileRows == 0, "the padding of rows must hold whole tiles");

// ---- screening in fp32 --------------------------------------------------------------------------------------------
// Codewords are packed in panels of two registers, value by value: panel[j][2 kWidth]. A register that is left over
// makes a panel of its own.
constexpr int64_t kPanel = 2 * kWidth;
inline int64_t panel_width(int64_t k, int64_t words) { return words - k < kPanel ? kWidth : kPanel; }

void pack_wide(const float* w, int64_t words, int64_t ld, void* packed, float* lost) {
  float* out = static_cast<float*>(packed);
  for (int64_t k = 0; k < words; k += kPanel)
    for (int64_t j = 0; j < ld; ++j)
      for (int64_t i = 0; i < panel_width(k, words); ++i) *out++ = w[(k + i) * ld + j];
  for (int64_t k = 0; k < words; ++k) lost[k] = 0.0f;
}

void prepare_wide(const float* x, int64_t ld, float factor, const float* shift, void* y, float* norm, float* lost) {
  float* out = static_cast<float*>(y);
  const Vec f = all(factor);
  Vec square = {};
  for (int64_t j = 0; j < ld; j += kWidth) {
    const Vec v = load(x + j) * f - load(shift + j);
    store(out + j, v);
    square = fma(v, v, square);
  }
  *norm = __builtin_sqrtf(sum_of(square));
  *lost = 0.0f;
}

struct WideStep {
  typedef float Value;
  static constexpr int64_t kValues = 1;  // of a row in a step
  static inline Vec run(const Value* y, Vec w, Vec sum) { return fma(all(*y), w, sum); }
};

template <class Step, int kRegisters>
inline void tile(
    const typename Step::Value* y, int64_t pitch, int64_t ld, const float* panel, const float* minus_b, int64_t words,
    float* out, Lines& ahead) {
  Vec sum[kTileRows][kRegisters];
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kRegisters; ++v) sum[r][v] = load(minus_b + v * kWidth);
  for (int64_t j = 0; j < ld; j += Step::kValues) {
    ahead.fetch();
    Vec w[kRegisters];
    for (int v = 0; v < kRegisters; ++v) w[v] = load(panel + v * kWidth);
    panel += kRegisters * kWidth;
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kRegisters; ++v) sum[r][v] = Step::run(y + r * pitch + j, w[v], sum[r][v]);
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kRegisters; ++v) store(out + r * words + v * kWidth, sum[r][v]);
}

template <class Step>
void scores_as(
    const void* y, int64_t rows, int64_t pitch, int64_t ld, const void* packed, const float* minus_b, int64_t words,
    float* out, const char* ahead, const char* ahead_end) {
  const auto* value = static_cast<const typename Step::Value*>(y);
  const float* panel = static_cast<const float*>(packed);
  Lines lines{ahead, ahead_end};
  for (int64_t k = 0; k < words; k += kPanel, panel += kPanel * (ld / Step::kValues))
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const auto run = panel_width(k, words) == kPanel ? tile<Step, 2> : tile<Step, 1>;
      run(value + i * pitch, pitch, ld, panel, minus_b + k, words, out + i * words + k, lines);
    }
}

const Screen wide_screen = {sizeof(float), kWidth, pack_wide, prepare_wide, scores_as<WideStep>};

// ---- screening in bfloat16 ----------------------------------------------------------------------------------------
#if defined(__AVX512BF16__)
// Codewords are packed pair by pair of values: panel[j / 2][2 kWidth][2].
inline __m256i narrow(Vec v) { return (__m256i)_mm512_cvtneps_pbh(v); }
inline Vec from_bfloat16s(__m256i v) {
  typedef uint16_t Narrow __attribute__((vector_size(32)));
  typedef uint32_t Word __attribute__((vector_size(64)));
  return (Vec)(__builtin_convertvector((Narrow)v, Word) << 16);
}

void pack_narrow(const float* w, int64_t words, int64_t ld, void* packed, float* lost) {
  uint16_t* out = static_cast<uint16_t*>(packed);
  for (int64_t k = 0; k < words; ++k) {
    Vec square = {};
    const int64_t width = panel_width(k / kPanel * kPanel, words);
    uint16_t* panel = out + k / kPanel * kPanel * ld + k % kPanel * 2;
    for (int64_t j = 0; j < ld; j += kWidth) {
      const Vec v = load(w + k * ld + j);
      const __m256i n = narrow(v);
      const Vec off = v - from_bfloat16s(n);
      square = fma(off, off, square);
      uint16_t value[kWidth];
      __builtin_memcpy(value, &n, sizeof(n));
      for (int i = 0; i < kWidth; i += 2) __builtin_memcpy(panel + (j + i) * width, value + i, 4);
    }
    lost[k] = __builtin_sqrtf(sum_of(square));
  }
}

void prepare_narrow(const float* x, int64_t ld, float factor, const float* shift, void* y, float* norm, float* lost) {
  uint16_t* out = static_cast<uint16_t*>(y);
  const Vec f = all(factor);
  Vec square = {}, off_square = {};
  for (int64_t j = 0; j < ld; j += kWidth) {
    const Vec v = load(x + j) * f - load(shift + j);
    const __m256i n = narrow(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j), n);
    const Vec off = v - from_bfloat16s(n);
    square = fma(v, v, square);
    off_square = fma(off, off, off_square);
  }
  *norm = __builtin_sqrtf(sum_of(square));
  *lost = __builtin_sqrtf(sum_of(off_square));
}

struct NarrowStep {
  typedef uint16_t Value;
  static constexpr int64_t kValues = 2;
  static inline Vec run(const Value* y, Vec w, Vec sum) {
    int32_t pair;
    __builtin_memcpy(&pair, y, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)w);
  }
};

const Screen narrow_screen = {sizeof(uint16_t), kWidth, pack_narrow, prepare_narrow, scores_as<NarrowStep>};
constexpr const Screen* kNarrow = &narrow_screen;

float norm_bfloat16(const void* x, int64_t ld) {
  const auto* value = static_cast<const uint16_t*>(x);
  Vec square = {};
  int64_t j = 0;
  for (; j + 2 * kWidth <= ld; j += 2 * kWidth) {
    const Vec v = load(reinterpret_cast<const float*>(value + j));
    square = _mm512_dpbf16_ps(square, (__m512bh)v, (__m512bh)v);
  }
  for (; j < ld; j += kWidth) {
    __m256i n;
    __builtin_memcpy(&n, value + j, sizeof(n));
    const Vec v = from_bfloat16s(n);
    square = fma(v, v, square);
  }
  return __builtin_sqrtf(sum_of(square));
}
constexpr auto kNormBFloat16 = norm_bfloat16;
#else
constexpr const Screen* kNarrow = nullptr;
constexpr float (*kNormBFloat16)(const void*, int64_t) = nullptr;
#endif

void choose(const float* scores, int64_t rows, int64_t words, const float* slack, float* best, int32_t* code) {
  for (int64_t i = 0; i < rows; ++i, scores += words) {
    Vec top = load(scores);
    for (int64_t k = kWidth; k < words; k += kWidth) top = larger(load(scores + k), top);
    best[i] = largest_of(top);
    const float least = best[i] - slack[i];
    int32_t close = 0, last = 0;
    for (int64_t k = 0; k < words; ++k) {
      const int32_t within = scores[k] >= least;
      close += within;
      last += within * static_cast<int32_t>(k);  // the codeword itself, if it is the only one
    }
    code[i] = close == 1 ? last : -1;
  }
}

// ---- distances and sums -------------------------------------------------------------------------------------------
float distance(const float* x, const float* c, int64_t ld) {
  Vec sum[kLanes / kWidth] = {};
  for (int64_t j = 0; j < ld; j += kLanes)
    for (int p = 0; p < kLanes / kWidth; ++p) {
      const Vec d = load(x + j + p * kWidth) - load(c + j + p * kWidth);
      sum[p] = fma(d, d, sum[p]);
    }
  for (int p = 1; p < kLanes / kWidth; ++p) sum[0] = sum[0] + sum[p];
  return sum_of(sum[0]);
}

inline double tree_sum(const double* lane) {
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

double exact_distance(const float* __restrict x, const float* __restrict c, int64_t ld) {
  double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t j = 0; j < ld; j += 8)
    for (int i = 0; i < 8; ++i) {
      const double d = static_cast<double>(x[j + i]) - static_cast<double>(c[j + i]);
      lane[i] += d * d;
    }
  return tree_sum(lane);
}

inline double dot(const float* __restrict a, const float* __restrict b, int64_t ld) {
  double lane[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t j = 0; j < ld; j += 8)
    for (int i = 0; i < 8; ++i) lane[i] += static_cast<double>(a[j + i]) * static_cast<double>(b[j + i]);
  return tree_sum(lane);
}

template <Format F>
inline float value_of(typename Value<F>::type q) {
  return Value<F>::decode(q);
}

template <>
inline float value_of<Format::kFloat16>(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, a = h & 0x7fffu;
  return a >= 0x7c00u ? from_bits(sign | 0x7f800000u | (a & 0x3ffu) << 13) : from_half(h);
}

template <>
inline float value_of<Format::kE4M3>(uint8_t q) {
  return (q & 0x7fu) == 0x7fu ? from_bits(0x7fc00000u) : from_e4m3(q);
}

template <Format F>
void decode_as(const void* __restrict x, float scale, int64_t dim, float* __restrict z) {
  const auto* v = static_cast<const typename Value<F>::type*>(x);
  for (int64_t j = 0; j < dim; ++j) z[j] = value_of<F>(v[j]) * scale;
  for (int64_t j = dim; j < padded(dim); ++j) z[j] = 0.0f;
}

void decode(Format format, const void* x, float scale, int64_t dim, float* z) {
  switch (format) {
    case Format::kFloat32: return decode_as<Format::kFloat32>(x, scale, dim, z);
    case Format::kFloat16: return decode_as<Format::kFloat16>(x, scale, dim, z);
    case Format::kBFloat16: return decode_as<Format::kBFloat16>(x, scale, dim, z);
    case Format::kInt8: return decode_as<Format::kInt8>(x, scale, dim, z);
    case Format::kE4M3: return decode_as<Format::kE4M3>(x, scale, dim, z);
  }
}

void unit(float* x, int64_t ld) {
  const double norm = __builtin_sqrt(dot(x, x, ld)), inverse = 1.0 / (norm > kNormEps ? norm : kNormEps);
  for (int64_t j = 0; j < ld; ++j) x[j] = static_cast<float>(static_cast<double>(x[j]) * inverse);
}

// Values of a row that fill a register as float64.
struct Float32Row {
  static inline Half load(const void* x, int64_t j) { return load_half(static_cast<const float*>(x) + j); }
};

#if defined(__AVX512BF16__)
struct BFloat16Row {
  static inline Half load(const void* x, int64_t j) {
    __m128i v;
    __builtin_memcpy(&v, static_cast<const uint16_t*>(x) + j, sizeof(v));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
};
#endif

// Columns [j, j + kParts kHalf): the sums stay in registers while the rows go by.
template <class Row, int kParts>
inline void add_columns(double* sum, const void* const* x, int64_t n, const float* c, int64_t j) {
  Wide total[kParts];
  Half centre[kParts];
  for (int p = 0; p < kParts; ++p) {
    total[p] = load_wide(sum + j + p * kHalf);
    centre[p] = load_half(c + j + p * kHalf);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int p = 0; p < kParts; ++p) total[p] = total[p] + widen(Row::load(x[i], j + p * kHalf) - centre[p]);
  for (int p = 0; p < kParts; ++p) store_wide(sum + j + p * kHalf, total[p]);
}

template <class Row>
void add(double* sum, const void* const* x, int64_t n, const float* c, int64_t ld) {
  int64_t j = 0;
  for (; j + kAtOnce * kHalf <= ld; j += kAtOnce * kHalf) add_columns<Row, kAtOnce>(sum, x, n, c, j);
  for (; j < ld; j += kLanes) add_columns<Row, kLanes / kHalf>(sum, x, n, c, j);
}

#if defined(__AVX512BF16__)
constexpr auto kAddBFloat16 = add<BFloat16Row>;
#else
constexpr void (*kAddBFloat16)(double*, const void* const*, int64_t, const float*, int64_t) = nullptr;
#endif

void unit_backward(const float* __restrict g, const float* __restrict x, int64_t ld, float* __restrict out) {
  const double norm = __builtin_sqrt(dot(x, x, ld)), inverse = norm <= kNormEps ? 0.0 : 1.0 / norm;
  const double along = dot(g, x, ld) * inverse * inverse;
  for (int64_t j = 0; j < ld; ++j)
    out[j] = static_cast<float>((static_cast<double>(g[j]) - along * static_cast<double>(x[j])) * inverse);
}

}  // namespace

extern const EncodeKernels ENCODE_KERNELS;
const EncodeKernels ENCODE_KERNELS = {
    ENCODE_KERNELS_NAME, &wide_screen, kNarrow, kNormBFloat16, choose, distance, exact_distance, decode, unit,
    add<Float32Row>, kAddBFloat16, unit_backward};

}  // namespace dre_fast
