// The deltas that lead from anchors to their boxes, in the operations and the order of wanted_deltas_reference.
#pragma once

#include "corners.h"

namespace detcore {

using Deltas = Pack<float>;  // of x, y, width, height

// Rounded from float64, so that all processors agree.
HOST_DEVICE float log_rounded(float x) { return static_cast<float>(log(static_cast<double>(x))); }

HOST_DEVICE float number_or_zero(float x) { return x == x ? x : 0.f; }

// Along one axis: of the centre in anchor sizes, and of the size.
HOST_DEVICE void encode_axis(float low, float high, float anchor_low, float anchor_high, float& centre, float& size) {
  const float own = high - low, anchor = anchor_high - anchor_low;
  const float apart = low + product(0.5f, own) - (anchor_low + product(0.5f, anchor));
  centre = number_or_zero(quotient(apart, anchor));
  size = number_or_zero(log_rounded(own) - log_rounded(anchor));
}

HOST_DEVICE Deltas encoded(Corners box, Corners anchor) {
  Deltas to;
  encode_axis(box.x1, box.x2, anchor.x1, anchor.x2, to.at[0], to.at[2]);
  encode_axis(box.y1, box.y2, anchor.y1, anchor.y2, to.at[1], to.at[3]);
  return to;
}

// Row i belongs to anchor i % anchors of image i / anchors.
struct Assigned {
  const Corners *grid, *boxes;
  const int64_t* matched;
  int64_t anchors, most;  // boxes of an image with padding

  HOST_DEVICE Deltas row(int64_t i) const {
    const int64_t index = matched[i];
    if (index < 0 || index >= most) return {};
    return encoded(boxes[i / anchors * most + index], grid[i % anchors]);
  }
};

// The arguments of both implementations, checked; out: float32 [images, anchors, 4].
struct WantedDeltas {
  Assigned assigned;
  int64_t rows;
  Tensor out;

  WantedDeltas(const Tensor& anchors, const Tensor& boxes, const Tensor& matched)
      : assigned{static_cast<const Corners*>(contiguous(anchors, "anchors").data_ptr()),
                 static_cast<const Corners*>(contiguous(boxes, "boxes").data_ptr()),
                 static_cast<const int64_t*>(contiguous(matched, "matched").data_ptr()), anchors.size(0),
                 boxes.dim() == 3 ? boxes.size(1) : 0},
        rows(matched.numel()),
        out(torch::stable::empty({matched.size(0), assigned.anchors, 4}, ScalarType::Float, std::nullopt,
                                 anchors.device())) {
    check(anchors.scalar_type() == ScalarType::Float && anchors.dim() == 2 && anchors.size(1) == 4,
          "anchors must be float32 [A, 4]");
    check(matched.scalar_type() == ScalarType::Long && matched.dim() == 2 && matched.size(1) == assigned.anchors,
          "matched must be int64 [N, A]");
    check(boxes.scalar_type() == ScalarType::Float && boxes.dim() == 3 && boxes.size(0) == matched.size(0) &&
              boxes.size(2) == 4,
          "boxes must be float32 [N, M, 4]");
  }

  Deltas* deltas() const { return static_cast<Deltas*>(out.data_ptr()); }
};

}  // namespace detcore
