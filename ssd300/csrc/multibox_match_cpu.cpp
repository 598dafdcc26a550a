#include <algorithm>
#include <vector>

#include "multibox_match.h"
#include "planes.h"
#include "vectors.h"

namespace detcore {

// A box of one image that takes part, and the prior that it overlaps most.
struct Claim {
  int32_t index;
  Corners box;
  float area, highest = -1;
  int64_t prior = kClaimsNothing;
};

// overlap(box, ...) of the priors begin..begin+n. Returns the highest.
WIDE_VECTORS static float overlaps(const Planes& priors, int64_t begin, int64_t n, Corners box, float box_area,
                                   float* out) {
  const float *x1 = &priors.x1[begin], *y1 = &priors.y1[begin], *x2 = &priors.x2[begin], *y2 = &priors.y2[begin];
  const float* areas = &priors.area[begin];
  for (int64_t i = 0; i < n; ++i) out[i] = overlap(box, box_area, {x1[i], y1[i], x2[i], y2[i]}, areas[i]);
  constexpr int kLanes = 16;
  float lanes[kLanes];
  for (float& lane : lanes) lane = -1;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] = larger(out[i + k], lanes[k]);
  }
  for (; i < n; ++i) lanes[0] = larger(out[i], lanes[0]);
  float highest = -1;
  for (float lane : lanes) highest = larger(lane, highest);
  return highest;
}

// Takes box `index` where it overlaps more than the best so far.
WIDE_VECTORS static void take(const float* iou, int64_t n, int32_t index, float* best, int32_t* at) {
  for (int64_t i = 0; i < n; ++i) {
    at[i] = iou[i] > best[i] ? index : at[i];
    best[i] = larger(iou[i], best[i]);
  }
}

static void match_image(const MultiboxMatch& a, const Planes& priors, int64_t image, int64_t* out) {
  std::vector<Claim> claims;
  for (int64_t j = 0; j < a.most; ++j) {
    const Corners box = of_one(a.boxes[image * a.most + j]);
    if (a.labels[image * a.most + j] < 0 || !has_area(box)) continue;
    claims.push_back({static_cast<int32_t>(j), box, area(box)});
  }
  float iou[kTile], best[kTile];
  int32_t at[kTile];
  for (int64_t begin = 0; begin < a.count; begin += kTile) {
    const int64_t n = std::min(kTile, a.count - begin);
    std::fill_n(best, n, -1.f);
    std::fill_n(at, n, 0);
    for (Claim& claim : claims) {
      const float highest = overlaps(priors, begin, n, claim.box, claim.area, iou);
      if (highest > claim.highest) {
        claim.highest = highest;
        claim.prior = begin + (std::find(iou, iou + n, highest) - iou);
      }
      take(iou, n, claim.index, best, at);
    }
    for (int64_t i = 0; i < n; ++i) out[begin + i] = decision(kBackground, best[i], at[i]);
  }
  for (const Claim& claim : claims) {
    if (claim.prior >= 0) out[claim.prior] = claim.index;  // the last one stays
  }
}

static Tensor multibox_match(const Tensor& priors_, const Tensor& boxes, const Tensor& labels) {
  const MultiboxMatch a(priors_, boxes, labels);
  const Planes priors(a.count, [&](int64_t i) { return corners(a.priors[i]); });
  int64_t* out = static_cast<int64_t*>(a.out.data_ptr());
  torch::stable::parallel_for(0, a.images, 1, [&](int64_t first, int64_t last) {
    for (int64_t image = first; image < last; ++image) match_image(a, priors, image, out + image * a.count);
  });
  return a.out;
}

}  // namespace detcore

SCHEMAS(m) { m.def("multibox_match(Tensor priors, Tensor boxes, Tensor labels) -> Tensor"); }
CPU_OPS(m) { m.impl("multibox_match", TORCH_BOX(&detcore::multibox_match)); }
