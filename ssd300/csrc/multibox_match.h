// Which ground-truth box each prior shall learn: overlaps in the operations and the order of match_reference.
#pragma once

#include "corners.h"

namespace detcore {

constexpr float kPositiveIou = 0.5f;    // as ops/multibox.py
constexpr float kImageSize = 300.f;     // as anchors.py
constexpr int64_t kBackground = -1;     // as ops/multibox.py
constexpr int32_t kClaimsNothing = -1;  // the prior that something claims which is no box

// cx, cy, w, h of 0..1.
struct Prior {
  float cx, cy, w, h;
};

HOST_DEVICE Corners corners(Prior p) {
  const float w = product(0.5f, p.w), h = product(0.5f, p.h);
  return {p.cx - w, p.cy - h, p.cx + w, p.cy + h};
}

// Pixels of the image to 0..1.
HOST_DEVICE Corners of_one(Corners b) {
  return {quotient(b.x1, kImageSize), quotient(b.y1, kImageSize), quotient(b.x2, kImageSize),
          quotient(b.y2, kImageSize)};
}

// Whether a box of 0..1 has an area; NaN has none.
HOST_DEVICE bool has_area(Corners b) { return b.x2 > b.x1 && b.y2 > b.y1; }

HOST_DEVICE float overlap(Corners box, float box_area, Corners prior, float prior_area) {
  const float width = larger(smaller(prior.x2, box.x2) - larger(prior.x1, box.x1), 0.f);
  const float height = larger(smaller(prior.y2, box.y2) - larger(prior.y1, box.y1), 0.f);
  const float inter = product(width, height);
  return quotient(inter, box_area + prior_area - inter);
}

// What a prior takes: the last box that claims it, or its best one if that overlaps it enough.
HOST_DEVICE int64_t decision(int64_t claimed, float best, int64_t index) {
  return claimed >= 0 ? claimed : best > kPositiveIou ? index : kBackground;
}

// The arguments of both implementations, checked; out: int64 [images, count].
struct MultiboxMatch {
  const Prior* priors;
  const Corners* boxes;
  const int64_t* labels;
  int64_t images, count, most;  // images, priors, boxes of an image with padding
  Tensor out;

  MultiboxMatch(const Tensor& priors_, const Tensor& boxes_, const Tensor& labels_)
      : priors(static_cast<const Prior*>(contiguous(priors_, "priors").data_ptr())),
        boxes(static_cast<const Corners*>(contiguous(boxes_, "boxes").data_ptr())),
        labels(static_cast<const int64_t*>(contiguous(labels_, "labels").data_ptr())),
        images(labels_.size(0)),
        count(priors_.size(0)),
        most(labels_.dim() == 2 ? labels_.size(1) : 0),
        out(torch::stable::empty({images, count}, ScalarType::Long, std::nullopt, priors_.device())) {
    check(priors_.scalar_type() == ScalarType::Float && priors_.dim() == 2 && priors_.size(1) == 4,
          "priors must be float32 [P, 4]");
    check(labels_.scalar_type() == ScalarType::Long && labels_.dim() == 2, "labels must be int64 [N, M]");
    check(boxes_.scalar_type() == ScalarType::Float && boxes_.dim() == 3 && boxes_.size(0) == images &&
              boxes_.size(1) == most && boxes_.size(2) == 4,
          "boxes must be float32 [N, M, 4], as many as labels");
    check(count < (int64_t{1} << 31) && most < (int64_t{1} << 31), "2^31 priors or boxes are too many");
  }
};

}  // namespace detcore
