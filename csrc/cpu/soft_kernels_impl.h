// Definition of the soft kernels for the instruction set of the including file, which defines SOFT_KERNELS (the
// table's name).

#include "encode_vec.h"
#include "soft_kernels.h"

namespace dre_fast {
namespace {

// ---- products -----------------------------------------------------------------------------------------------------
// kRows x kRegisters registers of products, while p goes by.
template <bool kRowMajor, int kRows, int kRegisters>
void tile(Left a, int64_t inner, const float* b, int64_t b_row, const float* start, float* c, int64_t c_row, Lines& ahead) {
  Vec sum[kRows][kRegisters];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kRegisters; ++v) sum[r][v] = Vec{};
  for (int64_t p = 0; p < inner; ++p) {
    ahead.fetch();
    Vec w[kRegisters];
    for (int v = 0; v < kRegisters; ++v) w[v] = load(b + v * kWidth);
    b += b_row;
    for (int r = 0; r < kRows; ++r) {
      const Vec x = all(kRowMajor ? a.at[r * a.row + p] : a.at[r]);
      for (int v = 0; v < kRegisters; ++v) sum[r][v] = fma(x, w[v], sum[r][v]);
    }
    if (!kRowMajor) a.at += a.step;
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kRegisters; ++v) {
      float* to = c + r * c_row + v * kWidth;
      store(to, load(start ? start + v * kWidth : to) + sum[r][v]);
    }
}

typedef void (*Tile)(Left, int64_t, const float*, int64_t, const float*, float*, int64_t, Lines&);

// The tile of a number of rows, at most kTileRows.
template <bool kRowMajor, int kRegisters, int kRows = kTileRows>
inline Tile tile_of(int64_t rows) {
  if constexpr (kRows > 1)
    if (rows < kRows) return tile_of<kRowMajor, kRegisters, kRows - 1>(rows);
  return tile<kRowMajor, kRows, kRegisters>;
}

template <bool kRowMajor>
void product_as(
    Left a, int64_t rows, int64_t inner, Right b, int64_t columns, const float* start, float* c, int64_t c_row,
    int64_t chain, Lines ahead) {
  constexpr int64_t kColumns = 2 * kWidth;
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t j = 0; j < columns; j += kColumns) {
    const bool both = columns - j >= kColumns;
    const float* panel = b.at + j / kPanel * b.panel + j % kPanel;
    for (int64_t p = 0; p < inner; p += chain) {
      const int64_t taken = inner - p < chain ? inner - p : chain;
      const float* from = p > 0 || !start ? nullptr : start + j;
      // rows are shared out evenly: a tile of few rows would load as much as a whole one
      for (int64_t t = 0, i = 0; t < tiles; ++t) {
        const int64_t height = (rows - i + tiles - t - 1) / (tiles - t);
        const Tile run = both ? tile_of<kRowMajor, 2>(height) : tile_of<kRowMajor, 1>(height);
        run({a.at + i * a.row + p * a.step, a.row, a.step}, taken, panel + p * b.row, b.row, from, c + i * c_row + j,
            c_row, ahead);
        i += height;
      }
    }
  }
}

void product(
    Left a, int64_t rows, int64_t inner, Right b, int64_t columns, const float* start, float* c, int64_t c_row,
    int64_t chain, const char* ahead, const char* ahead_end) {
  const auto run = a.step == 1 ? product_as<true> : product_as<false>;
  run(a, rows, inner, b, columns, start, c, c_row, chain, {ahead, ahead_end});
}

// ---- softmax ------------------------------------------------------------------------------------------------------
// e^x for x <= 0 as 2^n e^r, |r| <= ln 2 / 2, with the Taylor polynomial of degree 7 (relative error below 2^-27);
// zero where e^x is below the least normal number. NaN stays.
inline Vec exp_of(Vec x) {
  typedef int32_t Word __attribute__((vector_size(sizeof(Vec))));
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: the low bits of a float near it count units
  const Vec shifted = fma(x, all(1.44269504f), all(kRounder));
  const Vec n = shifted - all(kRounder);
  // ln 2 in two parts, the first of few bits, so that n times it is exact
  const Vec r = fma(n, all(-1.42860682e-6f), fma(n, all(-0.693145752f), x));
  Vec p = all(1.0f / 5040);
  p = fma(p, r, all(1.0f / 720));
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1.0f));
  p = fma(p, r, all(1.0f));
  const Vec power = (Vec)(((Word)shifted << 23) + (127 << 23));
  return x < all(-87.3f) ? Vec{} : p * power;
}

