// Greedy class-wise suppression: candidates by falling score -> positions of those kept.
#pragma once

#include "kernel.h"

namespace detcore {

struct Box {
  float x1, y1, x2, y2;
};

HOST_DEVICE float area(const Box& b) { return (b.x2 - b.x1) * (b.y2 - b.y1); }

// Whether two boxes overlap by more than the threshold. The operations, each rounded, are nms_reference's. NaN in a
// coordinate or two boxes without area make the overlap NaN, which is not more than anything.
HOST_DEVICE bool overlaps(const Box& a, float area_a, const Box& b, float area_b, float threshold) {
  float dx = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  float dy = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  dx = dx < 0 ? 0 : dx;
  dy = dy < 0 ? 0 : dy;
  const float inter = dx * dy;
  return inter / (area_a + area_b - inter) > threshold;
}

// The arguments of both implementations, checked; kept: int64 [N, D].
struct Nms {
  const Box* boxes;
  const float* scores;
  const int64_t* labels;
  Tensor kept;
  int64_t images, candidates, detections;
  float threshold;

  Nms(const Tensor& boxes_, const Tensor& scores_, const Tensor& labels_, double threshold_, int64_t detections_)
      : boxes(static_cast<const Box*>(contiguous(boxes_, "boxes").data_ptr())),
        scores(static_cast<const float*>(contiguous(scores_, "scores").data_ptr())),
        labels(static_cast<const int64_t*>(contiguous(labels_, "labels").data_ptr())),
        kept(torch::stable::empty({boxes_.size(0), detections_ < 0 ? 0 : detections_}, ScalarType::Long, std::nullopt,
                                  boxes_.device())),
        images(boxes_.size(0)),
        candidates(boxes_.size(1)),
        detections(detections_),
        threshold(static_cast<float>(threshold_)) {
    check(boxes_.scalar_type() == ScalarType::Float && boxes_.dim() == 3 && boxes_.size(2) == 4,
          "boxes must be float32 [N, P, 4]");
    check(scores_.scalar_type() == ScalarType::Float && scores_.dim() == 2 && scores_.size(0) == images &&
              scores_.size(1) == candidates,
          "scores must be float32 [N, P]");
    check(labels_.scalar_type() == ScalarType::Long && labels_.dim() == 2 && labels_.size(0) == images &&
              labels_.size(1) == candidates,
          "labels must be int64 [N, P]");
    check(detections_ >= 0, "detections must not be negative");
  }

  int64_t* positions() const { return static_cast<int64_t*>(kept.data_ptr()); }
};

}  // namespace detcore
