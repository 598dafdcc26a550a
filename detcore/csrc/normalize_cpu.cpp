#include "normalize.h"

namespace detcore {

static Tensor normalize(const Tensor& images, const Tensor& scale, const Tensor& shift, ScalarType dtype) {
  const Normalize a(images, scale, shift, dtype);
  for_floating(a.out, "the output", [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(a.out.data_ptr());
    torch::stable::parallel_for(0, a.count * a.pixels, 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int c = 0; c < kColours; ++c) {
          const uint8_t value = a.images[source_offset(i / a.pixels, i % a.pixels, c, a.pixels, a.planes)];
          out[i * kColours + c] = normalized<T>(value, a.scale[c], a.shift[c]);
        }
      }
    });
  });
  return a.out;
}

}  // namespace detcore

SCHEMAS(m) { m.def("normalize(Tensor images, Tensor scale, Tensor shift, ScalarType dtype) -> Tensor"); }
CPU_OPS(m) { m.impl("normalize", TORCH_BOX(&detcore::normalize)); }
