// Reads of the bank on the GPU: stored rows, and what the running sums hold of a slide's other rows.
// The specification is dre_fast/reference/bank.py: read, rest. No atomics on results, nothing waits for the host.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <cassert>
#include <tuple>

#include "../common.h"
#include "launch.h"

namespace dre_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kLive = 1024;  // live rows looked through at a time

template <typename Q> struct alignas(4 * sizeof(Q)) Four {
  Q v[4];
};

// ---- rows ---------------------------------------------------------------------------------------------------------
// One warp a row. kFour: the row's values in fours, one load and one store of 16 bytes each; dim is a multiple of 4.
template <Format F, bool kFour>
__global__ void __launch_bounds__(kThreads) read_kernel(BankRead r, float* out) {
  using Q = typename Value<F>::type;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= r.rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t row = r.index[i];
  assert(row < r.rows_total);
  float* to = out + i * r.dim;
  if (row < 0) {
    for (int64_t d = lane; d < r.dim; d += 32) to[d] = 0.0f;
    return;
  }
  const float scale = has_scale(F) ? r.scale[row] : 1.0f;
  const Q* from = reinterpret_cast<const Q*>(r.payload) + row * r.row_stride;
  if (kFour) {
    const auto* fours = reinterpret_cast<const Four<Q>*>(from);
    auto* place = reinterpret_cast<float4*>(to);
#pragma unroll 4
    for (int64_t d = lane; d < r.dim / 4; d += 32) {
      const Four<Q> q = fours[d];
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = has_scale(F) ? Value<F>::decode(q.v[j]) * scale : Value<F>::decode(q.v[j]);
      place[d] = make_float4(x[0], x[1], x[2], x[3]);
    }
  } else {
    for (int64_t d = lane; d < r.dim; d += 32)
      to[d] = has_scale(F) ? Value<F>::decode(from[d]) * scale : Value<F>::decode(from[d]);
  }
}

// ---- the rest of a slide ------------------------------------------------------------------------------------------
// One block a codeword of a bag. It collects the live rows of its codeword, in any order: what is taken from the sums
// are integers.
template <Format F, typename Out>
__global__ void __launch_bounds__(kThreads, 8) rest_kernel(BankRest r, Out* V, int64_t* counts) {
  using Q = typename Value<F>::type;
  __shared__ const Q* found[kLive];
  __shared__ float found_scale[kLive];
  __shared__ int number;
  const int64_t k = blockIdx.x, bag = blockIdx.y + static_cast<int64_t>(blockIdx.z) * gridDim.y;
  if (bag >= r.bags) return;
  const int64_t slide = r.bag_slide[bag];
  assert(slide >= 0 && slide < r.slides);
  const int64_t first = r.start[slide], cell = slide * r.codewords + k, to = bag * r.codewords + k;
  const int64_t* tiles = r.tiles + bag * r.live;

  int64_t taken = 0;
  for (int64_t d0 = 0; d0 < r.dim; d0 += kThreads) {  // at least once: dim is positive
    const int64_t d = d0 + threadIdx.x;
    int64_t sum = d < r.dim ? r.sums[cell * r.dim + d] : 0;
    taken = 0;
    for (int64_t from = 0; from < r.live; from += kLive) {
      __syncthreads();
      if (threadIdx.x == 0) number = 0;
      __syncthreads();
      const int64_t stop = from + kLive < r.live ? from + kLive : r.live;
      for (int64_t i = from + threadIdx.x; i < stop; i += kThreads) {
        const int64_t tile = tiles[i];
        if (tile < 0) continue;
        const int64_t row = first + tile;
        assert(row < r.rows_total);
        if (r.code[row] != k) continue;
        const int at = atomicAdd(&number, 1);
        found[at] = reinterpret_cast<const Q*>(r.payload) + row * r.row_stride;
        found_scale[at] = has_scale(F) ? r.scale[row] : 1.0f;
      }
      __syncthreads();
      taken += number;
      if (d < r.dim) {
        for (int j = 0; j < number; ++j) {
          const float q = Value<F>::decode(found[j][d]);
          sum -= to_fixed(has_scale(F) ? q * found_scale[j] : q);
        }
      }
    }
    const double n = static_cast<double>(r.counts[cell] - taken);
    // two roundings, as on the CPU: the product is not fused into the difference
    if (d < r.dim) {
      const double whole = __dmul_rn(static_cast<double>(sum), 5.9604644775390625e-8);
      V[to * r.dim + d] =
          static_cast<Out>(__dsub_rn(whole, __dmul_rn(n, static_cast<double>(r.codebook[k * r.dim + d]))));
    }
  }
  if (threadIdx.x == 0) counts[to] = r.counts[cell] - taken;
}

