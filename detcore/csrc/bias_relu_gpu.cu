#include <algorithm>

#include "bias_relu.h"

namespace detcore {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 4096;  // enough to fill a GPU; threads then go on by strides
constexpr int64_t kSumBlocks = 1024;

// How many blocks an SM of 2048 threads (A100, H100, B200) shall hold, so that 132 SMs run kSumBlocks in one wave.
// Other GPUs have fewer threads, for which ptxas would refuse the number.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
constexpr int kResident = 8;
#else
constexpr int kResident = 1;
#endif

// Groups [start, groups) of a thread, one stride apart. kWhole: channels_last with channels % 8 == 0 and aligned
// tensors, so that a group has 8 neighbouring channels; the channel is then carried along, without divisions.
template <typename T, bool kWhole>
__global__ void bias_relu_kernel(const T* x, const float* bias, const T* residual, T* out, uint8_t* bits,
                                 Places places) {
  const int64_t groups = (places.numel + kGroup - 1) / kGroup;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int row = kWhole ? static_cast<int>(places.channels / kGroup) : 1;
  const int step = static_cast<int>(stride % row);
  for (int c = static_cast<int>(i % row); i < groups; i += stride) {
    const int64_t first = i * kGroup;
    const int count = static_cast<int>(places.numel - first < kGroup ? places.numel - first : kGroup);
    Group<T, kWhole> group, other;
    Group<float, kWhole> shift;
    float sums[kGroup];
    group.load(x + first, count);
    if (residual) other.load(residual + first, count);
    if (kWhole) {
      shift.load(bias + static_cast<int64_t>(c) * kGroup, kGroup);
    } else {
      for (int k = 0; k < kGroup; ++k) shift.at[k] = k < count ? bias[places.channel(first + k)] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      sums[k] = residual ? bias_added(group.at[k], shift.at[k], other.at[k]) : bias_added(group.at[k], shift.at[k]);
    }
    const uint8_t byte = rectify(sums, group.at);
    group.store(out + first, count);
    if (bits) bits[i] = byte;
    c += step;
    if (c >= row) c -= row;
  }
}

template <typename T, bool kWhole, int kCount, typename Mask>
__global__ void mask_kernel(Gradients<T> from, Mask mask, T* dx, int64_t numel) {
  const int64_t groups = (numel + kGroup - 1) / kGroup;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < groups; i += stride) {
    const int64_t first = i * kGroup;
    const int count = static_cast<int>(numel - first < kGroup ? numel - first : kGroup);
    Group<T, kWhole> group;
    mask_gradients<T, kWhole, kCount>(from, first, count, mask.template byte<kWhole>(i, count), group);
    group.store(dx + first, count);
  }
}

