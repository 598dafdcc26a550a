#include <algorithm>
#include <tuple>
#include <vector>

#include "focal.h"
#include "vectors.h"

namespace detcore {

constexpr int kLanes = 16, kPiece = 512;             // independent sums; logits that are converted at once
constexpr int64_t kRows = 64;                        // rows of a partial sum
constexpr int64_t kMostParts = 64, kLeastCells = 8;  // the same with a bias

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

// The same for any n and type; the rest of the lanes holds logits that add nothing. With a bias the gradient is also
// added to `sums`.
template <typename T>
static float negatives(const T* logits, const float* bias, int n, float scale, T* gradient, float* sums) {
  float x[kPiece], g[kPiece], sum = 0;
  for (int begin = 0; begin < n; begin += kPiece) {
    const int here = std::min(kPiece, n - begin), padded = static_cast<int>(ceil_div(here, kLanes)) * kLanes;
    for (int i = 0; i < here; ++i) x[i] = static_cast<float>(logits[begin + i]);
    for (int i = 0; bias && i < here; ++i) x[i] += bias[begin + i];
    std::fill(x + here, x + padded, -1000.f);
    sum += piece(x, padded, scale, g);
    for (int i = 0; i < here; ++i) gradient[begin + i] = static_cast<T>(g[i]);
    for (int i = 0; bias && i < here; ++i) sums[begin + i] += g[i];
  }
  return sum;
}

// The weighted loss of one row; bias and sums: those of its anchor, or null.
template <typename T>
static float focal_row(const T* logits, const float* bias, int classes, int64_t target, float weight, T* gradient,
                       float* sums) {
  const float unit = weight * focal_constant<T>(), scale = (1 - kAlpha) * unit;
  const auto negative = [&](int from, int to) {
    return negatives(logits + from, bias ? bias + from : nullptr, to - from, scale, gradient + from,
                     bias ? sums + from : nullptr);
  };
  if (target < 0 || target >= classes) return (1 - kAlpha) * weight * negative(0, classes);
  const int at = static_cast<int>(target);
  float others = negative(0, at);
  others += negative(at + 1, classes);
  const Term own = focal_term(-(static_cast<float>(logits[at]) + (bias ? bias[at] : 0.f)));
  const float positive = -kAlpha * unit * own.gradient;
  gradient[at] = static_cast<T>(positive);
  if (bias) sums[at] += positive;
  return weight * ((1 - kAlpha) * others + kAlpha * own.loss);
}

static std::tuple<Tensor, Tensor, Tensor> focal(const Tensor& logits, const Tensor& matched, const Tensor& labels,
                                                const Tensor& weight, int64_t first,
                                                const std::optional<Tensor>& bias) {
  Focal a(logits, matched, labels, weight, first, bias);
  // With a bias a part is cells, so many that the parts' sums take little memory.
  const int64_t part_rows = a.bias ? std::max(ceil_div(a.cells(), kMostParts), kLeastCells) * a.per_cell : kRows;
  std::vector<double> partials(ceil_div(a.rows, part_rows));
  std::vector<float> bias_partials(a.bias ? partials.size() * a.columns : 0);
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(logits.data_ptr());
    T* to = static_cast<T*>(a.gradient.data_ptr());
    torch::stable::parallel_for(0, static_cast<int64_t>(partials.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * part_rows; row < std::min(end * part_rows, a.rows); ++row) {
        const int64_t box = a.targets.box(row), offset = row * a.classes, part = row / part_rows;
        if (a.targets.match(row) == kIgnored) {
          std::fill_n(to + offset, a.classes, zero);
          continue;
        }
        const int64_t target = box >= 0 ? a.targets.labels[box] : -1;
        const int64_t column = offset % a.columns;
        partials[part] += focal_row(from + offset, a.bias ? a.bias + column : nullptr, a.classes, target,
                                    a.targets.weight[row / a.targets.rows], to + offset,
                                    a.bias ? bias_partials.data() + part * a.columns + column : nullptr);
      }
    });
    for (int64_t column = 0; a.bias && column < a.columns; ++column) {
      double sum = 0;
      for (size_t part = 0; part < partials.size(); ++part) sum += bias_partials[part * a.columns + column];
      a.bias_sums()[column] = static_cast<float>(sum / focal_constant<T>());
    }
  });
  double sum = 0;
  for (double partial : partials) sum += partial;
  *static_cast<float*>(a.loss.data_ptr()) = static_cast<float>(sum);
  return {a.loss, a.gradient, a.bias_gradient};
}

}  // namespace detcore

SCHEMAS(m) {
  m.def(
      "focal(Tensor logits, Tensor matched, Tensor labels, Tensor weight, int first, Tensor? bias=None) -> "
      "(Tensor, Tensor, Tensor)");
}
CPU_OPS(m) { m.impl("focal", TORCH_BOX(&detcore::focal)); }
