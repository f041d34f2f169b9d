#include "encode_assign.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace dre_fast {
namespace {

constexpr int64_t kBlockBytes = 384 << 10;  // rows, prepared rows and scores of a block stay in a core's cache
constexpr int64_t kMaxBlock = 384;
constexpr int64_t kFewRows = 6;
constexpr int64_t kPitchPad = 32;           // values; keeps rows of 2^n bytes apart in the cache
constexpr int64_t kWideBlocks = 16;         // blocks screened in fp32 after one that bfloat16 left too much of
constexpr float kUnit = 0x1p-24f;           // rounding of fp32, relative
constexpr float kTinyNorm = 0x1p-54f;       // more than underflow takes from the norm of 2^17 values
constexpr float kLargeScore = 0x1p120f;     // below it no sum overflows
constexpr float kSlackOfBounds = 1.001f;    // bounds are formed in fp32 themselves
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

Codewords::Codewords(const Tensor& codebook)
    : words(codebook.size(0)), dim(codebook.size(1)), ld(padded(dim)), values(words * ld, 0.0f) {
  const Tensor kept = dre_fast::as_float(codebook);
  for (int64_t k = 0; k < words; ++k) std::memcpy(&values[k * ld], floats(kept) + k * dim, dim * sizeof(float));
}

Nearest::Nearest(const Codewords& codewords, int64_t rows, bool bfloat16)
    : codewords_(codewords),
      kernels_(encode_kernels_here()),
      padded_words_(round_up(codewords.words, kernels_.wide->panel)),
      pitch_(codewords.ld + kPitchPad),
      bfloat16_(bfloat16),
      screened_(rows > kFewRows && codewords.words > 1) {
  const int64_t ld = codewords.ld, words = codewords.words;
  const int64_t row_bytes = ld * (bfloat16 ? 2 : 6) + padded_words_ * 4;
  block_rows_ = std::clamp(kBlockBytes / row_bytes / kScreenRows * kScreenRows, kScreenRows, kMaxBlock);
  if (!screened_) return;
  mean_.assign(ld, 0.0);
  for (int64_t k = 0; k < words; ++k)
    for (int64_t j = 0; j < ld; ++j) mean_[j] += codewords[k][j];
  for (double& m : mean_) m /= static_cast<double>(words);
  for (int64_t k = 0; k < words && screened_; ++k) {
    double square = 0.0;
    for (int64_t j = 0; j < ld; ++j) square += (codewords[k][j] - mean_[j]) * (codewords[k][j] - mean_[j]);
    screened_ = std::isfinite(square);
    spread_ = std::max(spread_, std::sqrt(square));
  }
}

// With y = s x - m and w_k = s c_k - m, argmin_k ||x - c_k|| = argmax_k <y, w_k> - ||w_k||^2 / 2 for any m and s > 0.
// m is about the mean of s c_k, because rounding errors shrink with the norms, and s the power of two that makes the
// largest ||w_k|| about one. Rows taken as they are have <x, c_k> - ||c_k||^2 / 2 = <x, w_k> - b_k + <x, m> - ||m||^2 / 2
// with b_k = (||c_k||^2 - ||m||^2) / 2.
void Nearest::pack(Mode mode, Packed& p) const {
  const int64_t ld = codewords_.ld;
  if (mode != kAsIs && spread_ > 0.0) p.factor = std::ldexp(1.0f, std::clamp(-std::ilogb(spread_), -126, 126));
  p.shift.resize(ld);
  double shift_square = 0.0;
  for (int64_t j = 0; j < ld; ++j) {
    p.shift[j] = static_cast<float>(mean_[j] * p.factor);
    shift_square += static_cast<double>(p.shift[j]) * p.shift[j];
  }
  p.minus_b.assign(padded_words_, -kInfinity);  // padding is never near
  std::vector<float> w(padded_words_ * ld, 0.0f), lost(padded_words_);
  double reach = 0.0, bias = 0.0;
  for (int64_t k = 0; k < codewords_.words; ++k) {
    const float* c = codewords_[k];
    double square = 0.0, word_square = 0.0;
    for (int64_t j = 0; j < ld; ++j) {
      const double off = static_cast<double>(c[j]) * p.factor - p.shift[j];
      square += off * off;
      word_square += static_cast<double>(c[j]) * c[j];
      w[k * ld + j] = static_cast<float>(off);
    }
    const double b = 0.5 * (mode == kAsIs ? word_square - shift_square : square);
    p.minus_b[k] = static_cast<float>(-b);
    reach = std::max(reach, square);
    bias = std::max(bias, std::fabs(b));
  }
  const Screen& screen = screen_of(mode);
  p.words.resize(padded_words_ * ld * screen.element);
  screen.pack(w.data(), padded_words_, ld, p.words.data(), lost.data());
  p.reach = static_cast<float>(std::sqrt(reach)) * kSlackOfBounds;
  p.bias = static_cast<float>(bias) * kSlackOfBounds;
  p.lost = *std::max_element(lost.begin(), lost.end()) * kSlackOfBounds + kTinyNorm;
}

const Nearest::Packed& Nearest::packed(Mode mode) const {
  std::call_once(packed_[mode].once, [&] { pack(mode, packed_[mode]); });
  return packed_[mode];
}

Nearest::Scratch::Scratch(const Nearest& owner, int64_t rows) {
  const int64_t n = round_up(std::min(rows, owner.block_rows_), kScreenRows);
  candidates.resize(owner.codewords_.words);
  distance.resize(owner.codewords_.words);
  row.resize(owner.bfloat16_ ? owner.codewords_.ld : 0);
  if (!owner.screened_) return;
  prepared.resize(n * owner.pitch_ * sizeof(float));
  scores.resize(n * owner.padded_words_);
  slack.resize(n);
  best.resize(n);
}

const float* Nearest::as_float(const void* row, Scratch& s) const {
  if (!bfloat16_) return static_cast<const float*>(row);
  kernels_.decode(Format::kBFloat16, row, 1.0f, codewords_.ld, s.row.data());
  return s.row.data();
}

void Nearest::screen(
    Mode mode, const void* const* rows, int64_t n, int32_t* code, Scratch& s, Ahead ahead) const {
  const Screen& screen = screen_of(mode);
  const Packed& p = packed(mode);
  const int64_t ld = codewords_.ld, bytes = pitch_ * screen.element;
  // sums of ld products, each rounded at most twice, of operands that centring rounded
  const float rounding = static_cast<float>(2 * ld + 16) * kUnit;
  const float of_word = p.reach + p.lost;
  // rows that lie evenly are read in place, whole tiles of them
  int64_t in_place = mode == kAsIs ? n / kScreenRows * kScreenRows : 0;
  const int64_t step = n > 1 ? static_cast<const char*>(rows[1]) - static_cast<const char*>(rows[0]) : 0;
  for (int64_t i = 0; i < n; ++i) {
    float norm, lost = 0.0f;
    if (mode == kAsIs) {
      norm = kernels_.norm_bfloat16(rows[i], ld);
      if (static_cast<const char*>(rows[i]) != static_cast<const char*>(rows[0]) + i * step) in_place = 0;
    } else {
      screen.prepare(
          as_float(rows[i], s), ld, p.factor, p.shift.data(), s.prepared.data() + i * bytes, &norm, &lost);
    }
    const float whole = norm + lost + kTinyNorm, size = whole * of_word + p.bias;
    const float bound = (lost + kTinyNorm) * of_word + whole * p.lost + rounding * size;
    // NaN where the row cannot be screened: it compares with nothing, so all codewords are compared
    s.slack[i] = size < kLargeScore ? 2.0f * kSlackOfBounds * bound : std::numeric_limits<float>::quiet_NaN();
  }
  if (mode == kAsIs)
    for (int64_t i = in_place; i < n; ++i) std::memcpy(s.prepared.data() + i * bytes, rows[i], ld * screen.element);
  for (int64_t i = n; i < round_up(n, kScreenRows); ++i) std::memset(s.prepared.data() + i * bytes, 0, bytes);
  const auto scores = [&](const void* y, int64_t first, int64_t past, int64_t pitch, Ahead fetched) {
    if (first < past)
      screen.scores(
          y, past - first, pitch, ld, p.words.data(), p.minus_b.data(), padded_words_,
          s.scores.data() + first * padded_words_, fetched.begin, fetched.end);
  };
  scores(rows[0], 0, in_place, step / screen.element, ahead);
  scores(s.prepared.data() + in_place * bytes, in_place, n, pitch_, in_place ? Ahead{} : ahead);
  kernels_.choose(s.scores.data(), n, padded_words_, s.slack.data(), s.best.data(), code);
}

void Nearest::assign(const void* const* rows, int64_t n, int32_t* code, Scratch& s, Ahead ahead) const {
  const int64_t words = codewords_.words;
  if (n == 0) return;
  if (words == 1) {
    std::fill(code, code + n, 0);
    return;
  }
  const bool narrow = kernels_.narrow && s.wide_blocks == 0;
  if (screened_)
    screen(narrow ? (bfloat16_ ? kAsIs : kNarrow) : kWide, rows, n, code, s, ahead);
  else
    std::fill(code, code + n, -1);
  int64_t compared = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (code[i] >= 0) continue;
    int64_t found = 0;
    if (screened_) {
      const float* score = s.scores.data() + i * padded_words_;
      const float least = s.best[i] - s.slack[i];
      for (int64_t k = 0; k < words; ++k) {
        s.candidates[found] = static_cast<int32_t>(k);
        found += score[k] >= least;
      }
    }
    if (found == 0)
      for (; found < words; ++found) s.candidates[found] = static_cast<int32_t>(found);
    code[i] = compare(as_float(rows[i], s), found, s);
    compared += found;
  }
  if (s.wide_blocks > 0)
    --s.wide_blocks;
  else if (compared > n * words / 8 + 2 * n)
    s.wide_blocks = kWideBlocks;
}

