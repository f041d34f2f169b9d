// Hard encoding on the CPU: rows are read once, a block at a time; while a block is in cache its codes are found and
// its residuals added to float64 sums. The specification is dre_fast/reference/hard.py.
//
// The rows are cut into segments that do not depend on the number of threads, and the sums of a bag that lies in
// several segments are added up in their order: the same bits for any number of threads.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "encode.h"
#include "encode_assign.h"

namespace dre_fast {
namespace {

// The sums of a segment cost about as much as a hundred rows. A power of two of segments shares out evenly.
constexpr int64_t kLeastRows = 512, kFairRows = 16384, kFairSegments = 16, kMostSegments = 64;
constexpr int64_t kPartialBytes = int64_t{256} << 20;  // about how much the sums of all segments may take

// Residual sums and member counts of one bag. The sum of a codeword without members is never touched.
class Sums {
 public:
  explicit Sums(const Codewords& c) : ld_(c.ld), count_(c.words, 0), sum_(new double[c.words * c.ld]) {}

  double* open(int64_t k, int64_t more) {
    double* row = sum_.get() + k * ld_;
    if (count_[k] == 0) std::memset(row, 0, ld_ * sizeof(double));
    count_[k] += more;
    return row;
  }

  const double* sum(int64_t k) const { return sum_.get() + k * ld_; }
  int64_t count(int64_t k) const { return count_[k]; }
  void clear() { std::fill(count_.begin(), count_.end(), 0); }

 private:
  int64_t ld_;
  std::vector<int64_t> count_;
  std::unique_ptr<double[]> sum_;
};

class HardEncode {
 public:
  HardEncode(const RowSource& source, const Codewords& codewords, const Tensor& offsets, const int16_t* known)
      : source_(source),
        codewords_(codewords),
        kernels_(encode_kernels_here()),
        cu_(static_cast<const int64_t*>(offsets.const_data_ptr())),
        bags_(offsets.size(0) - 1),
        total_(cu_[bags_]),
        known_(known),
        nearest_(codewords, known ? 0 : total_, source.bfloat16()) {
    const int64_t sums = codewords.words * codewords.ld * static_cast<int64_t>(sizeof(double));
    int64_t segments = 1;
    const auto one_more = [&] {
      const int64_t rows = total_ / (2 * segments);
      return rows >= (segments < kFairSegments ? kLeastRows : kFairRows) && 2 * segments <= kMostSegments &&
          (segments < 4 || 2 * segments * sums <= kPartialBytes);
    };
    while (one_more()) segments *= 2;
    segment_rows_ = std::max<int64_t>((total_ + segments - 1) / segments, 1);
    parts_.resize((total_ + segment_rows_ - 1) / segment_rows_);
  }

  void run(float* residuals, int64_t* counts, int64_t* codes, float* distances) {
    residuals_ = residuals, counts_ = counts, codes_ = codes, distances_ = distances;
    std::fill(codes + total_, codes + source_.rows(), -1);
    if (distances) std::fill(distances + total_, distances + source_.rows(), 0.0f);
    clear_empty_bags();
    torch::stable::parallel_for(0, static_cast<int64_t>(parts_.size()), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t s = begin; s < end; ++s) segment(s, scratch);
    });
    STD_TORCH_CHECK(!bad_code_, "hard_encode: row_codes must be below the ", codewords_.words, " codewords");
    add_parts();
  }

 private:
  // Sums of a bag that began before its segment, and of one that goes on after it.
  struct Parts {
    std::unique_ptr<Sums> head, tail;
    int64_t head_bag = -1, tail_bag = -1;
  };

  struct Scratch {
    explicit Scratch(const HardEncode& e)
        : block(std::min(e.nearest_.block_rows(), e.segment_rows_)),
          buffer(e.source_.in_place() ? 0 : block * e.codewords_.ld),
          rows(block),
          code(block),
          at(block),
          next(block),
          group(block),
          first(e.codewords_.words, -1),
          nearest(e.nearest_, block),
          sums(new Sums(e.codewords_)) {}
    int64_t block;
    std::vector<float> buffer;
    std::vector<const void*> rows;
    std::vector<int32_t> code;
    std::vector<int64_t> at;
    std::vector<int32_t> next;        // in a block, the next row of the same bag and codeword
    std::vector<const void*> group;   // such rows
    std::vector<int32_t> first;       // of each codeword, -1 between calls of add_rows
    Nearest::Scratch nearest;
    std::unique_ptr<Sums> sums;
  };

