// Shared by the CPU and CUDA sides of the bank write: row formats and the checks of the arguments.
//
// Only the libtorch stable ABI of torch 2.10 is used, so one binary serves every later torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "row_format.h"

namespace dre_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Format format_of(const Tensor& payload) {
  switch (payload.scalar_type()) {
    case ScalarType::Float: return Format::kFloat32;
    case ScalarType::Half: return Format::kFloat16;
    case ScalarType::BFloat16: return Format::kBFloat16;
    case ScalarType::Char: return Format::kInt8;
    case ScalarType::Float8_e4m3fn: return Format::kE4M3;
    default:
      throw std::runtime_error(
          "bank_write: payload must be float32, float16, bfloat16, int8 or float8_e4m3fn");
  }
}

// Pointers and sizes of one call, after the checks.
struct BankWrite {
  Format format;
  int64_t rows_total, row_stride, dim, codewords, slides, rows;
  void* payload;     // [rows_total, row_stride] in `format`
  float* scale;      // [rows_total], null without scales
  int16_t* code;     // [rows_total]
  int32_t* age;      // [rows_total]
  float* drift;      // [rows_total]
  int64_t* sums;     // [slides, codewords, dim]
  int64_t* counts;   // [slides, codewords]
  const float* codebook;     // [codewords, dim]
  const int64_t* start;      // [slides]
  const int64_t* rows_slide;  // [rows]
  const int64_t* rows_tile;   // [rows]
  const float* features;     // [rows, dim]
  int32_t step;
};

inline void check_tensor(
    const char* name, const Tensor& t, const Tensor& payload, ScalarType dtype, const char* dtype_name,
    int64_t dims) {
  STD_TORCH_CHECK(
      t.scalar_type() == dtype, "bank_write: ", name, " must be ", dtype_name);
  STD_TORCH_CHECK(
      t.dim() == dims, "bank_write: ", name, " must have ", dims, " dimensions, has ", t.dim());
  STD_TORCH_CHECK(t.is_contiguous(), "bank_write: ", name, " must be contiguous");
  STD_TORCH_CHECK(
      t.is_cuda() == payload.is_cuda() && t.get_device_index() == payload.get_device_index(),
      "bank_write: ", name, " must be on the device of payload");
}

inline BankWrite checked(
    const Tensor& payload, const Tensor& scale, const Tensor& code, const Tensor& age, const Tensor& drift,
    const Tensor& sums, const Tensor& counts, const Tensor& codebook, const Tensor& start,
    const Tensor& rows_slide, const Tensor& rows_tile, const Tensor& features, int64_t step) {
  BankWrite w{};
  w.format = format_of(payload);
  check_tensor("payload", payload, payload, payload.scalar_type(), "", 2);
  check_tensor("scale", scale, payload, ScalarType::Float, "float32", 1);
  check_tensor("code", code, payload, ScalarType::Short, "int16", 1);
  check_tensor("age", age, payload, ScalarType::Int, "int32", 1);
  check_tensor("drift", drift, payload, ScalarType::Float, "float32", 1);
  check_tensor("sums", sums, payload, ScalarType::Long, "int64", 3);
  check_tensor("counts", counts, payload, ScalarType::Long, "int64", 2);
  check_tensor("codebook", codebook, payload, ScalarType::Float, "float32", 2);
  check_tensor("start", start, payload, ScalarType::Long, "int64", 1);
  check_tensor("rows_slide", rows_slide, payload, ScalarType::Long, "int64", 1);
  check_tensor("rows_tile", rows_tile, payload, ScalarType::Long, "int64", 1);
  check_tensor("features", features, payload, ScalarType::Float, "float32", 2);

  w.rows_total = payload.size(0);
  w.row_stride = payload.size(1);
  w.rows = features.size(0);
  w.dim = features.size(1);
  w.codewords = codebook.size(0);
  w.slides = start.size(0);
  const int64_t scales = has_scale(w.format) ? w.rows_total : 0;
  STD_TORCH_CHECK(w.dim <= w.row_stride, "bank_write: features have ", w.dim, " columns, payload ", w.row_stride);
  STD_TORCH_CHECK(scale.size(0) == scales, "bank_write: scale must have ", scales, " entries, has ", scale.size(0));
  STD_TORCH_CHECK(
      code.size(0) == w.rows_total && age.size(0) == w.rows_total && drift.size(0) == w.rows_total,
      "bank_write: code, age and drift must have one entry for each of the ", w.rows_total, " rows of payload");
  STD_TORCH_CHECK(
      rows_slide.size(0) == w.rows && rows_tile.size(0) == w.rows,
      "bank_write: rows_slide and rows_tile must have one entry for each of the ", w.rows, " feature rows");
  STD_TORCH_CHECK(w.codewords <= 32767, "bank_write: codes are int16, at most 32767 codewords; got ", w.codewords);
  if (w.codewords > 0) {
    STD_TORCH_CHECK(codebook.size(1) == w.dim, "bank_write: codebook has ", codebook.size(1), " columns, features ", w.dim);
    STD_TORCH_CHECK(
        sums.size(0) == w.slides && sums.size(1) == w.codewords && sums.size(2) == w.dim &&
            counts.size(0) == w.slides && counts.size(1) == w.codewords,
        "bank_write: sums must be [", w.slides, ", ", w.codewords, ", ", w.dim, "] and counts [", w.slides, ", ",
        w.codewords, "]");
  }
  STD_TORCH_CHECK(step >= 0 && step <= INT32_MAX, "bank_write: step must be in [0, 2^31), is ", step);
  STD_TORCH_CHECK(w.rows <= INT32_MAX, "bank_write: at most 2^31 - 1 rows in one call, got ", w.rows);

  w.payload = payload.mutable_data_ptr();
  w.scale = scales ? static_cast<float*>(scale.mutable_data_ptr()) : nullptr;
  w.code = static_cast<int16_t*>(code.mutable_data_ptr());
  w.age = static_cast<int32_t*>(age.mutable_data_ptr());
  w.drift = static_cast<float*>(drift.mutable_data_ptr());
  w.sums = static_cast<int64_t*>(sums.mutable_data_ptr());
  w.counts = static_cast<int64_t*>(counts.mutable_data_ptr());
  w.codebook = static_cast<const float*>(codebook.const_data_ptr());
  w.start = static_cast<const int64_t*>(start.const_data_ptr());
  w.rows_slide = static_cast<const int64_t*>(rows_slide.const_data_ptr());
  w.rows_tile = static_cast<const int64_t*>(rows_tile.const_data_ptr());
  w.features = static_cast<const float*>(features.const_data_ptr());
  w.step = static_cast<int32_t>(step);
  return w;
}

}  // namespace dre_fast
