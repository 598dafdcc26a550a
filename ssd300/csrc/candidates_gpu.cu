#include "candidates.h"

namespace detcore {

constexpr int kRowThreads = 256;    // of a block that goes through rows
constexpr int kListThreads = 1024;  // of the block that lists an image's rows
constexpr int kThreads = 256;       // of the block that selects in one image and class

// The softmax of every row, and whether any class but the first is above the threshold: 1 or 0.
template <typename T>
__global__ void rows_kernel(const T* logits, int64_t rows, int classes, float threshold, Softmax* softmaxes,
                            Key* alive) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kRowLanes;
  const int lane = static_cast<int>(threadIdx.x % kRowLanes), count = row < rows ? classes : 0;
  const T* own = logits + (row < rows ? row : 0) * classes;
  const Softmax soft = softmax(own, count);
  float most = -INFINITY;
  for (int k = lane; k < count; k += kRowLanes) most = k > 0 ? fmaxf(most, static_cast<float>(own[k])) : most;
#pragma unroll
  for (int step = kRowLanes / 2; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, step));
  if (row >= rows || lane != 0) return;
  softmaxes[row] = soft;
  alive[row] = probability(soft, most) > threshold;
}

// One block for each image: its rows that are alive, in order, and how many they are.
static __global__ void __launch_bounds__(kListThreads)
    list_kernel(const Key* alive, int64_t count, int32_t* chosen, int32_t* counts) {
  __shared__ Scratch scratch;
  const int64_t first = blockIdx.x * count;
  const KeyList keys{alive + first, count};
  const uint32_t found =
      emit_selected<kListThreads>(keys, Limit{0, 0}, scratch, [&](int64_t row, int column, uint32_t place) {
        chosen[first + place] = static_cast<int32_t>(row * kColumns + column);
      });
  if (threadIdx.x == 0) counts[blockIdx.x] = static_cast<int32_t>(found);
}

// The scores of one class in the chosen rows of an image.
template <typename T>
struct ScoreKeys {
  const T* logits;
  const Softmax* softmaxes;
  const int32_t* chosen;
  int64_t count;
  int classes, label;
  float threshold;

  __device__ int64_t rows() const { return (count + kColumns - 1) / kColumns; }
  __device__ int columns() const { return kColumns; }
  __device__ int32_t prior(int64_t row, int column) const { return chosen[row * kColumns + column]; }
  __device__ float score(int64_t prior) const {
    return probability(softmaxes[prior], static_cast<float>(logits[prior * classes + label]));
  }
  __device__ Key key(int64_t row, int column) const {
    return row * kColumns + column < count ? key_above(score(prior(row, column)), threshold) : 0;
  }
};

// The best priors of one image and class, by one block.
template <typename T>
__global__ void select_kernel(const T* logits, const Softmax* softmaxes, const int32_t* chosen, const int32_t* counts,
                              int64_t count, int classes, float threshold, int64_t most, float* scores,
                              int64_t* priors) {
  __shared__ Scratch scratch;
  const int64_t image = blockIdx.x / (classes - 1), first = image * count;
  const int label = static_cast<int>(blockIdx.x % (classes - 1)) + 1;
  const ScoreKeys<T> keys{
      logits + first * classes, softmaxes + first, chosen + first, counts[image], classes, label, threshold};
  scores += blockIdx.x * most;
  priors += blockIdx.x * most;
  const Limit limit = find_limit<kThreads, 32>(keys, static_cast<uint32_t>(most), scratch);
  const uint32_t filled = emit_selected<kThreads>(keys, limit, scratch, [&](int64_t row, int column, uint32_t place) {
    const int32_t prior = keys.prior(row, column);
    scores[place] = keys.score(prior);
    priors[place] = prior;
  });
  for (int64_t place = filled + threadIdx.x; place < most; place += kThreads) {
    scores[place] = -1;
    priors[place] = 0;
  }
}

static std::tuple<Tensor, Tensor> candidates(const Tensor& logits, double threshold, int64_t most) {
  const Candidates a(logits, threshold, most);
  const int64_t rows = a.images * a.count;
  const auto scratch = [&](int64_t bytes) {
    return torch::stable::empty({ceil_div(bytes, 8)}, ScalarType::Long, std::nullopt, logits.device());
  };
  const Tensor softmaxes = scratch(rows * sizeof(Softmax)), alive = scratch(rows * sizeof(Key));
  const Tensor chosen = scratch(rows * sizeof(int32_t)), counts = scratch(a.images * sizeof(int32_t));
  Softmax* soft = static_cast<Softmax*>(softmaxes.data_ptr());
  Key* flags = static_cast<Key*>(alive.data_ptr());
  int32_t *list = static_cast<int32_t*>(chosen.data_ptr()), *lengths = static_cast<int32_t*>(counts.data_ptr());
  const OnDevice gpu(logits);
  for_floating(logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(logits.data_ptr());
    gpu.launch(&rows_kernel<T>, ceil_div(rows * kRowLanes, kRowThreads), kRowThreads, from, rows, a.classes,
               a.threshold, soft, flags);
    gpu.launch(&list_kernel, a.images, kListThreads, flags, a.count, list, lengths);
    gpu.launch(&select_kernel<T>, a.images * (a.classes - 1), kThreads, from, soft, list, lengths, a.count, a.classes,
               a.threshold, a.most, static_cast<float*>(a.scores.data_ptr()),
               static_cast<int64_t*>(a.priors.data_ptr()));
  });
  return {a.scores, a.priors};
}

}  // namespace detcore

GPU_OPS(m) { m.impl("candidates", TORCH_BOX(&detcore::candidates)); }
