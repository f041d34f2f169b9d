// Shared by the CPU and CUDA sides of the bank's ops: the tables and the checks of the arguments.
//
// Only the libtorch stable ABI of torch 2.10 is used, so one binary serves every later torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "row_format.h"

#if defined(__CUDACC__)
#define DRE_FAST_BOTH __host__ __device__
#else
#define DRE_FAST_BOTH
#endif

namespace dre_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Format format_of(const char* op, const Tensor& payload) {
  switch (payload.scalar_type()) {
    case ScalarType::Float: return Format::kFloat32;
    case ScalarType::Half: return Format::kFloat16;
    case ScalarType::BFloat16: return Format::kBFloat16;
    case ScalarType::Char: return Format::kInt8;
    case ScalarType::Float8_e4m3fn: return Format::kE4M3;
    default:
      throw std::runtime_error(
          std::string(op) + ": payload must be float32, float16, bfloat16, int8 or float8_e4m3fn");
  }
}

// Stored rows, after the checks.
struct BankRows {
  Format format;
  int64_t rows_total, row_stride, dim;
  char* payload;  // [rows_total, row_stride] in `format`
  float* scale;   // [rows_total], null without scales

  DRE_FAST_BOTH char* row(int64_t r) const { return payload + r * row_stride * element_bytes(format); }
};

// Stored rows with their codes, and the running sums of the slides.
struct BankSums : BankRows {
  int64_t codewords, slides;
  int16_t* code;          // [rows_total]
  int64_t* sums;          // [slides, codewords, dim]
  int64_t* counts;        // [slides, codewords]
  const float* codebook;  // [codewords, dim]
  const int64_t* start;   // [slides]
};

struct BankWrite : BankSums {
  int64_t rows;
  int32_t* age;               // [rows_total]
  float* drift;               // [rows_total]
  const int64_t* rows_slide;  // [rows]
  const int64_t* rows_tile;   // [rows]
  const float* features;      // [rows, dim]
  int32_t step;
};

// The rest of some slides: what the running sums hold of their other rows.
struct BankRest : BankSums {
  int64_t bags, live;
  const int64_t* bag_slide;  // [bags]
  const int64_t* tiles;      // [bags, live]
};

struct BankRead : BankRows {
  int64_t rows;
  const int64_t* index;  // [rows], negative = zeros
};

// Positions first .. first + count - 1 after the live ones of some slides' visits.
struct BankTiles {
  int64_t bags, first, count, m, seed;
  const int64_t* lengths;  // [bags]
  const int64_t* slides;   // [bags]
  const int64_t* visit;    // [bags]
};

class Checker {
 public:
  Checker(const char* op, const Tensor& payload) : op_(op), payload_(payload) {}

  void tensor(const char* name, const Tensor& t, ScalarType dtype, const char* dtype_name, int64_t dims) const {
    STD_TORCH_CHECK(t.scalar_type() == dtype, op_, ": ", name, " must be ", dtype_name);
    STD_TORCH_CHECK(t.dim() == dims, op_, ": ", name, " must have ", dims, " dimensions, has ", t.dim());
    STD_TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " must be contiguous");
    STD_TORCH_CHECK(
        t.is_cuda() == payload_.is_cuda() && t.get_device_index() == payload_.get_device_index(), op_, ": ", name,
        " must be on the device of payload");
  }

  void rows(BankRows& r, const Tensor& scale, int64_t dim) const {
    r.format = format_of(op_, payload_);
    tensor("payload", payload_, payload_.scalar_type(), "", 2);
    tensor("scale", scale, ScalarType::Float, "float32", 1);
    r.rows_total = payload_.size(0);
    r.row_stride = payload_.size(1);
    r.dim = dim;
    const int64_t scales = has_scale(r.format) ? r.rows_total : 0;
    STD_TORCH_CHECK(dim <= r.row_stride, op_, ": rows have ", dim, " values, payload ", r.row_stride);
    STD_TORCH_CHECK(
        scale.size(0) == scales, op_, ": scale must have ", scales, " entries, has ", scale.size(0));
    r.payload = static_cast<char*>(payload_.mutable_data_ptr());
    r.scale = scales ? static_cast<float*>(scale.mutable_data_ptr()) : nullptr;
  }

  void sums(
      BankSums& b, const Tensor& scale, const Tensor& code, const Tensor& sums, const Tensor& counts,
      const Tensor& codebook, const Tensor& start, int64_t dim) const {
    rows(b, scale, dim);
    tensor("code", code, ScalarType::Short, "int16", 1);
    tensor("sums", sums, ScalarType::Long, "int64", 3);
    tensor("counts", counts, ScalarType::Long, "int64", 2);
    tensor("codebook", codebook, ScalarType::Float, "float32", 2);
    tensor("start", start, ScalarType::Long, "int64", 1);
    b.codewords = codebook.size(0);
    b.slides = start.size(0);
    STD_TORCH_CHECK(
        code.size(0) == b.rows_total, op_, ": code must have one entry for each of the ", b.rows_total,
        " rows of payload");
    STD_TORCH_CHECK(b.codewords <= 32767, op_, ": codes are int16, at most 32767 codewords; got ", b.codewords);
    if (b.codewords > 0) {
      STD_TORCH_CHECK(codebook.size(1) == dim, op_, ": codebook has ", codebook.size(1), " columns, rows ", dim);
      STD_TORCH_CHECK(
          sums.size(0) == b.slides && sums.size(1) == b.codewords && sums.size(2) == dim &&
              counts.size(0) == b.slides && counts.size(1) == b.codewords,
          op_, ": sums must be [", b.slides, ", ", b.codewords, ", ", dim, "] and counts [", b.slides, ", ",
          b.codewords, "]");
    }
    b.code = static_cast<int16_t*>(code.mutable_data_ptr());
    b.sums = static_cast<int64_t*>(sums.mutable_data_ptr());
    b.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
    b.codebook = static_cast<const float*>(codebook.const_data_ptr());
    b.start = static_cast<const int64_t*>(start.const_data_ptr());
  }

 private:
  const char* op_;
  const Tensor& payload_;
};

