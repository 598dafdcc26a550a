#include <algorithm>
#include <tuple>

#include "multibox_loss.h"
#include "sum.h"

namespace detcore {

constexpr int kSelecting = 1024;  // threads of the block that selects in one image
constexpr int kTile = 128;        // rows of a block in class_kernel: a multiple of 16 bytes, whatever the classes

// Pass 1 over the logits: kRowLanes threads for each row.
template <typename T>
__global__ void entropy_kernel(const T* logits, Truth truth, int64_t rows, int classes, Softmax* softmaxes, Key* keys) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) / kRowLanes;
  const T* own = logits + (row < rows ? row : 0) * classes;
  Softmax soft = softmax(own, row < rows ? classes : 0);
  if (row >= rows || threadIdx.x % kRowLanes != 0) return;
  const int target = truth.target(row, classes);
  if (target == kNoClass) soft.most = NAN;
  softmaxes[row] = soft;
  keys[row] = hardness(entropy(soft, static_cast<float>(own[target > 0 ? target : 0])), truth.box(row) >= 0);
}

// One block for each image: which of its rows count.
static __global__ void __launch_bounds__(kSelecting)
    choose_kernel(Truth truth, const Key* keys, int64_t empty_negatives, Kept* kept) {
  __shared__ Scratch scratch;
  __shared__ int positives, last;
  const int64_t image = blockIdx.x;
  if (threadIdx.x == 0) {
    positives = 0;
    last = -1;
  }
  __syncthreads();
  int own = 0;
  for (int64_t p = threadIdx.x; p < truth.count; p += kSelecting) own += truth.box(image * truth.count + p) >= 0;
  if (own > 0) atomicAdd(&positives, own);
  __syncthreads();
  const int64_t wanted = negatives(positives, empty_negatives);
  Limit limit{wanted == 0 ? kNoNumber<float> : 0, 0};
  if (wanted > 0 && wanted < truth.count) {
    const KeyList list{keys + image * truth.count, truth.count};
    limit = find_limit<kSelecting, 32>(list, static_cast<uint32_t>(wanted), scratch);
    emit_selected<kSelecting>(list, limit, scratch, [&](int64_t row, int column, uint32_t) {
      if (list.key(row, column) == limit.key) atomicMax(&last, static_cast<int>(row * kColumns + column));
    });
    __syncthreads();
  }
  if (threadIdx.x == 0) kept[image] = {limit.key, last, positives};
}

// What a block has to know of its rows.
struct Tile {
  Softmax softmax[kTile];
  int target[kTile];
  float scale[kTile];
};

// The gradient of the logits first..first+kWidth of a tile, which may belong to several rows. Those are read only if
// one of the rows counts.
template <typename T, int kWidth>
__device__ inline void class_values(const Tile& tile, const T* logits, int first, int classes, T* gradient) {
  struct alignas(kWidth * sizeof(T)) Values {
    T at[kWidth];
  };
  int row = first / classes, column = first % classes;
  Values values;
  bool needed = false;
  for (int r = row; r * classes < first + kWidth; ++r) needed |= tile.target[r] != kDropped;
  if (needed) values = *reinterpret_cast<const Values*>(logits + first);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    float slope = 0;
    if (needed && tile.target[row] != kDropped) {
      const float p = probability(tile.softmax[row], static_cast<float>(values.at[k]));
      slope = (column == tile.target[row] ? p - 1.f : p) * tile.scale[row];
    }
    values.at[k] = static_cast<T>(slope);
    if (++column == classes) {
      column = 0;
      ++row;
    }
  }
  *reinterpret_cast<Values*>(gradient + first) = values;
}

// Pass 2: the weighted cross-entropy of the rows that count, and the gradient of all. One tile for each block.
template <typename T, int kWidth>
__global__ void class_kernel(const T* logits, Truth truth, int64_t rows, int classes, const Softmax* softmaxes,
                             const Key* keys, const Kept* kept, float constant, T* gradient, float* partials) {
  __shared__ Tile tile;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile, row = begin + threadIdx.x;
  const int here = static_cast<int>(rows - begin < kTile ? rows - begin : kTile);
  float loss = 0;
  if (static_cast<int>(threadIdx.x) < here) {
    const int64_t image = row / truth.count;
    const bool counts = truth.box(row) >= 0 || kept[image].keeps(keys[row], row % truth.count);
    tile.target[threadIdx.x] = kDropped;
    if (counts) {
      const int target = truth.target(row, classes);
      const float weight = kept[image].weight(truth.images);
      const Softmax soft = softmaxes[row];
      tile.target[threadIdx.x] = target;
      tile.softmax[threadIdx.x] = soft;
      tile.scale[threadIdx.x] = weight * constant;
      loss = weight * entropy(soft, static_cast<float>(logits[row * classes + (target > 0 ? target : 0)]));
    }
  }
  __syncthreads();
  logits += begin * classes;
  gradient += begin * classes;
  const int count = here * classes, whole = count / kWidth * kWidth;
  for (int i = threadIdx.x * kWidth; i < whole; i += kSumThreads * kWidth) {
    class_values<T, kWidth>(tile, logits, i, classes, gradient);
  }
  for (int i = whole + threadIdx.x; i < count; i += kSumThreads) {
    class_values<T, 1>(tile, logits, i, classes, gradient);
  }
  loss = block_sum(loss);
  if (threadIdx.x == 0) partials[blockIdx.x] = loss;
}

