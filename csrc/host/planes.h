// Pixels as image libraries give them, colour beside colour, laid out in planes.
#pragma once

#include <cstdint>

namespace dre_fast {

// pixels [n, channels], channels 3 or 4 -> red, green and blue, each [n], one after the other in `planes`.
void split_planes(const uint8_t* pixels, int channels, int64_t n, uint8_t* planes);

}  // namespace dre_fast
