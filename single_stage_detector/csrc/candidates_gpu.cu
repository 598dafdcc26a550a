#include <algorithm>

#include "candidates.h"

namespace detcore {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kRowLanes = 8;    // threads that share a row of logits
constexpr int kThreads = 1024;  // of the block that selects in one image and level
constexpr int kBatch = 9;       // keys that a thread loads at once: 9 x 32 columns hold OpenImages' 264 classes
constexpr int kColumns = 32 * kBatch;

// The key of the best class of every anchor, [N, A]; 0 for none above the floor or with a NaN. Unit: Pack<T>, or T
// where rows are no multiple of 16 bytes.
template <typename T, typename Unit>
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
    const int count = static_cast<int>(levels.classes / kPer);
#pragma unroll 4
    for (int u = threadIdx.x % kRowLanes; u < count; u += kRowLanes) {
      const Unit unit = units[u];
      const T* values = reinterpret_cast<const T*>(&unit);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const float value = static_cast<float>(values[j]);
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
    best[row] = bad ? 0 : key_of(static_cast<T>(most), levels.floor);
  }
}

// What the threads of a selecting block share.
struct Scratch {
  uint32_t histogram[256];
  uint32_t above[kThreads / 32], equal[kThreads / 32];
  uint32_t digit, before, total;
};

// The keys to select from, as rows of columns. First the best classes of a level's anchors, in rows of kColumns ...
struct AnchorKeys {
  const Key* best;
  int64_t anchors;

  __device__ int64_t rows() const { return (anchors + kColumns - 1) / kColumns; }
  __device__ int columns() const { return kColumns; }
  __device__ Key key(int64_t row, int column) const {
    const int64_t anchor = row * kColumns + column;
    return anchor < anchors ? best[anchor] : 0;
  }
};

// ... then the classes of the chosen anchors, where only keys from `least` on can be among the best.
template <typename T>
struct PairKeys {
  const T* logits;
  const int32_t* chosen;
  int64_t count, classes;
  float floor;
  Key least;

  __device__ int64_t rows() const { return count; }
  __device__ int columns() const { return static_cast<int>(classes); }
  __device__ Key key(int64_t row, int column) const {
    const Key key = key_of(logits[chosen[row] * classes + column], floor);
    return key >= least ? key : 0;
  }
};

// Calls f(row, column, key) for all keys; each warp goes through its own run of rows, in order, with its lanes side by
// side in a row. They all call f together, with 0 past the end of the row.
template <typename Keys, typename F>
__device__ void for_keys(const Keys& keys, F&& f) {
  constexpr int warps = kThreads / 32;
  const int64_t warp = threadIdx.x / 32;
  const int64_t last = keys.rows() * (warp + 1) / warps;
  const int columns = keys.columns(), lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t row = keys.rows() * warp / warps; row < last; ++row) {
    for (int start = 0; start < columns; start += kColumns) {
      Key batch[kBatch];  // loaded together, so that the warp waits once
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int column = start + 32 * u + lane;
        batch[u] = column < columns ? keys.key(row, column) : 0;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (start + 32 * u < columns) f(row, start + 32 * u + lane, batch[u]);
      }
    }
  }
}

// The selected: all keys above `key`, and the first `ties` that are equal to it.
struct Limit {
  Key key;
  uint32_t ties;
};

// Finds, from the highest on, the bin in which the `wanted`-th key falls, and how many stand in those above. By the
// first warp; a lane has 8 bins.
__device__ inline void find_digit(Scratch& s, uint32_t wanted) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t own = 0;
  for (int j = 0; j < 8; ++j) own += s.histogram[255 - (lane * 8 + j)];
  uint32_t until = own;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, until, step);
    if (lane >= step) until += other;
  }
  if (lane == 31) s.total = until;
  uint32_t before = until - own;
  if (before < wanted && wanted <= until) {
    int bin = 255 - lane * 8;
    while (before + s.histogram[bin] < wanted) before += s.histogram[bin--];
    s.digit = static_cast<uint32_t>(bin);
    s.before = before;
  }
}

// The limit of the `wanted` largest keys above 0; {0, 0} if there are no more than that. Radix selection, 8 bits a
// pass.
template <int kBits, typename Keys>
__device__ Limit find_limit(const Keys& keys, uint32_t wanted, Scratch& s) {
  Key prefix = 0;
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < 256; bin += kThreads) s.histogram[bin] = 0;
    __syncthreads();
    for_keys(keys, [&](int64_t, int, uint64_t key) {
      if (key != 0 && key >> (shift + 8) == prefix) atomicAdd(&s.histogram[key >> shift & 255], 1u);
    });
    __syncthreads();
    if (threadIdx.x < 32) find_digit(s, wanted);
    __syncthreads();
    if (shift == kBits - 8 && s.total <= wanted) return {0, 0};
    prefix = prefix << 8 | s.digit;
    wanted -= s.before;
  }
  return {prefix, wanted};
}