// A thread for each row.
template <typename T>
__global__ void box_kernel(const T* deltas, Truth truth, int64_t rows, const Kept* kept, float constant, T* gradient,
                           float* partials) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const float loss = block_sum(row < rows ? box_row(truth, kept, constant, deltas, row, gradient) : 0.f);
  if (threadIdx.x == 0) partials[blockIdx.x] = loss;
}

template <typename T>
static void class_loss(const MultiboxLoss& a, const OnDevice& gpu, const T* logits, T* gradient, void* softmaxes,
                       void* key, void* kept_, float* partials) {
  Softmax* soft = static_cast<Softmax*>(softmaxes);
  Key* keys = static_cast<Key*>(key);
  Kept* kept = static_cast<Kept*>(kept_);
  const int64_t groups = ceil_div(a.rows * kRowLanes, kSumThreads), tiles = ceil_div(a.rows, kTile);
  gpu.launch(&entropy_kernel<T>, groups, kSumThreads, logits, a.truth, a.rows, a.classes, soft, keys);
  gpu.launch(&choose_kernel, a.truth.images, kSelecting, a.truth, keys, a.empty_negatives, kept);
  const auto unaligned = (reinterpret_cast<uintptr_t>(logits) | reinterpret_cast<uintptr_t>(gradient)) % 16;
  const auto kernel = unaligned ? &class_kernel<T, 1> : &class_kernel<T, Pack<T>::size>;
  gpu.launch(kernel, tiles, kSumThreads, logits, a.truth, a.rows, a.classes, soft, keys, kept,
             kept_constant<T>(a.truth.images), gradient, partials);
  gpu.launch(&total_kernel, 1, kSumThreads, partials, tiles, static_cast<float*>(a.cls.data_ptr()));
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> multibox_loss(const Tensor& deltas, const Tensor& logits,
                                                                const Tensor& priors, const Tensor& boxes,
                                                                const Tensor& labels, const Tensor& matched,
                                                                int64_t empty_negatives) {
  const MultiboxLoss a(deltas, logits, priors, boxes, labels, matched, empty_negatives);
  const OnDevice gpu(logits);
  const auto scratch = [&](int64_t bytes) {
    return torch::stable::empty({ceil_div(bytes, 8)}, ScalarType::Long, std::nullopt, logits.device());
  };
  const Tensor softmaxes = scratch(a.rows * sizeof(Softmax)), keys = scratch(a.rows * sizeof(Key));
  const Tensor kept = scratch(a.truth.images * sizeof(Kept));
  const Tensor partials = scratch(ceil_div(a.rows, kTile) * sizeof(float));
  float* sums = static_cast<float*>(partials.data_ptr());
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    class_loss(a, gpu, static_cast<const T*>(logits.data_ptr()), static_cast<T*>(a.logit_gradient.data_ptr()),
               softmaxes.data_ptr(), keys.data_ptr(), kept.data_ptr(), sums);
  });
  for_floating(deltas, "deltas", [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = ceil_div(a.rows, kSumThreads);
    gpu.launch(&box_kernel<T>, blocks, kSumThreads, static_cast<const T*>(deltas.data_ptr()), a.truth, a.rows,
               static_cast<const Kept*>(kept.data_ptr()), kept_constant<T>(a.truth.images),
               static_cast<T*>(a.delta_gradient.data_ptr()), sums);
    gpu.launch(&total_kernel, 1, kSumThreads, sums, blocks, static_cast<float*>(a.box.data_ptr()));
  });
  return a.result();
}

}  // namespace detcore

GPU_OPS(m) { m.impl("multibox_loss", TORCH_BOX(&detcore::multibox_loss)); }
