// The rows an encoding reads: a dense tensor, chosen rows of it, or stored rows of a bank.
// The specification is dre_fast/reference/rows.py.
#pragma once

#include <optional>

#include "../common.h"
#include "encode_kernels.h"

namespace dre_fast {

using OptionalTensor = std::optional<Tensor>;

// The kernels of this processor.
const EncodeKernels& encode_kernels_here();

// A tensor as contiguous fp32; the result keeps its memory alive.
Tensor as_float(const Tensor& t);

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Checks offsets [B+1] over `rows` rows and makes them contiguous.
Tensor checked_offsets(const char* op, const Tensor& cu_seqlens, int64_t rows);

// Rows of a segment, at least about `least`, where the sums of one take `bytes`: a bag of many rows is summed in
// segments, which do not depend on the number of threads, and these are added up in their order.
int64_t rows_of_segment(int64_t rows, int64_t least, int64_t bytes);

// x [dim] -> out in float32, float16 or bfloat16; what lies outside the format becomes infinite.
void store_row(Format format, const float* x, int64_t dim, char* out);

class RowSource {
 public:
  RowSource(
      const char* op, const Tensor& x, int64_t dim, const OptionalTensor& index, const OptionalTensor& row_scale,
      bool unit);

  int64_t rows() const { return rows_; }
  int64_t dim() const { return dim_; }
  int64_t ld() const { return padded(dim_); }
  int64_t stored_rows() const { return stored_; }
  Format format() const { return format_; }

  // Rows are read where they lie, as fp32 or as bfloat16; else they are written to a buffer as fp32.
  bool in_place() const { return direct_; }
  bool bfloat16() const { return direct_ && format_ == Format::kBFloat16; }

  // Whether row i is row i of x.
  bool in_order() const { return !index_; }

  // The row of x that row i is; negative = skip.
  int64_t at(int64_t i) const { return index_ ? index_[i] : i; }

  // Bytes of row r of x.
  const char* stored(int64_t r) const { return x_ + r * stride_; }
  int64_t stride() const { return stride_; }

  // Row r of x [ld] where it lies, or written to `buffer` [ld].
  const void* read(int64_t r, float* buffer) const {
    if (direct_) return stored(r);
    return decoded(r, buffer);
  }

  // Row r of x as fp32, written to `buffer` [ld].
  const float* decoded(int64_t r, float* buffer) const;

 private:
  Tensor x_kept_;
  OptionalTensor index_kept_, scale_kept_;
  const char* x_;
  const int64_t* index_;
  const float* scale_;
  Format format_;
  int64_t rows_, stored_, dim_, stride_;
  bool unit_, direct_;
};

}  // namespace dre_fast
