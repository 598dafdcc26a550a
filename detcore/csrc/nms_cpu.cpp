#include <algorithm>
#include <vector>

#include "nms.h"

namespace detcore {

// Each candidate against the boxes kept before it: at most D, and usually few of its class.
static void keep(const Nms& a, int64_t image) {
  struct Kept {
    Box box;
    float area;
    int64_t label;
  };
  std::vector<Kept> best;
  const int64_t first = image * a.candidates;
  int64_t* out = a.positions() + image * a.detections;
  int64_t found = 0;
  for (int64_t i = 0; i < a.candidates && found < a.detections && a.scores[first + i] >= 0; ++i) {
    const Kept mine{a.boxes[first + i], area(a.boxes[first + i]), a.labels[first + i]};
    const bool suppressed = std::any_of(best.begin(), best.end(), [&](const Kept& other) {
      return other.label == mine.label && overlaps(other.box, other.area, mine.box, mine.area, a.threshold);
    });
    if (suppressed) continue;
    best.push_back(mine);
    out[found++] = i;
  }
  std::fill(out + found, out + a.detections, -1);
}

static Tensor nms(const Tensor& boxes, const Tensor& scores, const Tensor& labels, double threshold,
                  int64_t detections) {
  const Nms a(boxes, scores, labels, threshold, detections);
  torch::stable::parallel_for(0, a.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) keep(a, image);
  });
  return a.kept;
}

}  // namespace detcore

SCHEMAS(m) { m.def("nms(Tensor boxes, Tensor scores, Tensor labels, float threshold, int detections) -> Tensor"); }
CPU_OPS(m) { m.impl("nms", TORCH_BOX(&detcore::nms)); }
