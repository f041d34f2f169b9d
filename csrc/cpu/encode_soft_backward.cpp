// Gradients of soft encoding on the CPU, with the assignment computed again a block of rows at a time.
// The specification is dre_fast/reference/soft.py:soft_encode_backward.

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "encode.h"
#include "encode_segments.h"
#include "encode_soft.h"

namespace dre_fast {
namespace {

// What the rows of a segment contribute to the gradients of the parameters, with d z the gradient of z.
struct Sums {
  explicit Sums(const SoftAssignment& by)
      : points(by.centre.words * by.centre.ld, 0.0f), start(by.padded_words, 0.0), minus_scale(by.padded_words, 0.0) {}
  std::vector<float> points;         // sum_i (d z)_ik (x_i - m) [words, ld]
  std::vector<double> start;         // sum_i (d z)_ik [padded_words]
  std::vector<double> minus_scale;   // the gradient of -scale [padded_words]
};

class SoftBackward {
 public:
  SoftBackward(
      const RowSource& source, const RowSource& stored, const SoftAssignment& by, const Tensor& offsets,
      const float* grad, const float* grad_mass, Format format, bool unit, char* d_rows)
      : source_(source),
        stored_(stored),
        by_(by),
        cu_(static_cast<const int64_t*>(offsets.const_data_ptr())),
        bags_(offsets.size(0) - 1),
        total_(cu_[bags_]),
        segment_rows_(rows_of_segment(
            total_, kLeastSoftRows, by.centre.words * by.centre.ld * static_cast<int64_t>(sizeof(float)))),
        grad_(grad),
        grad_mass_(grad_mass),
        format_(format),
        unit_(unit),
        d_rows_(d_rows),
        in_place_(format == Format::kFloat32 && !unit && by.centre.dim == by.centre.ld),
        row_bytes_(by.centre.dim * element_bytes(format)) {}

