#include <algorithm>
#include <cmath>
#include <vector>

#include "candidates.h"
#include "rows.h"

namespace detcore {

struct Scored {
  float score;
  int32_t prior;
};

// How far the best class must at least be above the background for a score above the threshold, or a bit less: a score
// is at most 1 / (1 + exp(background - class)).
static float least_margin(double threshold) {
  const double low = threshold * (1 - 1e-5);  // float32 rounds the score
  return low > 0 && low < 1 ? static_cast<float>(std::log(low / (1 - low))) : -INFINITY;
}

// A logit below which no score of the row is above the threshold, but little lower than need be.
static float least_logit(Softmax row, float threshold) {
  return threshold > 0 ? row.most + std::log(threshold * row.sum) - 1e-4f * (1 + std::fabs(row.most)) : -INFINITY;
}

// Leaves the `most` best, in the order of the priors. Of equal scores the lower prior is the better.
static void keep_best(std::vector<Scored>& all, int64_t most) {
  if (static_cast<int64_t>(all.size()) <= most) return;
  std::nth_element(all.begin(), all.begin() + (most - 1), all.end(), [](const Scored& a, const Scored& b) {
    return a.score != b.score ? a.score > b.score : a.prior < b.prior;
  });
  all.resize(most);
  std::sort(all.begin(), all.end(), [](const Scored& a, const Scored& b) { return a.prior < b.prior; });
}

// Whether a row may have a score above the threshold. Most have none, so compilers shall make vector instructions of
// it.
template <typename T>
static bool may_have(const T* row, int classes, float margin) {
  const float background = static_cast<float>(row[0]), least = background + margin - 1e-6f * std::fabs(background);
  int32_t high = 0;
  for (int k = 1; k < classes; ++k) high |= !(static_cast<float>(row[k]) < least);  // NaN is not below
  return high;
}

// The pairs of one image, class by class.
template <typename T>
static void choose(const Candidates& a, const T* logits, float margin, float* scores, int64_t* priors) {
  std::vector<std::vector<Scored>> found(a.classes - 1);
  Row row(a.classes);
  for (int64_t p = 0; p < a.count; ++p) {
    if (!may_have(logits + p * a.classes, a.classes, margin)) continue;
    row.load(logits + p * a.classes);
    const Softmax soft = row.softmax();
    const float least = least_logit(soft, a.threshold);
    for (int k = 1; k < a.classes; ++k) {
      if (row[k] < least) continue;
      const float score = probability(soft, row[k]);
      if (score > a.threshold) found[k - 1].push_back({score, static_cast<int32_t>(p)});
    }
  }
  std::fill_n(scores, (a.classes - 1) * a.most, -1.f);
  std::fill_n(priors, (a.classes - 1) * a.most, 0);
  for (int k = 0; k + 1 < a.classes; ++k) {
    keep_best(found[k], a.most);
    for (size_t i = 0; i < found[k].size(); ++i) {
      scores[k * a.most + i] = found[k][i].score;
      priors[k * a.most + i] = found[k][i].prior;
    }
  }
}

static std::tuple<Tensor, Tensor> candidates(const Tensor& logits, double threshold, int64_t most) {
  const Candidates a(logits, threshold, most);
  const float margin = least_margin(threshold);
  float* scores = static_cast<float*>(a.scores.data_ptr());
  int64_t* priors = static_cast<int64_t*>(a.priors.data_ptr());
  const int64_t places = (a.classes - 1) * a.most, values = a.count * a.classes;
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(logits.data_ptr());
    torch::stable::parallel_for(0, a.images, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        choose(a, from + i * values, margin, scores + i * places, priors + i * places);
      }
    });
  });
  return {a.scores, a.priors};
}

}  // namespace detcore

SCHEMAS(m) { m.def("candidates(Tensor logits, float threshold, int per_class) -> (Tensor, Tensor)"); }
CPU_OPS(m) { m.impl("candidates", TORCH_BOX(&detcore::candidates)); }
