#include <algorithm>
#include <tuple>

#include "focal.h"
#include "sum.h"

namespace detcore {

constexpr int kTile = 128;  // rows that a block prepares at a time

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Values {
  T at[kWidth];
};

// Loss of the classes column..column+kWidth of a row; turns the logits into the gradient.
template <typename T, int kWidth>
__device__ inline float focal_values(Values<T, kWidth>& values, int column, int target, float weight) {
  const Values<T, kWidth> logits = values;
  const float scale = (1 - kAlpha) * weight * focal_constant<T>();
  float loss = 0;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const Term term = focal_term(static_cast<float>(logits.at[k]));
    loss += term.loss;
    values.at[k] = static_cast<T>(scale * term.gradient);
  }
  const int place = target - column;
  if (place < 0 || place >= kWidth) return (1 - kAlpha) * weight * loss;
  // Few threads come here: those that hold the class of a foreground row. Subtracting that logit's loss as a negative
  // would lose digits, so that the sum is made anew.
  loss = 0;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const float x = static_cast<float>(logits.at[k]);
    const Term term = focal_term(k == place ? -x : x);
    loss += (k == place ? kAlpha : 1 - kAlpha) * term.loss;
    if (k == place) values.at[k] = static_cast<T>(-kAlpha * weight * focal_constant<T>() * term.gradient);
  }
  return weight * loss;
}

// A block goes through tiles of rows: their targets into shared memory, then kWidth logits a thread at a time, of which
// the next ones are on their way while the present ones are computed. kWidth divides the number of classes.
template <typename T, int kWidth>
__global__ __launch_bounds__(kSumThreads, 5) void focal_kernel(const T* logits, Targets targets, int64_t rows,
                                                               int classes, T* gradient, float* partials) {
  using Part = Values<T, kWidth>;
  constexpr int kSkip = -2;  // the target of a row that is left out
  __shared__ int target[kTile];
  __shared__ float weight[kTile];
  const int thread = threadIdx.x, parts = classes / kWidth;
  const int rows_on = kSumThreads / parts, parts_on = kSumThreads % parts;  // from one pass to the next
  float sum = 0;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile; begin < rows; begin += int64_t{kTile} * gridDim.x) {
    const int here = static_cast<int>(rows - begin < kTile ? rows - begin : kTile);
    __syncthreads();
    if (thread < here) {
      const int64_t box = targets.box(begin + thread);
      const bool ignored = targets.match(begin + thread) == kIgnored;
      target[thread] = ignored ? kSkip : box >= 0 ? static_cast<int>(targets.labels[box]) : -1;
      weight[thread] = targets.weight[(begin + thread) / targets.rows];
    }
    __syncthreads();
    const Part* from = reinterpret_cast<const Part*>(logits + begin * classes);
    Part* to = reinterpret_cast<Part*>(gradient + begin * classes);
    const int end = here * parts;
    int row = thread / parts, part = thread % parts;
    Part next;
    if (thread < end) next = from[thread];
    for (int i = thread; i < end; i += kSumThreads) {
      Part values = next;
      if (i + kSumThreads < end) next = from[i + kSumThreads];
      if (target[row] == kSkip) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values.at[k] = static_cast<T>(0.f);
      } else {
        sum += focal_values<T, kWidth>(values, part * kWidth, target[row], weight[row]);
      }
      to[i] = values;
      row += rows_on;
      part += parts_on;
      if (part >= parts) {
        part -= parts;
        ++row;
      }
    }
  }
  sum = block_sum(sum);
  if (thread == 0) partials[blockIdx.x] = sum;
}

static std::tuple<Tensor, Tensor> focal(const Tensor& logits, const Tensor& matched, const Tensor& labels,
                                        const Tensor& weight, int64_t first) {
  const Focal a(logits, matched, labels, weight, first);
  const OnDevice gpu(logits);
  const int64_t blocks = std::min(ceil_div(a.rows, kTile), kMostPartials);
  const Tensor partials = torch::stable::empty({blocks}, ScalarType::Float, std::nullopt, logits.device());
  float* sums = static_cast<float*>(partials.data_ptr());
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = Pack<T>::size;
    const T* from = static_cast<const T*>(logits.data_ptr());
    T* to = static_cast<T*>(a.gradient.data_ptr());
    const auto unaligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % sizeof(Pack<T>);
    const auto kernel = a.classes % kWidth == 0 && unaligned == 0 ? &focal_kernel<T, kWidth> : &focal_kernel<T, 1>;
    gpu.launch(kernel, blocks, kSumThreads, from, a.targets, a.rows, a.classes, to, sums);
  });
  gpu.launch(&total_kernel, 1, kSumThreads, sums, blocks, static_cast<float*>(a.loss.data_ptr()));
  return {a.loss, a.gradient};
}

}  // namespace detcore

GPU_OPS(m) { m.impl("focal", TORCH_BOX(&detcore::focal)); }
