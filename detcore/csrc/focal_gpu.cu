#include <algorithm>
#include <tuple>

#include "focal.h"
#include "sum.h"

namespace detcore {

constexpr int kTile = 128;  // rows that a block prepares at a time
constexpr int kLanes = 32;  // neighbours of a block of the kernels with a bias
constexpr int64_t kBiasBlocks = 1024, kLeastCells = 32;

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Values {
  T at[kWidth];
};

// What is added to the logits of a thread, and the sums of their gradients, before rounding and times focal_constant.
template <int kWidth>
struct Bias {
  float at[kWidth], sums[kWidth];
};
struct NoBias {};

// What all threads know of the loss: its term, alpha, and what gradients are multiplied by while they are kept.
template <typename F>
struct Recipe {
  F term;
  float alpha, constant;
};

// Loss of the classes column..column+kWidth of a row; turns the logits into the gradient.
template <typename T, int kWidth, typename F, typename B>
__device__ inline float focal_values(Values<T, kWidth>& values, int column, int target, float weight,
                                     const Recipe<F>& recipe, B& bias) {
  constexpr bool biased = !std::is_same_v<B, NoBias>;
  const Values<T, kWidth> logits = values;
  const auto logit = [&](int k) {
    if constexpr (biased) return static_cast<float>(logits.at[k]) + bias.at[k];
    return static_cast<float>(logits.at[k]);
  };
  const float alpha = recipe.alpha, scale = (1 - alpha) * weight * recipe.constant;
  const int place = target - column;
  float loss = 0;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const Term term = recipe.term(logit(k));
    loss += term.loss;
    values.at[k] = static_cast<T>(scale * term.gradient);
    if constexpr (biased) bias.sums[k] += k == place ? 0.f : scale * term.gradient;
  }
  if (place < 0 || place >= kWidth) return (1 - alpha) * weight * loss;
  // Few threads come here: those that hold the class of a foreground row. Subtracting that logit's loss as a negative
  // would lose digits, so that the sum is made anew.
  loss = 0;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const float x = logit(k);
    const Term term = recipe.term(k == place ? -x : x);
    loss += (k == place ? alpha : 1 - alpha) * term.loss;
    if (k == place) {
      const float gradient = -alpha * weight * recipe.constant * term.gradient;
      values.at[k] = static_cast<T>(gradient);
      if constexpr (biased) bias.sums[k] += gradient;
    }
  }
  return weight * loss;
}

// A block goes through tiles of rows: their targets into shared memory, then kWidth logits a thread at a time, of which
// the next ones are on their way while the present ones are computed. kWidth divides the number of classes.
template <typename T, int kWidth, typename F>
__global__ __launch_bounds__(kSumThreads, 5) void focal_kernel(const T* logits, Targets targets, int64_t rows,
                                                               int classes, Recipe<F> recipe, T* gradient,
                                                               float* partials) {
  using Part = Values<T, kWidth>;
  constexpr int kSkip = -2;  // the target of a row that is left out
  __shared__ int target[kTile];
  __shared__ float weight[kTile];
  const int thread = threadIdx.x, parts = classes / kWidth;
  const int rows_on = kSumThreads / parts, parts_on = kSumThreads % parts;  // from one pass to the next
  float sum = 0;
  NoBias none;
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile; begin < rows; begin += int64_t{kTile} * gridDim.x) {
    const int here = static_cast<int>(rows - begin < kTile ? rows - begin : kTile);
    __syncthreads();
    if (thread < here) {
      const int64_t box = targets.box(begin + thread);
      const bool ignored = targets.match(begin + thread) == kIgnored;
      target[thread] = ignored ? kSkip : box >= 0 ? static_cast<int>(targets.labels[box]) : -1;
      weight[thread] = targets.weight[(begin + thread) / targets.rows];
    }
    __syncthreads();
    const Part* from = reinterpret_cast<const Part*>(logits + begin * classes);
    Part* to = reinterpret_cast<Part*>(gradient + begin * classes);
    const int end = here * parts;
    int row = thread / parts, part = thread % parts;
    Part next;
    if (thread < end) next = from[thread];
    for (int i = thread; i < end; i += kSumThreads) {
      Part values = next;
      if (i + kSumThreads < end) next = from[i + kSumThreads];
      if (target[row] == kSkip) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values.at[k] = static_cast<T>(0.f);
      } else {
        sum += focal_values<T, kWidth>(values, part * kWidth, target[row], weight[row], recipe, none);
      }
      to[i] = values;
      row += rows_on;
      part += parts_on;
      if (part >= parts) {
        part -= parts;
        ++row;
      }
    }
  }
  sum = block_sum(sum);
  if (thread == 0) partials[blockIdx.x] = sum;
}

