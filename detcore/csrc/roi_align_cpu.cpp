#include <algorithm>
#include <vector>

#include "roi_align.h"
#include "vectors.h"

namespace detcore {

constexpr int64_t kChannels = 32;  // whose gradients of a map are summed at once

// sum[c] += the sample of channel c, for channels that are neighbours in memory.
template <typename T>
WIDE_VECTORS static void add_sample(const Sample& s, const T* values, int64_t channels, float* sum) {
  const T *a = values + s.place[0], *b = values + s.place[1], *c = values + s.place[2], *d = values + s.place[3];
  for (int64_t k = 0; k < channels; ++k) {
    sum[k] +=
        s.read(static_cast<float>(a[k]), static_cast<float>(b[k]), static_cast<float>(c[k]), static_cast<float>(d[k]));
  }
}

// The samples of all bins along one axis.
static std::vector<Tap> taps(const Span& span, int bins) {
  std::vector<Tap> found;
  for (int bin = 0; bin < bins; ++bin) {
    for (int k = 0; k < span.samples; ++k) found.push_back(tap(span.at(bin, k), span.size));
  }
  return found;
}

// The samples of a region bin after bin, each bin's from begin[bin] to begin[bin + 1].
struct Samples {
  std::vector<Sample> at;
  std::vector<size_t> begin;

  Samples(const Map& map, int64_t image, const Span& rows, const Span& columns, int bins) {
    const std::vector<Tap> ys = taps(rows, bins), xs = taps(columns, bins);
    for (int bin = 0; bin < bins * bins; ++bin) {
      begin.push_back(at.size());
      for (int i = 0; i < rows.samples; ++i) {
        const Tap& y = ys[bin / bins * rows.samples + i];
        for (int j = 0; j < columns.samples; ++j) {
          const Tap& x = xs[bin % bins * columns.samples + j];
          if (y.used() && x.used()) at.push_back(corners_of(map, image, y, x));
        }
      }
    }
    begin.push_back(at.size());
  }
};

template <typename T>
static void align_region(const RoIAlign& a, int64_t region, T* to) {
  const RoIs& rois = a.rois;
  const int64_t bins = rois.bins * rois.bins, channels = rois.channels;
  to += region * channels * bins;
  if (rois.nowhere(region)) return void(std::fill_n(to, channels * bins, T(0.f)));
  const Map& map = a.pyramid.at[rois.level[region]];
  const T* from = static_cast<const T*>(map.values);
  const Span rows = rois.rows(region, map), columns = rois.columns(region, map);
  const Samples samples(map, region / rois.count, rows, columns, rois.bins);
  std::vector<float> sum(channels);
  for (int64_t bin = 0; a.last && bin < bins; ++bin) {
    std::fill(sum.begin(), sum.end(), 0.f);
    for (size_t k = samples.begin[bin]; k < samples.begin[bin + 1]; ++k) {
      add_sample(samples.at[k], from, channels, sum.data());
    }
    for (int64_t c = 0; c < channels; ++c) to[bin * channels + c] = T(mean_of(sum[c], rows, columns));
  }
  for (int64_t c = 0; !a.last && c < channels; ++c) {
    const T* plane = from + c * map.channel_step;
    for (int64_t bin = 0; bin < bins; ++bin) {
      float total = 0;
      for (size_t k = samples.begin[bin]; k < samples.begin[bin + 1]; ++k) {
        const Sample& s = samples.at[k];
        total += s.read(static_cast<float>(plane[s.place[0]]), static_cast<float>(plane[s.place[1]]),
                        static_cast<float>(plane[s.place[2]]), static_cast<float>(plane[s.place[3]]));
      }
      to[c * bins + bin] = T(mean_of(total, rows, columns));
    }
  }
}

static Tensor roi_align(std::vector<Tensor> features, Tensor boxes, Tensor level, std::vector<double> scales,
                        int64_t resolution, int64_t sampling_ratio, bool aligned) {
  const RoIAlign a(features, boxes, level, scales, resolution, sampling_ratio, aligned);
  const Tensor out = a.empty(features[0]);
  for_floating(out, "features", [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, a.regions(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) align_region<T>(a, i, static_cast<T*>(out.data_ptr()));
    });
  });
  return out;
}

// to[k] += factor * from[k]
WIDE_VECTORS static void add_scaled(float factor, const float* from, float* to, int64_t count) {
  for (int64_t k = 0; k < count; ++k) to[k] += factor * from[k];
}

