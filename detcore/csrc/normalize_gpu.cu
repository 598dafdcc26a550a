#include "normalize.h"

namespace detcore {

// A thread writes kChannels packs: the values of as many pixels as a pack holds. pixels is a multiple of that, or the
// values are written one by one.
template <typename T, int kChannels>
__global__ void normalize_kernel(Source source, const float* scale, const float* shift, T* out, int64_t count) {
  constexpr int kPixels = Pack<T>::size;
  const int64_t pixels = source.pixels, groups = (pixels + kPixels - 1) / kPixels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count * groups) return;
  const int64_t image = i / groups, first = i % groups * kPixels;
  const int here = static_cast<int>(pixels - first < kPixels ? pixels - first : kPixels);
  Pack<T> packs[kChannels];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    if (p >= here) break;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const int k = p * kChannels + c;
      packs[k / kPixels].at[k % kPixels] = channel_value<T>(source, scale, shift, image, first + p, c);
    }
  }
  T* to = out + (image * pixels + first) * kChannels;
  if (pixels % kPixels == 0) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) reinterpret_cast<Pack<T>*>(to)[c] = packs[c];
  } else {
#pragma unroll
    for (int k = 0; k < kPixels * kChannels; ++k) {
      if (k < here * kChannels) to[k] = packs[k / kPixels].at[k % kPixels];
    }
  }
}

static Tensor normalize(const Tensor& images, const Tensor& scale, const Tensor& shift, ScalarType dtype,
                        const std::optional<Tensor>& flip, int64_t channels) {
  const Normalize a(images, scale, shift, dtype, flip, channels);
  const OnDevice gpu(images);
  for_floating(a.out, "the output", [&](auto zero) {
    using T = decltype(zero);
    const int64_t threads = a.count * ceil_div(a.source.pixels, Pack<T>::size);
    const auto kernel = channels == 8   ? &normalize_kernel<T, 8>
                        : channels == 4 ? &normalize_kernel<T, 4>
                                        : &normalize_kernel<T, kColours>;
    gpu.launch(kernel, ceil_div(threads, 256), 256, a.source, a.scale, a.shift, static_cast<T*>(a.out.data_ptr()),
               a.count);
  });
  return a.out;
}

}  // namespace detcore

GPU_OPS(m) { m.impl("normalize", TORCH_BOX(&detcore::normalize)); }
