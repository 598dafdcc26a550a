// Kernels that test the emulation: each is right on a GPU, or wrong in one way that the emulation must find.
#include "kernel.h"

namespace detcore {

__global__ void warp_kernel(const int64_t* in, int64_t* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  const int value = static_cast<int>(in[i]);
  int64_t* to = out + static_cast<int64_t>(i) * 12;
  int sum = value;
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
  int before = value;  // the sum of the lanes up to this one
  for (int by = 1; by < 32; by *= 2) {
    const int other = __shfl_up_sync(0xffffffff, before, by);
    if (lane >= by) before += other;
  }
  to[0] = sum;
  to[1] = before;
  to[2] = __shfl_down_sync(0xffffffff, value, 3);
  to[3] = __shfl_sync(0xffffffff, value, lane * 7 + 3);
  to[4] = __shfl_sync(0xffffffff, value, 1, 8);
  to[5] = __shfl_down_sync(0xffffffff, 0.5 * value, 4, 8) * 2;
  to[6] = __ballot_sync(0xffffffff, value % 2);
  to[7] = __any_sync(0xffffffff, value == 5);
  to[8] = __all_sync(0xffffffff, value >= 0);
  to[9] = __popc(value) + __popcll(value);
  to[10] = __ffs(value) + __ffsll(value);
  to[11] = __clz(value) + __clzll(value);
}

__global__ __launch_bounds__(128) void block_kernel(const int64_t* in, int64_t* out, int64_t size) {
  __shared__ int64_t values[128];
  __shared__ unsigned largest;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  values[threadIdx.x] = i < size ? __ldg(in + i) : 0;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  atomicMax(&largest, static_cast<unsigned>(values[threadIdx.x]));
  for (int half = 64; half > 0; half /= 2) {
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    __syncthreads();
  }
  const int odd = __syncthreads_count(i < size && in[i] % 2);
  const int any = __syncthreads_or(i < size && in[i] == 5), all = __syncthreads_and(i >= size || in[i] >= 0);
  if (i < size) atomicAdd(reinterpret_cast<unsigned long long*>(out), static_cast<unsigned long long>(in[i]));
  if (threadIdx.x > 0) return;
  int64_t* to = out + 1 + static_cast<int64_t>(blockIdx.x) * 5;
  to[0] = values[0];
  to[1] = largest;
  to[2] = odd;
  to[3] = any;
  to[4] = all;
}

// The threads that have returned are not waited for.
__global__ void early_kernel(const int64_t*, int64_t* out) {
  __shared__ int seen;
  if (threadIdx.x >= 40) return;
  if (threadIdx.x == 0) seen = 1;
  __syncthreads();
  out[threadIdx.x] = seen;
}

__global__ void unset_kernel(const int64_t*, int64_t* out) {
  __shared__ int64_t values[64];
  if (blockIdx.x == 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
}

__global__ void race_kernel(const int64_t* in, int64_t* out) {
  __shared__ int64_t values[64];
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void order_kernel(const int64_t*, int64_t* out) { out[0] = blockIdx.x; }

__global__ void divergent_kernel(const int64_t*, int64_t*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void stuck_kernel(const int64_t*, int64_t* out) {
  if (threadIdx.x < 10) __syncthreads();
  out[threadIdx.x] = __ballot_sync(0xffffffff, 1);
}

__global__ void gone_kernel(const int64_t*, int64_t* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_sync(0xffffffff, 1, 3);
}

__global__ void mask_kernel(const int64_t*, int64_t* out) { out[threadIdx.x] = __ballot_sync(0xff, 1); }

__global__ void misaligned_kernel(const int64_t* in, int64_t* out) {
  *reinterpret_cast<Pack<int64_t>*>(out) = *reinterpret_cast<const Pack<int64_t>*>(in + 1);
}

__global__ void bounds_kernel(const int64_t*, int64_t* out) {
  __shared__ int64_t values[8];
  values[threadIdx.x] = 1;
  __syncthreads();
  out[0] = values[0];
}

static Tensor run(std::string name, const Tensor& in, int64_t blocks, int64_t threads, int64_t size) {
  Tensor out = torch::stable::empty({size}, ScalarType::Long, std::nullopt, in.device());
  torch::stable::zero_(out);
  const OnDevice gpu(in);
  const auto* from = static_cast<const int64_t*>(in.data_ptr());
  auto* to = static_cast<int64_t*>(out.data_ptr());
  using Kernel = void (*)(const int64_t*, int64_t*);
  const std::pair<const char*, Kernel> kernels[] = {
      {"warp", warp_kernel},   {"early", early_kernel},           {"unset", unset_kernel},  {"race", race_kernel},
      {"order", order_kernel}, {"divergent", divergent_kernel},   {"stuck", stuck_kernel},  {"gone", gone_kernel},
      {"mask", mask_kernel},   {"misaligned", misaligned_kernel}, {"bounds", bounds_kernel}};
  if (name == "block") gpu.launch(&block_kernel, blocks, static_cast<int>(threads), from, to, in.numel());
  for (const auto& [known, kernel] : kernels) {
    if (name == known) gpu.launch(kernel, blocks, static_cast<int>(threads), from, to);
  }
  return out;
}

}  // namespace detcore

SCHEMAS(m) { m.def("run(str kernel, Tensor x, int blocks, int threads, int size) -> Tensor"); }
GPU_OPS(m) { m.impl("run", TORCH_BOX(&detcore::run)); }
