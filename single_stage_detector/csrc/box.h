// L1 loss of box deltas and its derivative; the deltas that are wanted are computed on the way, as
// detcore.boxes.encode.
#pragma once

#include "targets.h"

namespace detcore {

// A delta for each of x, y, width, height.
struct Deltas {
  float at[4];
};

HOST_DEVICE Deltas encoded(Corners box, Corners anchor) {
  const float width = anchor.x2 - anchor.x1, height = anchor.y2 - anchor.y1;
  const float box_width = box.x2 - box.x1, box_height = box.y2 - box.y1;
  const float x = box.x1 + 0.5f * box_width - (anchor.x1 + 0.5f * width);
  const float y = box.y1 + 0.5f * box_height - (anchor.y1 + 0.5f * height);
  return {{x / width, y / height, logf(box_width / width), logf(box_height / height)}};
}

// Weighted loss of a row's deltas; turns them into the gradient, which is 0 where a delta is met exactly.
template <typename T>
HOST_DEVICE float box_term(T* deltas, const Deltas& wanted, float weight, float constant) {
  float loss = 0;
  for (int k = 0; k < 4; ++k) {
    const float distance = static_cast<float>(deltas[k]) - wanted.at[k];
    const float sign = distance > 0 ? 1.f : distance < 0 ? -1.f : distance;  // 0 and NaN stay
    loss += fabsf(distance);
    deltas[k] = static_cast<T>(sign * weight * constant);
  }
  return weight * loss;
}

// What the gradient is multiplied by while it is kept. Weights are up to 1, which 65536 would make too large.
template <typename T>
constexpr float box_constant() {
  return std::is_same_v<T, Half> ? 32768.f : 1.f;
}

// The arguments of both implementations, checked; gradient like deltas, loss float32 [].
struct BoxLoss {
  Targets targets;
  const Corners *anchors, *boxes;
  int64_t rows;  // of all images
  Tensor gradient, loss;

  BoxLoss(const Tensor& deltas, const Tensor& anchors_, const Tensor& boxes_, const Tensor& matched,
          const Tensor& labels, const Tensor& weight, int64_t first)
      : targets(matched, labels, weight, deltas.dim() == 3 ? deltas.size(1) : 0, first),
        anchors(static_cast<const Corners*>(contiguous(anchors_, "anchors").data_ptr())),
        boxes(static_cast<const Corners*>(contiguous(boxes_, "boxes").data_ptr())),
        rows(deltas.dim() == 3 ? deltas.size(0) * deltas.size(1) : 0),
        gradient(torch::stable::empty_like(contiguous(deltas, "deltas"))),
        loss(torch::stable::empty({}, ScalarType::Float, std::nullopt, deltas.device())) {
    check(deltas.dim() == 3 && deltas.size(0) == targets.images && deltas.size(2) == 4, "deltas must be [N, R, 4]");
    check(anchors_.scalar_type() == ScalarType::Float && anchors_.dim() == 2 && anchors_.size(1) == 4 &&
              anchors_.size(0) == targets.anchors,
          "anchors must be float32 [A, 4]");
    check(boxes_.scalar_type() == ScalarType::Float && boxes_.dim() == 3 && boxes_.size(0) == targets.images &&
              boxes_.size(1) == targets.most && boxes_.size(2) == 4,
          "boxes must be float32 [N, M, 4], as many as labels");
  }
};

// One row: its loss, and its gradient written.
template <typename T>
HOST_DEVICE float box_row(const Targets& targets, const Corners* anchors, const Corners* boxes, const T* deltas,
                          int64_t row, T* gradient) {
  const int64_t box = targets.box(row);
  if (box < 0) {
    for (int k = 0; k < 4; ++k) gradient[row * 4 + k] = static_cast<T>(0.f);
    return 0;
  }
  T values[4];
  for (int k = 0; k < 4; ++k) values[k] = deltas[row * 4 + k];
  const Deltas wanted = encoded(boxes[box], anchors[targets.first + row % targets.rows]);
  const float loss = box_term(values, wanted, targets.weight[row / targets.rows], box_constant<T>());
  for (int k = 0; k < 4; ++k) gradient[row * 4 + k] = values[k];
  return loss;
}

}  // namespace detcore