  void segment(int64_t s, Scratch& t) {
    const int64_t begin = s * segment_rows_, end = std::min(begin + segment_rows_, total_);
    int64_t bag = std::upper_bound(cu_, cu_ + bags_ + 1, begin) - cu_ - 1;
    for (int64_t first = begin; first < end; first += t.block) {
      const int64_t past = std::min(first + t.block, end);
      const int64_t taken = read(first, past, t);
      if (!known_)
        nearest_.assign(
            t.rows.data(), taken, t.code.data(), t.nearest, following(past, std::min(past + t.block, end)));
      for (int64_t n = 0; n < taken;) {
        for (; t.at[n] >= cu_[bag + 1]; ++bag) finish(bag, s, begin, end, t);
        const int64_t from = n;
        while (n < taken && t.at[n] < cu_[bag + 1]) ++n;
        add_rows(from, n, t);
      }
    }
    for (; bag < bags_ && cu_[bag] < end; ++bag) finish(bag, s, begin, end, t);
  }

  // Adds rows of one bag, codeword by codeword, so that sums are read and written once for several rows.
  void add_rows(int64_t begin, int64_t end, Scratch& t) {
    for (int64_t n = end - 1; n >= begin; --n) {
      int32_t& first = t.first[t.code[n]];
      t.next[n] = first;
      first = static_cast<int32_t>(n);
    }
    const auto add = source_.bfloat16() ? kernels_.add_bfloat16 : kernels_.add;
    for (int64_t n = begin; n < end; ++n) {
      const int32_t k = t.code[n];
      codes_[t.at[n]] = k;
      if (t.first[k] != n) continue;
      int64_t members = 0;
      for (int32_t i = t.first[k]; i >= 0; i = t.next[i]) t.group[members++] = t.rows[i];
      t.first[k] = -1;
      add(t.sums->open(k, members), t.group.data(), members, codewords_[k], codewords_.ld);
    }
    if (distances_)
      for (int64_t n = begin; n < end; ++n)
        distances_[t.at[n]] = static_cast<float>(
            kernels_.exact_distance(nearest_.as_float(t.rows[n], t.nearest), codewords_[t.code[n]], codewords_.ld));
  }

  // The rows of [first, past) that are not skipped; codes of all others become -1.
  int64_t read(int64_t first, int64_t past, Scratch& t) {
    int64_t taken = 0;
    for (int64_t i = first; i < past; ++i) {
      const int64_t r = source_.at(i);
      const int32_t code = known_ && r >= 0 ? known_[r] : 0;
      if (code >= codewords_.words) bad_code_ = true;
      if (r < 0 || code < 0 || code >= codewords_.words) {
        codes_[i] = -1;
        if (distances_) distances_[i] = 0.0f;
        continue;
      }
      t.rows[taken] = source_.read(r, t.buffer.data() + taken * codewords_.ld);
      t.code[taken] = code;
      t.at[taken++] = i;
    }
    return taken;
  }

  Ahead following(int64_t first, int64_t past) const {
    if (!source_.in_order() || first >= past) return {};
    return {source_.stored(first), source_.stored(past - 1) + source_.dim() * element_bytes(source_.format())};
  }

  // The rows of the bag in this segment are through.
  void finish(int64_t bag, int64_t s, int64_t begin, int64_t end, Scratch& t) {
    if (cu_[bag] == cu_[bag + 1]) return;
    const bool head = cu_[bag] < begin, tail = cu_[bag + 1] > end;
    if (!head && !tail) {
      for (int64_t k = 0; k < codewords_.words; ++k) {
        const Sums* one = t.sums.get();
        write(bag, k, &one, 1);
      }
      t.sums->clear();
      return;
    }
    (head ? parts_[s].head : parts_[s].tail) = std::move(t.sums);
    (head ? parts_[s].head_bag : parts_[s].tail_bag) = bag;
    t.sums.reset(new Sums(codewords_));
  }

