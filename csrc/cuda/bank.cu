// Bank write on the GPU: two kernels, deterministic, no float atomics.
// The specification is dre_fast/reference/bank.py:write.
//
//   claim   every entry puts its row into a hash table; the largest entry number wins each row, in O(entries)
//   write   one warp a row: normalise, quantise; the block scores its rows against the codebook; one warp a row:
//           drift, running sums by the difference (integer atomics commute), scatter
//
// A row belongs to one warp, which reads the old value before it stores the new one.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <cassert>

#include "../common.h"
#include "launch.h"

namespace dre_fast {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xffffffffu;
constexpr unsigned long long kEmpty = ~0ull;

void check(cudaError_t status, const char* what) { check_cuda("bank_write", status, what); }

// Which entry owns each row. `rows` and `owner` are filled with ones beforehand: empty, and -1.
struct Claims {
  unsigned long long* rows;  // [slots]
  int32_t* owner;            // [slots]
  int32_t* slot;             // [entries], -1 = skipped
  uint32_t mask;
  int shift;
};

__global__ void __launch_bounds__(kThreads) claim_kernel(BankWrite w, Claims c) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= w.rows) return;
  const int64_t slide = w.rows_slide[i], tile = w.rows_tile[i];
  if (slide < 0 || tile < 0) {
    c.slot[i] = -1;
    return;
  }
  assert(slide < w.slides);
  const int64_t row = w.start[slide] + tile;
  assert(row >= 0 && row < w.rows_total);
  const auto key = static_cast<unsigned long long>(row);
  uint32_t at = static_cast<uint32_t>((key * 0x9e3779b97f4a7c15ull) >> c.shift);
  while (true) {  // at most half of the slots are ever taken, so an empty one comes
    const unsigned long long before = atomicCAS(&c.rows[at], kEmpty, key);
    if (before == kEmpty || before == key) break;
    at = (at + 1) & c.mask;
  }
  atomicMax(&c.owner[at], static_cast<int32_t>(i));
  c.slot[i] = static_cast<int32_t>(at);
}

template <typename T, typename Join>
__device__ T across_warp(T v, Join join) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) v = join(v, __shfl_xor_sync(kAll, v, half));
  return v;
}

template <typename T>
__device__ T warp_sum(T v) {
  return across_warp(v, [](T a, T b) { return a + b; });
}

__device__ void add_to(int64_t* p, int64_t v) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}

// Shared memory of a block: z [kRows, dim] fp32, then q [kRows, dim] in the row format.
template <Format F, int kRows>
__global__ void __launch_bounds__(kThreads, 2) write_kernel(BankWrite w, Claims c) {
  using Q = typename Value<F>::type;
  extern __shared__ float z_shared[];
  Q* q_shared = reinterpret_cast<Q*>(z_shared + kRows * w.dim);
  __shared__ float best_score[kWarps][kRows];
  __shared__ int best_word[kWarps][kRows];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t dim = w.dim, entry = static_cast<int64_t>(blockIdx.x) * kRows + warp;
  bool mine = warp < kRows && entry < w.rows && c.slot[entry] >= 0;
  mine = mine && c.owner[c.slot[entry]] == entry;
  if (!__syncthreads_or(mine)) return;

  float* z = z_shared + (warp % kRows) * dim;
  Q* q = q_shared + (warp % kRows) * dim;
  float scale = 0.0f;
  if (mine) {
    const float* x = w.features + entry * dim;
    double square = 0.0;
    for (int64_t d = lane; d < dim; d += 32) square = fma(double(x[d]), double(x[d]), square);
    const double inverse = 1.0 / fmax(sqrt(warp_sum(square)), kNormEps);
    float top = 0.0f;
    for (int64_t d = lane; d < dim; d += 32) {
      z[d] = static_cast<float>(x[d] * inverse);
      top = fmaxf(top, fabsf(z[d]));
    }
    if (has_scale(F)) scale = across_warp(top, [](float a, float b) { return fmaxf(a, b); }) / format_limit(F);
    for (int64_t d = lane; d < dim; d += 32) {
      if (has_scale(F))
        q[d] = scale == 0.0f ? Q{} : Value<F>::encode(__fdiv_rn(z[d], scale));  // zeros of either sign are stored as 0
      else
        q[d] = Value<F>::encode(z[d]);
      z[d] = has_scale(F) ? Value<F>::decode(q[d]) * scale : Value<F>::decode(q[d]);
    }
  } else if (warp < kRows) {
    for (int64_t d = lane; d < dim; d += 32) z[d] = 0.0f;
  }

  int after = -1;
  if (w.codewords > 0) {
    __syncthreads();
    float best[kRows];
    int word[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      best[r] = -INFINITY;
      word[r] = 0;
    }
    for (int64_t k = warp; k < w.codewords; k += kWarps) {
      const float* codeword = w.codebook + k * dim;
      float dot[kRows] = {}, norm = 0.0f;
      for (int64_t d = lane; d < dim; d += 32) {
        const float v = codeword[d];
        norm = fmaf(v, v, norm);
#pragma unroll
        for (int r = 0; r < kRows; ++r) dot[r] = fmaf(z_shared[r * dim + d], v, dot[r]);
      }
      norm = warp_sum(norm);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float score = warp_sum(dot[r]) - 0.5f * norm;
        if (score > best[r]) {
          best[r] = score;
          word[r] = static_cast<int>(k);
        }
      }
    }
    if (lane == 0) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        best_score[warp][r] = best[r];
        best_word[warp][r] = word[r];
      }
    }
    __syncthreads();
    if (mine) {
      float top = -INFINITY;
      after = 0;
      for (int v = 0; v < kWarps; ++v) {
        const float s = best_score[v][warp];
        const int k = best_word[v][warp];
        if (s > top || (s == top && k < after)) {  // warps hold interleaved codewords: ties by number
          top = s;
          after = k;
        }
      }
    }
  }
  if (!mine) return;

  const int64_t slide = w.rows_slide[entry], row = w.start[slide] + w.rows_tile[entry];
  Q* stored = reinterpret_cast<Q*>(w.payload) + row * w.row_stride;
  const bool written = w.age[row] >= 0;
  const int before = w.code[row];
  const float old_scale = has_scale(F) ? w.scale[row] : 0.0f;
  const int64_t to = (slide * w.codewords + after) * dim;
  const int64_t from = (slide * w.codewords + before) * dim;
  double aa = 0.0, bb = 0.0, ab = 0.0;
  for (int64_t d = lane; d < dim; d += 32) {
    const float fresh = z[d];
    const float old = has_scale(F) ? Value<F>::decode(stored[d]) * old_scale : Value<F>::decode(stored[d]);
    aa = fma(double(old), double(old), aa);
    bb = fma(double(fresh), double(fresh), bb);
    ab = fma(double(old), double(fresh), ab);
    if (after >= 0) {
      if (before == after) {
        add_to(w.sums + to + d, to_fixed(fresh) - to_fixed(old));
      } else {
        if (before >= 0) add_to(w.sums + from + d, -to_fixed(old));
        add_to(w.sums + to + d, to_fixed(fresh));
      }
    }
    stored[d] = q[d];
  }
  aa = warp_sum(aa);
  bb = warp_sum(bb);
  ab = warp_sum(ab);
  if (lane != 0) return;
  const double power = aa * bb;
  double moved = 1.0 - ab / sqrt(power > 0.0 ? power : 1.0);
  if (aa == 0.0 && bb == 0.0) moved = 0.0;
  w.drift[row] = written ? static_cast<float>(fmin(fmax(moved, 0.0), 2.0)) : 0.0f;
  if (after >= 0 && before != after) {
    if (before >= 0) add_to(w.counts + slide * w.codewords + before, -1);
    add_to(w.counts + slide * w.codewords + after, 1);
  }
  if (has_scale(F)) w.scale[row] = scale;
  w.code[row] = static_cast<int16_t>(after);
  w.age[row] = w.step;
}

