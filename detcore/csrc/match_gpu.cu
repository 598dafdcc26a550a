#include <climits>
#include <cstring>

#include "match.h"

namespace detcore {

constexpr int kThreads = 256, kBoxes = 256;  // threads of a block, boxes that it holds at a time
constexpr int kEach = 4;                     // anchors of a thread in highest_kernel
constexpr unsigned kWarpMask = 0xffffffffu;

// An overlap as an integer of the same order: its bits, since it is not negative.
__device__ inline int ordered(float overlap) {
  int bits;
  memcpy(&bits, &overlap, sizeof(bits));
  return bits;
}

// The boxes of one image that are in use, some at a time, where all threads of a block read them fast.
struct Staged {
  Corners box[kBoxes];
  float area[kBoxes];
  int index[kBoxes];
};

// Loads the used boxes first..first+kBoxes, as far as there are; all threads of the block call it. Returns how many.
__device__ inline int stage(Staged& staged, const Corners* boxes, const int* used, int first, int count) {
  const int here = count - first < kBoxes ? count - first : kBoxes;
  __syncthreads();
  for (int i = threadIdx.x; i < here; i += kThreads) {
    const int index = used[first + i];
    staged.index[i] = index;
    staged.box[i] = boxes[index];
    staged.area[i] = area(boxes[index]);
  }
  __syncthreads();
  return here;
}

// One warp for each image: the places of its labels that are no padding, in order, and how many there are; their
// highest overlaps begin at 0, their first anchors (null: not wanted) at the largest number.
__global__ void used_kernel(const int64_t* labels, int most, int* used, int* counts, int* highest, int* first_anchor) {
  constexpr int kAhead = 8;  // loads on their way at once
  const int lane = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * most;
  int count = 0;
  for (int start = 0; start < most; start += 32 * kAhead) {
    bool real[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = start + int64_t{32} * k + lane;
      real[k] = at < most && labels[row + at] >= 0;
      if (at < most) highest[row + at] = 0;
      if (at < most && first_anchor) first_anchor[row + at] = INT_MAX;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const unsigned votes = __ballot_sync(kWarpMask, real[k]);
      if (real[k]) used[row + count + __popc(votes & ((1u << lane) - 1))] = start + 32 * k + lane;
      count += __popc(votes);
    }
  }
  if (lane == 0) counts[blockIdx.x] = count;
}

// A block takes kThreads * kEach anchors of one image and raises the highest overlap of each used box.
__global__ void highest_kernel(const Corners* anchors, int64_t total, int64_t step, int chunks, const Corners* boxes,
                               int most, const int* used, const int* counts, int* highest) {
  __shared__ Staged staged;
  const int image = blockIdx.x / chunks;
  anchors += image * step;
  const int64_t begin = static_cast<int64_t>(blockIdx.x % chunks) * kThreads * kEach + threadIdx.x;
  Corners anchor[kEach];
  float anchor_area[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const int64_t at = begin + k * kThreads;
    anchor[k] = at < total ? anchors[at] : Corners{0, 0, 0, 0};
    anchor_area[k] = area(anchor[k]);
  }
  const int64_t row = static_cast<int64_t>(image) * most;
  const int count = counts[image];
  for (int first = 0; first < count; first += kBoxes) {
    const int here = stage(staged, boxes + row, used + row, first, count);
    for (int i = 0; i < here; ++i) {
      float most_shared = 0;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        most_shared = larger(overlap(staged.box[i], staged.area[i], anchor[k], anchor_area[k]), most_shared);
      }
      if (!__ballot_sync(kWarpMask, most_shared > 0)) continue;  // so it is for most pairs of box and anchors
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        most_shared = larger(__shfl_xor_sync(kWarpMask, most_shared, lanes), most_shared);
      }
      if (threadIdx.x % 32 == 0) atomicMax(highest + row + first + i, ordered(most_shared));
    }
  }
}

