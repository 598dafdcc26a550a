#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

#include "multibox_loss.h"
#include "rows.h"

namespace detcore {

constexpr int64_t kChunk = 64;  // rows of a partial sum

// What pass 1 leaves of the logits of all rows.
struct Rows {
  std::vector<Softmax> softmax;
  std::vector<Key> key;
};

template <typename T>
static void read_logits(const MultiboxLoss& a, const T* logits, Rows& rows) {
  torch::stable::parallel_for(0, a.rows, kChunk, [&](int64_t begin, int64_t end) {
    Row row(a.classes);
    for (int64_t r = begin; r < end; ++r) {
      row.load(logits + r * a.classes);
      Softmax soft = row.softmax();
      const int target = a.truth.target(r, a.classes);
      if (target == kNoClass) soft.most = NAN;
      rows.softmax[r] = soft;
      rows.key[r] = hardness(entropy(soft, row[std::max(target, 0)]), a.truth.box(r) >= 0);
    }
  });
}

// Which of one image's rows count.
static Kept choose(const MultiboxLoss& a, const Key* keys, int64_t image) {
  const int64_t count = a.truth.count;
  Kept kept{0, -1, 0};
  for (int64_t p = 0; p < count; ++p) kept.positives += a.truth.box(image * count + p) >= 0;
  const int64_t wanted = negatives(kept.positives, a.empty_negatives);
  if (wanted == 0) kept.limit = kNoNumber<float>;
  if (wanted == 0 || wanted >= count) return kept;
  std::vector<Key> sorted(keys, keys + count);
  std::nth_element(sorted.begin(), sorted.begin() + (wanted - 1), sorted.end(), std::greater<Key>());
  kept.limit = sorted[wanted - 1];
  int64_t ties = wanted - std::count_if(keys, keys + count, [&](Key key) { return key > kept.limit; });
  for (int64_t p = 0; ties > 0; ++p) {
    if (keys[p] != kept.limit) continue;
    kept.last = static_cast<int32_t>(p);
    --ties;
  }
  return kept;
}

// The weighted cross-entropy of one row that counts, and its gradient written.
template <typename T>
static float class_row(const T* logits, int classes, Softmax soft, int target, float weight, float constant,
                       T* gradient) {
  const float scale = weight * constant;
  for (int k = 0; k < classes; ++k) {
    const float p = probability(soft, static_cast<float>(logits[k]));
    gradient[k] = static_cast<T>((k == target ? p - 1.f : p) * scale);
  }
  return weight * entropy(soft, static_cast<float>(logits[std::max(target, 0)]));
}

// Sum of f over all rows, in chunks that the threads share.
template <typename F>
static void total(int64_t rows, const Tensor& out, F&& f) {
  std::vector<double> partials(ceil_div(rows, kChunk));
  torch::stable::parallel_for(0, static_cast<int64_t>(partials.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kChunk; row < std::min(end * kChunk, rows); ++row) partials[row / kChunk] += f(row);
  });
  double sum = 0;
  for (double partial : partials) sum += partial;
  *static_cast<float*>(out.data_ptr()) = static_cast<float>(sum);
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> multibox_loss(const Tensor& deltas, const Tensor& logits,
                                                                const Tensor& priors, const Tensor& boxes,
                                                                const Tensor& labels, const Tensor& matched,
                                                                int64_t empty_negatives) {
  const MultiboxLoss a(deltas, logits, priors, boxes, labels, matched, empty_negatives);
  const Truth& truth = a.truth;
  Rows rows{std::vector<Softmax>(a.rows), std::vector<Key>(a.rows)};
  std::vector<Kept> kept(truth.images);
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(logits.data_ptr());
    T* to = static_cast<T*>(a.logit_gradient.data_ptr());
    const float constant = kept_constant<T>(truth.images);
    read_logits(a, from, rows);
    torch::stable::parallel_for(0, truth.images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kept[i] = choose(a, &rows.key[i * truth.count], i);
    });
    total(a.rows, a.cls, [&](int64_t row) {
      const Kept& of_image = kept[row / truth.count];
      const int64_t offset = row * a.classes;
      if (truth.box(row) < 0 && !of_image.keeps(rows.key[row], row % truth.count)) {
        std::fill_n(to + offset, a.classes, zero);
        return 0.f;
      }
      const float weight = of_image.weight(truth.images);
      return class_row(from + offset, a.classes, rows.softmax[row], truth.target(row, a.classes), weight, constant,
                       to + offset);
    });
  });
  for_floating(deltas, "deltas", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(deltas.data_ptr());
    T* to = static_cast<T*>(a.delta_gradient.data_ptr());
    const float constant = kept_constant<T>(truth.images);
    total(a.rows, a.box, [&](int64_t row) { return box_row(truth, kept.data(), constant, from, row, to); });
  });
  return a.result();
}

}  // namespace detcore

SCHEMAS(m) {
  m.def(
      "multibox_loss(Tensor deltas, Tensor logits, Tensor priors, Tensor boxes, Tensor labels, Tensor matched, "
      "int empty_negatives) -> (Tensor, Tensor, Tensor, Tensor)");
}
CPU_OPS(m) { m.impl("multibox_loss", TORCH_BOX(&detcore::multibox_loss)); }
