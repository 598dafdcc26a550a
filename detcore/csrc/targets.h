// What the rows of a level's outputs are to learn, straight from the matches of all anchors: shared by the losses.
#pragma once

#include "corners.h"

namespace detcore {

constexpr int64_t kUnmatched = -1, kIgnored = -2;  // as ops/match.py

// Row r of a level [images, rows] belongs to anchor `first + r % rows` of image `r / rows`.
struct Targets {
  const int64_t *matched, *labels;  // [images, anchors], [images, most]
  const float* weight;              // [images]
  int64_t images, rows, first, anchors, most;

  Targets(const Tensor& matched_, const Tensor& labels_, const Tensor& weight_, int64_t rows_, int64_t first_)
      : matched(static_cast<const int64_t*>(contiguous(matched_, "matched").data_ptr())),
        labels(static_cast<const int64_t*>(contiguous(labels_, "labels").data_ptr())),
        weight(static_cast<const float*>(contiguous(weight_, "weight").data_ptr())),
        images(weight_.numel()),
        rows(rows_),
        first(first_),
        anchors(matched_.dim() == 2 ? matched_.size(1) : 0),
        most(labels_.dim() == 2 ? labels_.size(1) : 0) {
    check(matched_.scalar_type() == ScalarType::Long && matched_.dim() == 2 && matched_.size(0) == images,
          "matched must be int64 [N, A]");
    check(labels_.scalar_type() == ScalarType::Long && labels_.dim() == 2 && labels_.size(0) == images,
          "labels must be int64 [N, M]");
    check(weight_.scalar_type() == ScalarType::Float && weight_.dim() == 1, "weight must be float32 [N]");
    check(first >= 0 && first + rows <= anchors, "the level's rows are not among the anchors");
  }

  HOST_DEVICE int64_t match(int64_t row) const { return match(row / rows, row % rows); }
  HOST_DEVICE int64_t match(int64_t image, int64_t row) const { return matched[image * anchors + first + row]; }

  // The place of the row's box among those of all images, or a negative number for a row that has none.
  HOST_DEVICE int64_t box(int64_t row) const { return place(row / rows, match(row)); }
  HOST_DEVICE int64_t place(int64_t image, int64_t index) const {
    return index >= 0 && index < most ? image * most + index : -1;
  }
};

// Partial sums of a level: so many at most, each of rows that the shape alone decides.
constexpr int64_t kMostPartials = 4096;

}  // namespace detcore
