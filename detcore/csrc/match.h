// Which ground-truth box each anchor belongs to: overlaps in the operations and the order of match_reference.
#pragma once

#include "corners.h"
#include "targets.h"

namespace detcore {

// Which anchors take a box below the threshold: as ops/match.py.
enum class LowQuality : int64_t { kNone, kTies, kBest };

// Overlap 0..1; 0 where nothing is shared, also for boxes without area. Not a number only if a coordinate is none.
HOST_DEVICE float overlap(Corners box, float box_area, Corners anchor, float anchor_area) {
  const float width = larger(smaller(box.x2, anchor.x2) - larger(box.x1, anchor.x1), 0.f);
  const float height = larger(smaller(box.y2, anchor.y2) - larger(box.y1, anchor.y1), 0.f);
  const float inter = product(width, height);
  return inter > 0 ? quotient(inter, box_area + anchor_area - inter) : 0.f;
}

struct Thresholds {
  float high, low;

  // What an anchor takes, from its best box and whether it ties for any box's highest overlap.
  HOST_DEVICE int64_t decision(float best, int64_t index, bool tied) const {
    if (tied || best >= high) return index;
    return best < low ? kUnmatched : kIgnored;
  }
};

// The arguments of both implementations, checked; out: int64 [images, anchors].
struct Match {
  const Corners *anchors, *boxes;
  const int64_t* labels;
  int64_t images, count, most;  // images, anchors, boxes of an image with padding
  int64_t step;                 // from an image's anchors to the next one's: 0 where all have the same
  Thresholds thresholds;
  LowQuality low_quality;
  Tensor out;

  Match(const Tensor& anchors_, const Tensor& boxes_, const Tensor& labels_, double high, double low,
        int64_t low_quality_)
      : anchors(static_cast<const Corners*>(contiguous(anchors_, "anchors").data_ptr())),
        boxes(static_cast<const Corners*>(contiguous(boxes_, "boxes").data_ptr())),
        labels(static_cast<const int64_t*>(contiguous(labels_, "labels").data_ptr())),
        images(labels_.size(0)),
        count(anchors_.dim() >= 2 ? anchors_.size(-2) : 0),
        most(labels_.dim() == 2 ? labels_.size(1) : 0),
        step(anchors_.dim() == 3 ? count : 0),
        thresholds{static_cast<float>(high), static_cast<float>(low)},
        low_quality(static_cast<LowQuality>(low_quality_)),
        out(torch::stable::empty({images, count}, ScalarType::Long, std::nullopt, anchors_.device())) {
    check(anchors_.scalar_type() == ScalarType::Float && anchors_.size(-1) == 4 &&
              (anchors_.dim() == 2 || (anchors_.dim() == 3 && anchors_.size(0) == images)),
          "anchors must be float32 [A, 4] or [N, A, 4]");
    check(labels_.scalar_type() == ScalarType::Long && labels_.dim() == 2, "labels must be int64 [N, M]");
    check(boxes_.scalar_type() == ScalarType::Float && boxes_.dim() == 3 && boxes_.size(0) == images &&
              boxes_.size(1) == most && boxes_.size(2) == 4,
          "boxes must be float32 [N, M, 4], as many as labels");
    check(0 <= low && low <= high && high <= 1, "thresholds must be 0 <= low <= high <= 1");
    check(low_quality_ >= 0 && low_quality_ <= 2, "low_quality must be 0, 1 or 2");
    check(count < (int64_t{1} << 31) && most < (int64_t{1} << 31), "2^31 anchors or boxes are too many");
  }

  Tensor scratch(ScalarType dtype, int64_t values) const {
    return torch::stable::empty({values}, dtype, std::nullopt, out.device());
  }
};

}  // namespace detcore
