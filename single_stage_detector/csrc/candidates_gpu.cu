#include <algorithm>

#include "candidates.h"

namespace detcore {

constexpr int kRowLanes = 8;    // threads that share a row of logits
constexpr int kThreads = 1024;  // of the block that selects in one image and level

// The key of the best class of every anchor, [N, A]; 0 for none above the floor or with a NaN. Unit: Pack<T>, or T
// where rows are no multiple of 16 bytes.
template <typename T, bool kBias, typename Unit>
__global__ void best_kernel(Levels levels, Key* best) {
  constexpr int kPer = sizeof(Unit) / sizeof(T);
  const int64_t rows = levels.images * levels.all_anchors;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kRowLanes) + threadIdx.x / kRowLanes;
  float most = -INFINITY;
  int bad = 0;
  if (row < rows) {
    const int64_t image = row / levels.all_anchors, anchor = row % levels.all_anchors;
    int level = 0;
    while (level + 1 < levels.count && anchor >= levels.first[level + 1]) ++level;
    const int64_t here = image * levels.anchors[level] + anchor - levels.first[level];
    const Unit* units =
        reinterpret_cast<const Unit*>(static_cast<const T*>(levels.logits[level]) + here * levels.classes);
    const float* bias = kBias ? levels.bias_of(anchor - levels.first[level]) : nullptr;
    const int count = static_cast<int>(levels.classes / kPer);
#pragma unroll 4
    for (int u = threadIdx.x % kRowLanes; u < count; u += kRowLanes) {
      const Unit unit = units[u];
      const T* values = reinterpret_cast<const T*>(&unit);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const float value = static_cast<float>(logit_of<T, kBias>(values, kBias ? bias + u * kPer : nullptr, j));
        most = fmaxf(most, value);
        bad |= value != value;
      }
    }
  }
  for (int step = kRowLanes / 2; step > 0; step /= 2) {
    most = fmaxf(most, __shfl_xor_sync(kAll, most, step));
    bad |= __shfl_xor_sync(kAll, bad, step);
  }
  if (row < rows && threadIdx.x % kRowLanes == 0) {
    best[row] = bad ? 0 : key_of(static_cast<Logit<T, kBias>>(most), levels.floor);
  }
}

// The classes of the chosen anchors, where only keys from `least` on can be among the best.
template <typename T, bool kBias>
struct PairKeys {
  const Levels& levels;
  const T* logits;
  const int32_t* chosen;
  int64_t count;
  Key least;

  __device__ int64_t rows() const { return count; }
  __device__ int columns() const { return static_cast<int>(levels.classes); }
  __device__ Key key(int64_t row, int column) const {
    const int64_t anchor = chosen[row];
    const float* bias = kBias ? levels.bias_of(anchor) : nullptr;
    const Key key = key_of(logit_of<T, kBias>(logits + anchor * levels.classes, bias, column), levels.floor);
    return key >= least ? key : 0;
  }
};

// The pairs of one image and level, by one block. chosen: [N, L, most], for the anchors selected first.
template <typename T, bool kBias>
__global__ void __launch_bounds__(kThreads)
    select_kernel(Levels levels, Found found, int delta_bytes, const Key* best, int32_t* chosen, int64_t most) {
  __shared__ Scratch scratch;
  constexpr int bits = kKeyBits<Logit<T, kBias>>;
  const int64_t image = blockIdx.x / levels.count;
  const int level = static_cast<int>(blockIdx.x % levels.count);
  const uint32_t topk = static_cast<uint32_t>(levels.topk);
  chosen += blockIdx.x * most;

  const KeyList anchors{best + image * levels.all_anchors + levels.first[level], levels.anchors[level]};
  const Limit anchor_limit = find_limit<kThreads, bits>(anchors, topk, scratch);
  const uint32_t count = emit_selected<kThreads>(
      anchors, anchor_limit, scratch,
      [&](int64_t row, int column, uint32_t place) { chosen[place] = static_cast<int32_t>(row * kColumns + column); });
  __syncthreads();  // what the block's other threads wrote to `chosen` is there

  const T* logits = static_cast<const T*>(levels.logits[level]) + image * levels.anchors[level] * levels.classes;
  const Key least = anchor_limit.key ? anchor_limit.key : 1;  // topk pairs are that good: an anchor's best
  const PairKeys<T, kBias> pairs{levels, logits, chosen, count, least};
  const Limit limit = find_limit<kThreads, bits>(pairs, topk, scratch);
  const uint32_t filled = emit_selected<kThreads>(pairs, limit, scratch, [&](int64_t row, int column, uint32_t place) {
    write_pair<T, kBias>(levels, found, delta_bytes, image, level, place, chosen[row], column);
  });
  for (int64_t slot = filled + threadIdx.x; slot < levels.slots[level]; slot += kThreads) {
    write_pair<T, kBias>(levels, found, delta_bytes, image, level, slot, -1, 0);
  }
}

template <typename T, bool kBias>
static void find(const OnDevice& gpu, const Candidates& a, Key* keys, int32_t* chosen, int64_t most) {
  const Levels& levels = a.levels;
  bool whole = levels.classes % Pack<T>::size == 0;  // rows of 16-byte packs
  for (int level = 0; level < levels.count; ++level) {
    whole = whole && reinterpret_cast<uintptr_t>(levels.logits[level]) % sizeof(Pack<T>) == 0;
  }
  constexpr int threads = 256;
  gpu.launch(whole ? &best_kernel<T, kBias, Pack<T>> : &best_kernel<T, kBias, T>,
             ceil_div(levels.images * levels.all_anchors, threads / kRowLanes), threads, levels, keys);
  gpu.launch(&select_kernel<T, kBias>, levels.images * levels.count, kThreads, levels, a.found(),
             static_cast<int>(a.deltas.element_size()), keys, chosen, most);
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> candidates(const std::vector<Tensor>& logits,
                                                             const std::vector<Tensor>& deltas, int64_t topk,
                                                             double floor, const std::optional<Tensor>& bias) {
  const Candidates a(logits, deltas, topk, floor, bias);
  const Levels& levels = a.levels;
  const auto scratch = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::empty(std::vector<int64_t>(shape), ScalarType::Int, std::nullopt, logits[0].device());
  };
  const Tensor best = scratch({levels.images, levels.all_anchors});
  const int64_t most = std::min(topk, levels.all_anchors);
  const Tensor chosen = scratch({levels.images, levels.count, most});
  Key* keys = static_cast<Key*>(best.data_ptr());
  const OnDevice gpu(logits[0]);
  for_floating(logits[0], "logits", [&](auto zero) {
    using T = decltype(zero);
    int32_t* places = static_cast<int32_t*>(chosen.data_ptr());
    bias ? find<T, true>(gpu, a, keys, places, most) : find<T, false>(gpu, a, keys, places, most);
  });
  return a.result();
}

}  // namespace detcore

GPU_OPS(m) { m.impl("candidates", TORCH_BOX(&detcore::candidates)); }
