// Rows of logits on the CPU, as floats in whole vectors.
#pragma once

#include <algorithm>
#include <vector>

#include "softmax.h"
#include "vectors.h"

namespace detcore {

constexpr int kLanes = 16;

// The largest value; NaN is none.
WIDE_VECTORS static float most_of(const float* values, int count) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -INFINITY;
  for (int i = 0; i < count; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] = values[i + k] > lanes[k] ? values[i + k] : lanes[k];
  }
  float most = -INFINITY;
  for (float lane : lanes) most = lane > most ? lane : most;
  return most;
}

// The sum of exp(value - most). work: as long as values; in two loops, so that compilers make vector instructions.
WIDE_VECTORS static float sum_of_exponentials(const float* values, int count, float most, float* work) {
  for (int i = 0; i < count; ++i) work[i] = at_least(values[i] - most);
  float lanes[kLanes] = {}, sum = 0;
  for (int i = 0; i < count; i += kLanes) {
    for (int k = 0; k < kLanes; ++k) lanes[k] += exp_above_least(work[i + k]);
  }
  for (float lane : lanes) sum += lane;
  return sum;
}

// Memory for one row; what is beyond its classes is minus infinity, which adds nothing.
class Row {
 public:
  explicit Row(int64_t classes)
      : classes_(static_cast<int>(classes)), values_(ceil_div(classes, kLanes) * kLanes, -INFINITY), work_(values_) {}

  template <typename T>
  void load(const T* logits) {
    for (int k = 0; k < classes_; ++k) values_[k] = static_cast<float>(logits[k]);
  }
  Softmax softmax() {
    const float most = most_of(values_.data(), padded());
    return {most, sum_of_exponentials(values_.data(), padded(), most, work_.data())};
  }
  float operator[](int64_t k) const { return values_[k]; }

 private:
  int padded() const { return static_cast<int>(values_.size()); }

  int classes_;
  std::vector<float> values_, work_;
};

}  // namespace detcore
