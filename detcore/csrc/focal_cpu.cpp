#include <algorithm>
#include <tuple>
#include <vector>

#include "focal.h"
#include "vectors.h"

namespace detcore {

constexpr int kLanes = 16, kPiece = 512;             // independent sums; logits that are converted at once
constexpr int64_t kRows = 64;                        // rows of a partial sum
constexpr int64_t kMostParts = 64, kLeastCells = 8;  // the same with a bias

// Sum of the losses of n logits as targets 0; gradient = scale * their derivatives.
template <typename F>
WIDE_VECTORS static float piece(F of, const float* __restrict x, int n, float scale, float* __restrict gradient) {
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) {
      const Term term = of(x[i + k]);
      lanes[k] += term.loss;
      gradient[i + k] = scale * term.gradient;
    }
  }
  for (int k = 0; i + k < n; ++k) {
    const Term term = of(x[i + k]);
    lanes[k] += term.loss;
    gradient[i + k] = scale * term.gradient;
  }
  float sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

// The same for any n and type. With a bias the gradient is also added to `sums`.
template <typename F, typename T>
static float negatives(F of, const T* logits, const float* bias, int n, float scale, T* gradient, float* sums) {
  float x[kPiece], g[kPiece], sum = 0;
  for (int begin = 0; begin < n; begin += kPiece) {
    const int here = std::min(kPiece, n - begin);
    for (int i = 0; i < here; ++i) x[i] = static_cast<float>(logits[begin + i]);
    for (int i = 0; bias && i < here; ++i) x[i] += bias[begin + i];
    sum += piece(of, x, here, scale, g);
    for (int i = 0; i < here; ++i) gradient[begin + i] = static_cast<T>(g[i]);
    for (int i = 0; bias && i < here; ++i) sums[begin + i] += g[i];
  }
  return sum;
}

// The weighted loss of one row; bias and sums: those of its anchor, or null.
template <typename F, typename T>
static float focal_row(F of, float alpha, float constant, const T* logits, const float* bias, int classes,
                       int64_t target, float weight, T* gradient, float* sums) {
  const float unit = weight * constant, scale = (1 - alpha) * unit;
  const auto negative = [&](int from, int to) {
    return negatives(of, logits + from, bias ? bias + from : nullptr, to - from, scale, gradient + from,
                     bias ? sums + from : nullptr);
  };
  if (target < 0 || target >= classes) return (1 - alpha) * weight * negative(0, classes);
  const int at = static_cast<int>(target);
  float others = negative(0, at);
  others += negative(at + 1, classes);
  const Term own = of(-(static_cast<float>(logits[at]) + (bias ? bias[at] : 0.f)));
  const float positive = -alpha * unit * own.gradient;
  gradient[at] = static_cast<T>(positive);
  if (bias) sums[at] += positive;
  return weight * ((1 - alpha) * others + alpha * own.loss);
}

static std::tuple<Tensor, Tensor, Tensor> focal(const Tensor& logits, const Tensor& matched, const Tensor& labels,
                                                const Tensor& weight, int64_t first, double alpha, double gamma,
                                                double smoothing, const std::optional<Tensor>& bias) {
  Focal a(logits, matched, labels, weight, first, alpha, gamma, smoothing, bias);
  // With a bias a part is cells, so many that the parts' sums take little memory.
  const int64_t part_rows = a.bias ? std::max(ceil_div(a.cells(), kMostParts), kLeastCells) * a.per_cell : kRows;
  std::vector<double> partials(ceil_div(a.rows, part_rows));
  std::vector<float> bias_partials(a.bias ? partials.size() * a.columns : 0);
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(logits.data_ptr());
    T* to = static_cast<T*>(a.gradient.data_ptr());
    const float constant = a.constant<T>();
    const auto rows = [&](auto of, int64_t begin, int64_t end) {
      for (int64_t row = begin * part_rows; row < std::min(end * part_rows, a.rows); ++row) {
        const int64_t box = a.targets.box(row), offset = row * a.classes, part = row / part_rows;
        if (a.targets.match(row) == kIgnored) {
          std::fill_n(to + offset, a.classes, zero);
          continue;
        }
        const int64_t target = box >= 0 ? a.targets.labels[box] : -1;
        const int64_t column = offset % a.columns;
        partials[part] += focal_row(of, a.alpha, constant, from + offset, a.bias ? a.bias + column : nullptr, a.classes,
                                    target, a.targets.weight[row / a.targets.rows], to + offset,
                                    a.bias ? bias_partials.data() + part * a.columns + column : nullptr);
      }
    };
    torch::stable::parallel_for(0, static_cast<int64_t>(partials.size()), 1, [&](int64_t begin, int64_t end) {
      a.with_term([&](auto of) { rows(of, begin, end); });
    });
    for (int64_t column = 0; a.bias && column < a.columns; ++column) {
      double sum = 0;
      for (size_t part = 0; part < partials.size(); ++part) sum += bias_partials[part * a.columns + column];
      a.bias_sums()[column] = static_cast<float>(sum / constant);
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
      "focal(Tensor logits, Tensor matched, Tensor labels, Tensor weight, int first, float alpha, float gamma, "
      "float smoothing, Tensor? bias=None) -> (Tensor, Tensor, Tensor)");
}
CPU_OPS(m) { m.impl("focal", TORCH_BOX(&detcore::focal)); }
