#include "norm_act.h"

namespace detcore {

constexpr int kThreads = 128;      // few, so that the registers of a multiprocessor are enough for more of them
constexpr int kMerging = 64;       // threads that merge the parts of a channel
constexpr int kAtOnce = 4;         // rows whose moments a thread makes at once
constexpr int64_t kBlocks = 2048;  // enough to fill a GPU; their threads go on by strides

// Which values a block has: some rows (places of the map, over all images) of `lanes` units, and a unit is the kWidth
// channels of a thread. Neighbouring threads have neighbours in memory.
struct Grid {
  Places places;
  int64_t rows, parts, length;  // length: rows of a part
  int units, lanes, across;     // lanes: a power of two

  Grid(const Places& p, int width) : places(p) {
    rows = p.numel / p.channels;
    units = static_cast<int>(p.channels / width);
    lanes = 1;
    while (p.inner == 1 && lanes < units && lanes < 32) lanes *= 2;
    for (int fewer = lanes / 2; fewer >= 8; fewer /= 2) {  // where less of them are none of the tensor's
      if (ceil_div(units, fewer) * fewer < ceil_div(units, lanes) * lanes) lanes = fewer;
    }
    across = static_cast<int>(ceil_div(units, lanes));
    const int64_t wanted = ceil_div(rows, kAtOnce * kThreads / lanes), most = ceil_div(kBlocks, across);
    parts = wanted < most ? wanted : most;
    length = ceil_div(rows, parts);
  }

  int64_t blocks() const { return parts * across; }

  // Of a row and a unit.
  template <int kWidth>
  HOST_DEVICE int64_t place(int64_t row, int unit) const {
    if constexpr (kWidth > 1) return (row * units + unit) * kWidth;
    return (row / places.inner * units + unit) * places.inner + row % places.inner;
  }
};

// What a thread has of them: every step-th row from the first on, of one unit.
struct Share {
  int unit, step;
  int64_t part, first, end;
  bool there;  // else the unit is none of the tensor's, and no row is the thread's

  __device__ explicit Share(const Grid& g) {
    const int thread = static_cast<int>(threadIdx.x);
    unit = static_cast<int>(blockIdx.x) % g.across * g.lanes + thread % g.lanes;
    step = kThreads / g.lanes;
    part = blockIdx.x / g.across;
    first = part * g.length + thread / g.lanes;
    end = (part + 1) * g.length < g.rows ? (part + 1) * g.length : g.rows;
    there = unit < g.units;
    if (!there) unit = 0, end = 0;
  }
};

// What all threads of a lane have, added up in a fixed order; left with the lane's first one. A block has kCount
// threads, of which thread i is of lane i % lanes.
template <int kCount, template <typename, int> typename Kind, typename Real, int kWidth>
__device__ void add_threads(Kind<Real, kWidth>& own, int lanes) {
  __shared__ Real shared[Kind<Real, kWidth>::kValues][kCount];
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = kCount / 2; half >= lanes; half /= 2) {
    __syncthreads();
    UNROLL for (int v = 0; v < own.kValues; ++v) shared[v][thread] = own.at[v];
    __syncthreads();
    if (thread >= half) continue;
    Kind<Real, kWidth> other;
    UNROLL for (int v = 0; v < own.kValues; ++v) other.at[v] = shared[v][thread + half];
    own.add(other);
  }
}

