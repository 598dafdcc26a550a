// relu(x + bias (+ residual)) and its gradient; one bit a value is kept between the two, or the output.
//
// A value's place i is its place in memory: [N, H, W, C] for channels_last, [N, C, H, W] for contiguous tensors. Bit
// i % 8 of byte i / 8 of the mask says that the gradient passes. A thread has 8 neighbours, so that a byte is its own.
#pragma once

#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "kernel.h"

namespace detcore {

constexpr int kGroup = 8;

// 8 values, in one or two accesses of 16 bytes where kWhole, else the first `count` of them, one by one. The CPU's code
// does not ask whether tensors are aligned.
template <typename T, bool kWhole>
struct Group {
  static constexpr int kPacks = kGroup * sizeof(T) / sizeof(Pack<T>);
  union {
    Pack<T> packs[kPacks];
    T at[kGroup];
  };

  HOST_DEVICE Group() {}
  HOST_DEVICE void load(const T* from, int count) {
    if constexpr (kWhole) {
#if defined(__CUDACC__) || defined(EMULATED_GPU)
      for (int k = 0; k < kPacks; ++k) packs[k] = reinterpret_cast<const Pack<T>*>(from)[k];
#else
      std::memcpy(at, from, sizeof(at));
#endif
    } else {
      for (int k = 0; k < kGroup; ++k) at[k] = k < count ? from[k] : T(0.0f);
    }
  }
  HOST_DEVICE void store(T* to, int count) const {
    if constexpr (kWhole) {
#if defined(__CUDACC__) || defined(EMULATED_GPU)
      for (int k = 0; k < kPacks; ++k) reinterpret_cast<Pack<T>*>(to)[k] = packs[k];
#else
      std::memcpy(to, at, sizeof(at));
#endif
    } else {
      for (int k = 0; k < kGroup; ++k) {
        if (k < count) to[k] = at[k];
      }
    }
  }
};

// As torch.relu: NaN stays NaN and passes gradients, -0 stays -0 and passes none.
HOST_DEVICE bool passes(float value) { return !(value <= 0.0f); }

// The sum is rounded to T before the comparison, so that the bit agrees with what the output shows.
template <typename T>
HOST_DEVICE float bias_added(T x, float bias, T residual) {
  return static_cast<float>(static_cast<T>((static_cast<float>(x) + bias) + static_cast<float>(residual)));
}

template <typename T>
HOST_DEVICE float bias_added(T x, float bias) {
  return static_cast<float>(static_cast<T>(static_cast<float>(x) + bias));
}

// ReLU of 8 sums in place; the mask's byte.
template <typename T>
HOST_DEVICE uint8_t rectify(const float* sums, T* out) {
  unsigned bits = 0;
  for (int k = 0; k < kGroup; ++k) {
    out[k] = static_cast<T>(sums[k] < 0.0f ? 0.0f : sums[k]);
    bits |= static_cast<unsigned>(passes(sums[k])) << k;
  }
  return static_cast<uint8_t>(bits);
}

constexpr int kMostGradients = 3;

// The gradients of one output, one for each of its uses. Their sum is made in float32, in this order, and rounded to T
// once: of two it is what T's own addition gives.
template <typename T>
struct Gradients {
  const T* at[kMostGradients];
  int count;
};

// 8 sums of the kCount gradients from place `first` on, of which `count` exist, where the byte lets them pass.
template <typename T, bool kWhole, int kCount>
HOST_DEVICE void mask_gradients(const Gradients<T>& from, int64_t first, int count, uint8_t byte,
                                Group<T, kWhole>& group) {
  group.load(from.at[0] + first, count);
  if constexpr (kCount > 1) {
    Group<T, kWhole> others[kCount - 1];
    for (int g = 1; g < kCount; ++g) others[g - 1].load(from.at[g] + first, count);
    for (int k = 0; k < kGroup; ++k) {
      float sum = static_cast<float>(group.at[k]);
      for (int g = 1; g < kCount; ++g) sum += static_cast<float>(others[g - 1].at[k]);
      group.at[k] = static_cast<T>(sum);
    }
  }
  for (int k = 0; k < kGroup; ++k) group.at[k] = byte >> k & 1 ? group.at[k] : T(0.0f);
}

// What lets gradients pass, a byte for a group of places: the bits of the mask,
struct Bits {
  const uint8_t* at;

  template <bool kWhole>
  HOST_DEVICE uint8_t byte(int64_t group, int) const {
    return at[group];
  }
};

// or the output.
template <typename T>
struct Shown {
  const T* at;

