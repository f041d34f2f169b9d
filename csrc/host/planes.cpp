#include "planes.h"

namespace dre_fast {
namespace {

// The compiler turns this into byte shuffles, six times as fast as byte by byte, where the processor has them: on x86
// that takes SSSE3, which the baseline lacks.
template <int kChannels>
__attribute__((always_inline)) inline void split(
    const uint8_t* __restrict pixels, int64_t n, uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b) {
  for (int64_t i = 0; i < n; ++i) {
    r[i] = pixels[kChannels * i];
    g[i] = pixels[kChannels * i + 1];
    b[i] = pixels[kChannels * i + 2];
  }
}

__attribute__((always_inline)) inline void split_any(
    const uint8_t* pixels, int channels, int64_t n, uint8_t* planes) {
  if (channels == 3)
    split<3>(pixels, n, planes, planes + n, planes + 2 * n);
  else
    split<4>(pixels, n, planes, planes + n, planes + 2 * n);
}

#if defined(__x86_64__)
__attribute__((target("ssse3"))) void split_ssse3(const uint8_t* pixels, int channels, int64_t n, uint8_t* planes) {
  split_any(pixels, channels, n, planes);
}
#endif

}  // namespace

void split_planes(const uint8_t* pixels, int channels, int64_t n, uint8_t* planes) {
#if defined(__x86_64__)
  static const bool shuffles = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("ssse3") != 0;
  }();
  if (shuffles) return split_ssse3(pixels, channels, n, planes);
#endif
  split_any(pixels, channels, n, planes);
}

}  // namespace dre_fast
