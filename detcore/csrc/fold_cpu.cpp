#include <algorithm>

#include "fold.h"

namespace detcore {

static void fold_(std::vector<Tensor> out, std::vector<Tensor> values, std::vector<Tensor> scales) {
  const Fold a(out, values, scales);
  for (const Entries& entries : a.launches) {
    Fold::for_types(out[0], values[0], [&](auto from, auto to) {
      torch::stable::parallel_for(0, entries.first_block[entries.count], 1, [&](int64_t begin, int64_t end) {
        int e = 0;
        for (int64_t block = begin; block < end; ++block) {
          while (entries.first_block[e + 1] <= block) ++e;
          const int64_t start = (block - entries.first_block[e]) * kChunk;
          const int64_t limit = std::min(start + kChunk, entries.at[e].numel);
          for (int64_t i = start; i < limit; i += kGroup) {
            fold_group<decltype(from), decltype(to)>(entries.at[e], i);
          }
        }
      });
    });
  }
}

}  // namespace detcore

SCHEMAS(m) { m.def("fold_(Tensor(a!)[] out, Tensor[] values, Tensor[] scales) -> ()"); }
CPU_OPS(m) { m.impl("fold_", TORCH_BOX(&detcore::fold_)); }
