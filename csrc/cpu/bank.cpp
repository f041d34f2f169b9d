// Bank write on the CPU: normalise, quantise, assign, scatter, and update the running sums by the difference.
// The specification is dre_fast/reference/bank.py:write.

#include "bank.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "row_kernels.h"

namespace dre_fast {
namespace {

// Locks over cells (slide, codeword) of the running sums. Integer addition commutes, so the order in which threads
// get a lock does not show in the result.
class CellLocks {
 public:
  class Guard {
   public:
    explicit Guard(std::atomic<bool>& flag) : flag_(flag) {
      while (flag_.exchange(true, std::memory_order_acquire)) sched_yield();
    }
    ~Guard() { flag_.store(false, std::memory_order_release); }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    std::atomic<bool>& flag_;
  };

  Guard lock(int64_t cell) {
    const uint64_t mixed = static_cast<uint64_t>(cell) * 0x9e3779b97f4a7c15ull;
    return Guard(flags_[mixed >> 54].held);
  }

 private:
  struct alignas(64) Flag {
    std::atomic<bool> held{false};
  };
  std::vector<Flag> flags_ = std::vector<Flag>(1024);
};

// The entries to be written: of several that name one row, the last; skipped ones are left out.
struct Chosen {
  std::vector<int64_t> entry, row;
};

Chosen choose_entries(const BankWrite& w) {
  uint64_t slots = 16;
  while (slots < 2 * static_cast<uint64_t>(w.rows)) slots *= 2;
  int shift = 64;
  for (uint64_t s = slots; s > 1; s /= 2) --shift;
  std::vector<int64_t> taken(slots, -1);
  Chosen out;
  out.entry.reserve(w.rows);
  out.row.reserve(w.rows);
  for (int64_t i = w.rows - 1; i >= 0; --i) {
    const int64_t slide = w.rows_slide[i], tile = w.rows_tile[i];
    if (slide < 0 || tile < 0) continue;
    STD_TORCH_CHECK(slide < w.slides, "bank_write: slide ", slide, " does not exist, the bank has ", w.slides);
    const int64_t row = w.start[slide] + tile;
    STD_TORCH_CHECK(
        row >= 0 && row < w.rows_total, "bank_write: tile ", tile, " of slide ", slide, " is row ", row,
        ", outside the bank's ", w.rows_total);
    uint64_t slot = (static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15ull) >> shift;
    while (taken[slot] >= 0 && taken[slot] != row) slot = (slot + 1) & (slots - 1);
    if (taken[slot] == row) continue;
    taken[slot] = row;
    out.entry.push_back(i);
    out.row.push_back(row);
  }
  return out;
}

// The codebook in rows of whole lanes, and ||c_k||^2 / 2. Codewords of the padding can never be the nearest.
struct PaddedCodebook {
  int64_t codewords;
  std::vector<float> values, half_norm;

  PaddedCodebook(const BankWrite& w, const RowKernels& kernels)
      : codewords(round_up(w.codewords, kWordMultiple)),
        values(codewords * padded(w.dim), 0.0f),
        half_norm(codewords, std::numeric_limits<float>::infinity()) {
    const int64_t ld = padded(w.dim);
    for (int64_t k = 0; k < w.codewords; ++k) {
      std::memcpy(&values[k * ld], w.codebook + k * w.dim, w.dim * sizeof(float));
      half_norm[k] = kernels.half_square(&values[k * ld], ld);
    }
  }
};

class Writer {
 public:
  explicit Writer(const BankWrite& w)
      : w_(w), kernels_(row_kernels_here()), chosen_(choose_entries(w)), codebook_(w, kernels_) {}

  void run() {
    const int64_t n = static_cast<int64_t>(chosen_.entry.size());
    const int64_t groups = (n + kGroup - 1) / kGroup;
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(w_);
      for (int64_t g = begin; g < end; ++g) write_group(g * kGroup, std::min(n, (g + 1) * kGroup), scratch);
    });
  }

 private:
  struct Scratch {
    explicit Scratch(const BankWrite& w)
        : q(kGroup * w.dim * element_bytes(w.format)), z(kGroup * padded(w.dim)), old(padded(w.dim)) {}
    std::vector<char> q;
    std::vector<float> z, old;
    float scale[kGroup];
    int32_t code[kGroup];
  };

  void write_group(int64_t begin, int64_t end, Scratch& s) {
    const int64_t ld = padded(w_.dim), bytes = w_.dim * element_bytes(w_.format), rows = end - begin;
    for (int64_t i = 0; i < rows; ++i) {
      const float* x = w_.features + chosen_.entry[begin + i] * w_.dim;
      kernels_.encode(w_.format, x, w_.dim, s.q.data() + i * bytes, &s.scale[i], s.z.data() + i * ld);
      s.code[i] = -1;
    }
    if (w_.codewords > 0)
      kernels_.assign(
          s.z.data(), rows, ld, codebook_.values.data(), codebook_.half_norm.data(), codebook_.codewords, s.code);
    for (int64_t i = 0; i < rows; ++i) write_row(begin + i, i, s);
  }

  void write_row(int64_t position, int64_t i, Scratch& s) {
    const int64_t row = chosen_.row[position], slide = w_.rows_slide[chosen_.entry[position]];
    const int64_t ld = padded(w_.dim), bytes = w_.dim * element_bytes(w_.format);
    char* stored = w_.row(row);
    const float* z = s.z.data() + i * ld;
    const bool written = w_.age[row] >= 0;
    if (written || w_.code[row] >= 0)
      kernels_.decode(w_.format, stored, w_.scale ? w_.scale[row] : 0.0f, w_.dim, s.old.data());
    w_.drift[row] = written ? kernels_.drift(s.old.data(), z, ld) : 0.0f;
    if (w_.codewords > 0) update_sums(slide, w_.code[row], s.code[i], s.old.data(), z);
    std::memcpy(stored, s.q.data() + i * bytes, bytes);
    if (w_.scale) w_.scale[row] = s.scale[i];
    w_.code[row] = static_cast<int16_t>(s.code[i]);
    w_.age[row] = w_.step;
  }

  void update_sums(int64_t slide, int64_t before, int64_t after, const float* old_z, const float* new_z) {
    const int64_t to = slide * w_.codewords + after, from = slide * w_.codewords + before;
    if (before == after) {
      const auto guard = locks_.lock(to);
      kernels_.swap_fixed(w_.sums + to * w_.dim, old_z, new_z, w_.dim);
      return;
    }
    if (before >= 0) {
      const auto guard = locks_.lock(from);
      kernels_.add_fixed(w_.sums + from * w_.dim, old_z, w_.dim, -1);
      --w_.counts[from];
    }
    const auto guard = locks_.lock(to);
    kernels_.add_fixed(w_.sums + to * w_.dim, new_z, w_.dim, 1);
    ++w_.counts[to];
  }

  const BankWrite& w_;
  const RowKernels& kernels_;
  const Chosen chosen_;
  const PaddedCodebook codebook_;
  CellLocks locks_;
};

}  // namespace

void bank_write_cpu(const BankWrite& w) {
  if (w.rows > 0) Writer(w).run();
}

}  // namespace dre_fast