// The same for one gradient, with partial sums of it. Tensors are rows of `row` groups. A block has `lanes` (a power of
// two) neighbouring groups of its part of the rows; partial: [parts, row * 8], each value the sum over one part.
// kResident leaves 32 registers to a thread, too few for float.
template <typename T, typename Mask>
__global__ __launch_bounds__(kThreads,
                             sizeof(T) == 4 ? 1 : kResident) void mask_sums_kernel(Gradients<T> from, Mask mask, T* dx,
                                                                                   float* partial, int64_t rows,
                                                                                   int row, int lanes, int64_t parts) {
  __shared__ float shared[kGroup * kThreads];
  const int across = (row + lanes - 1) / lanes;
  const int group_in_row = static_cast<int>(blockIdx.x % across) * lanes + static_cast<int>(threadIdx.x) % lanes;
  const int at_once = kThreads / lanes, line = static_cast<int>(threadIdx.x) / lanes;
  const int64_t part = blockIdx.x / across, length = (rows + parts - 1) / parts;
  const int64_t end = (part + 1) * length < rows ? (part + 1) * length : rows;
  float sums[kGroup] = {};
  if (group_in_row < row) {
    for (int64_t r = part * length + line; r < end; r += at_once) {
      const int64_t i = r * row + group_in_row;
      Group<T, true> group;
      mask_gradients<T, true, 1>(from, i * kGroup, kGroup, mask.template byte<true>(i, kGroup), group);
      group.store(dx + i * kGroup, kGroup);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) sums[k] += static_cast<float>(group.at[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) shared[k * kThreads + threadIdx.x] = sums[k];
  __syncthreads();
  for (int half = at_once / 2; half > 0; half /= 2) {
    if (line < half) {
      for (int k = 0; k < kGroup; ++k) {
        float* mine = shared + k * kThreads + threadIdx.x;
        mine[0] += mine[half * lanes];
      }
    }
    __syncthreads();
  }
  if (line == 0 && group_in_row < row) {
    for (int k = 0; k < kGroup; ++k) {
      partial[(part * row + group_in_row) * kGroup + k] = shared[k * kThreads + threadIdx.x];
    }
  }
}

// A block adds the values of one channel, in a fixed order.
template <typename T>
__global__ void channel_sums_kernel(const T* values, float* sums, Places places) {
  __shared__ float shared[kThreads];
  const int64_t count = places.numel / places.channels;
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
    const int64_t outer = k / places.inner, inner = k % places.inner;
    sum += static_cast<float>(values[(outer * places.channels + blockIdx.x) * places.inner + inner]);
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

static bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

static bool whole_rows(const Places& p) { return p.inner == 1 && p.channels % kGroup == 0; }

static int64_t blocks_for(int64_t numel) {
  const int64_t all = ceil_div(ceil_div(numel, kGroup), kThreads);
  return all < kBlocks ? all : kBlocks;
}

static std::tuple<Tensor, Tensor> bias_relu(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual,
                                            bool keep) {
  const BiasRelu a(x, bias, residual, keep);
  const OnDevice gpu(x);
  const bool whole = whole_rows(a.places) && aligned(a.x) && aligned(a.residual) && aligned(a.bias);
  for_floating(x, "x", [&](auto zero) {
    using T = decltype(zero);
    gpu.launch(whole ? &bias_relu_kernel<T, true> : &bias_relu_kernel<T, false>, blocks_for(a.places.numel), kThreads,
               static_cast<const T*>(a.x), a.bias, static_cast<const T*>(a.residual), static_cast<T*>(a.out.data_ptr()),
               a.bits(), a.places);
  });
  return {a.out, a.mask};
}

// Gradient and partial sums in one pass, then the sums of the partial sums.
template <typename T, typename Mask>
static void backward_with_sums(const OnDevice& gpu, const BiasReluBackward& a, const Mask& mask, T* dx) {
  const int64_t channels = a.places.channels, rows = a.places.numel / channels;
  const int row = static_cast<int>(channels / kGroup);
  int lanes = 1;
  while (lanes < row && lanes < 32) lanes *= 2;
  const int64_t across = ceil_div(row, lanes), at_most = ceil_div(rows, 4 * kThreads / lanes);
  const int64_t parts = at_most < ceil_div(kSumBlocks, across) ? at_most : ceil_div(kSumBlocks, across);
  const Tensor partial = torch::stable::empty({parts, channels, 1, 1}, ScalarType::Float, std::nullopt, a.dx.device());
  const float* sums = static_cast<const float*>(partial.data_ptr());
  gpu.launch(&mask_sums_kernel<T, Mask>, parts * across, kThreads, a.gradients<T>(), mask, dx,
             static_cast<float*>(partial.data_ptr()), rows, row, lanes, parts);
  gpu.launch(&channel_sums_kernel<float>, channels, kThreads, sums, a.sums(), Places(partial));
}

template <typename T, int kCount, typename Mask>
static void backward(const BiasReluBackward& a, const Mask& mask, const OnDevice& gpu) {
  T* dx = static_cast<T*>(a.dx.data_ptr());
  const bool alike =
      std::all_of(a.grads.begin(), a.grads.end(), aligned) && aligned(dx) && (!a.shown || aligned(a.mask));
  if (kCount == 1 && a.sums() && a.places.numel > 0 && alike && whole_rows(a.places)) {
    return backward_with_sums(gpu, a, mask, dx);
  }
  const bool whole = alike && a.places.numel % kGroup == 0;
  gpu.launch(whole ? &mask_kernel<T, true, kCount, Mask> : &mask_kernel<T, false, kCount, Mask>,
             blocks_for(a.places.numel), kThreads, a.gradients<T>(), mask, dx, a.places.numel);
  if (a.sums()) {
    gpu.launch(&channel_sums_kernel<T>, a.places.channels, kThreads, static_cast<const T*>(dx), a.sums(), a.places);
  }
}

static std::tuple<Tensor, Tensor> bias_relu_backward(const Tensor& grad, const Tensor& mask, bool sums,
                                                     const std::optional<Tensor>& second,
                                                     const std::optional<Tensor>& third) {
  const BiasReluBackward a(grad, mask, sums, second, third);
  const OnDevice gpu(grad);
  for_floating(grad, "the gradient", [&](auto zero) {
    using T = decltype(zero);
    a.for_kind<T>([&](auto count, auto mask) { backward<T, count.value>(a, mask, gpu); });
  });
  return {a.dx, a.dbias};
}

}  // namespace detcore

GPU_OPS(m) {
  m.impl("bias_relu", TORCH_BOX(&detcore::bias_relu));
  m.impl("bias_relu_backward", TORCH_BOX(&detcore::bias_relu_backward));
}