// Which cells of an axis a region touches, and their weights in each bin.
struct Reach {
  int first, last;
  std::vector<float> weight;  // [bins][cells]

  Reach(const Span& span, int bins) {
    span.cells(bins, first, last);
    weight.resize(static_cast<size_t>(bins) * cells());
    for (int bin = 0; bin < bins; ++bin) span.weights(bin, first, cells(), &weight[bin * cells()], 1);
  }
  int cells() const { return last - first + 1; }
};

// Adds the gradient of one region to that of `count` channels of a map, sum [H][W][kChannels].
template <typename T>
static void add_region(const RoIAlign& a, int64_t region, const Map& map, const Map& grad, int64_t channel,
                       int64_t count, std::vector<float>& line, std::vector<float>& sum) {
  const int bins = a.rois.bins;
  const Reach rows(a.rois.rows(region, map), bins), columns(a.rois.columns(region, map), bins);
  const T* from = static_cast<const T*>(grad.values);
  line.resize(static_cast<size_t>(columns.cells()) * kChannels);
  for (int y_bin = 0; y_bin < bins; ++y_bin) {
    std::fill(line.begin(), line.end(), 0.f);
    for (int x_bin = 0; x_bin < bins; ++x_bin) {
      float values[kChannels] = {};
      const T* place = from + grad.place(region, y_bin, x_bin, channel);
      for (int64_t c = 0; c < count; ++c) values[c] = static_cast<float>(place[c * grad.channel_step]);
      for (int x = 0; x < columns.cells(); ++x) {
        const float weight = columns.weight[x_bin * columns.cells() + x];
        if (weight != 0.f) add_scaled(weight, values, &line[x * kChannels], kChannels);
      }
    }
    for (int y = 0; y < rows.cells(); ++y) {
      const float weight = rows.weight[y_bin * rows.cells() + y];
      float* to = &sum[(static_cast<size_t>(rows.first + y) * map.width + columns.first) * kChannels];
      if (weight != 0.f) add_scaled(weight, line.data(), to, columns.cells() * kChannels);
    }
  }
}

// The gradient of some channels of one map of one image.
template <typename T>
static void map_gradient(const RoIAlign& a, int which, int64_t image, int64_t channel, const Map& grad) {
  const Map& map = a.pyramid.at[which];
  const int64_t count = std::min(kChannels, a.rois.channels - channel);
  std::vector<float> line, sum(static_cast<size_t>(map.height) * map.width * kChannels);
  for (int64_t region = image * a.rois.count; region < (image + 1) * a.rois.count; ++region) {
    if (a.rois.level[region] == which) add_region<T>(a, region, map, grad, channel, count, line, sum);
  }
  T* to = static_cast<T*>(map.values);
  for (int y = 0; y < map.height; ++y) {
    for (int x = 0; x < map.width; ++x) {
      T* place = to + map.place(image, y, x, channel);
      const float* from = &sum[(static_cast<size_t>(y) * map.width + x) * kChannels];
      for (int64_t c = 0; c < count; ++c) place[c * map.channel_step] = T(from[c]);
    }
  }
}

static void roi_align_backward_(std::vector<Tensor> grads, Tensor grad, Tensor boxes, Tensor level,
                                std::vector<double> scales, int64_t resolution, int64_t sampling_ratio, bool aligned) {
  const RoIAlign a(grads, boxes, level, scales, resolution, sampling_ratio, aligned);
  const Map values = a.values(grad, grads[0]);
  const int64_t parts = ceil_div(a.rois.channels, kChannels), levels = a.rois.levels;
  for_floating(grad, "grad", [&](auto zero) {
    torch::stable::parallel_for(0, a.rois.images * levels * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        map_gradient<decltype(zero)>(a, static_cast<int>(i / parts % levels), i / parts / levels, i % parts * kChannels,
                                     values);
      }
    });
  });
}

}  // namespace detcore

SCHEMAS(m) {
  m.def(
      "roi_align(Tensor[] features, Tensor boxes, Tensor level, float[] scales, int resolution, int sampling_ratio, "
      "bool aligned) -> Tensor");
  m.def(
      "roi_align_backward_(Tensor(a!)[] grads, Tensor grad, Tensor boxes, Tensor level, float[] scales, "
      "int resolution, int sampling_ratio, bool aligned) -> ()");
}
CPU_OPS(m) {
  m.impl("roi_align", TORCH_BOX(&detcore::roi_align));
  m.impl("roi_align_backward_", TORCH_BOX(&detcore::roi_align_backward_));
}
