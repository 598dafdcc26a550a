// Features of one size for regions of any size: bilinear samples of the levels of a pyramid, averaged by bins.
//
// A bin's mean is separable: its weight of a cell is that of the cell's row times that of its column. The forward pass
// reads what each sample touches; the backward pass asks for each cell which bins touch it, so that a cell's gradient
// is one sum, in the order of the regions, and nothing is added atomically.
#pragma once

#include <vector>

#include "bias_relu.h"
#include "corners.h"

namespace detcore {

constexpr int kMostLevels = 8;
constexpr int kMostBins = 32;  // along an axis

// One level's feature map of all images, or its gradient. A step is what lies between two channels, columns, ...
struct Map {
  void* values;
  int height, width;
  float scale;  // cells per pixel
  int64_t image_step, row_step, column_step, channel_step;

  HOST_DEVICE int64_t place(int64_t image, int row, int column, int64_t channel) const {
    return image * image_step + row * row_step + column * column_step + channel * channel_step;
  }
};

struct Pyramid {
  Map at[kMostLevels];
};

// What a sample reads along one axis: two neighbouring cells and their weights.
struct Tap {
  int low, high;
  float low_weight, high_weight;

  HOST_DEVICE bool used() const { return low_weight + high_weight != 0.f; }
};

HOST_DEVICE Tap tap(float at, int size) {
  if (!(at >= -1.f && at <= static_cast<float>(size))) return {0, 0, 0.f, 0.f};
  at = larger(at, 0.f);
  const int low = static_cast<int>(at);
  if (low >= size - 1) return {size - 1, size - 1, 1.f, 0.f};
  const float far = at - static_cast<float>(low);
  return {low, low + 1, 1.f - far, far};
}

// A region along one axis of its map, in cells.
struct Span {
  float start, bin, step;  // of the region, a bin, a sample
  int samples, size;       // of a bin; cells of the map

  HOST_DEVICE float at(int bin_index, int sample) const {
    return start + product(static_cast<float>(bin_index), bin) + product(static_cast<float>(sample) + .5f, step);
  }

  // The weights in a bin's mean, along this axis, of the cells first..first + cells - 1, to `to[0]`, `to[step]`, ...
  // Returns whether there is any.
  HOST_DEVICE bool weights(int bin_index, int first, int cells, float* to, int step) const {
    bool any = false;
    for (int i = 0; i < cells; ++i) to[i * step] = 0.f;
    for (int k = 0; k < samples; ++k) {
      const Tap t = tap(at(bin_index, k), size);
      const int low = t.low - first, high = t.high - first;
      if (low >= 0 && low < cells) to[low * step] += t.low_weight;
      if (high >= 0 && high < cells) to[high * step] += t.high_weight;
    }
    for (int i = 0; i < cells; ++i) {
      if (to[i * step] == 0.f) continue;
      to[i * step] = quotient(to[i * step], static_cast<float>(samples));
      any = true;
    }
    return any;
  }

  // Cells first..last that may have a weight; of the cells of the map.
  HOST_DEVICE void cells(int bins, int& first, int& last) const {
    const float end = start + product(static_cast<float>(bins), bin);
    const float low = smaller(start, end) - 1.f, high = larger(start, end) + 1.f, most = static_cast<float>(size - 1);
    first = low > 0.f ? (low < most ? static_cast<int>(low) : size - 1) : 0;
    last = high < most ? (high > 0.f ? static_cast<int>(high) : 0) : size - 1;
  }
};

// Four cells and their weights in a sample.
struct Sample {
  int64_t place[4];
  float weight[4];

  HOST_DEVICE float read(float a, float b, float c, float d) const {
    return product(weight[0], a) + product(weight[1], b) + product(weight[2], c) + product(weight[3], d);
  }
};

// Sizes that both passes share, and how a region lies on its map.
struct RoIs {
  const Corners* boxes;
  const int64_t* level;
  int64_t images, count, channels;  // count: regions of an image
  int levels, bins, sampling;
  bool aligned;

