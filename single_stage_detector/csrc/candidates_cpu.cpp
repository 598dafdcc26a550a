#include <algorithm>

#include "candidates.h"

namespace detcore {

struct Ranked {
  Key key;
  int64_t index;
};

// Leaves the `most` best, in the order of their indices. Of equal keys the lower index is the better.
static void keep_best(std::vector<Ranked>& all, int64_t most) {
  if (static_cast<int64_t>(all.size()) <= most) return;
  std::nth_element(all.begin(), all.begin() + (most - 1), all.end(),
                   [](const Ranked& a, const Ranked& b) { return a.key != b.key ? a.key > b.key : a.index < b.index; });
  all.resize(most);
  std::sort(all.begin(), all.end(), [](const Ranked& a, const Ranked& b) { return a.index < b.index; });
}

// The key of a row's best logit; 0 with a NaN among them. Most rows are below the floor: the first loop, which
// compilers turn into vector instructions, finds them.
template <typename T, bool kBias>
static Key best_key(const T* row, const float* bias, int64_t classes, float floor) {
  int32_t high = 0;
  for (int64_t k = 0; k < classes; ++k) {
    high |= !(static_cast<float>(logit_of<T, kBias>(row, bias, k)) < floor);  // NaN is not below
  }
  if (!high) return 0;
  Key best = 0;
  for (int64_t k = 0; k < classes; ++k) best = std::max(best, key_of(logit_of<T, kBias>(row, bias, k), floor));
  return best == kNoNumber<Logit<T, kBias>> ? 0 : best;
}

// The pairs of one image and level.
template <typename T, bool kBias>
static void choose(const Levels& levels, const Found& found, int delta_bytes, const Key* best, int64_t image,
                   int level) {
  const int64_t classes = levels.classes;
  const T* logits = static_cast<const T*>(levels.logits[level]) + image * levels.anchors[level] * classes;
  best += image * levels.all_anchors + levels.first[level];
  std::vector<Ranked> anchors, pairs;
  for (int64_t a = 0; a < levels.anchors[level]; ++a) {
    if (best[a] > 0) anchors.push_back({best[a], a});
  }
  const bool full = static_cast<int64_t>(anchors.size()) >= levels.topk;
  keep_best(anchors, levels.topk);
  Key least = 1;  // as many anchors as pairs are wanted have such a key, so no lower pair is among the best
  if (full) {
    least = std::min_element(anchors.begin(), anchors.end(), [](const Ranked& a, const Ranked& b) {
              return a.key < b.key;
            })->key;
  }
  for (const Ranked& anchor : anchors) {
    const T* row = logits + anchor.index * classes;
    const float* bias = kBias ? levels.bias_of(anchor.index) : nullptr;
    for (int64_t k = 0; k < classes; ++k) {
      const Key key = key_of(logit_of<T, kBias>(row, bias, k), levels.floor);
      if (key >= least) pairs.push_back({key, anchor.index * classes + k});
    }
  }
  keep_best(pairs, levels.slots[level]);
  for (int64_t slot = 0; slot < levels.slots[level]; ++slot) {
    const bool filled = slot < static_cast<int64_t>(pairs.size());
    const int64_t index = filled ? pairs[slot].index : 0;
    write_pair<T, kBias>(levels, found, delta_bytes, image, level, slot, filled ? index / classes : -1,
                         index % classes);
  }
}

template <typename T, bool kBias>
static void find(const Levels& levels, const Found& found, int delta_bytes) {
  std::vector<Key> best(levels.images * levels.all_anchors);
  for (int level = 0; level < levels.count; ++level) {
    const T* rows = static_cast<const T*>(levels.logits[level]);
    const int64_t anchors = levels.anchors[level];
    torch::stable::parallel_for(0, levels.images * anchors, 256, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t anchor = row % anchors;
        const float* bias = kBias ? levels.bias_of(anchor) : nullptr;
        best[row / anchors * levels.all_anchors + levels.first[level] + anchor] =
            best_key<T, kBias>(rows + row * levels.classes, bias, levels.classes, levels.floor);
      }
    });
  }
  torch::stable::parallel_for(0, levels.images * levels.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      choose<T, kBias>(levels, found, delta_bytes, best.data(), i / levels.count, static_cast<int>(i % levels.count));
    }
  });
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> candidates(const std::vector<Tensor>& logits,
                                                             const std::vector<Tensor>& deltas, int64_t topk,
                                                             double floor, const std::optional<Tensor>& bias) {
  const Candidates a(logits, deltas, topk, floor, bias);
  const int delta_bytes = static_cast<int>(a.deltas.element_size());
  for_floating(logits[0], "logits", [&](auto zero) {
    using T = decltype(zero);
    bias ? find<T, true>(a.levels, a.found(), delta_bytes) : find<T, false>(a.levels, a.found(), delta_bytes);
  });
  return a.result();
}

}  // namespace detcore

SCHEMAS(m) {
  m.def(
      "candidates(Tensor[] logits, Tensor[] deltas, int topk, float floor, Tensor? bias=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
CPU_OPS(m) { m.impl("candidates", TORCH_BOX(&detcore::candidates)); }
