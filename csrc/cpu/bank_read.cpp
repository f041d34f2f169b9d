// Reads of the bank on the CPU: stored rows, and what the running sums hold of a slide's other rows.
// The specification is dre_fast/reference/bank.py: read, rest.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bank.h"

namespace dre_fast {
namespace {

constexpr int64_t kWords = 16;  // codewords of a task: a slide's sums are large enough to be shared out
constexpr int64_t kRows = 64;   // rows of a task
constexpr int64_t kAhead = 8;   // rows lie anywhere in the bank: they are asked for this many before their turn

// Inlined: GCC takes a function that only prefetches for one without effect, and drops its calls.
[[gnu::always_inline]] inline void prefetch(const BankRows& b, int64_t row) {
  const char* p = b.row(row);
  for (int64_t at = 0; at < b.dim * element_bytes(b.format); at += 64) __builtin_prefetch(p + at);
  if (b.scale) __builtin_prefetch(b.scale + row);
}

// malloc maps results of this size anew for each call. Touching them 4 KB at a time then takes longer than the read, so
// pages of 2 MB are asked for; where the system has none to give, nothing changes.
constexpr int64_t kMappedAnew = 32 << 20;
constexpr uintptr_t kLargePage = 2 << 20;

void ask_for_large_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  if (bytes < kMappedAnew) return;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kLargePage * kLargePage;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kLargePage - 1) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The rows of a bag that are live and stored, and their codes; -1 where there is none.
struct Live {
  std::vector<int64_t> row;
  std::vector<int16_t> code;
};

Live live_rows(const BankRest& r, int64_t bag) {
  const int64_t slide = r.bag_slide[bag];
  STD_TORCH_CHECK(
      slide >= 0 && slide < r.slides, "bank_rest: slide ", slide, " does not exist, the bank has ", r.slides);
  Live live{std::vector<int64_t>(r.live, -1), std::vector<int16_t>(r.live, -1)};
  for (int64_t i = 0; i < r.live; ++i) {
    const int64_t tile = r.tiles[bag * r.live + i];
    if (tile < 0) continue;
    const int64_t row = r.start[slide] + tile;
    STD_TORCH_CHECK(
        row >= 0 && row < r.rows_total, "bank_rest: tile ", tile, " of slide ", slide, " is row ", row,
        ", outside the bank's ", r.rows_total);
    const int16_t code = r.code[row];
    STD_TORCH_CHECK(
        code < r.codewords, "bank_rest: row ", row, " has code ", code, ", there are ", r.codewords, " codewords");
    live.row[i] = row;
    live.code[i] = code;
  }
  return live;
}

template <typename Out>
void rest(
    const BankRest& r, Out* V, int64_t* counts,
    void (*residual)(const int64_t*, const float*, double, int64_t, Out*)) {
  const RowKernels& kernels = row_kernels_here();
  std::vector<Live> live;
  for (int64_t bag = 0; bag < r.bags; ++bag) live.push_back(live_rows(r, bag));
  const int64_t parts = (r.codewords + kWords - 1) / kWords;
  torch::stable::parallel_for(0, r.bags * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> z(padded(r.dim));
    std::vector<int64_t> sums(kWords * r.dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bag = task / parts, first = task % parts * kWords;
      const int64_t words = std::min(kWords, r.codewords - first);
      const int64_t cell = r.bag_slide[bag] * r.codewords + first;
      const Live& rows = live[bag];
      for (int64_t i = 0; i < r.live; ++i)
        if (rows.code[i] >= first && rows.code[i] < first + words) prefetch(r, rows.row[i]);
      int64_t left[kWords];
      bool changed[kWords] = {};
      std::copy_n(r.counts + cell, words, left);
      for (int64_t i = 0; i < r.live; ++i) {
        const int64_t k = rows.code[i] - first, row = rows.row[i];
        if (rows.code[i] < 0 || k < 0 || k >= words) continue;
        int64_t* own = sums.data() + k * r.dim;
        if (!changed[k]) std::memcpy(own, r.sums + (cell + k) * r.dim, r.dim * sizeof(int64_t));
        changed[k] = true;
        kernels.decode(r.format, r.row(row), r.scale ? r.scale[row] : 0.0f, r.dim, z.data());
        kernels.add_fixed(own, z.data(), r.dim, -1);
        --left[k];
      }
      for (int64_t k = 0; k < words; ++k) {
        const int64_t* from = changed[k] ? sums.data() + k * r.dim : r.sums + (cell + k) * r.dim;
        const int64_t to = bag * r.codewords + first + k;
        residual(from, r.codebook + (first + k) * r.dim, static_cast<double>(left[k]), r.dim, V + to * r.dim);
        counts[to] = left[k];
      }
    }
  });
}

}  // namespace

void bank_rest_cpu(const BankRest& r, double* V, int64_t* counts) { rest(r, V, counts, row_kernels_here().residual); }

void bank_rest_cpu(const BankRest& r, float* V, int64_t* counts) {
  rest(r, V, counts, row_kernels_here().residual_float);
}

void bank_read_cpu(const BankRead& r, float* out) {
  const RowKernels& kernels = row_kernels_here();
  for (int64_t i = 0; i < r.rows; ++i)
    STD_TORCH_CHECK(
        r.index[i] < r.rows_total, "bank_read: row ", r.index[i], " is outside the bank's ", r.rows_total);
  ask_for_large_pages(out, r.rows * r.dim * static_cast<int64_t>(sizeof(float)));
  torch::stable::parallel_for(0, (r.rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> z(padded(r.dim));
    const int64_t last = std::min(r.rows, end * kRows);
    for (int64_t i = begin * kRows; i < last; ++i) {
      if (i + kAhead < last && r.index[i + kAhead] >= 0) prefetch(r, r.index[i + kAhead]);
      const int64_t row = r.index[i];
      float* to = out + i * r.dim;
      if (row < 0) {
        std::memset(to, 0, r.dim * sizeof(float));
        continue;
      }
      const float scale = r.scale ? r.scale[row] : 0.0f;
      const bool whole = r.dim % kLanes == 0;  // no padding is written behind the row
      kernels.decode(r.format, r.row(row), scale, r.dim, whole ? to : z.data());
      if (!whole) std::memcpy(to, z.data(), r.dim * sizeof(float));
    }
  });
}

}  // namespace dre_fast
