// Sums on the GPU that come out the same in every run: one partial sum for each block, added by one block.
#pragma once

#include "kernel.h"

namespace detcore {

constexpr int kSumThreads = 256;

// The sum over the threads of a block of kSumThreads. All of them call it, once in a kernel.
__device__ inline float block_sum(float value) {
  __shared__ float of_warp[kSumThreads / 32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (float part : of_warp) sum += part;
  return sum;
}

// One block: total = the sum of the partial sums.
static __global__ void total_kernel(const float* partials, int count, float* total) {
  __shared__ double sums[kSumThreads];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kSumThreads) sum += partials[i];
  sums[threadIdx.x] = sum;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *total = static_cast<float>(sums[0]);
}

}  // namespace detcore
