#include <algorithm>
#include <tuple>

#include "box.h"
#include "sum.h"

namespace detcore {

// A thread for each row; most rows are background and write zeros.
template <typename T>
__global__ void box_kernel(const T* deltas, Targets targets, const Corners* anchors, const Corners* boxes, int64_t rows,
                           T* gradient, float* partials) {
  float sum = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; row < rows;
       row += static_cast<int64_t>(kSumThreads) * gridDim.x) {
    sum += box_row(targets, anchors, boxes, deltas, row, gradient);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

static std::tuple<Tensor, Tensor> box(const Tensor& deltas, const Tensor& anchors, const Tensor& boxes,
                                      const Tensor& matched, const Tensor& labels, const Tensor& weight,
                                      int64_t first) {
  const BoxLoss a(deltas, anchors, boxes, matched, labels, weight, first);
  const OnDevice gpu(deltas);
  const int64_t blocks = std::min(ceil_div(a.rows, kSumThreads), kMostPartials);
  const Tensor partials = torch::stable::empty({blocks}, ScalarType::Float, std::nullopt, deltas.device());
  float* sums = static_cast<float*>(partials.data_ptr());
  for_floating(deltas, "deltas", [&](auto zero) {
    using T = decltype(zero);
    gpu.launch(&box_kernel<T>, blocks, kSumThreads, static_cast<const T*>(deltas.data_ptr()), a.targets, a.anchors,
               a.boxes, a.rows, static_cast<T*>(a.gradient.data_ptr()), sums);
  });
  gpu.launch(&total_kernel, 1, kSumThreads, sums, blocks, static_cast<float*>(a.loss.data_ptr()));
  return {a.loss, a.gradient};
}

}  // namespace detcore

GPU_OPS(m) { m.impl("box", TORCH_BOX(&detcore::box)); }