constexpr int64_t kPlainShared = 48 * 1024;  // what every GPU gives a block without asking
constexpr int64_t kMostShared = 96 * 1024;   // what sm_80 to sm_120 all give on request

template <Format F, int kRows>
void launch_write(const BankWrite& w, const Claims& c, cudaStream_t stream) {
  const int64_t bytes = kRows * w.dim * (static_cast<int64_t>(sizeof(float)) + element_bytes(F));
  STD_TORCH_CHECK(bytes <= kMostShared, "bank_write: rows of ", w.dim, " values do not fit into shared memory");
  auto* kernel = write_kernel<F, kRows>;
  if (bytes > kPlainShared)
    check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "request of shared memory");
  const auto blocks = static_cast<unsigned>((w.rows + kRows - 1) / kRows);
  kernel<<<blocks, kThreads, bytes, stream>>>(w, c);
  check(cudaGetLastError(), "launch of the write kernel");
}

// Eight rows a block share each read of the codebook; rows of more than 1,536 values (fp32) come in twos.
template <Format F>
void launch_write(const BankWrite& w, const Claims& c, cudaStream_t stream) {
  const int64_t row_bytes = w.dim * (static_cast<int64_t>(sizeof(float)) + element_bytes(F));
  return row_bytes * kWarps <= kMostShared ? launch_write<F, kWarps>(w, c, stream) : launch_write<F, 2>(w, c, stream);
}

void bank_write_cuda(const BankWrite& w, const Tensor& payload) {
  if (w.rows == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(payload.get_device_index());
  const cudaStream_t stream = current_stream("bank_write", payload);

  int64_t slots = 16;
  int shift = 60;
  for (; slots < 2 * w.rows; slots *= 2) --shift;
  const int64_t table = slots * 12;
  const Tensor scratch = torch::stable::new_empty(payload, {table + w.rows * 4}, ScalarType::Byte);
  auto* base = static_cast<char*>(scratch.mutable_data_ptr());
  Claims c{};
  c.rows = reinterpret_cast<unsigned long long*>(base);
  c.owner = reinterpret_cast<int32_t*>(base + slots * 8);
  c.slot = reinterpret_cast<int32_t*>(base + table);
  c.mask = static_cast<uint32_t>(slots - 1);
  c.shift = shift;
  check(cudaMemsetAsync(base, 0xff, table, stream), "clearing the claim table");
  claim_kernel<<<static_cast<unsigned>((w.rows + kThreads - 1) / kThreads), kThreads, 0, stream>>>(w, c);
  check(cudaGetLastError(), "launch of the claim kernel");

  for_format(w.format, [&](auto f) { launch_write<decltype(f)::value>(w, c, stream); });
}

void bank_write(
    const Tensor& payload, const Tensor& scale, const Tensor& code, const Tensor& age, const Tensor& drift,
    const Tensor& sums, const Tensor& counts, const Tensor& codebook, const Tensor& start,
    const Tensor& rows_slide, const Tensor& rows_tile, const Tensor& features, int64_t step) {
  bank_write_cuda(
      checked_write(
          payload, scale, code, age, drift, sums, counts, codebook, start, rows_slide, rows_tile, features, step),
      payload);
}

}  // namespace
}  // namespace dre_fast

STABLE_TORCH_LIBRARY_IMPL(dre_fast_native, CUDA, m) {
  m.impl("bank_write", TORCH_BOX(&dre_fast::bank_write));
}
