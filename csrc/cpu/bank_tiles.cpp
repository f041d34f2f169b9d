// Tiles of per-slide permutations; the bijection is written out in dre_fast/reference/sampling.py.

#include "bank.h"

#include <algorithm>

namespace dre_fast {
namespace {

constexpr int kRounds = 6, kLeastBits = 6;
constexpr uint32_t kGolden = 0x9E3779B9u;

uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The permutation of [0, n), 2 <= n <= 2^32, keyed by (seed, cycle, slide).
class Permutation {
 public:
  Permutation(int64_t n, uint64_t seed, uint64_t cycle, uint64_t slide) : last_(static_cast<uint32_t>(n - 1)) {
    uint32_t h = kGolden;
    for (const uint64_t word : {seed, cycle, slide})
      for (const uint32_t half : {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)})
        h = mix(h + half) + kGolden;
    for (int i = 0; i < kRounds; ++i) keys_[i] = mix(h + static_cast<uint32_t>(i + 1) * kGolden);
    int bits = kLeastBits;
    while (bits < 32 && last_ >> bits) ++bits;
    low_ = bits - bits / 2;
    low_mask_ = (1u << low_) - 1;
    high_mask_ = (1u << (bits / 2)) - 1;
  }

  uint32_t operator()(uint32_t y) const {
    do {
      uint32_t high = y >> low_, low = y & low_mask_;
      for (int i = 0; i < kRounds; i += 2) {
        low ^= mix(high + keys_[i]) & low_mask_;
        high ^= mix(low + keys_[i + 1]) & high_mask_;
      }
      y = (high << low_) | low;
    } while (y > last_);
    return y;
  }

 private:
  uint32_t last_, keys_[kRounds], low_mask_, high_mask_;
  int low_;
};

// Division that rounds down, as the reference's does.
int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

}  // namespace

void bank_tiles_cpu(const BankTiles& t, int64_t* tiles) {
  torch::stable::parallel_for(0, t.bags, 1, [&](int64_t begin, int64_t end) {
    for (int64_t bag = begin; bag < end; ++bag) {
      const int64_t n = t.lengths[bag], visits = std::max<int64_t>((n + t.m - 1) / t.m, 1);
      const int64_t cycle = floor_div(t.visit[bag], visits), start = (t.visit[bag] - cycle * visits) * t.m;
      const int64_t there = t.first < n ? std::min(n - t.first, t.count) : 0;
      int64_t* to = tiles + bag * t.count;
      std::fill(to + there, to + t.count, -1);
      if (n == 1) {  // nothing to permute
        std::fill(to, to + there, 0);
        continue;
      }
      const Permutation permuted(
          std::max<int64_t>(n, 2), static_cast<uint64_t>(t.seed), static_cast<uint64_t>(cycle),
          static_cast<uint64_t>(t.slides[bag]));
      for (int64_t i = 0; i < there; ++i) {
        const int64_t position = start + t.first + i;  // both parts were below n
        to[i] = permuted(static_cast<uint32_t>(position >= n ? position - n : position));
      }
    }
  });
}

}  // namespace dre_fast
