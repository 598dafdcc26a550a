#include "normalize.h"

namespace detcore {

static Tensor normalize(const Tensor& images, const Tensor& scale, const Tensor& shift, ScalarType dtype,
                        const std::optional<Tensor>& flip, int64_t channels) {
  const Normalize a(images, scale, shift, dtype, flip, channels);
  for_floating(a.out, "the output", [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(a.out.data_ptr());
    const int64_t pixels = a.source.pixels;
    torch::stable::parallel_for(0, a.count * pixels, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int c = 0; c < channels; ++c) {
          out[i * channels + c] = channel_value<T>(a.source, a.scale, a.shift, i / pixels, i % pixels, c);
        }
      }
    });
  });
  return a.out;
}

}  // namespace detcore

SCHEMAS(m) {
  m.def(
      "normalize(Tensor images, Tensor scale, Tensor shift, ScalarType dtype, Tensor? flip=None, int channels=3) -> "
      "Tensor");
}
CPU_OPS(m) { m.impl("normalize", TORCH_BOX(&detcore::normalize)); }