  HOST_DEVICE Span span(float low, float high, float scale, int size) const {
    const float shift = aligned ? .5f : 0.f;
    const float start = product(low, scale) - shift;
    float extent = product(high, scale) - shift - start;
    if (!aligned) extent = larger(extent, 1.f);
    const float bin = quotient(extent, static_cast<float>(bins));
    // The limit is out of reach of boxes near their image; beyond it samples would only cost time.
    const int samples = sampling > 0 ? sampling : static_cast<int>(smaller(larger(ceilf(bin), 0.f), 1024.f));
    return {start, bin, samples > 0 ? quotient(bin, static_cast<float>(samples)) : 0.f, samples, size};
  }
  HOST_DEVICE Span rows(int64_t region, const Map& map) const {
    return span(boxes[region].y1, boxes[region].y2, map.scale, map.height);
  }
  HOST_DEVICE Span columns(int64_t region, const Map& map) const {
    return span(boxes[region].x1, boxes[region].x2, map.scale, map.width);
  }
  HOST_DEVICE bool on(int64_t region, int which) const { return level[region] == which; }
  HOST_DEVICE bool nowhere(int64_t region) const { return level[region] < 0 || level[region] >= levels; }
};

HOST_DEVICE Sample corners_of(const Map& map, int64_t image, const Tap& y, const Tap& x) {
  return {{map.place(image, y.low, x.low, 0), map.place(image, y.low, x.high, 0), map.place(image, y.high, x.low, 0),
           map.place(image, y.high, x.high, 0)},
          {product(y.low_weight, x.low_weight), product(y.low_weight, x.high_weight),
           product(y.high_weight, x.low_weight), product(y.high_weight, x.high_weight)}};
}

// The mean of a sum of samples.
HOST_DEVICE float mean_of(float sum, const Span& rows, const Span& columns) {
  const float all = product(static_cast<float>(rows.samples), static_cast<float>(columns.samples));
  return all > 0.f ? quotient(sum, all) : 0.f;
}

// The arguments of both passes, checked. Regions' values are [N * S, C, bins, bins], in the maps' layout.
struct RoIAlign {
  RoIs rois;
  Pyramid pyramid;
  bool last;  // channels_last

  RoIAlign(const std::vector<Tensor>& maps, const Tensor& boxes, const Tensor& level, const std::vector<double>& scales,
           int64_t resolution, int64_t sampling_ratio, bool aligned) {
    check(!maps.empty() && maps.size() <= kMostLevels && scales.size() == maps.size(),
          "there must be 1 to 8 feature maps, and a scale for each");
    check(resolution >= 1 && resolution <= kMostBins, "resolution must be 1 to 32");
    check(sampling_ratio >= 0 && sampling_ratio <= 64, "sampling_ratio must be 0 to 64");
    check(level.scalar_type() == ScalarType::Long && level.dim() == 2, "level must be int64 [N, S]");
    check(boxes.scalar_type() == ScalarType::Float && boxes.dim() == 3 && boxes.size(0) == level.size(0) &&
              boxes.size(1) == level.size(1) && boxes.size(2) == 4,
          "boxes must be float32 [N, S, 4], as many as level");
    check(maps[0].dim() == 4, "features must be [N, C, H, W]");
    rois = {static_cast<const Corners*>(contiguous(boxes, "boxes").data_ptr()),
            static_cast<const int64_t*>(contiguous(level, "level").data_ptr()),
            level.size(0),
            level.size(1),
            maps[0].size(1),
            static_cast<int>(maps.size()),
            static_cast<int>(resolution),
            static_cast<int>(sampling_ratio),
            aligned};
    last = false;
    for (const Tensor& map : maps) last = last || !map.is_contiguous();
    for (size_t i = 0; i < maps.size(); ++i) pyramid.at[i] = checked(maps[i], maps[0], static_cast<float>(scales[i]));
  }

  int64_t regions() const { return rois.images * rois.count; }

  Tensor empty(const Tensor& like) const {
    using torch::headeronly::MemoryFormat;
    return torch::stable::empty({regions(), rois.channels, rois.bins, rois.bins}, like.scalar_type(), std::nullopt,
                                like.device(), std::nullopt,
                                last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

  // Where regions' values lie: a map whose images are the regions.
  Map values(const Tensor& t, const Tensor& like) const {
    check(t.dim() == 4 && t.size(0) == regions() && t.size(1) == rois.channels && t.size(2) == rois.bins &&
              t.size(3) == rois.bins && t.scalar_type() == like.scalar_type(),
          "grad must be [N * S, C, resolution, resolution], of the features' dtype");
    const Map map = shape(t.data_ptr(), rois.channels, rois.bins, rois.bins, last);
    check(lies(t, map), "grad must lie in memory as the features do");
    return map;
  }

 private:
  static Map shape(void* values, int64_t channels, int64_t height, int64_t width, bool last) {
    Map map{values, static_cast<int>(height), static_cast<int>(width), 1.f, channels * height * width, 0, 0, 0};
    map.row_step = last ? width * channels : width;
    map.column_step = last ? channels : 1;
    map.channel_step = last ? 1 : height * width;
    return map;
  }

  static bool lies(const Tensor& t, const Map& map) {
    const int64_t wanted[4] = {map.image_step, map.channel_step, map.row_step, map.column_step};
    bool right = true;
    for (int d = 0; d < 4; ++d) right = right && (t.size(d) <= 1 || t.stride(d) == wanted[d]);
    return right;
  }

  Map checked(const Tensor& t, const Tensor& first, float scale) const {
    check(t.dim() == 4 && t.size(0) == rois.images && t.size(1) == rois.channels && t.size(2) > 0 && t.size(3) > 0 &&
              t.scalar_type() == first.scalar_type(),
          "features must be [N, C, H, W] with cells, of one dtype and one number of channels");
    Map map = shape(t.data_ptr(), rois.channels, t.size(2), t.size(3), last);
    map.scale = scale;
    check(lies(t, map), "features must be all contiguous or all channels_last");
    return map;
  }
};

}  // namespace detcore
