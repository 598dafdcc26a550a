#include "mask_targets.h"

namespace detcore {

constexpr int kThreads = 256, kBits = 32;  // threads of a block, rows of a thread

// A thread takes kBits rows of one column of one region. Those of a warp, neighbouring columns, read the same edges.
__global__ void mask_targets_kernel(const Edge* edges, const int64_t* edge_of, const Edge* regions,
                                    const int64_t* box_of, int64_t most, int64_t count, int resolution, int chunks,
                                    int64_t threads, bool* out) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= threads) return;
  const int column = static_cast<int>(thread % resolution);
  const int first_row = static_cast<int>(thread / resolution % chunks) * kBits;
  const int64_t region = thread / resolution / chunks;
  const int64_t image = region / count, box = box_of[region];
  const Edge* own = edges + image * most;
  const int64_t* of = edge_of + 2 * image * most;
  const Window window = Window::of(regions[region], resolution);
  unsigned all = 0, part = 0;
  int64_t number = -1;  // of the part at hand
  for (int64_t e = box < 0 ? most : first_edge(of, most, box); e < most && of[2 * e] == box; ++e) {
    if (of[2 * e + 1] != number) {
      all |= part;
      part = 0;
      number = of[2 * e + 1];
    }
    const Edge edge = own[e];
    const int x1 = fine(edge.x1, window.x, window.across), x2 = fine(edge.x2, window.x, window.across);
    if (!passes(x1, x2, column)) continue;
    const Node from{x1, fine(edge.y1, window.y, window.down)}, to{x2, fine(edge.y2, window.y, window.down)};
    const int row = Line::of(from, to).row_below(column, resolution) - first_row;
    if (row < kBits) part ^= row <= 0 ? ~0u : ~0u << row;
  }
  all |= part;
  const int rows = resolution - first_row < kBits ? resolution - first_row : kBits;
  bool* at = out + (region * resolution + first_row) * resolution + column;
  for (int k = 0; k < rows; ++k) at[static_cast<int64_t>(k) * resolution] = all >> k & 1;
}

static Tensor mask_targets(const Tensor& edges, const Tensor& edge_of, const Tensor& regions, const Tensor& box_of,
                           int64_t resolution) {
  const MaskTargets a(edges, edge_of, regions, box_of, resolution);
  const OnDevice gpu(edges);
  const int64_t chunks = ceil_div(resolution, kBits), threads = a.images * a.count * chunks * resolution;
  gpu.launch(&mask_targets_kernel, ceil_div(threads, kThreads), kThreads, a.edges, a.edge_of, a.regions, a.box_of,
             a.most, a.count, a.resolution, chunks, threads, a.pixels());
  return a.out;
}

}  // namespace detcore

GPU_OPS(m) { m.impl("mask_targets", TORCH_BOX(&detcore::mask_targets)); }
