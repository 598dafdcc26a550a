// The largest keys of many, of equal ones the first: numbers as integers of their order, and radix selection by a
// block.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernel.h"

namespace detcore {

// A number as an unsigned integer that rises with it, so that keys compare as the numbers do. 0: below the floor, or
// minus infinity. kNoNumber: NaN.
using Key = uint32_t;
template <typename T>
constexpr int kKeyBits = 8 * sizeof(T);
template <typename T>
constexpr Key kNoNumber = sizeof(T) == 4 ? 0xffffffffu : 0xffffu;

template <typename T>
HOST_DEVICE Key key_of(T number, float floor) {
  const float value = static_cast<float>(number);
  if (value != value) return kNoNumber<T>;
  if (!(value >= floor) || value == -INFINITY) return 0;
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  Bits bits = 0;
  if (value != 0) memcpy(&bits, &number, sizeof(T));  // so that the two zeros are equal
  constexpr Bits sign = static_cast<Bits>(Bits{1} << (kKeyBits<T> - 1));
  return static_cast<Bits>(bits & sign ? ~bits : bits | sign);
}

#if defined(__CUDACC__) || defined(EMULATED_GPU)

// The functions below are called by all kThreads threads of a block, a multiple of 32.

constexpr unsigned kAll = 0xffffffffu;
constexpr int kBatch = 9;  // keys that a thread loads at once: 9 x 32 columns hold OpenImages' 264 classes
constexpr int kColumns = 32 * kBatch;

// What they share.
struct Scratch {
  uint32_t histogram[256];
  uint32_t above[32], equal[32];  // of each warp
  uint32_t digit, before, total;
};

// A list of keys, as rows of columns.
struct KeyList {
  const Key* keys;
  int64_t count;

  __device__ int64_t rows() const { return (count + kColumns - 1) / kColumns; }
  __device__ int columns() const { return kColumns; }
  __device__ Key key(int64_t row, int column) const {
    const int64_t at = row * kColumns + column;
    return at < count ? keys[at] : 0;
  }
};

// Calls f(row, column, key) for all keys; each warp goes through its own run of rows, in order, with its lanes side by
// side in a row. They all call f together, with 0 past the end of the row.
template <int kThreads, typename Keys, typename F>
__device__ void for_keys(const Keys& keys, F&& f) {
  constexpr int warps = kThreads / 32;
  const int64_t warp = threadIdx.x / 32;
  const int64_t last = keys.rows() * (warp + 1) / warps;
  const int columns = keys.columns(), lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t row = keys.rows() * warp / warps; row < last; ++row) {
    for (int start = 0; start < columns; start += kColumns) {
      Key batch[kBatch];  // loaded together, so that the warp waits once
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        const int column = start + 32 * u + lane;
        batch[u] = column < columns ? keys.key(row, column) : 0;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (start + 32 * u < columns) f(row, start + 32 * u + lane, batch[u]);
      }
    }
  }
}

// The selected: all keys above `key`, and the first `ties` that are equal to it.
struct Limit {
  Key key;
  uint32_t ties;
};

// Finds, from the highest on, the bin in which the `wanted`-th key falls, and how many stand in those above. By the
// first warp; a lane has 8 bins.
__device__ inline void find_digit(Scratch& s, uint32_t wanted) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint32_t own = 0;
  for (int j = 0; j < 8; ++j) own += s.histogram[255 - (lane * 8 + j)];
  uint32_t until = own;
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, until, step);
    if (lane >= step) until += other;
  }
  if (lane == 31) s.total = until;
  uint32_t before = until - own;
  if (before < wanted && wanted <= until) {
    int bin = 255 - lane * 8;
    while (before + s.histogram[bin] < wanted) before += s.histogram[bin--];
    s.digit = static_cast<uint32_t>(bin);
    s.before = before;
  }
}

// The limit of the `wanted` largest keys above 0; {0, 0} if there are no more than that. Radix selection, 8 bits a
// pass.
template <int kThreads, int kBits, typename Keys>
__device__ Limit find_limit(const Keys& keys, uint32_t wanted, Scratch& s) {
  Key prefix = 0;
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < 256; bin += kThreads) s.histogram[bin] = 0;
    __syncthreads();
    for_keys<kThreads>(keys, [&](int64_t, int, uint64_t key) {
      if (key != 0 && key >> (shift + 8) == prefix) atomicAdd(&s.histogram[key >> shift & 255], 1u);
    });
    __syncthreads();
    if (threadIdx.x < 32) find_digit(s, wanted);
    __syncthreads();
    if (shift == kBits - 8 && s.total <= wanted) return {0, 0};
    prefix = prefix << 8 | s.digit;
    wanted -= s.before;
  }
  return {prefix, wanted};
}

// Calls emit(row, column, place) for every selected key; places count up in the order of the keys. Returns their
// number.
template <int kThreads, typename Keys, typename Emit>
__device__ uint32_t emit_selected(const Keys& keys, const Limit limit, Scratch& s, Emit&& emit) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  const uint32_t earlier = (1u << (threadIdx.x % 32)) - 1;
  uint32_t above = 0, equal = 0;
  for_keys<kThreads>(keys, [&](int64_t, int, Key key) {
    above += __popc(__ballot_sync(kAll, key > limit.key));
    equal += __popc(__ballot_sync(kAll, limit.key != 0 && key == limit.key));
  });
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    s.above[warp] = above;
    s.equal[warp] = equal;
  }
  __syncthreads();
  uint32_t all = 0;
  above = equal = 0;  // from here on: those of the keys before
  for (int w = 0; w < kThreads / 32; ++w) {
    all += s.above[w];
    above += w < warp ? s.above[w] : 0;
    equal += w < warp ? s.equal[w] : 0;
  }
  for_keys<kThreads>(keys, [&](int64_t row, int column, Key key) {
    const bool is_above = key > limit.key, is_equal = limit.key != 0 && key == limit.key;
    const uint32_t aboves = __ballot_sync(kAll, is_above), equals = __ballot_sync(kAll, is_equal);
    const uint32_t ties = equal + __popc(equals & earlier);
    if (is_above || (is_equal && ties < limit.ties)) {
      emit(row, column, above + __popc(aboves & earlier) + (ties < limit.ties ? ties : limit.ties));
    }
    above += __popc(aboves);
    equal += __popc(equals);
  });
  return all + limit.ties;
}

#endif

}  // namespace detcore
