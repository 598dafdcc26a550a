#include <algorithm>
#include <vector>

#include "fuse.h"
#include "vectors.h"

namespace detcore {

constexpr int kWide = 32;            // channels at once
constexpr int64_t kGrain = 1 << 14;  // values a thread takes at least

// Calls f with each unit of a row, and with whether it has all of its channels and they follow each other.
template <typename F>
static inline void for_row(const Node& n, int image, int row, int columns, F&& f) {
  for (int column = 0; column < columns; ++column) {
    for (int channel = 0; channel < n.channels; channel += kWide) {
      const Unit u{image, row, column, channel, std::min(kWide, n.channels - channel)};
      if (n.channels_last && u.count == kWide) {
        f(u, std::true_type());
      } else {
        f(u, std::false_type());
      }
    }
  }
}

// Calls f with the image and the row of each row of a map.
template <typename F>
static void for_rows(const Node& n, int rows, int columns, F&& f) {
  const int64_t values = std::max<int64_t>(1, static_cast<int64_t>(columns) * n.channels);
  torch::stable::parallel_for(0, static_cast<int64_t>(n.images) * rows, ceil_div(kGrain, values),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  f(static_cast<int>(i / rows), static_cast<int>(i % rows));
                                }
                              });
}

template <typename T>
WIDE_VECTORS FLAT static void forward_row(const Node& n, int image, int row, T* out) {
  for_row(n, image, row, n.width, [&](const Unit& u, auto whole) { forward_unit<T, whole.value, kWide>(n, u, out); });
}

// sums: of this row, one for each map.
template <typename T>
WIDE_VECTORS FLAT static void backward_row(const Node& n, int image, int row, const T* grad, T* spread, float* sums) {
  float lanes[kMostMaps][kWide] = {};
  for_row(n, image, row, n.width, [&](const Unit& u, auto whole) {
    Sum<kWide> s;
    backward_unit<T, whole.value, kWide>(n, u, grad, spread, s);
    for (int m = 0; m < kMostMaps; ++m) {
      if (m >= n.count) continue;
      for (int k = 0; k < kWide; ++k) lanes[m][k] += s.sum[k] * s.maps[m][k];
    }
  });
  for (int m = 0; m < kMostMaps; ++m) {
    sums[m] = 0.0f;
    for (const float lane : lanes[m]) sums[m] += lane;
  }
}

template <typename T>
WIDE_VECTORS FLAT static void gather_row(const Node& n, int m, int image, int row, const T* spread) {
  for_row(n, image, row, n.maps[m].width,
          [&](const Unit& u, auto whole) { gather_unit<T, whole.value, kWide>(n, m, u, spread); });
}

template <typename T>
static void backward(const FuseBackward& a, const T* grad) {
  const Node& n = a.fuse.node;
  T* spread = a.template spread_values<T>();
  std::vector<float> sums(static_cast<size_t>(n.images) * n.height * kMostMaps);
  for_rows(n, n.height, n.width, [&](int image, int row) {
    const size_t line = static_cast<size_t>(image) * n.height + row;
    backward_row<T>(n, image, row, grad, spread, &sums[line * kMostMaps]);
  });
  for (int m = 0; m < n.count; ++m) {
    const Map& map = n.maps[m];
    if (map.how != kOwn) {
      for_rows(n, map.height, map.width, [&](int image, int row) { gather_row<T>(n, m, image, row, spread); });
    }
    if (a.weight_grad) {
      double sum = 0.0;
      for (size_t i = m; i < sums.size(); i += kMostMaps) sum += sums[i];
      a.weight_grad[m] = static_cast<float>(sum);
    }
  }
}

static Tensor fuse(std::vector<Tensor> maps, std::optional<Tensor> weights, std::vector<int64_t> how, bool same,
                   int64_t activation) {
  const Fuse a(maps, weights, how, same, activation);
  const Node& n = a.node;
  const Tensor out = torch::stable::empty_like(maps[0]);
  for_floating(out, "the maps", [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.data_ptr());
    for_rows(n, n.height, n.width, [&](int image, int row) { forward_row(n, image, row, to); });
  });
  return out;
}

static void fuse_backward_(std::vector<Tensor> grads, Tensor weight_grad, Tensor grad, std::vector<Tensor> maps,
                           std::optional<Tensor> weights, std::vector<int64_t> how, bool same, int64_t activation) {
  const FuseBackward a(Fuse(maps, weights, how, same, activation), grads, weight_grad, grad);
  for_floating(grad, "the gradient", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(grad.data_ptr());
    backward(a, from);
  });
}

}  // namespace detcore

SCHEMAS(m) {
  m.def("fuse(Tensor[] maps, Tensor? weights, int[] how, bool same, int activation) -> Tensor");
  m.def(
      "fuse_backward_(Tensor(a!)[] grads, Tensor(b!) weight_grad, Tensor grad, Tensor[] maps, Tensor? weights, "
      "int[] how, bool same, int activation) -> ()");
}
CPU_OPS(m) {
  m.impl("fuse", TORCH_BOX(&detcore::fuse));
  m.impl("fuse_backward_", TORCH_BOX(&detcore::fuse_backward_));
}