  std::vector<std::unique_ptr<Sums>> run() {
    std::vector<std::unique_ptr<Sums>> sums((total_ + segment_rows_ - 1) / segment_rows_);
    if (d_rows_) std::memset(d_rows_ + total_ * row_bytes_, 0, (source_.rows() - total_) * row_bytes_);
    torch::stable::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t s = begin; s < end; ++s) {
        sums[s] = std::make_unique<Sums>(by_);
        segment(s, *sums[s], scratch);
      }
    });
    return sums;
  }

 private:
  struct Scratch {
    explicit Scratch(const SoftBackward& b)
        : rows(std::min(b.by_.block_rows(), b.segment_rows_)),
          block(b.by_, rows),
          grad(b.by_.points().size(), 0.0f),
          grad_transposed(b.by_.centre.words, b.by_.centre.ld),
          start(b.by_.padded_words, 0.0f),
          zeros(b.by_.centre.ld, 0.0f),
          d_z(rows * b.by_.padded_words),
          row_sum(rows),
          d_x(b.d_rows_ ? rows * b.by_.centre.ld : 0),
          row(b.unit_ ? b.by_.centre.ld : 0),
          along(b.unit_ ? b.by_.centre.ld : 0) {}
    int64_t rows;
    SoftAssignment::Block block;
    int64_t bag = -1;          // whose gradient this is:
    std::vector<float> grad;   // [words, pitch_of(ld)]
    Transposed grad_transposed;
    std::vector<float> start;  // grad_mass_k - g_k . (c_k - m)
    std::vector<float> zeros;
    std::vector<float> d_z;      // the gradient of a, then of z
    std::vector<float> row_sum;  // sum_k (d z)_ik
    std::vector<float> d_x, row, along;
  };

  void take_gradient(int64_t bag, Scratch& t) const {
    const int64_t words = by_.centre.words, dim = by_.centre.dim, pitch = t.block.pitch;
    if (t.bag == bag) return;
    t.bag = bag;
    for (int64_t k = 0; k < words; ++k) {
      const float *g = grad_ + (bag * words + k) * dim, *c = by_.centre[k];
      std::memcpy(&t.grad[k * pitch], g, dim * sizeof(float));
      t.start[k] = static_cast<float>(grad_mass_[bag * words + k] - dot(&t.grad[k * pitch], c, by_.centre.ld));
    }
    t.grad_transposed.fill(t.grad.data(), words, pitch);
  }

  void segment(int64_t s, Sums& sums, Scratch& t) const {
    const SoftKernels& kernels = soft_kernels_here();
    const int64_t begin = s * segment_rows_, end = std::min(begin + segment_rows_, total_);
    const int64_t words = by_.padded_words, ld = by_.centre.ld;
    const int64_t open = std::upper_bound(cu_, cu_ + bags_ + 1, begin) - cu_ - 1;
    for (int64_t first = begin; first < end; first += by_.block_rows()) {
      const int64_t past = std::min(first + by_.block_rows(), end);
      by_.assign(source_, first, past, end, t.block);
      if (d_rows_) clear_skipped(first, past, t.block);
      for_each_bag(cu_, open, t.block, [&](int64_t bag, int64_t from, int64_t to) {
        take_gradient(bag, t);
        float* d_z = t.d_z.data() + from * words;
        // dL/da_ik = g_k . ((x_i - m) - (c_k - m)) + grad_mass_k
        kernels.product(
            {t.block.row(from), t.block.pitch, 1}, to - from, ld, t.grad_transposed.get(), words, t.start.data(), d_z, words,
            kLong, nullptr, nullptr);
        kernels.softmax_backward(t.block.a.data() + from * words, to - from, words, d_z);
        if (by_.by_distance())
          kernels.scale_backward(
              d_z, to - from, words, t.block.z.data() + from * words, by_.minus_scale(), sums.minus_scale.data(),
              t.row_sum.data() + from);
        if (d_rows_) rows_gradient(from, to, t);
      });
      if (t.block.taken == 0) continue;
      kernels.product(
          {t.d_z.data(), 1, words}, by_.centre.words, t.block.taken, rows_of(t.block.row(0), t.block.pitch), ld, nullptr,
          sums.points.data(), ld, kLong, nullptr, nullptr);
      kernels.add_columns(t.d_z.data(), t.block.taken, words, sums.start.data());
    }
  }

  // d x_i = sum_k a_ik g_k + (d z)_ik points_k, and 2 (x_i - m) sum_k (d z)_ik where z is a distance.
  void rows_gradient(int64_t from, int64_t to, Scratch& t) const {
    const SoftKernels& kernels = soft_kernels_here();
    const int64_t words = by_.padded_words, inner = by_.centre.words, ld = by_.centre.ld;
    const SoftAssignment::Block& block = t.block;
    // rows that lie together are written where they belong
    const bool in_place = in_place_ && block.at[to - 1] - block.at[from] == to - 1 - from;
    float* d_x = in_place ? reinterpret_cast<float*>(d_rows_ + block.at[from] * row_bytes_) : t.d_x.data();
    const float *a = block.a.data() + from * words, *d_z = t.d_z.data() + from * words;
    kernels.product(
        {a, words, 1}, to - from, inner, rows_of(t.grad.data(), block.pitch), ld, t.zeros.data(), d_x, ld, kLong, nullptr, nullptr);
    kernels.product(
        {d_z, words, 1}, to - from, inner, rows_of(by_.points().data(), block.pitch), ld, nullptr, d_x, ld, kLong, nullptr, nullptr);
    for (int64_t n = from; n < to; ++n, d_x += ld) {
      if (by_.by_distance()) kernels.add(2 * t.row_sum[n], block.x.data() + n * block.pitch, ld, d_x);
      if (in_place) continue;
      const float* result = d_x;
      if (unit_) {
        const float* x = stored_.decoded(stored_.at(block.at[n]), t.row.data());
        encode_kernels_here().unit_backward(d_x, x, ld, t.along.data());
        result = t.along.data();
      }
      store_row(format_, result, by_.centre.dim, d_rows_ + block.at[n] * row_bytes_);
    }
  }

  void clear_skipped(int64_t first, int64_t past, const SoftAssignment::Block& block) const {
    if (block.taken == past - first) return;
    for (int64_t i = first, n = 0; i < past; ++i) {
      if (n < block.taken && block.at[n] == i)
        ++n;
      else
        std::memset(d_rows_ + i * row_bytes_, 0, row_bytes_);
    }
  }

  const RowSource& source_;
  const RowSource& stored_;  // the same rows, not normalised
  const SoftAssignment& by_;
  const int64_t* cu_;
  const int64_t bags_, total_, segment_rows_;
  const float *grad_, *grad_mass_;
  const Format format_;  // of the gradient of rows
  const bool unit_;
  char* const d_rows_;  // null where it is not wanted
  const bool in_place_;
  const int64_t row_bytes_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_encode_backward_cpu(
    const Tensor& grad, const Tensor& grad_mass, const Tensor& x, const Tensor& codebook, const Tensor& cu_seqlens,
    const Tensor& mass, const OptionalTensor& scale, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& index, const OptionalTensor& row_scale, bool unit, bool rows) {
  const char* op = "soft_encode_backward";
  STD_TORCH_CHECK(
      codebook.dim() == 2 && codebook.size(0) >= 1, op, ": codebook must be [K, D] with at least one codeword");
  const SoftAssignment by(op, codebook, scale, weight, bias);
  const int64_t words = by.centre.words, dim = by.centre.dim, ld = by.centre.ld;
  const RowSource source(op, x, dim, index, row_scale, unit), stored(op, x, dim, index, row_scale, false);
  const Tensor offsets = checked_offsets(op, cu_seqlens, source.rows());
  const int64_t bags = offsets.size(0) - 1;
  STD_TORCH_CHECK(
      grad.dim() == 3 && grad.size(0) == bags && grad.size(1) == words && grad.size(2) == dim, op, ": grad must be [",
      bags, ", ", words, ", ", dim, "]");
  for (const Tensor* t : {&grad_mass, &mass})
    STD_TORCH_CHECK(
        t->dim() == 2 && t->size(0) == bags && t->size(1) == words, op, ": grad_mass and mass must be [", bags, ", ",
        words, "]");
  STD_TORCH_CHECK(!rows || row_scale || !has_scale(source.format()), op, ": 8-bit rows need row_scale");

  const Tensor g = as_float(grad), g_mass = as_float(grad_mass), m = as_float(mass);
  const Format format = row_scale ? Format::kFloat32 : source.format();
  const auto make = [&](bool wanted, int64_t n) {
    return torch::stable::new_empty(x, {wanted ? n : 0}, ScalarType::Float);
  };
  const auto row_type = row_scale ? ScalarType::Float : x.scalar_type();
  Tensor d_rows = rows ? torch::stable::new_empty(x, {source.rows(), dim}, row_type)
                       : torch::stable::new_empty(x, {0}, row_type);
  Tensor d_codebook = torch::stable::new_empty(x, {words, dim}, ScalarType::Float);
  Tensor d_weight = weight ? torch::stable::new_empty(x, {words, dim}, ScalarType::Float) : make(false, 0);
  Tensor d_scale = make(scale.has_value(), words), d_bias = make(bias.has_value(), words);
  const auto sums = SoftBackward(
                        source, stored, by, offsets, floats(g), floats(g_mass), format, unit,
                        rows ? static_cast<char*>(d_rows.mutable_data_ptr()) : nullptr)
                        .run();

  const auto written = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  float *to_codebook = written(d_codebook), *to_weight = written(d_weight);
  float *to_scale = written(d_scale), *to_bias = written(d_bias);
  torch::stable::parallel_for(0, words, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> points(ld), centre(dim);
    for (int64_t k = begin; k < end; ++k) {
      std::fill(points.begin(), points.end(), 0.0);
      std::fill(centre.begin(), centre.end(), 0.0);
      double start = 0.0, slope = 0.0;
      for (const auto& s : sums) {
        for (int64_t j = 0; j < dim; ++j) points[j] += s->points[k * ld + j];
        start += s->start[k];
        slope -= s->minus_scale[k];
      }
      // V depends on C directly as -mass * C, whatever the assignment
      for (int64_t b = 0; b < bags; ++b) {
        const double minus = -static_cast<double>(floats(m)[b * words + k]);
        const float* from = floats(g) + (b * words + k) * dim;
        for (int64_t j = 0; j < dim; ++j) centre[j] += minus * from[j];
      }
      if (scale)  // |x - m|^2 - 2 (x - m).(c - m) + |c - m|^2
        for (int64_t j = 0; j < dim; ++j) centre[j] += 2.0 * (start * by.centre[k][j] - points[j]);
      for (int64_t j = 0; j < dim; ++j) to_codebook[k * dim + j] = static_cast<float>(centre[j]);
      if (weight)
        for (int64_t j = 0; j < dim; ++j)
          to_weight[k * dim + j] = static_cast<float>(points[j] + start * by.middle[j]);
      if (scale) to_scale[k] = static_cast<float>(slope);
      if (bias) to_bias[k] = static_cast<float>(start);
    }
  });
  return {d_rows, d_codebook, d_scale, d_weight, d_bias};
}

}  // namespace dre_fast
