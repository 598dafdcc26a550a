// Which pixels of a region a mask covers, from the edges of its parts: COCO's rasterisation of polygons, to the bit.
//
// COCO walks along each edge on a grid of a fifth of a pixel and notes where the walk passes the middle of a pixel
// column. A pixel is inside where an odd number of the passes in its column lie above it. An edge's passes depend on no
// other edge, and each is found here without the steps between.
#pragma once

#include "kernel.h"

namespace detcore {

struct Edge {
  float x1, y1, x2, y2;
};

constexpr int kFine = 5;               // steps of the walk in a pixel
constexpr int kMiddle = 2;             // the middle of a column is passed between this step and the next
constexpr int kFarthest = 1 << 29;     // of a coordinate on the fine grid; what lies beyond is taken as that far
constexpr int64_t kLargest = 1 << 24;  // resolution, so that the fine grid's numbers fit

// A region's corner and the pixels of its mask for each of the canvas.
struct Window {
  float x, y, across, down;

  HOST_DEVICE static Window of(const Edge& region, int resolution) {
    const float width = region.x2 - region.x1, height = region.y2 - region.y1;
    const float size = static_cast<float>(resolution);
    return {region.x1, region.y1, size / (1 > width ? 1 : width), size / (1 > height ? 1 : height)};
  }
};

// A coordinate on the fine grid. The conversion cuts towards zero, as COCO's does.
HOST_DEVICE int fine(float value, float corner, float ratio) {
  const float moved = (value - corner) * ratio;
  const double step = kFine * static_cast<double>(moved) + .5;
  if (!(step > -kFarthest)) return -kFarthest;
  return step < kFarthest ? static_cast<int>(step) : kFarthest;
}

// One end of an edge, on the fine grid.
struct Node {
  int x, y;
};

HOST_DEVICE bool passes(int x1, int x2, int column) {
  const int middle = kFine * column + kMiddle;
  return (x1 < x2 ? x1 : x2) <= middle && (x1 < x2 ? x2 : x1) > middle;
}

// An edge as the walk takes it: step by step along its longer side, upwards in that coordinate.
struct Line {
  Node from, to;
  bool flat;              // its longer side is the one across
  double slope, inverse;  // of the shorter side along the longer one

  HOST_DEVICE static Line of(Node from, Node to) {
    const int dx = from.x < to.x ? to.x - from.x : from.x - to.x, dy = from.y < to.y ? to.y - from.y : from.y - to.y;
    const bool flat = dx >= dy, turned = flat ? from.x > to.x : from.y > to.y;
    const Node low = turned ? to : from, high = turned ? from : to;
    const double across = high.x - low.x, down = high.y - low.y;
    return {low, high, flat, flat ? down / across : across / down, flat ? 0 : down / across};
  }

  // The first row that lies below its pass through a column's middle, 0..rows; there must be one.
  HOST_DEVICE int row_below(int column, int rows) const {
    const int middle = kFine * column + kMiddle;
    int y;  // the higher of the walk's two points beside the middle
    if (flat) {
      const int step = middle - from.x;
      const int before = static_cast<int>(from.y + slope * step + .5);
      const int after = static_cast<int>(from.y + slope * (step + 1) + .5);
      y = before < after ? before : after;
    } else {
      const int last = to.y - from.y;
      int step = static_cast<int>((middle + .5 - from.x) * inverse);  // that of the pass, but for rounding
      step = step < 1 ? 1 : step > last ? last : step;
      while (step > 1 && passed(step - 1, middle)) --step;
      while (step < last && !passed(step, middle)) ++step;
      y = from.y + step - 1;
    }
    const int row = (y + kMiddle) / kFine;
    return row < 0 ? 0 : row < rows ? row : rows;
  }

 private:
  HOST_DEVICE bool passed(int step, int middle) const {
    return (static_cast<int>(from.x + slope * step + .5) > middle) == (to.x > from.x);
  }
};

// The first of an image's edges whose box is this one or a later one. of: box and part of each edge, rising, then -1.
HOST_DEVICE int64_t first_edge(const int64_t* of, int64_t count, int64_t box) {
  int64_t low = 0;
  while (low < count) {
    const int64_t half = low + (count - low) / 2;
    if (of[2 * half] >= 0 && of[2 * half] < box) {
      low = half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

// The arguments of both implementations, checked; out: bool [images, regions, resolution, resolution].
struct MaskTargets {
  const Edge *edges, *regions;
  const int64_t *edge_of, *box_of;
  int64_t images, most, count;  // images, edges of an image with padding, regions of an image
  int resolution;
  Tensor out;

  MaskTargets(const Tensor& edges_, const Tensor& edge_of_, const Tensor& regions_, const Tensor& box_of_,
              int64_t resolution_)
      : edges(static_cast<const Edge*>(contiguous(edges_, "edges").data_ptr())),
        regions(static_cast<const Edge*>(contiguous(regions_, "regions").data_ptr())),
        edge_of(static_cast<const int64_t*>(contiguous(edge_of_, "edge_of").data_ptr())),
        box_of(static_cast<const int64_t*>(contiguous(box_of_, "box_of").data_ptr())),
        images(box_of_.size(0)),
        most(edges_.dim() == 3 ? edges_.size(1) : 0),
        count(box_of_.dim() == 2 ? box_of_.size(1) : 0),
        resolution(static_cast<int>(resolution_)) {
    check(edges_.scalar_type() == ScalarType::Float && edges_.dim() == 3 && edges_.size(0) == images &&
              edges_.size(2) == 4,
          "edges must be float32 [N, E, 4]");
    check(edge_of_.scalar_type() == ScalarType::Long && edge_of_.dim() == 3 && edge_of_.size(0) == images &&
              edge_of_.size(1) == most && edge_of_.size(2) == 2,
          "edge_of must be int64 [N, E, 2], as many as edges");
    check(box_of_.scalar_type() == ScalarType::Long && box_of_.dim() == 2, "box_of must be int64 [N, S]");
    check(regions_.scalar_type() == ScalarType::Float && regions_.dim() == 3 && regions_.size(0) == images &&
              regions_.size(1) == count && regions_.size(2) == 4,
          "regions must be float32 [N, S, 4], as many as box_of");
    check(resolution_ > 0 && resolution_ <= kLargest, "resolution must be from 1 to 2^24");
    out = torch::stable::empty({images, count, resolution_, resolution_}, ScalarType::Bool, std::nullopt,
                               edges_.device());
  }

  bool* pixels() const { return static_cast<bool*>(out.data_ptr()); }
};

}  // namespace detcore
