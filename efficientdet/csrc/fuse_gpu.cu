#include "fuse.h"

namespace detcore {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 1024;  // whose sums are added at last

template <typename T, bool kWhole>
__global__ void fuse_kernel(Node n, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n.units(n.height, n.width)) {
    forward_unit<T, kWhole, kGroup>(n, n.unit(static_cast<int>(i), n.height, n.width), out);
  }
}

// sums: [maps, blocks], of the weights' gradients, or null.
template <typename T, bool kWhole>
__global__ void fuse_backward_kernel(Node n, const T* grad, T* spread, float* sums) {
  __shared__ float shared[kMostMaps][kThreads];
  float own[kMostMaps] = {};
  const int64_t units = n.units(n.height, n.width), stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < units; i += stride) {
    Sum<kGroup> s;
    backward_unit<T, kWhole, kGroup>(n, n.unit(static_cast<int>(i), n.height, n.width), grad, spread, s);
    UNROLL for (int m = 0; m < kMostMaps; ++m) {
      if (m >= n.count) continue;
      for (int k = 0; k < kGroup; ++k) own[m] += s.sum[k] * s.maps[m][k];
    }
  }
  if (!sums) return;
  for (int m = 0; m < kMostMaps; ++m) shared[m][threadIdx.x] = own[m];
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      for (int m = 0; m < kMostMaps; ++m) shared[m][threadIdx.x] += shared[m][threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0) {
    for (int m = 0; m < n.count; ++m) sums[static_cast<int64_t>(m) * gridDim.x + blockIdx.x] = shared[m][0];
  }
}

// A block for each map.
__global__ void fuse_weights_kernel(const float* sums, int count, float* weight_grad) {
  __shared__ double shared[kThreads];
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += sums[static_cast<int64_t>(blockIdx.x) * count + i];
  shared[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) weight_grad[blockIdx.x] = static_cast<float>(shared[0]);
}

template <typename T, bool kWhole>
__global__ void fuse_gather_kernel(Node n, int m, const T* spread) {
  const int rows = n.maps[m].height, columns = n.maps[m].width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n.units(rows, columns)) {
    gather_unit<T, kWhole, kGroup>(n, m, n.unit(static_cast<int>(i), rows, columns), spread);
  }
}

static Tensor fuse(std::vector<Tensor> maps, std::optional<Tensor> weights, std::vector<int64_t> how, bool same,
                   int64_t activation) {
  const Fuse a(maps, weights, how, same, activation);
  const Node& n = a.node;
  const Tensor out = torch::stable::empty_like(maps[0]);
  const bool whole = a.rows && a.aligned && reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0;
  const OnDevice gpu(out);
  for_floating(out, "the maps", [&](auto zero) {
    using T = decltype(zero);
    gpu.launch(whole ? &fuse_kernel<T, true> : &fuse_kernel<T, false>, ceil_div(n.units(n.height, n.width), kThreads),
               kThreads, n, static_cast<T*>(out.data_ptr()));
  });
  return out;
}

template <typename T, bool kWhole>
static void backward(const OnDevice& gpu, const FuseBackward& a, const Tensor& grad) {
  const Node& n = a.fuse.node;
  T* spread = a.template spread_values<T>();
  const int64_t wanted = ceil_div(n.units(n.height, n.width), kThreads), blocks = wanted < kBlocks ? wanted : kBlocks;
  const Tensor sums =
      torch::stable::empty({a.weight_grad ? n.count * blocks : 0}, ScalarType::Float, std::nullopt, grad.device());
  float* partial = static_cast<float*>(sums.data_ptr());
  gpu.launch(&fuse_backward_kernel<T, kWhole>, blocks, kThreads, n, static_cast<const T*>(grad.data_ptr()), spread,
             a.weight_grad ? partial : nullptr);
  if (a.weight_grad) gpu.launch(&fuse_weights_kernel, n.count, kThreads, partial, blocks, a.weight_grad);
  for (int m = 0; m < n.count; ++m) {
    const Map& map = n.maps[m];
    if (map.how == kOwn) continue;
    gpu.launch(&fuse_gather_kernel<T, kWhole>, ceil_div(n.units(map.height, map.width), kThreads), kThreads, n, m,
               spread);
  }
}

static void fuse_backward_(std::vector<Tensor> grads, Tensor weight_grad, Tensor grad, std::vector<Tensor> maps,
                           std::optional<Tensor> weights, std::vector<int64_t> how, bool same, int64_t activation) {
  const FuseBackward a(Fuse(maps, weights, how, same, activation), grads, weight_grad, grad);
  const OnDevice gpu(grad);
  for_floating(grad, "the gradient", [&](auto zero) {
    using T = decltype(zero);
    a.fuse.rows&& a.fuse.aligned ? backward<T, true>(gpu, a, grad) : backward<T, false>(gpu, a, grad);
  });
}

}  // namespace detcore

GPU_OPS(m) {
  m.impl("fuse", TORCH_BOX(&detcore::fuse));
  m.impl("fuse_backward_", TORCH_BOX(&detcore::fuse_backward_));
}