inline BankWrite checked_write(
    const Tensor& payload, const Tensor& scale, const Tensor& code, const Tensor& age, const Tensor& drift,
    const Tensor& sums, const Tensor& counts, const Tensor& codebook, const Tensor& start,
    const Tensor& rows_slide, const Tensor& rows_tile, const Tensor& features, int64_t step) {
  const Checker check("bank_write", payload);
  check.tensor("features", features, ScalarType::Float, "float32", 2);
  BankWrite w{};
  check.sums(w, scale, code, sums, counts, codebook, start, features.size(1));
  check.tensor("age", age, ScalarType::Int, "int32", 1);
  check.tensor("drift", drift, ScalarType::Float, "float32", 1);
  check.tensor("rows_slide", rows_slide, ScalarType::Long, "int64", 1);
  check.tensor("rows_tile", rows_tile, ScalarType::Long, "int64", 1);
  w.rows = features.size(0);
  STD_TORCH_CHECK(
      age.size(0) == w.rows_total && drift.size(0) == w.rows_total,
      "bank_write: age and drift must have one entry for each of the ", w.rows_total, " rows of payload");
  STD_TORCH_CHECK(
      rows_slide.size(0) == w.rows && rows_tile.size(0) == w.rows,
      "bank_write: rows_slide and rows_tile must have one entry for each of the ", w.rows, " feature rows");
  STD_TORCH_CHECK(step >= 0 && step <= INT32_MAX, "bank_write: step must be in [0, 2^31), is ", step);
  STD_TORCH_CHECK(w.rows <= INT32_MAX, "bank_write: at most 2^31 - 1 rows in one call, got ", w.rows);
  w.age = static_cast<int32_t*>(age.mutable_data_ptr());
  w.drift = static_cast<float*>(drift.mutable_data_ptr());
  w.rows_slide = static_cast<const int64_t*>(rows_slide.const_data_ptr());
  w.rows_tile = static_cast<const int64_t*>(rows_tile.const_data_ptr());
  w.features = static_cast<const float*>(features.const_data_ptr());
  w.step = static_cast<int32_t>(step);
  return w;
}

inline BankRest checked_rest(
    const Tensor& payload, const Tensor& scale, const Tensor& code, const Tensor& sums, const Tensor& counts,
    const Tensor& codebook, const Tensor& start, const Tensor& slides, const Tensor& tiles) {
  const Checker check("bank_rest", payload);
  STD_TORCH_CHECK(codebook.dim() == 2, "bank_rest: codebook must have 2 dimensions, has ", codebook.dim());
  BankRest r{};
  check.sums(r, scale, code, sums, counts, codebook, start, codebook.size(1));
  check.tensor("slides", slides, ScalarType::Long, "int64", 1);
  check.tensor("tiles", tiles, ScalarType::Long, "int64", 2);
  r.bags = slides.size(0);
  r.live = tiles.size(1);
  STD_TORCH_CHECK(
      tiles.size(0) == r.bags, "bank_rest: tiles must have one line for each of the ", r.bags, " slides, has ",
      tiles.size(0));
  r.bag_slide = static_cast<const int64_t*>(slides.const_data_ptr());
  r.tiles = static_cast<const int64_t*>(tiles.const_data_ptr());
  return r;
}

inline BankRead checked_read(const Tensor& payload, const Tensor& scale, const Tensor& index, int64_t dim) {
  const Checker check("bank_read", payload);
  BankRead r{};
  check.rows(r, scale, dim);
  check.tensor("rows", index, ScalarType::Long, "int64", 1);
  r.rows = index.size(0);
  r.index = static_cast<const int64_t*>(index.const_data_ptr());
  return r;
}

inline BankTiles checked_tiles(
    const Tensor& lengths, const Tensor& slides, int64_t first, int64_t count, int64_t m, const Tensor& visit,
    int64_t seed) {
  const Checker check("bank_tiles", slides);
  check.tensor("slides", slides, ScalarType::Long, "int64", 1);
  check.tensor("lengths", lengths, ScalarType::Long, "int64", 1);
  check.tensor("cycle", visit, ScalarType::Long, "int64", 1);
  BankTiles t{slides.size(0), first, count, m, seed};
  STD_TORCH_CHECK(
      lengths.size(0) == t.bags && visit.size(0) == t.bags,
      "bank_tiles: lengths and cycle must have one entry for each of the ", t.bags, " slides");
  STD_TORCH_CHECK(
      first >= 0 && count >= 0 && m >= 1, "bank_tiles: first and count must be >= 0 and m >= 1; got ", first, ", ",
      count, " and ", m);
  t.lengths = static_cast<const int64_t*>(lengths.const_data_ptr());
  t.slides = static_cast<const int64_t*>(slides.const_data_ptr());
  t.visit = static_cast<const int64_t*>(visit.const_data_ptr());
  return t;
}

}  // namespace dre_fast
