#include <cstring>

#include "multibox_match.h"

namespace detcore {

constexpr int kThreads = 256, kBoxes = 128;  // threads of a block, boxes that it holds at a time

// One block for each box, padding included: the prior that it overlaps most, of equals the first.
__global__ void claim_kernel(const Prior* priors, int64_t count, const Corners* boxes, const int64_t* labels,
                             int32_t* claims) {
  __shared__ unsigned long long of_warp[kThreads / 32];
  const Corners box = of_one(boxes[blockIdx.x]);
  if (labels[blockIdx.x] < 0 || !has_area(box)) {
    if (threadIdx.x == 0) claims[blockIdx.x] = kClaimsNothing;
    return;
  }
  const float box_area = area(box);
  float highest = -1;
  int64_t prior = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const Corners at = corners(priors[i]);
    const float shared = overlap(box, box_area, at, area(at));
    if (shared > highest) {
      highest = shared;
      prior = i;
    }
  }
  // Overlaps are not negative, so their bits rise with them; of equal ones the lower prior gives the larger number.
  unsigned long long best = 0;
  if (highest >= 0) {
    uint32_t bits;
    memcpy(&bits, &highest, sizeof(bits));
    best = static_cast<unsigned long long>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(prior));
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const unsigned long long other = __shfl_xor_sync(0xffffffffu, best, lanes);
    best = other > best ? other : best;
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) best = of_warp[warp] > best ? of_warp[warp] : best;
    claims[blockIdx.x] = best ? static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(best)) : kClaimsNothing;
  }
}

// A thread takes one prior of one image.
__global__ void match_kernel(const Prior* priors, int64_t count, int chunks, const Corners* boxes, int most,
                             const int32_t* claims, int64_t* out) {
  __shared__ Corners box[kBoxes];
  __shared__ float box_area[kBoxes];
  __shared__ int32_t claim[kBoxes];
  const int64_t image = blockIdx.x / chunks;
  const int64_t at = static_cast<int64_t>(blockIdx.x % chunks) * kThreads + threadIdx.x;
  const Corners prior = at < count ? corners(priors[at]) : Corners{0, 0, 1, 1};
  const float prior_area = area(prior);
  float best = -1;
  int64_t index = 0, claimed = kBackground;
  for (int first = 0; first < most; first += kBoxes) {
    const int here = most - first < kBoxes ? most - first : kBoxes;
    __syncthreads();
    for (int i = threadIdx.x; i < here; i += kThreads) {
      box[i] = of_one(boxes[image * most + first + i]);
      box_area[i] = area(box[i]);
      claim[i] = claims[image * most + first + i];
    }
    __syncthreads();
    for (int i = 0; i < here; ++i) {
      if (claim[i] == kClaimsNothing) continue;
      const float shared = overlap(box[i], box_area[i], prior, prior_area);
      if (shared > best) {
        best = shared;
        index = first + i;
      }
      if (claim[i] == at) claimed = first + i;
    }
  }
  if (at < count) out[image * count + at] = decision(claimed, best, index);
}

static Tensor multibox_match(const Tensor& priors, const Tensor& boxes, const Tensor& labels) {
  const MultiboxMatch a(priors, boxes, labels);
  const OnDevice gpu(priors);
  const Tensor claims = torch::stable::empty({a.images * a.most}, ScalarType::Int, std::nullopt, priors.device());
  int32_t* own = static_cast<int32_t*>(claims.data_ptr());
  const int64_t chunks = ceil_div(a.count, kThreads);
  gpu.launch(&claim_kernel, a.images * a.most, kThreads, a.priors, a.count, a.boxes, a.labels, own);
  gpu.launch(&match_kernel, a.images * chunks, kThreads, a.priors, a.count, chunks, a.boxes, a.most, own,
             static_cast<int64_t*>(a.out.data_ptr()));
  return a.out;
}

}  // namespace detcore

GPU_OPS(m) { m.impl("multibox_match", TORCH_BOX(&detcore::multibox_match)); }
