// Activations and their derivatives of kWidth values, and the accesses that go with them: 8 values for a thread of a
// GPU; on a CPU so many that a compiler makes loops of vector instructions of them, instead of as many lines.
#pragma once

#include "bias_relu.h"
#include "exp.h"

#if defined(__CUDA_ARCH__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

namespace detcore {

enum Activation { kNone, kRelu, kRelu6, kSilu };  // in the order of ops/activation.py

inline Activation activation_of(int64_t kind) {
  check(kind >= kNone && kind <= kSilu, "the activation is unknown");
  return static_cast<Activation>(kind);
}

// Far from 0 it is exactly 0 or 1, so that the largest numbers stay what they are.
HOST_DEVICE float sigmoid(float x) {
  const float away = -fabsf(x), e = away < -87.0f ? 0.0f : exp_above_least(away), d = 1.0f / (1.0f + e);
  return x > 0.0f ? d : e * d;
}

// In place; NaN stays NaN.
template <int kWidth>
HOST_DEVICE void activate(Activation kind, float* x) {
  if (kind == kSilu) {
    UNROLL for (int k = 0; k < kWidth; ++k) x[k] *= sigmoid(x[k]);
  } else if (kind != kNone) {
    const float most = kind == kRelu6 ? 6.0f : INFINITY;
    UNROLL for (int k = 0; k < kWidth; ++k) x[k] = x[k] < 0.0f ? 0.0f : x[k] > most ? most : x[k];
  }
}

// x becomes its own gradient, from that of the activation.
template <int kWidth>
HOST_DEVICE void differentiate(Activation kind, const float* gradient, float* x) {
  if (kind == kSilu) {
    UNROLL for (int k = 0; k < kWidth; ++k) {
      const float s = sigmoid(x[k]);
      x[k] = gradient[k] * (s * (1.0f + x[k] * (1.0f - s)));
    }
  } else if (kind == kNone) {
    UNROLL for (int k = 0; k < kWidth; ++k) x[k] = gradient[k];
  } else {
    const bool ends = kind == kRelu6;  // there NaN passes none, as in torch on a CPU
    UNROLL for (int k = 0; k < kWidth; ++k) {
      const bool open = ends ? x[k] > 0.0f && x[k] < 6.0f : passes(x[k]);
      x[k] = open ? gradient[k] : 0.0f;
    }
  }
}

// kWidth values `step` apart, of which `count` exist, as float. kWhole: they follow each other, all exist, and on a GPU
// they begin at a multiple of 16 bytes.
template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void load_group(const T* from, int64_t step, int count, float* to) {
  if constexpr (kWhole && kWidth == kGroup) {
    Group<T, true> group;
    group.load(from, kGroup);
    UNROLL for (int k = 0; k < kWidth; ++k) to[k] = static_cast<float>(group.at[k]);
  } else if constexpr (kWhole) {
    for (int k = 0; k < kWidth; ++k) to[k] = static_cast<float>(from[k]);
  } else {
    UNROLL for (int k = 0; k < kWidth; ++k) to[k] = k < count ? static_cast<float>(from[k * step]) : 0.0f;
  }
}

template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void store_group(const float* from, T* to, int64_t step, int count) {
  if constexpr (kWhole && kWidth == kGroup) {
    Group<T, true> group;
    UNROLL for (int k = 0; k < kWidth; ++k) group.at[k] = static_cast<T>(from[k]);
    group.store(to, kGroup);
  } else if constexpr (kWhole) {
    for (int k = 0; k < kWidth; ++k) to[k] = static_cast<T>(from[k]);
  } else {
    UNROLL for (int k = 0; k < kWidth; ++k) {
      if (k < count) to[k * step] = static_cast<T>(from[k]);
    }
  }
}

}  // namespace detcore
