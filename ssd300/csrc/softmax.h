// Softmax of a row of logits: what all its classes have in common. A row with NaN or plus infinity gives NaN.
#pragma once

#include "exp.h"

namespace detcore {

// The largest logit, and the sum of exp(logit - most).
struct Softmax {
  float most, sum;
};

HOST_DEVICE float probability(Softmax row, float logit) { return exp_of_negative(logit - row.most) / row.sum; }

// Cross-entropy, not negative: minus the logarithm of the probability.
HOST_DEVICE float entropy(Softmax row, float logit) { return logf(row.sum) + (row.most - logit); }

#if defined(__CUDACC__) || defined(EMULATED_GPU)

constexpr int kRowLanes = 8;  // threads that share a row

// All threads of a warp call it, kRowLanes neighbours for the same row; with 0 classes where there is none.
template <typename T>
__device__ Softmax softmax(const T* row, int classes) {
  const int lane = static_cast<int>(threadIdx.x % kRowLanes);
  float most = -INFINITY, sum = 0;
#pragma unroll 4
  for (int k = lane; k < classes; k += kRowLanes) most = fmaxf(most, static_cast<float>(row[k]));
#pragma unroll
  for (int step = kRowLanes / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
#pragma unroll 4
  for (int k = lane; k < classes; k += kRowLanes) sum += exp_of_negative(static_cast<float>(row[k]) - most);
#pragma unroll
  for (int step = kRowLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return {most, sum};
}

#endif

}  // namespace detcore
