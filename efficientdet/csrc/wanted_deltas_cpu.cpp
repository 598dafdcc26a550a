#include <algorithm>

#include "vectors.h"
#include "wanted_deltas.h"

namespace detcore {

constexpr int64_t kBlock = 32;       // rows whose matches are looked at together
constexpr int64_t kGrain = 1 << 13;  // rows a thread takes at least

static void write_rows(const Assigned& a, int64_t begin, int64_t end, Deltas* out) {
  for (int64_t i = begin; i < end; ++i) out[i] = a.row(i);
}

// Most blocks of rows have no box at all: the sign of all matches together tells.
WIDE_VECTORS static void write_blocks(const Assigned& a, int64_t begin, int64_t end, Deltas* out) {
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(first + kBlock, end);
    int64_t all = -1;
    for (int64_t i = first; i < last; ++i) all &= a.matched[i];
    if (all < 0) {
      std::fill(out + first, out + last, Deltas{});
    } else {
      write_rows(a, first, last, out);
    }
  }
}

static Tensor wanted_deltas(const Tensor& anchors, const Tensor& boxes, const Tensor& matched) {
  const WantedDeltas a(anchors, boxes, matched);
  torch::stable::parallel_for(0, a.rows, kGrain,
                              [&](int64_t begin, int64_t end) { write_blocks(a.assigned, begin, end, a.deltas()); });
  return a.out;
}

}  // namespace detcore

SCHEMAS(m) { m.def("wanted_deltas(Tensor anchors, Tensor boxes, Tensor matched) -> Tensor"); }
CPU_OPS(m) { m.impl("wanted_deltas", TORCH_BOX(&detcore::wanted_deltas)); }
