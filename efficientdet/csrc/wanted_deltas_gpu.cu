#include "wanted_deltas.h"

namespace detcore {

constexpr int kThreads = 256;

// A thread for each row: 8 bytes read and 16 written, at once; boxes and anchors are read for the few that have a box.
__global__ void wanted_deltas_kernel(Assigned assigned, int64_t rows, Deltas* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < rows) out[i] = assigned.row(i);
}

static Tensor wanted_deltas(const Tensor& anchors, const Tensor& boxes, const Tensor& matched) {
  const WantedDeltas a(anchors, boxes, matched);
  const OnDevice gpu(anchors);
  gpu.launch(&wanted_deltas_kernel, ceil_div(a.rows, kThreads), kThreads, a.assigned, a.rows, a.deltas());
  return a.out;
}

}  // namespace detcore

GPU_OPS(m) { m.impl("wanted_deltas", TORCH_BOX(&detcore::wanted_deltas)); }
