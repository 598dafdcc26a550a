#include <algorithm>
#include <tuple>
#include <vector>

#include "focal.h"
#include "vectors.h"

namespace detcore {

constexpr int kLanes = 16, kPiece = 512;  // independent sums; logits that are converted at once
constexpr int64_t kRows = 64;             // rows of a partial sum

// Sum of the losses of n logits, a multiple of kLanes, as targets 0; gradient = scale * their derivatives.
WIDE_VECTORS static float piece(const float* __restrict x, int n, float scale, float* __restrict gradient) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const Term term = focal_term(x[i + k]);
      lanes[k] += term.loss;
      gradient[i + k] = scale * term.gradient;
    }
  }
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// The same for any n and type; the rest of the lanes holds logits that add nothing.
template <typename T>
static float negatives(const T* logits, int n, float scale, T* gradient) {
  float x[kPiece], g[kPiece], sum = 0;
  for (int begin = 0; begin < n; begin += kPiece) {
    const int here = std::min(kPiece, n - begin), padded = static_cast<int>(ceil_div(here, kLanes)) * kLanes;
    for (int i = 0; i < here; ++i) x[i] = static_cast<float>(logits[begin + i]);
    std::fill(x + here, x + padded, -1000.f);
    sum += piece(x, padded, scale, g);
    for (int i = 0; i < here; ++i) gradient[begin + i] = static_cast<T>(g[i]);
  }
  return sum;
}

// The weighted loss of one row.
template <typename T>
static float focal_row(const T* logits, int classes, int64_t target, float weight, T* gradient) {
  const float unit = weight * focal_constant<T>(), scale = (1 - kAlpha) * unit;
  if (target < 0 || target >= classes) return (1 - kAlpha) * weight * negatives(logits, classes, scale, gradient);
  const int at = static_cast<int>(target);
  float others = negatives(logits, at, scale, gradient);
  others += negatives(logits + at + 1, classes - at - 1, scale, gradient + at + 1);
  const Term own = focal_term(-static_cast<float>(logits[at]));
  gradient[at] = static_cast<T>(-kAlpha * unit * own.gradient);
  return weight * ((1 - kAlpha) * others + kAlpha * own.loss);
}

static std::tuple<Tensor, Tensor> focal(const Tensor& logits, const Tensor& matched, const Tensor& labels,
                                        const Tensor& weight, int64_t first) {
  Focal a(logits, matched, labels, weight, first);
  std::vector<double> partials(ceil_div(a.rows, kRows));
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(logits.data_ptr());
    T* to = static_cast<T*>(a.gradient.data_ptr());
    torch::stable::parallel_for(0, static_cast<int64_t>(partials.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kRows; row < std::min(end * kRows, a.rows); ++row) {
        const int64_t box = a.targets.box(row), offset = row * a.classes;
        if (a.targets.match(row) == kIgnored) {
          std::fill_n(to + offset, a.classes, zero);
          continue;
        }
        const int64_t target = box >= 0 ? a.targets.labels[box] : -1;
        partials[row / kRows] +=
            focal_row(from + offset, a.classes, target, a.targets.weight[row / a.targets.rows], to + offset);
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
  m.def("focal(Tensor logits, Tensor matched, Tensor labels, Tensor weight, int first) -> (Tensor, Tensor)");
}
CPU_OPS(m) { m.impl("focal", TORCH_BOX(&detcore::focal)); }