// parts: [parts, channels].
template <typename T, int kWidth>
__global__ void norm_moments_kernel(const T* x, Grid grid, Moments<float, 1>* parts) {
  const Share mine(grid);
  Moments<float, kWidth> own{};
  for (int64_t row = mine.first; row < mine.end; row += kAtOnce * mine.step) {
    float values[kAtOnce][kWidth] = {};
    int count = 0;
    UNROLL for (int b = 0; b < kAtOnce; ++b) {
      if (row + b * mine.step >= mine.end) continue;
      const T* from = x + grid.place<kWidth>(row + b * mine.step, mine.unit);
      load_group<T, (kWidth > 1), kWidth>(from, 1, kWidth, values[b]);
      count = b + 1;
    }
    Moments<float, kWidth> these{};
    these.at[0] = static_cast<float>(count);
    const float share = 1.0f / these.at[0];
    UNROLL for (int k = 0; k < kWidth; ++k) {
      float mean = 0.0f, squares = 0.0f;
      UNROLL for (int b = 0; b < kAtOnce; ++b) mean += values[b][k];
      mean *= share;
      UNROLL for (int b = 0; b < kAtOnce; ++b) {
        const float apart = values[b][k] - mean;
        squares += b < count ? apart * apart : 0.0f;
      }
      these.at[1 + k] = mean;
      these.at[1 + kWidth + k] = squares;
    }
    own.add(these);
  }
  add_threads<kThreads>(own, grid.lanes);
  if (static_cast<int>(threadIdx.x) >= grid.lanes || !mine.there) return;
  for (int k = 0; k < kWidth; ++k) {
    parts[(mine.part * grid.units + mine.unit) * kWidth + k] = {own.at[0], own.at[1 + k], own.at[1 + kWidth + k]};
  }
}

template <typename T, int kWidth>
__global__ void norm_sums_kernel(const T* x, const T* grad, Grid grid, Parameters parameters, Activation kind,
                                 Sums<float, 1>* parts) {
  constexpr bool kWhole = kWidth > 1;
  const Share mine(grid);
  const auto p = parameters.lanes<kWhole, kWidth>(static_cast<int64_t>(mine.unit) * kWidth, 1, kWidth);
  Sums<float, kWidth> own{};
  for (int64_t row = mine.first; row < mine.end; row += mine.step) {
    const int64_t at = grid.place<kWidth>(row, mine.unit);
    float apart[kWidth], z[kWidth];
    gradient_group<T, kWhole, kWidth>(p, kind, x + at, grad + at, kWidth, apart, z);
    UNROLL for (int k = 0; k < kWidth; ++k) {
      own.at[k] += z[k];
      own.at[kWidth + k] += z[k] * apart[k];
    }
  }
  add_threads<kThreads>(own, grid.lanes);
  if (static_cast<int>(threadIdx.x) >= grid.lanes || !mine.there) return;
  for (int k = 0; k < kWidth; ++k) {
    parts[(mine.part * grid.units + mine.unit) * kWidth + k] = {own.at[k], own.at[kWidth + k]};
  }
}

// A block for each channel: to.write(channel, its parts together).
template <template <typename, int> typename Kind, typename To>
__global__ void norm_merge_kernel(const Kind<float, 1>* parts, int64_t count, To to) {
  Kind<double, 1> own{};
  for (int64_t part = threadIdx.x; part < count; part += kMerging) {
    own.add(widened(parts[part * gridDim.x + blockIdx.x]));
  }
  add_threads<kMerging>(own, 1);
  if (threadIdx.x == 0) to.write(blockIdx.x, own);
}

template <typename T, int kWidth>
__global__ void norm_act_kernel(const T* x, Grid grid, Parameters parameters, Activation kind, T* out) {
  constexpr bool kWhole = kWidth > 1;
  const Share mine(grid);
  const auto p = parameters.lanes<kWhole, kWidth>(static_cast<int64_t>(mine.unit) * kWidth, 1, kWidth);
  for (int64_t row = mine.first; row < mine.end; row += mine.step) {
    const int64_t at = grid.place<kWidth>(row, mine.unit);
    forward_group<T, kWhole, kWidth>(p, kind, x + at, out + at, kWidth);
  }
}

template <typename T, int kWidth>
__global__ void norm_input_kernel(const T* x, const T* grad, Grid grid, Parameters parameters,
                                  ParameterGradients gradients, float share, Activation kind, T* dx) {
  constexpr bool kWhole = kWidth > 1;
  const Share mine(grid);
  const int64_t channel = static_cast<int64_t>(mine.unit) * kWidth;
  const auto p = parameters.lanes<kWhole, kWidth>(channel, 1, kWidth);
  const auto means = parameters.means<kWhole, kWidth>(gradients, share, channel, 1, kWidth);
  for (int64_t row = mine.first; row < mine.end; row += mine.step) {
    const int64_t at = grid.place<kWidth>(row, mine.unit);
    input_group<T, kWhole, kWidth>(p, means, kind, x + at, grad + at, dx + at, kWidth);
  }
}

