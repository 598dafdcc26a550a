#include <algorithm>
#include <cstring>
#include <vector>

#include "mask_targets.h"
#include "vectors.h"

namespace detcore {

constexpr int64_t kWide = 32;  // rows are padded to so many bytes, for vector instructions

// Adds a part to a mask, both of r rows. passes: where edges of the part pass the middles of columns, each at the first
// row below it; emptied. inside: a row of scratch, whether the part covers the row at hand.
WIDE_VECTORS static void add_part(uint8_t* __restrict passes, uint8_t* __restrict inside, uint8_t* __restrict mask,
                                  int r, int64_t blocks) {
  std::memset(inside, 0, blocks * kWide);
  for (int row = 0; row < r; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t k = block * kWide; k < (block + 1) * kWide; ++k) {
        inside[k] ^= passes[k];
        mask[k] |= inside[k];
        passes[k] = 0;
      }
    }
    passes += blocks * kWide;
    mask += blocks * kWide;
  }
}

// Notes where an edge passes the middles of columns. passes: r + 1 rows; the last one lies below the mask.
static void add_edge(uint8_t* passes, const Window& window, const Edge& edge, int r, int64_t stride) {
  const int x1 = fine(edge.x1, window.x, window.across), x2 = fine(edge.x2, window.x, window.across);
  const int low = std::min(x1, x2), high = std::max(x1, x2);
  // The columns with low <= kFine * column + kMiddle < high; the divisions are of numbers that are not negative.
  const int first = low <= kMiddle ? 0 : (low - kMiddle + kFine - 1) / kFine;
  const int last = high <= kMiddle ? -1 : std::min((high - kMiddle - 1) / kFine, r - 1);
  if (first > last) return;
  const Node from{x1, fine(edge.y1, window.y, window.down)}, to{x2, fine(edge.y2, window.y, window.down)};
  const Line line = Line::of(from, to);
  for (int column = first; column <= last; ++column) {
    passes[line.row_below(column, r) * stride + column] ^= 1;
  }
}

static Tensor mask_targets(const Tensor& edges, const Tensor& edge_of, const Tensor& regions, const Tensor& box_of,
                           int64_t resolution) {
  const MaskTargets a(edges, edge_of, regions, box_of, resolution);
  const int r = a.resolution;
  const int64_t blocks = ceil_div(r, kWide), stride = blocks * kWide;
  torch::stable::parallel_for(0, a.images * a.count, 4, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> passes((r + 1) * stride, 0), inside(stride), mask(r * stride);
    for (int64_t i = begin; i < end; ++i) {
      std::fill(mask.begin(), mask.end(), 0);
      const int64_t image = i / a.count, box = a.box_of[i];
      const Edge* own = a.edges + image * a.most;
      const int64_t* of = a.edge_of + 2 * image * a.most;
      const Window window = Window::of(a.regions[i], r);
      for (int64_t e = box < 0 ? a.most : first_edge(of, a.most, box); e < a.most && of[2 * e] == box; ++e) {
        add_edge(passes.data(), window, own[e], r, stride);
        const bool last = e + 1 == a.most || of[2 * e + 2] != box || of[2 * e + 3] != of[2 * e + 1];
        if (last) add_part(passes.data(), inside.data(), mask.data(), r, blocks);
      }
      bool* out = a.pixels() + i * r * r;
      for (int64_t row = 0; row < r; ++row) std::memcpy(out + row * r, &mask[row * stride], r);
    }
  });
  return a.out;
}

}  // namespace detcore

SCHEMAS(m) {
  m.def("mask_targets(Tensor edges, Tensor edge_of, Tensor regions, Tensor box_of, int resolution) -> Tensor");
}
CPU_OPS(m) { m.impl("mask_targets", TORCH_BOX(&detcore::mask_targets)); }
