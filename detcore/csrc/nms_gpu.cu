#include "nms.h"

namespace detcore {

constexpr int kTile = 256;          // candidates looked at together, one a thread
constexpr int kWords = kTile / 32;  // of 32 bits, one bit a candidate

// Boxes of one class or another that all threads read.
struct Tile {
  Box box[kTile];
  float area[kTile];
  int64_t label[kTile];

  __device__ void set(int at, const Box& b, int64_t l) {
    box[at] = b;
    area[at] = detcore::area(b);
    label[at] = l;
  }
  __device__ bool suppresses(int at, const Box& b, float area_b, int64_t l, float threshold) const {
    return label[at] == l && overlaps(box[at], area[at], b, area_b, threshold);
  }
};

// One block per image. A tile of candidates at a time: those that boxes kept from earlier tiles suppress die; the
// others find out who suppresses whom among themselves (a bit each); the first warp then walks through the living in
// order.
__global__ void nms_kernel(const Box* boxes, const float* scores, const int64_t* labels, int64_t* positions,
                           int64_t candidates, int64_t detections, float threshold) {
  __shared__ Tile tile;
  __shared__ uint32_t victims[kTile][kWords];
  __shared__ uint32_t living[kWords];
  __shared__ int64_t total;
  const int64_t image = blockIdx.x;
  boxes += image * candidates;
  scores += image * candidates;
  labels += image * candidates;
  positions += image * detections;
  const int self = threadIdx.x, lane = self % 32;
  int64_t found = 0;
  for (int64_t start = 0; start < candidates && found < detections; start += kTile) {
    const int64_t i = start + self;
    bool alive = i < candidates && scores[i] >= 0;
    if (!__syncthreads_or(alive)) break;  // sorted by score: no candidate comes after
    const Box box = alive ? boxes[i] : Box{0, 0, 0, 0};
    const float own_area = area(box);
    const int64_t label = alive ? labels[i] : -1;
    for (int64_t chunk = 0; chunk < found; chunk += kTile) {
      const int here = static_cast<int>(found - chunk < kTile ? found - chunk : kTile);
      __syncthreads();
      if (self < here) tile.set(self, boxes[positions[chunk + self]], labels[positions[chunk + self]]);
      __syncthreads();
      for (int k = 0; k < here && alive; ++k) alive = !tile.suppresses(k, box, own_area, label, threshold);
    }
    __syncthreads();
    tile.set(self, box, label);
    const uint32_t votes = __ballot_sync(0xffffffff, alive);
    if (lane == 0) living[self / 32] = votes;
    __syncthreads();
    for (int word = 0; word < kWords; ++word) {
      uint32_t bits = 0;
      for (int bit = 0; bit < 32 && alive; ++bit) {
        const int other = word * 32 + bit;
        if (other > self && (living[word] >> bit & 1) && tile.suppresses(other, box, own_area, label, threshold)) {
          bits |= 1u << bit;
        }
      }
      victims[self][word] = bits;
    }
    __syncthreads();
    if (self < 32) {  // lane w holds word w of the living
      uint32_t left = lane < kWords ? living[lane] : 0;
      while (found < detections) {
        const uint32_t words = __ballot_sync(0xffffffff, left != 0);
        if (words == 0) break;
        const int word = __ffs(words) - 1;
        const int bit = __ffs(__shfl_sync(0xffffffff, left, word)) - 1;
        if (lane < kWords) left &= ~victims[word * 32 + bit][lane];
        if (lane == word) left &= ~(1u << bit);
        if (lane == 0) positions[found] = start + word * 32 + bit;
        ++found;
      }
      if (lane == 0) total = found;
    }
    __syncthreads();
    found = total;
  }
  for (int64_t k = found + self; k < detections; k += kTile) positions[k] = -1;
}

static Tensor nms(const Tensor& boxes, const Tensor& scores, const Tensor& labels, double threshold,
                  int64_t detections) {
  const Nms a(boxes, scores, labels, threshold, detections);
  const OnDevice gpu(boxes);
  gpu.launch(&nms_kernel, a.images, kTile, a.boxes, a.scores, a.labels, a.positions(), a.candidates, a.detections,
             a.threshold);
  return a.kept;
}

}  // namespace detcore

GPU_OPS(m) { m.impl("nms", TORCH_BOX(&detcore::nms)); }
