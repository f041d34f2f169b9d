// Row formats and fixed point, one value at a time, the same on CPU and GPU.
//
// No standard library or torch header here: see cpu/row_kernels.h.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define DRE_FAST_FN static inline __host__ __device__
#else
#define DRE_FAST_FN static inline
#endif

namespace dre_fast {

// The formats of a stored row. int8 and e4m3 carry one fp32 scale a row.
enum class Format : int { kFloat32, kFloat16, kBFloat16, kInt8, kE4M3 };

DRE_FAST_FN constexpr bool has_scale(Format f) { return f == Format::kInt8 || f == Format::kE4M3; }

DRE_FAST_FN constexpr int64_t element_bytes(Format f) { return f == Format::kFloat32 ? 4 : has_scale(f) ? 1 : 2; }

// The value that the largest component of a row maps to, where there is a scale.
DRE_FAST_FN constexpr float format_limit(Format f) { return f == Format::kInt8 ? 127.0f : 448.0f; }

constexpr double kNormEps = 1e-12;

DRE_FAST_FN uint32_t bits(float x) {
  uint32_t b;
  __builtin_memcpy(&b, &x, 4);
  return b;
}

DRE_FAST_FN float from_bits(uint32_t b) {
  float x;
  __builtin_memcpy(&x, &b, 4);
  return x;
}

// Half to even for |x| < 2^22: adding 1.5 * 2^23 leaves no bits below the unit.
DRE_FAST_FN float round_small(float x) { return (x + 12582912.0f) - 12582912.0f; }

// round(z * 2^24), half to even, for |z| < 2^26: the low bits of a double near 1.5 * 2^52 count units.
DRE_FAST_FN int64_t to_fixed(float z) {
  const double shifted = static_cast<double>(z) * 16777216.0 + 6755399441055744.0;
  int64_t b;
  __builtin_memcpy(&b, &shifted, 8);
  return b - 0x4338000000000000LL;
}

// Below, |x| lies within the format's range. Rounding is half to even: adding just under half a unit, plus one when
// the bit kept last is odd. Subnormals are counted in their unit, by adding 2^23 to their multiple of it.
DRE_FAST_FN uint16_t to_half(float x) {
  const uint32_t b = bits(x), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  const uint32_t normal = ((a + 0xfffu + ((a >> 13) & 1u)) >> 13) - (112u << 10);
  const uint32_t tiny = bits(from_bits(a) * 16777216.0f + 8388608.0f) - 0x4b000000u;  // unit 2^-24
  return static_cast<uint16_t>(sign | (a >= 0x38800000u ? normal : tiny));
}

DRE_FAST_FN float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, a = h & 0x7fffu;
  const float tiny = static_cast<float>(static_cast<int32_t>(a)) * 5.9604644775390625e-8f;  // 2^-24
  return from_bits(sign | (a >= 0x400u ? (a << 13) + (112u << 23) : bits(tiny)));
}

DRE_FAST_FN uint16_t to_bfloat16(float x) {
  const uint32_t b = bits(x);
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

DRE_FAST_FN float from_bfloat16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

// e4m3: 3 bits of mantissa, exponent bias 7, unit 2^-9 below 2^-6, largest value 448.
DRE_FAST_FN uint8_t to_e4m3(float x) {
  const uint32_t b = bits(x), sign = (b >> 24) & 0x80u, a = b & 0x7fffffffu;
  const uint32_t normal = ((a + 0x7ffffu + ((a >> 20) & 1u)) >> 20) - (120u << 3);
  const uint32_t tiny = bits(from_bits(a) * 512.0f + 8388608.0f) - 0x4b000000u;
  return static_cast<uint8_t>(sign | (a >= 0x3c800000u ? normal : tiny));
}

DRE_FAST_FN float from_e4m3(uint8_t q) {
  const uint32_t sign = (q & 0x80u) << 24, a = q & 0x7fu;
  const float tiny = static_cast<float>(static_cast<int32_t>(a)) * 0.001953125f;  // 2^-9
  return from_bits(sign | (a >= 8u ? (a << 20) + (120u << 23) : bits(tiny)));
}

DRE_FAST_FN float clamp(float x, float limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// One value in each format. `encode` takes f / scale where there is a scale (`decode` leaves the scale out).
template <Format> struct Value;

template <> struct Value<Format::kFloat32> {
  using type = float;
  DRE_FAST_FN float encode(float x) { return x; }
  DRE_FAST_FN float decode(float q) { return q; }
};

template <> struct Value<Format::kFloat16> {
  using type = uint16_t;
  DRE_FAST_FN uint16_t encode(float x) { return to_half(x); }
  DRE_FAST_FN float decode(uint16_t q) { return from_half(q); }
};

template <> struct Value<Format::kBFloat16> {
  using type = uint16_t;
  DRE_FAST_FN uint16_t encode(float x) { return to_bfloat16(x); }
  DRE_FAST_FN float decode(uint16_t q) { return from_bfloat16(q); }
};

template <> struct Value<Format::kInt8> {
  using type = int8_t;
  DRE_FAST_FN int8_t encode(float x) {
    return static_cast<int8_t>(static_cast<int32_t>(round_small(clamp(x, 127.0f))));
  }
  DRE_FAST_FN float decode(int8_t q) { return static_cast<float>(q); }
};

template <> struct Value<Format::kE4M3> {
  using type = uint8_t;
  DRE_FAST_FN uint8_t encode(float x) { return to_e4m3(clamp(x, 448.0f)); }
  DRE_FAST_FN float decode(uint8_t q) { return from_e4m3(q); }
};

}  // namespace dre_fast
