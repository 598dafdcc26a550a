#include "scale.h"

namespace detcore {

static void scale(Tensor gradient, const Tensor& upstream, double constant) {
  const Scale a(gradient, upstream, constant);
  const float factor = *a.upstream / a.constant;
  if (factor == 1.f) return;
  for_floating(gradient, "gradient", [&](auto zero) {
    using T = decltype(zero);
    T* values = static_cast<T*>(gradient.data_ptr());
    torch::stable::parallel_for(0, gradient.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[i] = static_cast<T>(static_cast<float>(values[i]) * factor);
    });
  });
}

}  // namespace detcore

SCHEMAS(m) { m.def("scale_(Tensor(a!) gradient, Tensor upstream, float constant) -> ()"); }
CPU_OPS(m) { m.impl("scale_", TORCH_BOX(&detcore::scale)); }
