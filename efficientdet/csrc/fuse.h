// A node of a feature pyramid, act(sum of w_m * r_m) with r_m the map m at the node's size, and its gradients.
//
// A map has the node's size, or each place takes its nearest cell, or the maximum of 3x3 cells at stride 2. A thread
// has 8 channels of a place, kWidth; on a CPU there are more at once. Nothing is kept between the two directions: the
// backward pass computes the sum again.
#pragma once

#include <vector>

#include "activation.h"

namespace detcore {

constexpr int kMostMaps = 3;
constexpr int kWindow = 3, kStride = 2;  // of the maximum

enum Resampling { kOwn, kNearest, kPooled };  // in the order of ops/fuse.py

// Channels of a place of a map, kWidth of them, of which `count` exist.
struct Unit {
  int image, row, column, channel, count;
};

// A map, its gradient, and how it comes to the node's size. A step is what lies between two channels, columns, ...
struct Map {
  const void* values;
  void* gradient;
  uint8_t* chosen;  // where in the window the maximum lies, 3 * row + column, for each value of the node
  Resampling how;
  int height, width, top, left;   // top and left: cells of padding before the first window
  float row_scale, column_scale;  // cells per place
  int64_t image_step, row_step, column_step, channel_step;

  HOST_DEVICE int64_t place(const Unit& u, int row, int column) const {
    return u.image * image_step + row * row_step + column * column_step + u.channel * channel_step;
  }
};

struct Node {
  Map maps[kMostMaps];  // the first has the node's size, and all that is of this size lies in memory as it does
  int count, images, channels, height, width;
  Activation activation;
  const float* weights;  // null: all are 1
  bool channels_last;

  HOST_DEVICE float weight(int m) const { return weights ? weights[m] : 1.0f; }

  HOST_DEVICE int64_t units(int rows, int columns) const {
    return static_cast<int64_t>(images) * rows * columns * ((channels + kGroup - 1) / kGroup);
  }