  template <bool kWhole>
  HOST_DEVICE uint8_t byte(int64_t group, int count) const {
    Group<T, kWhole> values;
    values.load(at + group * kGroup, count);
    unsigned bits = 0;
    for (int k = 0; k < kGroup; ++k) bits |= static_cast<unsigned>(passes(static_cast<float>(values.at[k]))) << k;
    return static_cast<uint8_t>(bits);
  }
};

// Calls f with the number of gradients as a constant.
template <typename F>
void for_count(int count, F&& f) {
  if (count == 1) return f(std::integral_constant<int, 1>());
  if (count == 2) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 3>());
}

// How a dense 4-D tensor lies in memory: the channel of place i is i / inner % channels.
struct Places {
  int64_t numel, channels, inner;

  explicit Places(const Tensor& t) : numel(t.numel()) {
    check(t.dim() == 4, "x must be [N, C, H, W]");
    channels = t.size(1);
    const bool last = dense(t, {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)});
    check(last || t.is_contiguous(), "x must be channels_last or contiguous");
    inner = last ? 1 : t.size(2) * t.size(3);
  }

  HOST_DEVICE int64_t channel(int64_t i) const { return i / inner % channels; }

 private:
  static bool dense(const Tensor& t, const int64_t (&strides)[4]) {
    for (int d = 0; d < 4; ++d) {
      if (t.numel() > 0 && t.size(d) > 1 && t.stride(d) != strides[d]) return false;
    }
    return true;
  }
};

// Whether the values of `other`, of the same type, lie at the places of those of x.
inline void check_like(const Tensor& x, const Tensor& other, const char* kind, const char* layout) {
  check(other.scalar_type() == x.scalar_type() && other.dim() == 4, kind);
  for (int d = 0; d < 4; ++d) {
    check(other.size(d) == x.size(d) && (x.size(d) == 1 || other.stride(d) == x.stride(d)), layout);
  }
}

// The arguments of both implementations, checked. mask: uint8 [ceil(numel / 8)], or [0] where none is asked for.
struct BiasRelu {
  Places places;
  Tensor out, mask;
  const void* x;
  const void* residual;
  const float* bias;

  BiasRelu(const Tensor& x_, const Tensor& bias_, const std::optional<Tensor>& residual_, bool keep)
      : places(x_),
        out(torch::stable::empty_like(x_)),
        mask(torch::stable::empty({keep ? ceil_div(places.numel, kGroup) : 0}, ScalarType::Byte, std::nullopt,
                                  x_.device())),
        x(x_.data_ptr()),
        residual(residual_ ? residual_->data_ptr() : nullptr),
        bias(static_cast<const float*>(contiguous(bias_, "bias").data_ptr())) {
    check(bias_.scalar_type() == ScalarType::Float && bias_.numel() == places.channels,
          "bias must be float32 of one value a channel");
    if (residual_) {
      check_like(x_, *residual_, "the residual must be like x", "the residual must have the shape and layout of x");
    }
  }

  uint8_t* bits() const { return mask.numel() > 0 ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr; }
};

// Arguments of the gradient, checked. dbias: float32 [C], or [0] where none is asked for.
struct BiasReluBackward {
  std::vector<const void*> grads;
  Places places;
  Tensor dx, dbias;
  const void* mask;  // Bits or Shown
  bool shown;

  BiasReluBackward(const Tensor& grad, const Tensor& mask_, bool sums, const std::optional<Tensor>& second,
                   const std::optional<Tensor>& third)
      : grads{grad.data_ptr()},
        places(grad),
        dx(torch::stable::empty_like(grad)),
        dbias(torch::stable::empty({sums ? places.channels : 0}, ScalarType::Float, std::nullopt, grad.device())),
        mask(mask_.data_ptr()),
        shown(mask_.scalar_type() != ScalarType::Byte) {
    if (shown) {
      check_like(grad, mask_, "the mask must be uint8 or like the gradient", "the mask must lie like the gradient");
    } else {
      check(contiguous(mask_, "mask").numel() == ceil_div(places.numel, kGroup), "a mask has one bit a value");
    }
    for (const auto& other : {second, third}) {
      if (!other) continue;
      check_like(grad, *other, "the gradients must have one dtype", "the gradients must have one shape and layout");
      grads.push_back(other->data_ptr());
    }
  }

  template <typename T>
  Gradients<T> gradients() const {
    Gradients<T> result{{}, static_cast<int>(grads.size())};
    for (int g = 0; g < result.count; ++g) result.at[g] = static_cast<const T*>(grads[g]);
    return result;
  }

  // Calls f with the number of gradients as a constant, and with the mask.
  template <typename T, typename F>
  void for_kind(F&& f) const {
    for_count(static_cast<int>(grads.size()), [&](auto count) {
      shown ? f(count, Shown<T>{static_cast<const T*>(mask)}) : f(count, Bits{static_cast<const uint8_t*>(mask)});
    });
  }

  float* sums() const { return dbias.numel() > 0 ? static_cast<float*>(dbias.data_ptr()) : nullptr; }
};

}  // namespace detcore
