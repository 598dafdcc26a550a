#include "pool_bias_relu.h"

namespace detcore {

static Tensor pool_bias_relu(const Tensor& x, const Tensor& bias) {
  const PoolBiasRelu a(x, bias);
  const bool whole = a.whole(x);
  for_floating(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.data_ptr());
    T* to = static_cast<T*>(a.out.data_ptr());
    torch::stable::parallel_for(0, a.pool.groups(), 1 << 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        whole ? pool_group<T, true>(a.pool, from, a.bias, to, static_cast<int>(i))
              : pool_group<T, false>(a.pool, from, a.bias, to, static_cast<int>(i));
      }
    });
  });
  return a.out;
}

}  // namespace detcore

SCHEMAS(m) { m.def("pool_bias_relu(Tensor x, Tensor bias) -> Tensor"); }
CPU_OPS(m) { m.impl("pool_bias_relu", TORCH_BOX(&detcore::pool_bias_relu)); }