  // Row k of a bag from the sums of its segments.
  void write(int64_t bag, int64_t k, const Sums* const* sums, int64_t n) {
    const int64_t dim = codewords_.dim, cell = bag * codewords_.words + k;
    float* out = residuals_ + cell * dim;
    int64_t members = 0, touched = 0;
    const double* only = nullptr;
    for (int64_t p = 0; p < n; ++p)
      if (sums[p]->count(k) > 0) {
        members += sums[p]->count(k);
        only = sums[p]->sum(k);
        ++touched;
      }
    counts_[cell] = members;
    if (touched == 0) {
      std::memset(out, 0, dim * sizeof(float));
    } else if (touched == 1) {
      for (int64_t j = 0; j < dim; ++j) out[j] = static_cast<float>(only[j]);
    } else {
      std::vector<double> sum(dim, 0.0);
      for (int64_t p = 0; p < n; ++p)
        if (sums[p]->count(k) > 0)
          for (int64_t j = 0; j < dim; ++j) sum[j] += sums[p]->sum(k)[j];
      for (int64_t j = 0; j < dim; ++j) out[j] = static_cast<float>(sum[j]);
    }
  }

  void clear_empty_bags() {
    const int64_t words = codewords_.words, cells = words * codewords_.dim;
    torch::stable::parallel_for(0, bags_, 256, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (cu_[b] < cu_[b + 1]) continue;
        std::memset(residuals_ + b * cells, 0, cells * sizeof(float));
        std::memset(counts_ + b * words, 0, words * sizeof(int64_t));
      }
    });
  }

  void add_parts() {
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
    const int64_t words = codewords_.words, cells = static_cast<int64_t>(spanning.size()) * words;
    torch::stable::parallel_for(0, cells, 8, [&](int64_t begin, int64_t end) {
      for (int64_t cell = begin; cell < end; ++cell) {
        const Spanning& bag = spanning[cell / words];
        write(bag.bag, cell % words, bag.sums.data(), static_cast<int64_t>(bag.sums.size()));
      }
    });
  }

  const RowSource& source_;
  const Codewords& codewords_;
  const EncodeKernels& kernels_;
  const int64_t* cu_;
  const int64_t bags_, total_;
  const int16_t* known_;
  const Nearest nearest_;
  int64_t segment_rows_;
  std::vector<Parts> parts_;
  std::atomic<bool> bad_code_{false};
  float* residuals_ = nullptr;
  int64_t *counts_ = nullptr, *codes_ = nullptr;
  float* distances_ = nullptr;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> hard_encode_cpu(
    const Tensor& x, const Tensor& codebook, const Tensor& cu_seqlens, const OptionalTensor& index,
    const OptionalTensor& row_scale, const OptionalTensor& row_codes, bool unit, bool distances) {
  STD_TORCH_CHECK(
      codebook.dim() == 2 && codebook.size(0) >= 1, "hard_encode: codebook must be [K, D] with at least one codeword");
  const int64_t words = codebook.size(0), dim = codebook.size(1);
  const RowSource source("hard_encode", x, dim, index, row_scale, unit);
  const Tensor offsets = checked_offsets("hard_encode", cu_seqlens, source.rows());
  OptionalTensor known;
  if (row_codes) {
    STD_TORCH_CHECK(
        row_codes->scalar_type() == ScalarType::Short && row_codes->dim() == 1 &&
            row_codes->size(0) == source.stored_rows(),
        "hard_encode: row_codes must be int16 [", source.stored_rows(), "]");
    known = torch::stable::contiguous(*row_codes);
  }
  const int64_t bags = offsets.size(0) - 1, rows = source.rows();
  Tensor residuals = torch::stable::new_empty(x, {bags, words, dim}, ScalarType::Float);
  Tensor counts = torch::stable::new_empty(x, {bags, words}, ScalarType::Long);
  Tensor codes = torch::stable::new_empty(x, {rows}, ScalarType::Long);
  Tensor squares = torch::stable::new_empty(x, {distances ? rows : 0}, ScalarType::Float);
  const Codewords codewords(codebook);
  HardEncode(
      source, codewords, offsets, known ? static_cast<const int16_t*>(known->const_data_ptr()) : nullptr)
      .run(
          static_cast<float*>(residuals.mutable_data_ptr()), static_cast<int64_t*>(counts.mutable_data_ptr()),
          static_cast<int64_t*>(codes.mutable_data_ptr()),
          distances ? static_cast<float*>(squares.mutable_data_ptr()) : nullptr);
  return {residuals, counts, codes, squares};
}

}  // namespace dre_fast
