#include <algorithm>
#include <tuple>
#include <vector>

#include "box.h"

namespace detcore {

constexpr int64_t kRows = 2048;  // rows of a partial sum

static std::tuple<Tensor, Tensor> box(const Tensor& deltas, const Tensor& anchors, const Tensor& boxes,
                                      const Tensor& matched, const Tensor& labels, const Tensor& weight,
                                      int64_t first) {
  BoxLoss a(deltas, anchors, boxes, matched, labels, weight, first);
  std::vector<double> partials(ceil_div(a.rows, kRows));
  for_floating(deltas, "deltas", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(deltas.data_ptr());
    T* to = static_cast<T*>(a.gradient.data_ptr());
    torch::stable::parallel_for(0, static_cast<int64_t>(partials.size()), 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kRows; row < std::min(end * kRows, a.rows); ++row) {
        partials[row / kRows] += box_row(a.targets, a.anchors, a.boxes, from, row, to);
      }
    });
  });
  double sum = 0;
  for (double partial : partials) sum += partial;
  *static_cast<float*>(a.loss.data_ptr()) = static_cast<float>(sum);
  return {a.loss, a.gradient};
}

}  // namespace detcore

SCHEMAS(m) {
  m.def(
      "box(Tensor deltas, Tensor anchors, Tensor boxes, Tensor matched, Tensor labels, Tensor weight, int first)"
      " -> (Tensor, Tensor)");
}
CPU_OPS(m) { m.impl("box", TORCH_BOX(&detcore::box)); }
