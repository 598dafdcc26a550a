#include "normalize.h"

namespace detcore {

// A thread writes kColours packs: the values of as many pixels as a pack holds. pixels is a multiple of that, or the
// rest of each image is written value by value.
template <typename T>
__global__ void normalize_kernel(const uint8_t* images, const float* scale, const float* shift, T* out, int64_t count,
                                 int64_t pixels, bool planes) {
  constexpr int kPixels = Pack<T>::size;
  const int64_t groups = (pixels + kPixels - 1) / kPixels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count * groups) return;
  const int64_t image = i / groups, first = i % groups * kPixels;
  const int here = static_cast<int>(pixels - first < kPixels ? pixels - first : kPixels);
  Pack<T> packs[kColours];
  T* values = packs[0].at;
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    if (p >= here) break;
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
      const uint8_t value = images[source_offset(image, first + p, c, pixels, planes)];
      values[p * kColours + c] = normalized<T>(value, scale[c], shift[c]);
    }
  }
  T* to = out + (image * pixels + first) * kColours;
  if (pixels % kPixels == 0) {
    for (int c = 0; c < kColours; ++c) reinterpret_cast<Pack<T>*>(to)[c] = packs[c];
  } else {
    for (int k = 0; k < here * kColours; ++k) to[k] = values[k];
  }
}

static Tensor normalize(const Tensor& images, const Tensor& scale, const Tensor& shift, ScalarType dtype) {
  const Normalize a(images, scale, shift, dtype);
  const OnDevice gpu(images);
  for_floating(a.out, "the output", [&](auto zero) {
    using T = decltype(zero);
    const int64_t threads = a.count * ceil_div(a.pixels, Pack<T>::size);
    gpu.launch(&normalize_kernel<T>, ceil_div(threads, 256), 256, a.images, a.scale, a.shift,
               static_cast<T*>(a.out.data_ptr()), a.count, a.pixels, a.planes);
  });
  return a.out;
}

}  // namespace detcore

GPU_OPS(m) { m.impl("normalize", TORCH_BOX(&detcore::normalize)); }