void softmax(float* z, int64_t rows, int64_t words, const float* squares, const float* minus_scale, float* a) {
  for (int64_t i = 0; i < rows; ++i, z += words, a += words) {
    Vec top = all(-__builtin_inff());
    for (int64_t k = 0; k < words; k += kWidth) {
      Vec logit = load(z + k);
      if (squares) {
        logit = logit + all(squares[i]);
        store(z + k, logit);
        logit = logit * load(minus_scale + k);
      }
      store(a + k, logit);
      top = larger(logit, top);
    }
    const Vec largest = all(largest_of(top));
    Vec sum = {};
    for (int64_t k = 0; k < words; k += kWidth) {
      const Vec e = exp_of(load(a + k) - largest);
      store(a + k, e);
      sum = sum + e;
    }
    const Vec total = all(sum_of(sum));
    for (int64_t k = 0; k < words; k += kWidth) store(a + k, load(a + k) / total);
  }
}

void softmax_backward(const float* a, int64_t rows, int64_t words, float* d) {
  for (int64_t i = 0; i < rows; ++i, a += words, d += words) {
    Vec along = {};
    for (int64_t k = 0; k < words; k += kWidth) along = fma(load(a + k), load(d + k), along);
    const Vec mean = all(sum_of(along));
    for (int64_t k = 0; k < words; k += kWidth) store(d + k, load(a + k) * (load(d + k) - mean));
  }
}

// Few rows are added up in fp32.
constexpr int64_t kFewRows = 32;

inline void add_wide(double* sum, Vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int h = 0; h < kWidth; h += kHalf) store_wide(sum + h, load_wide(sum + h) + widen(load_half(lane + h)));
}

void add_columns(const float* a, int64_t rows, int64_t words, double* sum) {
  for (int64_t first = 0; first < rows; first += kFewRows) {
    const int64_t past = first + kFewRows < rows ? first + kFewRows : rows;
    for (int64_t k = 0; k < words; k += kWidth) {
      Vec total = {};
      for (int64_t i = first; i < past; ++i) total = total + load(a + i * words + k);
      add_wide(sum + k, total);
    }
  }
}

void scale_backward(
    float* d, int64_t rows, int64_t words, const float* z, const float* minus_scale, double* d_minus_scale,
    float* row_sum) {
  for (int64_t first = 0; first < rows; first += kFewRows) {
    const int64_t past = first + kFewRows < rows ? first + kFewRows : rows;
    for (int64_t k = 0; k < words; k += kWidth) {
      Vec total = {};
      for (int64_t i = first; i < past; ++i) total = fma(load(d + i * words + k), load(z + i * words + k), total);
      add_wide(d_minus_scale + k, total);
    }
  }
  for (int64_t i = 0; i < rows; ++i, d += words) {
    Vec sum = {};
    for (int64_t k = 0; k < words; k += kWidth) {
      const Vec g = load(d + k) * load(minus_scale + k);
      store(d + k, g);
      sum = sum + g;
    }
    row_sum[i] = sum_of(sum);
  }
}

// ---- rows ---------------------------------------------------------------------------------------------------------
float square(const float* x, int64_t ld) {
  Vec sum = {};
  for (int64_t j = 0; j < ld; j += kWidth) {
    const Vec v = load(x + j);
    sum = fma(v, v, sum);
  }
  return sum_of(sum);
}

void add(float factor, const float* x, int64_t ld, float* out) {
  for (int64_t j = 0; j < ld; j += kWidth) store(out + j, fma(all(factor), load(x + j), load(out + j)));
}

}  // namespace

extern const SoftKernels SOFT_KERNELS;
const SoftKernels SOFT_KERNELS = {product, square, add, softmax, softmax_backward, scale_backward, add_columns};

}  // namespace dre_fast