template <Format F>
void launch_read(const BankRead& r, float* out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((r.rows + kWarps - 1) / kWarps);
  if (r.dim % 4 == 0)
    read_kernel<F, true><<<blocks, kThreads, 0, stream>>>(r, out);
  else
    read_kernel<F, false><<<blocks, kThreads, 0, stream>>>(r, out);
}

template <Format F>
void launch_rest(const BankRest& r, void* V, bool accurate, int64_t* counts, cudaStream_t stream) {
  constexpr int64_t kLines = 32768;  // of a grid, which has at most 65,535 in y
  const auto y = static_cast<unsigned>(r.bags < kLines ? r.bags : kLines);
  const auto z = static_cast<unsigned>((r.bags + kLines - 1) / kLines);
  const dim3 grid(static_cast<unsigned>(r.codewords), y, z);
  if (accurate)
    rest_kernel<F, double><<<grid, kThreads, 0, stream>>>(r, static_cast<double*>(V), counts);
  else
    rest_kernel<F, float><<<grid, kThreads, 0, stream>>>(r, static_cast<float*>(V), counts);
}

std::tuple<Tensor, Tensor> bank_rest(
    const Tensor& payload, const Tensor& scale, const Tensor& code, const Tensor& sums, const Tensor& counts,
    const Tensor& codebook, const Tensor& start, const Tensor& slides, const Tensor& tiles, bool accurate) {
  const BankRest r = checked_rest(payload, scale, code, sums, counts, codebook, start, slides, tiles);
  const torch::stable::accelerator::DeviceGuard guard(payload.get_device_index());
  const Tensor V = torch::stable::new_empty(
      codebook, {r.bags, r.codewords, r.dim}, accurate ? ScalarType::Double : ScalarType::Float);
  const Tensor n = torch::stable::new_empty(counts, {r.bags, r.codewords});
  if (r.bags == 0 || r.codewords == 0) return {V, n};
  const cudaStream_t stream = current_stream("bank_rest", payload);
  auto* rows = static_cast<int64_t*>(n.mutable_data_ptr());
  void* place = V.mutable_data_ptr();
  for_format(r.format, [&](auto f) { launch_rest<decltype(f)::value>(r, place, accurate, rows, stream); });
  check_cuda("bank_rest", cudaGetLastError(), "launch");
  return {V, n};
}

Tensor bank_read(const Tensor& payload, const Tensor& scale, const Tensor& rows, int64_t dim) {
  const BankRead r = checked_read(payload, scale, rows, dim);
  const torch::stable::accelerator::DeviceGuard guard(payload.get_device_index());
  const Tensor out = torch::stable::new_empty(scale, {r.rows, dim}, ScalarType::Float);
  if (r.rows == 0 || dim == 0) return out;
  STD_TORCH_CHECK(r.rows <= INT32_MAX, "bank_read: at most 2^31 - 1 rows in one call, got ", r.rows);
  const cudaStream_t stream = current_stream("bank_read", payload);
  auto* place = static_cast<float*>(out.mutable_data_ptr());
  for_format(r.format, [&](auto f) { launch_read<decltype(f)::value>(r, place, stream); });
  check_cuda("bank_read", cudaGetLastError(), "launch");
  return out;
}

}  // namespace
}  // namespace dre_fast

STABLE_TORCH_LIBRARY_IMPL(dre_fast_native, CUDA, m) {
  m.impl("bank_rest", TORCH_BOX(&dre_fast::bank_rest));
  m.impl("bank_read", TORCH_BOX(&dre_fast::bank_read));
}