// With a bias: the logits are cells of `packs` values of kWidth. A thread keeps its pack from cell to cell, and with it
// bias and sums; a block has kLanes neighbouring packs of the cells of its part. bias_partials: [parts, columns], the
// sums over a part.
template <typename T, int kWidth, typename F>
__global__ __launch_bounds__(kSumThreads, 4) void biased_focal_kernel(const T* logits, const float* bias,
                                                                      Targets targets, int64_t cells, int per_cell,
                                                                      int classes, Recipe<F> recipe, int64_t parts,
                                                                      T* gradient, float* partials,
                                                                      float* bias_partials) {
  using Part = Values<T, kWidth>;
  __shared__ float shared[kWidth * kSumThreads];
  constexpr int kLines = kSumThreads / kLanes;
  const int packs = per_cell * (classes / kWidth), across = (packs + kLanes - 1) / kLanes;
  const int thread = threadIdx.x, line = thread / kLanes;
  const int pack = static_cast<int>(blockIdx.x % across) * kLanes + thread % kLanes;
  const int64_t part = blockIdx.x / across, length = (cells + parts - 1) / parts;
  const int64_t end = (part + 1) * length < cells ? (part + 1) * length : cells;
  const bool here = pack < packs;
  const int anchor = pack * kWidth / classes, column = pack * kWidth % classes;
  Bias<kWidth> own{};
  float sum = 0;
  if (here) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) own.at[k] = bias[pack * kWidth + k];
    const Part* from = reinterpret_cast<const Part*>(logits) + pack;
    Part* to = reinterpret_cast<Part*>(gradient) + pack;
    int64_t cell = part * length + line;
    const int in_image = static_cast<int>(targets.rows / per_cell);
    int image = static_cast<int>(cell / in_image), place = static_cast<int>(cell % in_image);
    Part next;
    int next_match = 0;
    if (cell < end) {
      next = from[cell * packs];
      next_match = static_cast<int>(targets.match(image, place * per_cell + anchor));
    }
    for (; cell < end; cell += kLines) {
      Part values = next;
      const int match = next_match;
      const int64_t box = targets.place(image, match);
      const float weight = targets.weight[image];
      place += kLines;
      while (place >= in_image) {
        place -= in_image;
        ++image;
      }
      if (cell + kLines < end) {
        next = from[(cell + kLines) * packs];
        next_match = static_cast<int>(targets.match(image, place * per_cell + anchor));
      }
      if (match == kIgnored) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) values.at[k] = static_cast<T>(0.f);
      } else {
        const int target = box >= 0 ? static_cast<int>(targets.labels[box]) : -1;
        sum += focal_values<T, kWidth>(values, column, target, weight, recipe, own);
      }
      to[cell * packs] = values;
    }
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) shared[k * kSumThreads + thread] = own.sums[k];
  for (int half = kSumThreads / 2; half >= kLanes; half /= 2) {
    __syncthreads();
    if (thread < half) {
      for (int k = 0; k < kWidth; ++k) shared[k * kSumThreads + thread] += shared[k * kSumThreads + thread + half];
    }
  }
  if (line == 0 && here) {
    for (int k = 0; k < kWidth; ++k) {
      bias_partials[(part * packs + pack) * kWidth + k] = shared[k * kSumThreads + thread];
    }
  }
  sum = block_sum(sum);
  if (thread == 0) partials[blockIdx.x] = sum;
}