  // Unit i of a map of so many rows and columns; neighbours in memory follow each other.
  HOST_DEVICE Unit unit(int i, int rows, int columns) const {
    const int groups = (channels + kGroup - 1) / kGroup;
    Unit u;
    int group, line;
    if (channels_last) {
      group = i % groups, line = i / groups / columns;
      u.column = i / groups % columns, u.row = line % rows, u.image = line / rows;
    } else {
      line = i / columns;
      u.column = i % columns, u.row = line % rows, group = line / rows % groups, u.image = line / rows / groups;
    }
    u.channel = group * kGroup;
    u.count = channels - u.channel < kGroup ? channels - u.channel : kGroup;
    return u;
  }
};

// The cell that a place takes, as torch's interpolate has it.
HOST_DEVICE int nearest(int place, float scale, int cells) {
  const int cell = static_cast<int>(static_cast<float>(place) * scale);
  return cell < cells ? cell : cells - 1;
}

// Map m at a place of the node. The maximum is torch's: the first of equal ones, and NaN where there is one.
template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void resample(const Map& m, const Unit& u, float* to, int* chosen) {
  const T* from = static_cast<const T*>(m.values);
  if (m.how != kPooled) {
    const bool own = m.how == kOwn;
    const int row = own ? u.row : nearest(u.row, m.row_scale, m.height);
    const int column = own ? u.column : nearest(u.column, m.column_scale, m.width);
    return load_group<T, kWhole, kWidth>(from + m.place(u, row, column), m.channel_step, u.count, to);
  }
  bool first = true;
  for (int dy = 0; dy < kWindow; ++dy) {
    const int row = u.row * kStride - m.top + dy;
    if (row < 0 || row >= m.height) continue;
    for (int dx = 0; dx < kWindow; ++dx) {
      const int column = u.column * kStride - m.left + dx;
      if (column < 0 || column >= m.width) continue;
      float values[kWidth];
      load_group<T, kWhole, kWidth>(from + m.place(u, row, column), m.channel_step, u.count, values);
      for (int k = 0; k < kWidth; ++k) {
        const bool takes = first || values[k] > to[k] || values[k] != values[k];
        to[k] = takes ? values[k] : to[k];
        chosen[k] = takes ? dy * kWindow + dx : chosen[k];
      }
      first = false;
    }
  }
}

// The weighted sum at a place, from left to right, and what it is made of.
template <int kWidth>
struct Sum {
  float sum[kWidth], maps[kMostMaps][kWidth];
  int chosen[kMostMaps][kWidth];
};

template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void weighted_sum(const Node& n, const Unit& u, Sum<kWidth>& s) {
  UNROLL for (int m = 0; m < kMostMaps; ++m) {
    if (m >= n.count) continue;
    resample<T, kWhole, kWidth>(n.maps[m], u, s.maps[m], s.chosen[m]);
    const float weight = n.weight(m);
    for (int k = 0; k < kWidth; ++k) {
      const float part = s.maps[m][k] * weight;
      s.sum[k] = m == 0 ? part : s.sum[k] + part;
    }
  }
}

template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void forward_unit(const Node& n, const Unit& u, T* out) {
  Sum<kWidth> s;
  weighted_sum<T, kWhole, kWidth>(n, u, s);
  activate<kWidth>(n.activation, s.sum);
  store_group<T, kWhole, kWidth>(s.sum, out + n.maps[0].place(u, u.row, u.column), n.maps[0].channel_step, u.count);
}

// The gradient of the sum at a place, left in s.sum: it becomes those of the maps of the node's size, and is written to
// `spread`, if any, for the others.
template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void backward_unit(const Node& n, const Unit& u, const T* grad, T* spread, Sum<kWidth>& s) {
  const int64_t place = n.maps[0].place(u, u.row, u.column), step = n.maps[0].channel_step;
  float gradient[kWidth];
  weighted_sum<T, kWhole, kWidth>(n, u, s);
  load_group<T, kWhole, kWidth>(grad + place, step, u.count, gradient);
  differentiate<kWidth>(n.activation, gradient, s.sum);
  if (spread) store_group<T, kWhole, kWidth>(s.sum, spread + place, step, u.count);
  UNROLL for (int m = 0; m < kMostMaps; ++m) {
    if (m >= n.count) continue;
    const Map& map = n.maps[m];
    if (map.how == kOwn) {
      const float weight = n.weight(m);
      for (int k = 0; k < kWidth; ++k) gradient[k] = s.sum[k] * weight;
      store_group<T, kWhole, kWidth>(gradient, static_cast<T*>(map.gradient) + place, step, u.count);
    } else if (map.how == kPooled) {
      for (int k = 0; k < kWidth; ++k) {
        if (k < u.count) map.chosen[place + k * step] = static_cast<uint8_t>(s.chosen[m][k]);
      }
    }
  }
}

// Places first..end - 1 take the cell.
HOST_DEVICE void places_of(int cell, float scale, int cells, int places, int& first, int& end) {
  first = static_cast<int>(static_cast<float>(cell) / scale) - 1;
  if (first < 0) first = 0;
  while (first < places && nearest(first, scale, cells) < cell) ++first;
  end = first;
  while (end < places && nearest(end, scale, cells) == cell) ++end;
}

// Windows first..end - 1 have the cell.
HOST_DEVICE void windows_of(int cell, int before, int places, int& first, int& end) {
  first = (cell + before - kWindow + kStride) / kStride;
  if (cell + before < kWindow) first = 0;
  end = (cell + before) / kStride + 1;
  if (end > places) end = places;
}

// The gradient of map m, not of the node's size, at one of its own cells: the sum over the places that took it, in
// their order.
template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void gather_unit(const Node& n, int m, const Unit& u, const T* spread) {
  const Map& map = n.maps[m];
  const bool pooled = map.how == kPooled;
  int row, last_row, begin, end;
  if (pooled) {
    windows_of(u.row, map.top, n.height, row, last_row);
    windows_of(u.column, map.left, n.width, begin, end);
  } else {
    places_of(u.row, map.row_scale, map.height, n.height, row, last_row);
    places_of(u.column, map.column_scale, map.width, n.width, begin, end);
  }
  const float weight = n.weight(m);
  const int64_t step = n.maps[0].channel_step;
  float sum[kWidth] = {}, values[kWidth];
  for (; row < last_row; ++row) {
    for (int column = begin; column < end; ++column) {
      const int64_t place = n.maps[0].place(u, row, column);
      load_group<T, kWhole, kWidth>(spread + place, step, u.count, values);
      if (pooled) {
        const int at = (u.row + map.top - row * kStride) * kWindow + u.column + map.left - column * kStride;
        for (int k = 0; k < kWidth; ++k) {
          const bool takes = k < u.count && map.chosen[place + k * step] == at;
          sum[k] = takes ? sum[k] + values[k] * weight : sum[k];
        }
      } else {
        for (int k = 0; k < kWidth; ++k) sum[k] += values[k];
      }
    }
  }
  if (!pooled) {
    for (int k = 0; k < kWidth; ++k) sum[k] *= weight;
  }
  store_group<T, kWhole, kWidth>(sum, static_cast<T*>(map.gradient) + map.place(u, u.row, u.column), map.channel_step,
                                 u.count);
}

// The arguments of both implementations, checked.
struct Fuse {
  Node node;
  ScalarType dtype;
  bool aligned = true;  // all tensors begin at a multiple of 16 bytes
  bool rows;            // channels follow each other, and come in whole groups

  Fuse(const std::vector<Tensor>& maps, const std::optional<Tensor>& weights, const std::vector<int64_t>& how,
       bool same, int64_t activation) {
    check(!maps.empty() && maps.size() <= kMostMaps && how.size() == maps.size(), "1 to 3 maps can be fused");
    check(how[0] == kOwn, "the first map must have the node's size");
    const Tensor& own = maps[0];
    check(own.dim() == 4, "maps must be [N, C, H, W]");
    bool last = false;
    for (const Tensor& map : maps) last = last || !map.is_contiguous();
    node = {{},           static_cast<int>(maps.size()), size(own, 0), size(own, 1), size(own, 2),
            size(own, 3), activation_of(activation),     nullptr,      last};
    dtype = own.scalar_type();
    rows = last && node.channels % kGroup == 0;
    if (weights) {
      check(weights->scalar_type() == ScalarType::Float && weights->numel() == node.count,
            "weights must be float32, one a map");
      node.weights = static_cast<const float*>(contiguous(*weights, "weights").data_ptr());
    }
    for (int m = 0; m < node.count; ++m) node.maps[m] = checked(maps[m], static_cast<Resampling>(how[m]), same);
  }