// A thread takes one anchor of one image and lowers the first anchor of each used box whose highest overlap it has.
__global__ void first_kernel(const Corners* anchors, int64_t total, int64_t step, int chunks, const Corners* boxes,
                             int most, const int* used, const int* counts, const int* highest, int* first_anchor) {
  __shared__ Staged staged;
  const int image = blockIdx.x / chunks;
  anchors += image * step;
  const int64_t at = static_cast<int64_t>(blockIdx.x % chunks) * kThreads + threadIdx.x;
  const Corners anchor = at < total ? anchors[at] : Corners{0, 0, 0, 0};
  const float anchor_area = area(anchor);
  const int64_t row = static_cast<int64_t>(image) * most;
  const int count = counts[image];
  for (int first = 0; first < count; first += kBoxes) {
    const int here = stage(staged, boxes + row, used + row, first, count);
    for (int i = 0; i < here; ++i) {
      const float shared = overlap(staged.box[i], staged.area[i], anchor, anchor_area);
      if (shared > 0 && at < total && ordered(shared) == highest[row + first + i]) {
        atomicMin(first_anchor + row + first + i, static_cast<int>(at));
      }
    }
  }
}

// A thread takes one anchor of one image. first_anchor: the anchors that the boxes claim, or null: those that tie for
// a box's highest overlap take their own best box.
__global__ void match_kernel(const Corners* anchors, int64_t total, int64_t step, int chunks, const Corners* boxes,
                             int most, const int* used, const int* counts, const int* highest, const int* first_anchor,
                             Thresholds thresholds, int64_t* out) {
  __shared__ Staged staged;
  __shared__ int goal[kBoxes];
  const int image = blockIdx.x / chunks;
  anchors += image * step;
  const int64_t at = static_cast<int64_t>(blockIdx.x % chunks) * kThreads + threadIdx.x;
  const Corners anchor = at < total ? anchors[at] : Corners{0, 0, 0, 0};
  const float anchor_area = area(anchor);
  const int64_t row = static_cast<int64_t>(image) * most;
  const int count = counts[image];
  float best = 0;
  int index = 0, claim = -1;
  bool tied = false;
  for (int first = 0; first < count; first += kBoxes) {
    const int here = stage(staged, boxes + row, used + row, first, count);
    for (int i = threadIdx.x; i < here; i += kThreads) goal[i] = highest[row + first + i];
    __syncthreads();
    for (int i = 0; i < here; ++i) {
      const float shared = overlap(staged.box[i], staged.area[i], anchor, anchor_area);
      if (!(shared > 0)) continue;
      if (ordered(shared) == goal[i]) {
        tied |= !first_anchor;
        if (first_anchor && claim < 0 && first_anchor[row + first + i] == at) claim = staged.index[i];
      }
      if (shared > best) {
        best = shared;
        index = staged.index[i];
      }
    }
  }
  if (at < total) out[image * total + at] = claim >= 0 ? claim : thresholds.decision(best, index, tied);
}

static Tensor match(const Tensor& anchors, const Tensor& boxes, const Tensor& labels, double high, double low,
                    int64_t low_quality) {
  const Match a(anchors, boxes, labels, high, low, low_quality);
  const OnDevice gpu(anchors);
  const Tensor used = a.scratch(ScalarType::Int, a.images * a.most), counts = a.scratch(ScalarType::Int, a.images);
  const Tensor highest = a.scratch(ScalarType::Int, a.images * a.most);
  int *places = static_cast<int*>(used.data_ptr()), *many = static_cast<int*>(counts.data_ptr());
  int* best = static_cast<int*>(highest.data_ptr());
  const bool claims = a.low_quality == LowQuality::kBest;
  const Tensor firsts = a.scratch(ScalarType::Int, claims ? a.images * a.most : 0);
  int* first_anchor = claims ? static_cast<int*>(firsts.data_ptr()) : nullptr;
  const int64_t wide = ceil_div(a.count, kThreads * kEach), narrow = ceil_div(a.count, kThreads);
  gpu.launch(&used_kernel, a.images, 32, a.labels, a.most, places, many, best, first_anchor);
  if (a.low_quality != LowQuality::kNone) {  // else the highest overlaps stay 0, which no anchor has
    gpu.launch(&highest_kernel, a.images * wide, kThreads, a.anchors, a.count, a.step, wide, a.boxes, a.most, places,
               many, best);
  }
  if (claims) {
    gpu.launch(&first_kernel, a.images * narrow, kThreads, a.anchors, a.count, a.step, narrow, a.boxes, a.most, places,
               many, best, first_anchor);
  }
  gpu.launch(&match_kernel, a.images * narrow, kThreads, a.anchors, a.count, a.step, narrow, a.boxes, a.most, places,
             many, best, first_anchor, a.thresholds, static_cast<int64_t*>(a.out.data_ptr()));
  return a.out;
}

}  // namespace detcore

GPU_OPS(m) { m.impl("match", TORCH_BOX(&detcore::match)); }
