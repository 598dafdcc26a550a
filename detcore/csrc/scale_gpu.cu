#include <algorithm>

#include "scale.h"

namespace detcore {

constexpr int kThreads = 256, kMostBlocks = 2048;

// Packs first, then what is left, or everything where the address does not allow packs.
template <typename T>
__global__ void scale_kernel(T* values, int64_t packs, int64_t count, const float* upstream, float constant) {
  const float factor = *upstream / constant;
  if (factor == 1.f) return;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread; i < packs; i += threads) {
    Pack<T> pack = reinterpret_cast<Pack<T>*>(values)[i];
#pragma unroll
    for (int k = 0; k < Pack<T>::size; ++k) pack.at[k] = static_cast<T>(static_cast<float>(pack.at[k]) * factor);
    reinterpret_cast<Pack<T>*>(values)[i] = pack;
  }
  for (int64_t i = packs * Pack<T>::size + thread; i < count; i += threads) {
    values[i] = static_cast<T>(static_cast<float>(values[i]) * factor);
  }
}

static void scale(Tensor gradient, const Tensor& upstream, double constant) {
  const Scale a(gradient, upstream, constant);
  const OnDevice gpu(gradient);
  for_floating(gradient, "gradient", [&](auto zero) {
    using T = decltype(zero);
    T* values = static_cast<T*>(gradient.data_ptr());
    const int64_t count = gradient.numel();
    const bool aligned = reinterpret_cast<uintptr_t>(values) % sizeof(Pack<T>) == 0;
    const int64_t packs = aligned ? count / Pack<T>::size : 0;
    const int64_t blocks = std::min<int64_t>(ceil_div(aligned ? packs + 1 : count, kThreads), kMostBlocks);
    gpu.launch(&scale_kernel<T>, blocks, kThreads, values, packs, count, a.upstream, a.constant);
  });
}

}  // namespace detcore

GPU_OPS(m) { m.impl("scale_", TORCH_BOX(&detcore::scale)); }
