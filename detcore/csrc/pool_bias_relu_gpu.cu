#include "pool_bias_relu.h"

namespace detcore {

constexpr int kThreads = 256;

// Neighbouring threads have neighbouring groups, so that the values which windows share come from the caches.
template <typename T, bool kWhole>
__global__ void pool_bias_relu_kernel(Pool pool, const T* x, const float* bias, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < pool.groups()) pool_group<T, kWhole>(pool, x, bias, out, static_cast<int>(i));
}

static Tensor pool_bias_relu(const Tensor& x, const Tensor& bias) {
  const PoolBiasRelu a(x, bias);
  const OnDevice gpu(x);
  for_floating(x, "x", [&](auto zero) {
    using T = decltype(zero);
    gpu.launch(a.whole(x) ? &pool_bias_relu_kernel<T, true> : &pool_bias_relu_kernel<T, false>,
               ceil_div(a.pool.groups(), kThreads), kThreads, a.pool, static_cast<const T*>(x.data_ptr()), a.bias,
               static_cast<T*>(a.out.data_ptr()));
  });
  return a.out;
}

}  // namespace detcore

GPU_OPS(m) { m.impl("pool_bias_relu", TORCH_BOX(&detcore::pool_bias_relu)); }