// Calls emit(row, column, place) for every selected key; places count up in the order of the keys. Returns their
// number.
template <typename Keys, typename Emit>
__device__ uint32_t emit_selected(const Keys& keys, const Limit limit, Scratch& s, Emit&& emit) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const uint32_t earlier = (1u << (threadIdx.x % 32)) - 1;
  uint32_t above = 0, equal = 0;
  for_keys(keys, [&](int64_t, int, Key key) {
    above += __popc(__ballot_sync(kAll, key > limit.key));
    equal += __popc(__ballot_sync(kAll, limit.key != 0 && key == limit.key));
  });
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    s.above[warp] = above;
    s.equal[warp] = equal;
  }
  __syncthreads();
  uint32_t all = 0;
  above = equal = 0;  // from here on: those of the keys before
  for (int w = 0; w < kThreads / 32; ++w) {
    all += s.above[w];
    above += w < warp ? s.above[w] : 0;
    equal += w < warp ? s.equal[w] : 0;
  }
  for_keys(keys, [&](int64_t row, int column, Key key) {
    const bool is_above = key > limit.key, is_equal = limit.key != 0 && key == limit.key;
    const uint32_t aboves = __ballot_sync(kAll, is_above), equals = __ballot_sync(kAll, is_equal);
    const uint32_t ties = equal + __popc(equals & earlier);
    if (is_above || (is_equal && ties < limit.ties)) {
      emit(row, column, above + __popc(aboves & earlier) + (ties < limit.ties ? ties : limit.ties));
    }
    above += __popc(aboves);
    equal += __popc(equals);
  });
  return all + limit.ties;
}

// The pairs of one image and level, by one block. chosen: [N, L, most], for the anchors selected first.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    select_kernel(Levels levels, Found found, int delta_bytes, const Key* best, int32_t* chosen, int64_t most) {
  __shared__ Scratch scratch;
  const int64_t image = blockIdx.x / levels.count;
  const int level = static_cast<int>(blockIdx.x % levels.count);
  const uint32_t topk = static_cast<uint32_t>(levels.topk);
  chosen += blockIdx.x * most;

  const AnchorKeys anchors{best + image * levels.all_anchors + levels.first[level], levels.anchors[level]};
  const Limit anchor_limit = find_limit<kKeyBits<T>>(anchors, topk, scratch);
  const uint32_t count = emit_selected(anchors, anchor_limit, scratch, [&](int64_t row, int column, uint32_t place) {
    chosen[place] = static_cast<int32_t>(row * kColumns + column);
  });
  __syncthreads();  // what the block's other threads wrote to `chosen` is there

  const T* logits = static_cast<const T*>(levels.logits[level]) + image * levels.anchors[level] * levels.classes;
  const Key least = anchor_limit.key ? anchor_limit.key : 1;  // topk pairs are that good: an anchor's best
  const PairKeys<T> pairs{logits, chosen, count, levels.classes, levels.floor, least};
  const Limit limit = find_limit<kKeyBits<T>>(pairs, topk, scratch);
  const uint32_t filled = emit_selected(pairs, limit, scratch, [&](int64_t row, int column, uint32_t place) {
    write_pair<T>(levels, found, delta_bytes, image, level, place, chosen[row], column);
  });
  for (int64_t slot = filled + threadIdx.x; slot < levels.slots[level]; slot += kThreads) {
    write_pair<T>(levels, found, delta_bytes, image, level, slot, -1, 0);
  }
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> candidates(const std::vector<Tensor>& logits,
                                                             const std::vector<Tensor>& deltas, int64_t topk,
                                                             double floor) {
  const Candidates a(logits, deltas, topk, floor);
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
    bool whole = levels.classes % Pack<T>::size == 0;  // rows of 16-byte packs
    for (int level = 0; level < levels.count; ++level) {
      whole = whole && reinterpret_cast<uintptr_t>(levels.logits[level]) % sizeof(Pack<T>) == 0;
    }
    constexpr int threads = 256;
    gpu.launch(whole ? &best_kernel<T, Pack<T>> : &best_kernel<T, T>,
               ceil_div(levels.images * levels.all_anchors, threads / kRowLanes), threads, levels, keys);
    gpu.launch(&select_kernel<T>, levels.images * levels.count, kThreads, levels, a.found(),
               static_cast<int>(a.deltas.element_size()), keys, static_cast<int32_t*>(chosen.data_ptr()), most);
  });
  return a.result();
}

}  // namespace detcore

GPU_OPS(m) { m.impl("candidates", TORCH_BOX(&detcore::candidates)); }
