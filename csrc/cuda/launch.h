// What every launch needs: errors, the current stream, the row format as a constant.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../common.h"

namespace dre_fast {

inline void check_cuda(const char* op, cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + what + ": " + cudaGetErrorString(status));
}

inline cudaStream_t current_stream(const char* op, const Tensor& on) {
  void* raw = nullptr;
  // the macro for this has another name in torch 2.10
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(on.get_device_index(), &raw) == 0, op, ": no current CUDA stream");
  return static_cast<cudaStream_t>(raw);
}

// run(std::integral_constant<Format, format>{}).
template <typename Run>
void for_format(Format format, Run run) {
  switch (format) {
    case Format::kFloat32: return run(std::integral_constant<Format, Format::kFloat32>{});
    case Format::kFloat16: return run(std::integral_constant<Format, Format::kFloat16>{});
    case Format::kBFloat16: return run(std::integral_constant<Format, Format::kBFloat16>{});
    case Format::kInt8: return run(std::integral_constant<Format, Format::kInt8>{});
    case Format::kE4M3: return run(std::integral_constant<Format, Format::kE4M3>{});
  }
}

}  // namespace dre_fast