// The sums over the parts, times a factor. A block has kLanes columns.
static __global__ void column_sums_kernel(const float* partial, int64_t parts, int64_t columns, float factor,
                                          float* sums) {
  __shared__ float shared[kSumThreads];
  const int thread = threadIdx.x;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kLanes + thread % kLanes;
  float sum = 0;
  if (column < columns) {
    for (int64_t p = thread / kLanes; p < parts; p += kSumThreads / kLanes) sum += partial[p * columns + column];
  }
  shared[thread] = sum;
  for (int half = kSumThreads / 2; half >= kLanes; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  if (thread < kLanes && column < columns) sums[column] = factor * shared[thread];
}

// The gradient, partial sums of the loss, and the bias's gradient; a launch for each of the two passes.
template <typename T, int kWidth, typename F>
static void biased_focal(const OnDevice& gpu, const Focal& a, const Recipe<F>& recipe, const T* from, T* to,
                         int64_t parts, float* partials) {
  const Tensor bias_partials =
      torch::stable::empty({parts, a.columns}, ScalarType::Float, std::nullopt, a.loss.device());
  float* sums = static_cast<float*>(bias_partials.data_ptr());
  gpu.launch(&biased_focal_kernel<T, kWidth, F>, parts * ceil_div(a.columns / kWidth, kLanes), kSumThreads, from,
             a.bias, a.targets, a.cells(), static_cast<int>(a.per_cell), a.classes, recipe, parts, to, partials, sums);
  gpu.launch(&column_sums_kernel, ceil_div(a.columns, kLanes), kSumThreads, sums, parts, a.columns, 1 / recipe.constant,
             a.bias_sums());
}

static std::tuple<Tensor, Tensor, Tensor> focal(const Tensor& logits, const Tensor& matched, const Tensor& labels,
                                                const Tensor& weight, int64_t first, double alpha, double gamma,
                                                double smoothing, const std::optional<Tensor>& bias) {
  const Focal a(logits, matched, labels, weight, first, alpha, gamma, smoothing, bias);
  const OnDevice gpu(logits);
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = Pack<T>::size;
    const T* from = static_cast<const T*>(logits.data_ptr());
    T* to = static_cast<T*>(a.gradient.data_ptr());
    const auto unaligned = (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % sizeof(Pack<T>);
    const bool wide = a.classes % kWidth == 0 && unaligned == 0;
    const int64_t across = a.bias ? ceil_div(a.columns / (wide ? kWidth : 1), kLanes) : 1;
    const int64_t parts = a.bias ? std::min(ceil_div(a.cells(), kLeastCells), ceil_div(kBiasBlocks, across))
                                 : std::min(ceil_div(a.rows, kTile), kMostPartials);
    const Tensor partials = torch::stable::empty({parts * across}, ScalarType::Float, std::nullopt, logits.device());
    float* sums = static_cast<float*>(partials.data_ptr());
    a.with_term([&](auto term) {
      using F = decltype(term);
      const Recipe<F> recipe{term, a.alpha, a.constant<T>()};
      if (a.bias) {
        wide ? biased_focal<T, kWidth>(gpu, a, recipe, from, to, parts, sums)
             : biased_focal<T, 1>(gpu, a, recipe, from, to, parts, sums);
      } else {
        gpu.launch(wide ? &focal_kernel<T, kWidth, F> : &focal_kernel<T, 1, F>, parts, kSumThreads, from, a.targets,
                   a.rows, a.classes, recipe, to, sums);
      }
    });
    gpu.launch(&total_kernel, 1, kSumThreads, sums, parts * across, static_cast<float*>(a.loss.data_ptr()));
  });
  return {a.loss, a.gradient, a.bias_gradient};
}

}  // namespace detcore

GPU_OPS(m) { m.impl("focal", TORCH_BOX(&detcore::focal)); }
