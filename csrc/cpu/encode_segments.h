// Bags summed over segments of rows, which do not depend on the number of threads: the sums of a bag that lies in
// several segments are added up in their order, so results have the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "encode_rows.h"

namespace dre_fast {

// Sums has clear().
template <class Sums>
class Segments {
 public:
  // A segment has at least about `least` rows, and its sums take `bytes`.
  Segments(const Tensor& offsets, int64_t least, int64_t bytes)
      : cu(static_cast<const int64_t*>(offsets.const_data_ptr())),
        bags(offsets.size(0) - 1),
        total(cu[bags]),
        rows(rows_of_segment(total, least, bytes)),
        parts_((total + rows - 1) / rows) {}

  int64_t count() const { return static_cast<int64_t>(parts_.size()); }
  int64_t begin(int64_t s) const { return s * rows; }
  int64_t end(int64_t s) const { return std::min((s + 1) * rows, total); }
  int64_t first_bag(int64_t s) const { return std::upper_bound(cu, cu + bags + 1, begin(s)) - cu - 1; }

  // The rows of a bag in segment s are through: to.write(bag, k, &sums, 1) for its `words` codewords where that is the
  // whole bag, else the sums are kept. Leaves sums empty, made by to.make() if need be.
  template <class To>
  void finish(int64_t bag, int64_t s, std::unique_ptr<Sums>& sums, int64_t words, To& to) {
    if (cu[bag] == cu[bag + 1]) return;
    const bool head = cu[bag] < begin(s), tail = cu[bag + 1] > end(s);
    if (!head && !tail) {
      const Sums* one = sums.get();
      for (int64_t k = 0; k < words; ++k) to.write(bag, k, &one, 1);
      sums->clear();
      return;
    }
    (head ? parts_[s].head : parts_[s].tail) = std::move(sums);
    (head ? parts_[s].head_bag : parts_[s].tail_bag) = bag;
    sums = to.make();
  }

  // to.write(bag, k, sums, n) for the bags that lie in several segments, with what was kept of each.
  template <class To>
  void add_parts(int64_t words, To& to) const {
    struct Spanning {
      int64_t bag;
      std::vector<const Sums*> sums;
    };
    std::vector<Spanning> spanning;
    const auto take = [&](int64_t bag, const std::unique_ptr<Sums>& sums) {
      if (!sums) return;
      if (spanning.empty() || spanning.back().bag != bag) spanning.push_back({bag, {}});
      spanning.back().sums.push_back(sums.get());
    };
    for (const Parts& p : parts_) {
      take(p.head_bag, p.head);
      take(p.tail_bag, p.tail);
    }
    const int64_t cells = static_cast<int64_t>(spanning.size()) * words;
    torch::stable::parallel_for(0, cells, 8, [&](int64_t begin, int64_t end) {
      for (int64_t cell = begin; cell < end; ++cell) {
        const Spanning& bag = spanning[cell / words];
        to.write(bag.bag, cell % words, bag.sums.data(), static_cast<int64_t>(bag.sums.size()));
      }
    });
  }

  // clear(bag) for the bags without rows.
  template <class Clear>
  void for_each_empty(Clear clear) const {
    torch::stable::parallel_for(0, bags, 256, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        if (cu[b] == cu[b + 1]) clear(b);
    });
  }

  const int64_t* const cu;
  const int64_t bags, total, rows;

 private:
  // Sums of a bag that began before its segment, and of one that goes on after it.
  struct Parts {
    std::unique_ptr<Sums> head, tail;
    int64_t head_bag = -1, tail_bag = -1;
  };

  std::vector<Parts> parts_;
};

}  // namespace dre_fast
