// Boxes of a CPU implementation, coordinate by coordinate, so that its loops become vector instructions.
#pragma once

#include <vector>

#include "corners.h"

namespace detcore {

constexpr int64_t kTile = 1024;  // boxes that are handled at once: their state stays in the first cache

// The corners corners_at(0..count - 1), with their areas.
struct Planes {
  std::vector<float> x1, y1, x2, y2, area;

  template <typename F>
  Planes(int64_t count, F corners_at) : x1(count), y1(count), x2(count), y2(count), area(count) {
    for (int64_t i = 0; i < count; ++i) {
      const Corners at = corners_at(i);
      x1[i] = at.x1, y1[i] = at.y1, x2[i] = at.x2, y2[i] = at.y2;
      area[i] = detcore::area(at);
    }
  }
};

}  // namespace detcore