// The nearest of the first `candidates` of the scratch, which ascend.
int32_t Nearest::compare(const float* row, int64_t candidates, Scratch& s) const {
  const int64_t ld = codewords_.ld;
  float least = kInfinity;
  for (int64_t n = 0; n < candidates; ++n) {
    s.distance[n] = kernels_.distance(row, codewords_[s.candidates[n]], ld);
    least = std::min(least, s.distance[n]);
  }
  // A sum of squares in kLanes lanes, relative error at most (ld / kLanes + 8) units; squares may underflow.
  const float relative = static_cast<float>(4 * (ld / kLanes + 8)) * kUnit;
  const float bound = least + (least * relative + static_cast<float>(ld) * 0x1p-124f);
  int64_t close = 0;
  for (int64_t n = 0; n < candidates; ++n) {
    s.candidates[close] = s.candidates[n];
    close += !(s.distance[n] > bound);  // what is not a number stays
  }
  if (close == 1) return s.candidates[0];
  int32_t nearest = 0;
  double smallest = std::numeric_limits<double>::infinity();
  for (int64_t n = 0; n < close; ++n) {
    const double d = kernels_.exact_distance(row, codewords_[s.candidates[n]], ld);
    if (std::isnan(d)) return s.candidates[n];  // as argmin has it: a codeword with NaN is nearest to every row
    if (d < smallest) {
      smallest = d;
      nearest = s.candidates[n];
    }
  }
  return nearest;
}

}  // namespace dre_fast
