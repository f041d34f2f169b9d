// Hard encoding on the CPU: rows are read once, a block at a time; while a block is in cache its codes are found and
// its residuals added to float64 sums. The specification is dre_fast/reference/hard.py.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "encode.h"
#include "encode_assign.h"
#include "encode_segments.h"

namespace dre_fast {
namespace {

constexpr int64_t kLeastRows = 512;  // the sums of a segment cost about as much as a hundred rows

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
        segments_(offsets, kLeastRows, codewords.words * codewords.ld * static_cast<int64_t>(sizeof(double))),
        known_(known),
        nearest_(codewords, known ? 0 : segments_.total, source.bfloat16()) {}

  void run(float* residuals, int64_t* counts, int64_t* codes, float* distances) {
    residuals_ = residuals, counts_ = counts, codes_ = codes, distances_ = distances;
    const int64_t total = segments_.total, words = codewords_.words, cells = words * codewords_.dim;
    std::fill(codes + total, codes + source_.rows(), -1);
    if (distances) std::fill(distances + total, distances + source_.rows(), 0.0f);
    segments_.for_each_empty([&](int64_t bag) {
      std::memset(residuals + bag * cells, 0, cells * sizeof(float));
      std::memset(counts + bag * words, 0, words * sizeof(int64_t));
    });
    torch::stable::parallel_for(0, segments_.count(), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t s = begin; s < end; ++s) segment(s, scratch);
    });
    STD_TORCH_CHECK(!bad_code_, "hard_encode: row_codes must be below the ", codewords_.words, " codewords");
    segments_.add_parts(words, *this);
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

  std::unique_ptr<Sums> make() const { return std::make_unique<Sums>(codewords_); }

 private:
  struct Scratch {
    explicit Scratch(const HardEncode& e)
        : block(std::min(e.nearest_.block_rows(), e.segments_.rows)),
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
    const int64_t begin = segments_.begin(s), end = segments_.end(s), *cu = segments_.cu;
    const auto finish = [&](int64_t b) {
      segments_.finish(b, s, t.sums, codewords_.words, *this);
    };
    int64_t bag = segments_.first_bag(s);
    for (int64_t first = begin; first < end; first += t.block) {
      const int64_t past = std::min(first + t.block, end);
      const int64_t taken = read(first, past, t);
      if (!known_)
        nearest_.assign(
            t.rows.data(), taken, t.code.data(), t.nearest, following(past, std::min(past + t.block, end)));
      for (int64_t n = 0; n < taken;) {
        for (; t.at[n] >= cu[bag + 1]; ++bag) finish(bag);
        const int64_t from = n;
        while (n < taken && t.at[n] < cu[bag + 1]) ++n;
        add_rows(from, n, t);
      }
    }
    for (; bag < segments_.bags && cu[bag] < end; ++bag) finish(bag);
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

  const RowSource& source_;
  const Codewords& codewords_;
  const EncodeKernels& kernels_;
  Segments<Sums> segments_;
  const int16_t* known_;
  const Nearest nearest_;
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