  // A tensor of a map's size, dtype and layout.
  void check_like_map(const Tensor& t, const Map& map, const char* what) {
    check(t.scalar_type() == dtype && t.dim() == 4 && t.size(0) == node.images && t.size(1) == node.channels &&
              t.size(2) == map.height && t.size(3) == map.width && lies(t, map),
          what);
    begins(t);
  }

 private:
  static int size(const Tensor& t, int d) { return static_cast<int>(t.size(d)); }

  static bool lies(const Tensor& t, const Map& map) {
    const int64_t wanted[4] = {map.image_step, map.channel_step, map.row_step, map.column_step};
    bool right = true;
    for (int d = 0; d < 4; ++d) right = right && (t.numel() == 0 || t.size(d) <= 1 || t.stride(d) == wanted[d]);
    return right;
  }

  void begins(const Tensor& t) { aligned = aligned && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

  Map checked(const Tensor& t, Resampling how, bool same) {
    check(how == kOwn || how == kNearest || how == kPooled, "the resampling is unknown");
    check(t.dim() == 4 && t.scalar_type() == dtype && t.size(0) == node.images && t.size(1) == node.channels,
          "maps must be [N, C, H, W], of one dtype and one number of channels");
    check(t.numel() <= std::numeric_limits<int>::max(), "a map is too large");
    check(node.height * node.width == 0 || t.size(2) * t.size(3) > 0, "a map has no cells");
    const bool last = node.channels_last;
    const int64_t height = t.size(2), width = t.size(3), channels = node.channels;
    Map map{
        t.data_ptr(), nullptr, nullptr, how, size(t, 2), size(t, 3), 1, 1, 0, 0, channels * height * width, 0, 0, 0};
    map.row_step = last ? width * channels : width;
    map.column_step = last ? channels : 1;
    map.channel_step = last ? 1 : height * width;
    check(lies(t, map), "maps must be all contiguous or all channels_last");
    begins(t);
    map.row_scale = static_cast<float>(map.height) / static_cast<float>(node.height);
    map.column_scale = static_cast<float>(map.width) / static_cast<float>(node.width);
    if (how == kOwn) check(map.height == node.height && map.width == node.width, "a map has not the node's size");
    if (how == kPooled) {
      check(ceil_div(height, kStride) == node.height && ceil_div(width, kStride) == node.width,
            "a finer map must be twice the node's size");
      map.top = same ? map.height % 2 : 1;
      map.left = same ? map.width % 2 : 1;
    }
    return map;
  }
};

// What the backward pass writes, checked, and its memory.
struct FuseBackward {
  Fuse fuse;
  Tensor spread, chosen;  // the gradient of the sum, and Map::chosen, where there are maps of another size
  float* weight_grad;     // or null

  FuseBackward(const Fuse& fuse_, const std::vector<Tensor>& grads, const Tensor& weights, const Tensor& grad)
      : fuse(fuse_), weight_grad(nullptr) {
    Node& n = fuse.node;
    check(static_cast<int>(grads.size()) == n.count, "each map has a gradient");
    fuse.check_like_map(grad, n.maps[0], "the gradient must lie in memory as the first map does");
    check(weights.scalar_type() == ScalarType::Float && (weights.numel() == 0 || weights.numel() == n.count),
          "the weights' gradient must be float32, one a map or none");
    if (weights.numel() > 0) weight_grad = static_cast<float*>(contiguous(weights, "its gradient").data_ptr());
    int64_t others = 0, pooled = 0;
    for (int m = 0; m < n.count; ++m) {
      fuse.check_like_map(grads[m], n.maps[m], "a map's gradient must lie in memory as the map does");
      n.maps[m].gradient = grads[m].data_ptr();
      others += n.maps[m].how != kOwn;
      pooled += n.maps[m].how == kPooled;
    }
    spread = torch::stable::empty({others > 0 ? grad.numel() : 0}, grad.scalar_type(), std::nullopt, grad.device());
    chosen = torch::stable::empty({pooled * grad.numel()}, ScalarType::Byte, std::nullopt, grad.device());
    uint8_t* next = static_cast<uint8_t*>(chosen.data_ptr());
    for (int m = 0; m < n.count; ++m) {
      if (n.maps[m].how == kPooled) n.maps[m].chosen = next, next += grad.numel();
    }
  }

  template <typename T>
  T* spread_values() const {
    return spread.numel() > 0 ? static_cast<T*>(spread.data_ptr()) : nullptr;
  }
};

}  // namespace detcore
