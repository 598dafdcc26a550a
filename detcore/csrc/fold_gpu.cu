#include "fold.h"

namespace detcore {

constexpr int kThreads = 256;

template <typename From, typename To>
__global__ void fold_kernel(Entries entries) {
  const int block = static_cast<int>(blockIdx.x);
  int e = 0;
  while (entries.first_block[e + 1] <= block) ++e;
  const Entry entry = entries.at[e];
  const int64_t start = static_cast<int64_t>(block - entries.first_block[e]) * kChunk;
  const int64_t limit = start + kChunk < entry.numel ? start + kChunk : entry.numel;
  for (int64_t i = start + static_cast<int64_t>(threadIdx.x) * kGroup; i < limit; i += kThreads * kGroup) {
    fold_group<From, To>(entry, i);
  }
}

static void fold_(std::vector<Tensor> out, std::vector<Tensor> values, std::vector<Tensor> scales) {
  const Fold a(out, values, scales);
  for (const Entries& entries : a.launches) {
    const OnDevice gpu(values[0]);
    Fold::for_types(out[0], values[0], [&](auto from, auto to) {
      gpu.launch(&fold_kernel<decltype(from), decltype(to)>, entries.first_block[entries.count], kThreads, entries);
    });
  }
}

}  // namespace detcore

GPU_OPS(m) { m.impl("fold_", TORCH_BOX(&detcore::fold_)); }
