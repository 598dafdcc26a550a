// SSD's multibox loss: Smooth-L1 of the positive priors' deltas, cross-entropy of them and of the hardest others.
#pragma once

#include <type_traits>

#include "multibox_match.h"
#include "select.h"
#include "softmax.h"

namespace detcore {

constexpr int64_t kNegativesPerPositive = 3;             // as ops/multibox.py
constexpr float kCentreScale = 0.1f, kSizeScale = 0.2f;  // as anchors.py
constexpr int kDropped = -2, kNoClass = -1;              // targets of rows that don't count, or whose label is none

// What every prior shall learn. Row r belongs to prior r % count of image r / count.
struct Truth {
  const Prior* priors;
  const Corners* boxes;
  const int64_t *labels, *matched;
  int64_t images, count, most;  // images, priors, boxes of an image with padding

  // The place of the row's box among those of all images; negative for a row that has none.
  HOST_DEVICE int64_t box(int64_t row) const {
    const int64_t index = matched[row];
    return index >= 0 && index < most ? row / count * most + index : -1;
  }
  HOST_DEVICE int target(int64_t row, int classes) const {
    const int64_t at = box(row);
    if (at < 0) return 0;
    const int64_t label = labels[at];
    return label >= 0 && label + 1 < classes ? static_cast<int>(label + 1) : kNoClass;
  }
};

// Which rows of an image count in the class loss: its positive ones, and those that `keeps` says.
struct Kept {
  Key limit;
  int32_t last;  // of the priors whose key is the limit, those up to this one
  int64_t positives;

  HOST_DEVICE bool keeps(Key key, int64_t prior) const { return key > limit || (key == limit && prior <= last); }
  HOST_DEVICE float weight(int64_t images) const {
    return 1.f / static_cast<float>(images) / static_cast<float>(positives > 1 ? positives : 1);
  }
};

HOST_DEVICE int64_t negatives(int64_t positives, int64_t empty_negatives) {
  return positives > 0 ? kNegativesPerPositive * positives : empty_negatives;
}

// A row's cross-entropy as a key to select by; a positive row is worth 0.
HOST_DEVICE Key hardness(float entropy, bool positive) { return key_of(positive ? 0.f : entropy, -INFINITY); }

// Smooth-L1 of a positive row's deltas, unweighted; turns them into the gradient times scale.
template <typename T>
HOST_DEVICE float box_term(T* deltas, Corners box, Prior prior, float scale) {
  const Corners to = of_one(box);
  const float wanted[4] = {(0.5f * (to.x1 + to.x2) - prior.cx) / prior.w / kCentreScale,
                           (0.5f * (to.y1 + to.y2) - prior.cy) / prior.h / kCentreScale,
                           logf((to.x2 - to.x1) / prior.w) / kSizeScale, logf((to.y2 - to.y1) / prior.h) / kSizeScale};
  float loss = 0;
  for (int k = 0; k < 4; ++k) {
    const float distance = static_cast<float>(deltas[k]) - wanted[k];
    const float far = fabsf(distance);
    loss += far < 1 ? 0.5f * distance * distance : far - 0.5f;
    const float slope = distance > 1 ? 1.f : distance < -1 ? -1.f : distance;
    deltas[k] = static_cast<T>(slope * scale);
  }
  return loss;
}

// One row's Smooth-L1, weighted, and its gradient written.
template <typename T>
HOST_DEVICE float box_row(const Truth& truth, const Kept* kept, float constant, const T* deltas, int64_t row,
                          T* gradient) {
  const int64_t box = truth.box(row);
  T values[4] = {};
  float loss = 0;
  if (box >= 0) {
    const float weight = kept[row / truth.count].weight(truth.images);
    for (int k = 0; k < 4; ++k) values[k] = deltas[row * 4 + k];
    loss = weight * box_term(values, truth.boxes[box], truth.priors[row % truth.count], weight * constant);
  }
  for (int k = 0; k < 4; ++k) gradient[row * 4 + k] = values[k];
  return loss;
}

// What gradients are multiplied by while they are kept: float16 would lose the small ones. They are not above 1 /
// images.
template <typename T>
float kept_constant(int64_t images) {
  return !std::is_same_v<T, Half> ? 1.f : images > 1 ? 65536.f : 32768.f;
}

// The arguments of both implementations, checked; gradients like deltas and logits, losses float32 [].
struct MultiboxLoss {
  Truth truth;
  int64_t rows, empty_negatives;  // rows of all images
  int classes;
  Tensor box, cls, delta_gradient, logit_gradient;

  MultiboxLoss(const Tensor& deltas, const Tensor& logits, const Tensor& priors, const Tensor& boxes,
               const Tensor& labels, const Tensor& matched, int64_t empty_negatives_)
      : truth{static_cast<const Prior*>(contiguous(priors, "priors").data_ptr()),
              static_cast<const Corners*>(contiguous(boxes, "boxes").data_ptr()),
              static_cast<const int64_t*>(contiguous(labels, "labels").data_ptr()),
              static_cast<const int64_t*>(contiguous(matched, "matched").data_ptr()),
              logits.size(0),
              priors.size(0),
              labels.dim() == 2 ? labels.size(1) : 0},
        rows(truth.images * truth.count),
        empty_negatives(empty_negatives_),
        classes(logits.dim() == 3 ? static_cast<int>(logits.size(2)) : 0),
        box(torch::stable::empty({}, ScalarType::Float, std::nullopt, logits.device())),
        cls(torch::stable::empty({}, ScalarType::Float, std::nullopt, logits.device())),
        delta_gradient(torch::stable::empty_like(contiguous(deltas, "deltas"))),
        logit_gradient(torch::stable::empty_like(contiguous(logits, "logits"))) {
    check(logits.dim() == 3 && logits.size(1) == truth.count, "logits must be [N, P, K + 1]");
    check(logits.size(2) > 0 && logits.size(2) < (1 << 20), "there must be 1 to 2^20 classes");
    check(deltas.dim() == 3 && deltas.size(0) == truth.images && deltas.size(1) == truth.count && deltas.size(2) == 4,
          "deltas must be [N, P, 4]");
    check(priors.scalar_type() == ScalarType::Float && priors.dim() == 2 && priors.size(1) == 4,
          "priors must be float32 [P, 4]");
    check(labels.scalar_type() == ScalarType::Long && labels.dim() == 2 && labels.size(0) == truth.images,
          "labels must be int64 [N, M]");
    check(boxes.scalar_type() == ScalarType::Float && boxes.dim() == 3 && boxes.size(0) == truth.images &&
              boxes.size(1) == truth.most && boxes.size(2) == 4,
          "boxes must be float32 [N, M, 4], as many as labels");
    check(matched.scalar_type() == ScalarType::Long && matched.dim() == 2 && matched.size(0) == truth.images &&
              matched.size(1) == truth.count,
          "matched must be int64 [N, P]");
    check(empty_negatives >= 0, "empty_negatives must not be negative");
    check(truth.count < (int64_t{1} << 31), "2^31 priors are too many");
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> result() const { return {box, cls, delta_gradient, logit_gradient}; }
};

}  // namespace detcore
