#pragma once

#include <tuple>

#include "encode_rows.h"

namespace dre_fast {

// Arguments and results: dre_fast/reference/hard.py and soft.py.
std::tuple<Tensor, Tensor, Tensor, Tensor> hard_encode_cpu(
    const Tensor& x, const Tensor& codebook, const Tensor& cu_seqlens, const OptionalTensor& index,
    const OptionalTensor& row_scale, const OptionalTensor& row_codes, bool unit, bool distances);

Tensor hard_encode_backward_cpu(
    const Tensor& grad, const Tensor& codes, const Tensor& cu_seqlens, const OptionalTensor& x,
    const OptionalTensor& index, bool unit);

std::tuple<Tensor, Tensor> soft_encode_cpu(
    const Tensor& x, const Tensor& codebook, const Tensor& cu_seqlens, const OptionalTensor& scale,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& index,
    const OptionalTensor& row_scale, bool unit);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_encode_backward_cpu(
    const Tensor& grad, const Tensor& grad_mass, const Tensor& x, const Tensor& codebook, const Tensor& cu_seqlens,
    const Tensor& mass, const OptionalTensor& scale, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& index, const OptionalTensor& row_scale, bool unit, bool rows);

}  // namespace dre_fast
