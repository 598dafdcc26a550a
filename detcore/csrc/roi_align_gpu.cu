#include "roi_align.h"

namespace detcore {

constexpr int kThreads = 256;
constexpr int kSide = 8;  // cells of a tile along each axis, whose gradients a block sums

// A thread has one bin of one region, and kWidth channels of it: 8 neighbours in channels_last, else 1. Neighbouring
// threads write neighbouring places.
template <typename T, bool kWhole>
__global__ void roi_align_kernel(RoIs rois, Pyramid pyramid, Map out, bool last, int64_t total) {
  constexpr int kWidth = kWhole ? kGroup : 1;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t bins = rois.bins, groups = rois.channels / kWidth;
  const int64_t spot = last ? i / groups : i % (bins * bins);  // last: of all regions
  const int64_t region = i / (groups * bins * bins),
                channel = (last ? i % groups : i / (bins * bins) % groups) * kWidth;
  const int y_bin = static_cast<int>(spot / bins % bins), x_bin = static_cast<int>(spot % bins);
  float sum[kWidth] = {};
  T* to = static_cast<T*>(out.values) + out.place(region, y_bin, x_bin, channel);
  if (!rois.nowhere(region)) {
    const Map& map = pyramid.at[rois.level[region]];
    const T* from = static_cast<const T*>(map.values) + channel * map.channel_step;
    const Span rows = rois.rows(region, map), columns = rois.columns(region, map);
    for (int y_sample = 0; y_sample < rows.samples; ++y_sample) {
      const Tap y = tap(rows.at(y_bin, y_sample), map.height);
      if (!y.used()) continue;
      for (int x_sample = 0; x_sample < columns.samples; ++x_sample) {
        const Tap x = tap(columns.at(x_bin, x_sample), map.width);
        if (!x.used()) continue;
        const Sample s = corners_of(map, region / rois.count, y, x);
        if constexpr (kWhole) {
          Group<T, true> corner[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) corner[k].load(from + s.place[k], kGroup);
#pragma unroll
          for (int k = 0; k < kGroup; ++k) {
            sum[k] += s.read(static_cast<float>(corner[0].at[k]), static_cast<float>(corner[1].at[k]),
                             static_cast<float>(corner[2].at[k]), static_cast<float>(corner[3].at[k]));
          }
        } else {
          sum[0] += s.read(static_cast<float>(from[s.place[0]]), static_cast<float>(from[s.place[1]]),
                           static_cast<float>(from[s.place[2]]), static_cast<float>(from[s.place[3]]));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum[k] = mean_of(sum[k], rows, columns);
  }
  if constexpr (kWhole) {
    Group<T, true> group;
#pragma unroll
    for (int k = 0; k < kGroup; ++k) group.at[k] = static_cast<T>(sum[k]);
    group.store(to, kGroup);
  } else {
    *to = static_cast<T>(sum[0]);
  }
}

static Tensor roi_align(std::vector<Tensor> features, Tensor boxes, Tensor level, std::vector<double> scales,
                        int64_t resolution, int64_t sampling_ratio, bool aligned) {
  const RoIAlign a(features, boxes, level, scales, resolution, sampling_ratio, aligned);
  const Tensor out = a.empty(features[0]);
  const Map map = a.values(out, features[0]);
  uintptr_t addresses = reinterpret_cast<uintptr_t>(map.values);
  for (int k = 0; k < a.rois.levels; ++k) addresses |= reinterpret_cast<uintptr_t>(a.pyramid.at[k].values);
  const bool whole = a.last && a.rois.channels % kGroup == 0 && addresses % 16 == 0;
  const int64_t total = a.regions() * a.rois.channels * a.rois.bins * a.rois.bins / (whole ? kGroup : 1);
  const OnDevice gpu(boxes);
  for_floating(out, "features", [&](auto zero) {
    using T = decltype(zero);
    gpu.launch(whole ? &roi_align_kernel<T, true> : &roi_align_kernel<T, false>, ceil_div(total, kThreads), kThreads,
               a.rois, a.pyramid, map, a.last, total);
  });
  return out;
}

// Where the blocks of each map begin: tiles of all images, each for kThreads channels at a time.
struct Blocks {
  int64_t first[kMostLevels + 1];
};

// The weights of a tile's rows and columns in the bins of one region, and which bins have any.
struct TileWeights {
  float weight[2][kMostBins][kSide];
  bool any[2][kMostBins];
};

// Finds which of kThreads regions from `start` on touch a tile; list: those, in order. All threads of the block call
// it.
__device__ inline int touching(const RoIs& rois, const Map& map, int which, int64_t image, int64_t start, int y, int x,
                               int* list) {
  __shared__ int of_warp[kThreads / 32];
  const int64_t own = start + threadIdx.x, region = image * rois.count + own;
  bool touches = own < rois.count && rois.on(region, which);
  if (touches) {
    int first, last;
    rois.rows(region, map).cells(rois.bins, first, last);
    touches = first < y + kSide && last >= y;
    rois.columns(region, map).cells(rois.bins, first, last);
    touches = touches && first < x + kSide && last >= x;
  }
  const unsigned votes = __ballot_sync(0xffffffffu, touches);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) of_warp[warp] = __popc(votes);
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    before += w < warp ? of_warp[w] : 0;
    total += of_warp[w];
  }
  if (touches) list[before + __popc(votes & ((1u << lane) - 1))] = static_cast<int>(own);
  __syncthreads();
  return total;
}

// A block sums the gradients of a tile of cells, a thread those of one channel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    roi_align_backward_kernel(RoIs rois, Pyramid pyramid, Blocks blocks, Map grad) {
  __shared__ int list[kThreads];
  __shared__ TileWeights tile;
  int which = 0;
  while (blocks.first[which + 1] <= blockIdx.x) ++which;
  const Map map = pyramid.at[which];
  const int across = (map.width + kSide - 1) / kSide, down = (map.height + kSide - 1) / kSide;
  const int64_t parts = (rois.channels + kThreads - 1) / kThreads;
  int64_t rest = blockIdx.x - blocks.first[which];
  const int64_t channel = rest % parts * kThreads + threadIdx.x;
  rest /= parts;
  const int x0 = static_cast<int>(rest % across) * kSide, y0 = static_cast<int>(rest / across % down) * kSide;
  const int64_t image = rest / across / down;
  const bool used = channel < rois.channels;
  const T* from = static_cast<const T*>(grad.values);
  float sum[kSide][kSide] = {};
  for (int64_t start = 0; start < rois.count; start += kThreads) {
    const int found = touching(rois, map, which, image, start, y0, x0, list);
    for (int k = 0; k < found; ++k) {
      const int64_t region = image * rois.count + list[k];
      for (int t = threadIdx.x; t < 2 * rois.bins; t += kThreads) {
        const int axis = t / rois.bins, bin = t % rois.bins;
        const Span span = axis ? rois.columns(region, map) : rois.rows(region, map);
        tile.any[axis][bin] = span.weights(bin, axis ? x0 : y0, kSide, tile.weight[axis][bin], 1);
      }
      __syncthreads();
      for (int y_bin = 0; y_bin < rois.bins; ++y_bin) {
        if (!tile.any[0][y_bin]) continue;
        float line[kSide] = {};
        for (int x_bin = 0; x_bin < rois.bins; ++x_bin) {
          if (!tile.any[1][x_bin] || !used) continue;
          const float value = static_cast<float>(from[grad.place(region, y_bin, x_bin, channel)]);
#pragma unroll
          for (int x = 0; x < kSide; ++x) {
            const float weight = tile.weight[1][x_bin][x];
            if (weight != 0.f) line[x] += product(weight, value);
          }
        }
#pragma unroll
        for (int y = 0; y < kSide; ++y) {
          const float weight = tile.weight[0][y_bin][y];
          if (weight == 0.f) continue;
#pragma unroll
          for (int x = 0; x < kSide; ++x) sum[y][x] += product(weight, line[x]);
        }
      }
      __syncthreads();
    }
  }
  if (!used) return;
  T* to = static_cast<T*>(map.values);
#pragma unroll
  for (int y = 0; y < kSide; ++y) {
#pragma unroll
    for (int x = 0; x < kSide; ++x) {
      if (y0 + y < map.height && x0 + x < map.width) {
        to[map.place(image, y0 + y, x0 + x, channel)] = static_cast<T>(sum[y][x]);
      }
    }
  }
}

static void roi_align_backward_(std::vector<Tensor> grads, Tensor grad, Tensor boxes, Tensor level,
                                std::vector<double> scales, int64_t resolution, int64_t sampling_ratio, bool aligned) {
  const RoIAlign a(grads, boxes, level, scales, resolution, sampling_ratio, aligned);
  const Map values = a.values(grad, grads[0]);
  Blocks blocks{};
  for (int k = 0; k < a.rois.levels; ++k) {
    const Map& map = a.pyramid.at[k];
    const int64_t tiles = ceil_div(map.width, kSide) * ceil_div(map.height, kSide);
    blocks.first[k + 1] = blocks.first[k] + tiles * a.rois.images * ceil_div(a.rois.channels, kThreads);
  }
  const OnDevice gpu(boxes);
  for_floating(grad, "grad", [&](auto zero) {
    gpu.launch(&roi_align_backward_kernel<decltype(zero)>, blocks.first[a.rois.levels], kThreads, a.rois, a.pyramid,
               blocks, values);
  });
}

}  // namespace detcore

GPU_OPS(m) {
  m.impl("roi_align", TORCH_BOX(&detcore::roi_align));
  m.impl("roi_align_backward_", TORCH_BOX(&detcore::roi_align_backward_));
}
