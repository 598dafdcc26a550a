#include <algorithm>
#include <vector>

#include "match.h"
#include "planes.h"
#include "vectors.h"

namespace detcore {

// overlap(box, ...) of the anchors begin..begin+n.
WIDE_VECTORS static void overlaps(const Planes& anchors, int64_t begin, int64_t n, Corners box, float* out) {
  const float *x1 = &anchors.x1[begin], *y1 = &anchors.y1[begin], *x2 = &anchors.x2[begin], *y2 = &anchors.y2[begin];
  const float *areas = &anchors.area[begin], box_area = area(box);
  for (int64_t i = 0; i < n; ++i) out[i] = overlap(box, box_area, {x1[i], y1[i], x2[i], y2[i]}, areas[i]);
}

// The larger of `highest` and all values.
WIDE_VECTORS static float highest_of(const float* values, int64_t n, float highest) {
  constexpr int kLanes = 16;
  float lanes[kLanes];
  for (float& lane : lanes) lane = highest;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] = larger(values[i + k], lanes[k]);
  }
  for (; i < n; ++i) lanes[0] = larger(values[i], lanes[0]);
  for (float lane : lanes) highest = larger(lane, highest);
  return highest;
}

// Takes box `index` where it overlaps more than the best so far, and marks the anchors that tie for its highest.
WIDE_VECTORS static void take(const float* iou, int64_t n, int32_t index, float highest, float* best, int32_t* at,
                              int32_t* tied) {
  const bool touches = highest > 0;
  for (int64_t i = 0; i < n; ++i) {
    tied[i] |= touches & (iou[i] == highest);
    at[i] = iou[i] > best[i] ? index : at[i];
    best[i] = larger(iou[i], best[i]);
  }
}

static void match_tile(const Match& a, const Planes& anchors, const std::vector<int32_t>& used, const float* highest,
                       const Corners* boxes, int64_t begin, int64_t* out) {
  float iou[kTile], best[kTile];
  int32_t at[kTile], tied[kTile];
  const int64_t n = std::min(kTile, a.count - begin);
  std::fill_n(best, n, 0.f);
  std::fill_n(at, n, 0);
  std::fill_n(tied, n, 0);
  for (size_t k = 0; k < used.size(); ++k) {
    overlaps(anchors, begin, n, boxes[used[k]], iou);
    take(iou, n, used[k], highest[k], best, at, tied);
  }
  for (int64_t i = 0; i < n; ++i) out[begin + i] = a.thresholds.decision(best[i], at[i], tied[i]);
}

// The highest overlap of a box with any anchor, and the first anchor that has it.
struct Highest {
  float overlap = 0;
  int64_t first = 0;
};

static Highest highest_anchor(const Planes& anchors, int64_t count, Corners box) {
  float iou[kTile];
  Highest found;
  int64_t tile = 0;
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t n = std::min(kTile, count - begin);
    overlaps(anchors, begin, n, box, iou);
    const float highest = highest_of(iou, n, found.overlap);
    if (highest > found.overlap) tile = begin, found.overlap = highest;
  }
  const int64_t n = std::min(kTile, count - tile);
  overlaps(anchors, tile, n, box, iou);
  found.first = tile + (std::find(iou, iou + n, found.overlap) - iou);
  return found;
}

static Tensor match(const Tensor& anchors_, const Tensor& boxes, const Tensor& labels, double high, double low,
                    int64_t low_quality) {
  const Match a(anchors_, boxes, labels, high, low, low_quality);
  const bool ties = a.low_quality == LowQuality::kTies, best = a.low_quality == LowQuality::kBest;
  const auto planes = [&](int64_t image) {
    return Planes(a.count, [&](int64_t i) { return a.anchors[image * a.step + i]; });
  };
  Planes anchors(0, [](int64_t) { return Corners(); });
  const int64_t tiles = ceil_div(a.count, kTile);
  for (int64_t image = 0; image < a.images; ++image) {
    if (image == 0 || a.step) anchors = planes(image);
    const Corners* own = a.boxes + image * a.most;
    std::vector<int32_t> used;
    for (int64_t j = 0; j < a.most; ++j) {
      if (a.labels[image * a.most + j] >= 0) used.push_back(static_cast<int32_t>(j));
    }
    std::vector<float> goal(used.size());        // the overlap that ties; 0 for none
    std::vector<int64_t> first_of(used.size());  // the anchor that the box claims
    const int64_t searched = ties || best ? static_cast<int64_t>(used.size()) : 0;
    torch::stable::parallel_for(0, searched, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const Highest highest = highest_anchor(anchors, a.count, own[used[k]]);
        goal[k] = ties ? highest.overlap : 0;
        first_of[k] = highest.overlap > 0 ? highest.first : -1;
      }
    });
    int64_t* out = static_cast<int64_t*>(a.out.data_ptr()) + image * a.count;
    torch::stable::parallel_for(0, tiles, 16, [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) {
        match_tile(a, anchors, used, goal.data(), own, tile * kTile, out);
      }
    });
    for (size_t k = used.size(); best && k-- > 0;) {  // of the boxes that claim an anchor the first one gets it
      if (first_of[k] >= 0) out[first_of[k]] = used[k];
    }
  }
  return a.out;
}

}  // namespace detcore

SCHEMAS(m) {
  m.def("match(Tensor anchors, Tensor boxes, Tensor labels, float high, float low, int low_quality) -> Tensor");
}
CPU_OPS(m) { m.impl("match", TORCH_BOX(&detcore::match)); }
