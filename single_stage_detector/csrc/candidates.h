// From the logits of all levels to the best (anchor, class) pairs of each.
//
// The best pairs of a level can only stand in its best anchors by their best class, so the wide logits are read once,
// for that class; then only the rows of the chosen anchors are read again.
#pragma once

#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "select.h"

namespace detcore {

constexpr int kMostLevels = 8;

// What the kernels have to know of the levels; small enough to be a kernel's argument.
struct Levels {
  const void* logits[kMostLevels];
  const void* deltas[kMostLevels];
  int64_t anchors[kMostLevels];  // of one image
  int64_t first[kMostLevels];    // anchors of the levels before
  int64_t slot[kMostLevels];     // output places of the levels before
  int64_t slots[kMostLevels];
  int count;
  int64_t images, classes, topk;
  int64_t all_anchors, all_slots;  // of one image
  float floor;
  const float* bias;  // null, or [per_cell, classes]: what the logits of anchor a lack is row a % per_cell
  int64_t per_cell;

  HOST_DEVICE const float* bias_of(int64_t anchor) const { return bias + anchor % per_cell * classes; }
};

// A logit as it is compared: as the network wrote it, or with a bias the sum in float32.
template <typename T, bool kBias>
using Logit = std::conditional_t<kBias, float, T>;

template <typename T, bool kBias>
HOST_DEVICE Logit<T, kBias> logit_of(const T* row, const float* bias, int64_t label) {
  if constexpr (kBias) return static_cast<float>(row[label]) + bias[label];
  return row[label];
}

// The outputs of one call, [N, P] and [N, P, 4].
struct Found {
  float* logits;
  int64_t* anchors;
  int64_t* labels;
  void* deltas;
};

// The arguments of both implementations, checked, and the outputs.
struct Candidates {
  Levels levels{};
  Tensor logits, anchors, labels, deltas;

  Candidates(const std::vector<Tensor>& logits_, const std::vector<Tensor>& deltas_, int64_t topk, double floor,
             const std::optional<Tensor>& bias)
      : Candidates(measured(logits_, deltas_, topk, floor, bias), logits_[0], deltas_[0]) {}

  Found found() const {
    return {static_cast<float*>(logits.data_ptr()), static_cast<int64_t*>(anchors.data_ptr()),
            static_cast<int64_t*>(labels.data_ptr()), deltas.data_ptr()};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> result() const { return {logits, anchors, labels, deltas}; }

 private:
  Candidates(const Levels& measured, const Tensor& l, const Tensor& d)
      : levels(measured),
        logits(output(l, {levels.images, levels.all_slots}, ScalarType::Float)),
        anchors(output(l, {levels.images, levels.all_slots}, ScalarType::Long)),
        labels(output(l, {levels.images, levels.all_slots}, ScalarType::Long)),
        deltas(output(l, {levels.images, levels.all_slots, 4}, d.scalar_type())) {}

  static Tensor output(const Tensor& like, std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::empty(shape, dtype, std::nullopt, like.device());
  }

  static Levels measured(const std::vector<Tensor>& logits, const std::vector<Tensor>& deltas, int64_t topk,
                         double floor, const std::optional<Tensor>& bias) {
    check(!logits.empty() && logits.size() <= kMostLevels && logits.size() == deltas.size(),
          "logits and deltas must be lists over the same levels, 1 to 8");
    check(topk > 0 && topk <= std::numeric_limits<int32_t>::max(), "topk must be positive and below 2^31");
    check(logits[0].dim() == 3, "logits must be [N, A, K]");
    Levels levels{};
    levels.count = static_cast<int>(logits.size());
    levels.images = logits[0].size(0);
    levels.classes = logits[0].size(2);
    levels.topk = topk;
    levels.floor = static_cast<float>(floor);
    if (bias) {
      const int64_t values = contiguous(*bias, "bias").numel();
      check(bias->scalar_type() == ScalarType::Float && bias->dim() == 1 && values > 0 && levels.classes > 0 &&
                values % levels.classes == 0,
            "bias must be float32, one value a class of each anchor of a cell");
      levels.bias = static_cast<const float*>(bias->data_ptr());
      levels.per_cell = values / levels.classes;
    }
    for (int l = 0; l < levels.count; ++l) {
      const Tensor& wide = contiguous(logits[l], "logits");
      const Tensor& narrow = contiguous(deltas[l], "deltas");
      check(wide.dim() == 3 && wide.size(0) == levels.images && wide.size(2) == levels.classes &&
                wide.scalar_type() == logits[0].scalar_type(),
            "logits must be [N, A, K] of one dtype, with the same N and K in all levels");
      check(narrow.dim() == 3 && narrow.size(0) == levels.images && narrow.size(1) == wide.size(1) &&
                narrow.size(2) == 4 && narrow.scalar_type() == deltas[0].scalar_type() &&
                (narrow.element_size() == 4 || narrow.element_size() == 2),
            "deltas must be [N, A, 4] of one dtype of 2 or 4 bytes, with the logits' N and A");
      check(reinterpret_cast<uintptr_t>(narrow.data_ptr()) % 4 == 0, "deltas must start at a multiple of 4 bytes");
      const int64_t pairs = wide.size(1) * levels.classes;
      check(pairs <= std::numeric_limits<int32_t>::max(), "a level has too many (anchor, class) pairs");
      check(!bias || wide.size(1) % levels.per_cell == 0, "with a bias a level must have whole cells of anchors");
      levels.logits[l] = wide.data_ptr();
      levels.deltas[l] = narrow.data_ptr();
      levels.anchors[l] = wide.size(1);
      levels.first[l] = levels.all_anchors;
      levels.slot[l] = levels.all_slots;
      levels.slots[l] = topk < pairs ? topk : pairs;
      levels.all_anchors += levels.anchors[l];
      levels.all_slots += levels.slots[l];
    }
    return levels;
  }
};

// Writes a pair, or where anchor < 0 none, to an output place. The deltas are copied as they are: 4 of delta_bytes
// each, which are delta_bytes words of 4 bytes.
template <typename T, bool kBias>
HOST_DEVICE void write_pair(const Levels& levels, const Found& found, int delta_bytes, int64_t image, int level,
                            int64_t slot, int64_t anchor, int64_t label) {
  const int64_t to = image * levels.all_slots + levels.slot[level] + slot;
  const bool none = anchor < 0;
  const int64_t row = none ? 0 : image * levels.anchors[level] + anchor;
  const T* logits = static_cast<const T*>(levels.logits[level]) + row * levels.classes;
  const float* bias = kBias && !none ? levels.bias_of(anchor) : nullptr;
  found.logits[to] = none ? -INFINITY : static_cast<float>(logit_of<T, kBias>(logits, bias, label));
  found.anchors[to] = none ? 0 : levels.first[level] + anchor;
  found.labels[to] = none ? 0 : label;
  const uint32_t* from = static_cast<const uint32_t*>(levels.deltas[level]) + row * delta_bytes;
  uint32_t* into = static_cast<uint32_t*>(found.deltas) + to * delta_bytes;
  for (int word = 0; word < delta_bytes; ++word) into[word] = none ? 0 : from[word];
}

}  // namespace detcore