// Memory for the parts of all channels.
template <template <typename, int> typename Kind>
static Tensor parts_of(const Grid& grid, const Tensor& like) {
  return floats(grid.parts * grid.places.channels * Kind<float, 1>::kValues, like);
}

template <typename T, int kWidth>
static void forward(const OnDevice& gpu, const NormAct& a, const Tensor& x) {
  const Grid grid(a.places, kWidth);
  const Tensor parts = parts_of<Moments>(grid, x);
  const T* from = static_cast<const T*>(x.data_ptr());
  auto* moments = static_cast<Moments<float, 1>*>(parts.data_ptr());
  gpu.launch(&norm_moments_kernel<T, kWidth>, grid.blocks(), kThreads, from, grid, moments);
  gpu.launch(&norm_merge_kernel<Moments, Statistics>, a.places.channels, kMerging, moments, grid.parts, a.statistics);
  gpu.launch(&norm_act_kernel<T, kWidth>, grid.blocks(), kThreads, from, grid, a.parameters, a.kind,
             static_cast<T*>(a.out.data_ptr()));
}

template <typename T, int kWidth>
static void backward(const OnDevice& gpu, const NormActBackward& a, const Tensor& grad, const Tensor& x) {
  const Grid grid(a.places, kWidth);
  const Tensor parts = parts_of<Sums>(grid, x);
  const T* from = static_cast<const T*>(x.data_ptr());
  const T* upstream = static_cast<const T*>(grad.data_ptr());
  auto* sums = static_cast<Sums<float, 1>*>(parts.data_ptr());
  gpu.launch(&norm_sums_kernel<T, kWidth>, grid.blocks(), kThreads, from, upstream, grid, a.parameters, a.kind, sums);
  gpu.launch(&norm_merge_kernel<Sums, ParameterGradients>, a.places.channels, kMerging, sums, grid.parts, a.gradients);
  gpu.launch(&norm_input_kernel<T, kWidth>, grid.blocks(), kThreads, from, upstream, grid, a.parameters, a.gradients,
             a.share, a.kind, static_cast<T*>(a.dx.data_ptr()));
}

// Whether channels come in whole groups that follow each other, and everything begins at a multiple of 16 bytes.
static bool whole_groups(const Places& p, const Parameters& a, std::initializer_list<const void*> others) {
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  bool whole = p.inner == 1 && p.channels % kGroup == 0;
  for (const float* values : {a.mean, a.inverse, a.weight, a.bias}) whole = whole && aligned(values);
  for (const void* values : others) whole = whole && aligned(values);
  return whole;
}

static std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   const std::optional<Tensor>& running_mean,
                                                   const std::optional<Tensor>& running_variance, double momentum,
                                                   double eps, int64_t activation) {
  const NormAct a(x, weight, bias, running_mean, running_variance, momentum, eps, activation);
  const bool whole = whole_groups(a.places, a.parameters, {x.data_ptr(), a.out.data_ptr()});
  const OnDevice gpu(x);
  for_floating(x, "x", [&](auto zero) {
    using T = decltype(zero);
    whole ? forward<T, kGroup>(gpu, a, x) : forward<T, 1>(gpu, a, x);
  });
  return {a.out, a.mean, a.inverse};
}

static std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& mean,
                                                            const Tensor& inverse, int64_t activation) {
  const NormActBackward a(grad, x, weight, bias, mean, inverse, activation);
  const bool whole = whole_groups(a.places, a.parameters, {x.data_ptr(), grad.data_ptr(), a.dx.data_ptr()});
  const OnDevice gpu(x);
  for_floating(x, "x", [&](auto zero) {
    using T = decltype(zero);
    whole ? backward<T, kGroup>(gpu, a, grad, x) : backward<T, 1>(gpu, a, grad, x);
  });
  return {a.dx, a.dweight, a.dbias};
}

}  // namespace detcore

GPU_OPS(m) {
  m.impl("norm_act", TORCH_BOX(&detcore::norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&detcore::norm_act_backward));
}
