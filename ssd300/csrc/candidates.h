// From the logits to the best priors of every class by their softmax.
//
// Few rows have any class above the threshold, so the wide logits are read once, to find those; the rest reads them.
#pragma once

#include <tuple>
#include <vector>

#include "select.h"
#include "softmax.h"

namespace detcore {

// The arguments of both implementations, checked; scores float32 and priors int64, [N, K, most].
struct Candidates {
  int64_t images, count;  // count: priors of an image
  int classes;            // with the background, which is the first
  int64_t most;           // places of a class
  float threshold;
  Tensor scores, priors;

  Candidates(const Tensor& logits, double threshold_, int64_t most_)
      : images(logits.size(0)),
        count(logits.dim() == 3 ? logits.size(1) : 0),
        classes(logits.dim() == 3 ? static_cast<int>(logits.size(2)) : 0),
        most(most_),
        threshold(static_cast<float>(threshold_)),
        scores(output(logits, ScalarType::Float)),
        priors(output(logits, ScalarType::Long)) {
    contiguous(logits, "logits");
  }

 private:
  Tensor output(const Tensor& logits, ScalarType dtype) const {
    check(logits.dim() == 3, "logits must be [N, P, K + 1]");
    check(logits.size(2) > 0 && logits.size(2) < (1 << 20), "there must be 1 to 2^20 classes");
    check(count < (int64_t{1} << 31), "2^31 priors are too many");
    check(most > 0 && most <= std::numeric_limits<int32_t>::max(), "per_class must be positive and below 2^31");
    return torch::stable::empty({images, classes - 1, most}, dtype, std::nullopt, logits.device());
  }
};

// A score as a key; 0 up to the threshold, and for NaN.
HOST_DEVICE Key key_above(float score, float threshold) { return score > threshold ? key_of(score, -INFINITY) : 0; }

}  // namespace detcore
