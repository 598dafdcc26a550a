#include <algorithm>
#include <vector>

#include "mask_targets.h"

namespace detcore {

constexpr int kBits = 64;  // rows of a column that a word holds

// The mask of one region, column after column in words of bits: of the part at hand, and of all before it.
struct Columns {
  std::vector<uint64_t> part, all;
  int words;

  explicit Columns(int resolution) : words(static_cast<int>(ceil_div(resolution, kBits))) {
    part.assign(static_cast<size_t>(resolution) * words, 0);
    all = part;
  }

  // Every row from `row` on of a column changes sides.
  void toggle(int column, int row) {
    uint64_t* at = &part[static_cast<size_t>(column) * words];
    const int first = row / kBits;
    if (first == words) return;
    at[first] ^= ~uint64_t{0} << row % kBits;
    for (int k = first + 1; k < words; ++k) at[k] = ~at[k];
  }

  void end_part() {
    for (size_t k = 0; k < all.size(); ++k) all[k] |= part[k];
    std::fill(part.begin(), part.end(), 0);
  }
};

static void add_edge(Columns& columns, const Window& window, const Edge& edge, int resolution) {
  const int x1 = fine(edge.x1, window.x, window.across), x2 = fine(edge.x2, window.x, window.across);
  const int low = std::min(x1, x2), high = std::max(x1, x2);
  // The columns with low <= kFine * column + kMiddle < high; the divisions are of numbers that are not negative.
  const int first = low <= kMiddle ? 0 : (low - kMiddle + kFine - 1) / kFine;
  const int last = high <= kMiddle ? -1 : std::min((high - kMiddle - 1) / kFine, resolution - 1);
  if (first > last) return;
  const Node from{x1, fine(edge.y1, window.y, window.down)}, to{x2, fine(edge.y2, window.y, window.down)};
  for (int column = first; column <= last; ++column) {
    columns.toggle(column, row_below(from, to, column, resolution));
  }
}

static Tensor mask_targets(const Tensor& edges, const Tensor& edge_of, const Tensor& regions, const Tensor& box_of,
                           int64_t resolution) {
  const MaskTargets a(edges, edge_of, regions, box_of, resolution);
  const int r = a.resolution;
  torch::stable::parallel_for(0, a.images * a.count, 4, [&](int64_t begin, int64_t end) {
    Columns columns(r);
    for (int64_t i = begin; i < end; ++i) {
      bool* out = a.pixels() + i * r * r;
      const int64_t image = i / a.count, box = a.box_of[i];
      const Edge* own = a.edges + image * a.most;
      const int64_t* of = a.edge_of + 2 * image * a.most;
      std::fill(columns.all.begin(), columns.all.end(), 0);
      const Window window = Window::of(a.regions[i], r);
      for (int64_t e = box < 0 ? a.most : first_edge(of, a.most, box); e < a.most && of[2 * e] == box; ++e) {
        add_edge(columns, window, own[e], r);
        const bool last = e + 1 == a.most || of[2 * e + 2] != box || of[2 * e + 3] != of[2 * e + 1];
        if (last) columns.end_part();
      }
      for (int row = 0; row < r; ++row) {
        const uint64_t* words = &columns.all[row / kBits];
        for (int column = 0; column < r; ++column) {
          const uint64_t word = words[static_cast<int64_t>(column) * columns.words];
          out[static_cast<int64_t>(row) * r + column] = word >> row % kBits & 1;
        }
      }
    }
  });
  return a.out;
}

}  // namespace detcore

SCHEMAS(m) {
  m.def("mask_targets(Tensor edges, Tensor edge_of, Tensor regions, Tensor box_of, int resolution) -> Tensor");
}
CPU_OPS(m) { m.impl("mask_targets", TORCH_BOX(&detcore::mask_targets)); }
