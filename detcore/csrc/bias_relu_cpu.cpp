#include <algorithm>
#include <vector>

#include "bias_relu.h"

namespace detcore {

constexpr int64_t kGrain = 1 << 12;  // groups a thread takes at least
constexpr int64_t kRows = 256;       // rows a partial sum covers

// 8 places that share a byte; kWhole: all of them exist.
template <typename T, bool kWhole>
static uint8_t forward_group(const T* x, const float* bias, const T* residual, T* out, int count) {
  Group<T, kWhole> group, other;
  float sums[kGroup];
  group.load(x, count);
  if (residual) {
    other.load(residual, count);
    for (int k = 0; k < kGroup; ++k) sums[k] = bias_added(group.at[k], bias[k], other.at[k]);
  } else {
    for (int k = 0; k < kGroup; ++k) sums[k] = bias_added(group.at[k], bias[k]);
  }
  const uint8_t byte = rectify(sums, group.at);
  group.store(out, count);
  return byte;
}

template <typename T>
static void forward(const BiasRelu& a) {
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* out = static_cast<T*>(a.out.data_ptr());
  uint8_t* bits = a.bits();
  const Places p = a.places;
  const bool whole_rows = p.inner == 1 && p.channels % kGroup == 0;  // a group's biases follow each other
  torch::stable::parallel_for(0, ceil_div(p.numel, kGroup), kGrain, [&](int64_t begin, int64_t end) {
    float same[kGroup];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kGroup;
      const int count = static_cast<int>(std::min<int64_t>(kGroup, p.numel - first));
      const float* bias = same;
      if (whole_rows) {
        bias = a.bias + first % p.channels;
      } else if (count == kGroup && first % p.inner + kGroup <= p.inner) {
        std::fill(same, same + kGroup, a.bias[p.channel(first)]);
      } else {
        for (int k = 0; k < kGroup; ++k) same[k] = k < count ? a.bias[p.channel(first + k)] : 0.0f;
      }
      const T* here = residual ? residual + first : nullptr;
      const uint8_t byte = count == kGroup ? forward_group<T, true>(x + first, bias, here, out + first, kGroup)
                                           : forward_group<T, false>(x + first, bias, here, out + first, count);
      if (bits) bits[i] = byte;
    }
  });
}

static std::tuple<Tensor, Tensor> bias_relu(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& residual,
                                            bool keep) {
  const BiasRelu a(x, bias, residual, keep);
  for_floating(x, "x", [&](auto zero) { forward<decltype(zero)>(a); });
  return {a.out, a.mask};
}

// Sums over all places of a channel, by partial sums whose limits do not depend on the threads: a partial row of
// channels for kRows rows (channels_last), or one of kGroup lanes for a plane.
template <typename T>
static void channel_sums(const T* values, const Places& p, float* sums) {
  const int64_t rows = p.channels > 0 ? p.numel / p.channels : 0, outer = p.inner > 0 ? rows / p.inner : 0;
  const int64_t parts = p.inner == 1 ? ceil_div(rows, kRows) : outer;
  std::vector<float> partial(parts * p.channels, 0.0f);
  if (p.inner == 1) {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * kRows; r < std::min(end * kRows, rows); ++r) {
        float* to = partial.data() + r / kRows * p.channels;
        for (int64_t c = 0; c < p.channels; ++c) to[c] += static_cast<float>(values[r * p.channels + c]);
      }
    });
  } else {
    torch::stable::parallel_for(0, parts * p.channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const T* from = values + plane * p.inner;
        float lanes[kGroup] = {};
        int64_t j = 0;
        for (; j + kGroup <= p.inner; j += kGroup) {
          for (int k = 0; k < kGroup; ++k) lanes[k] += static_cast<float>(from[j + k]);
        }
        for (; j < p.inner; ++j) lanes[0] += static_cast<float>(from[j]);
        for (float lane : lanes) partial[plane] += lane;
      }
    });
  }
  std::fill(sums, sums + p.channels, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t c = 0; c < p.channels; ++c) sums[c] += partial[part * p.channels + c];
  }
}

template <typename T, bool kWhole, int kCount, typename Mask>
static void backward_group(const Gradients<T>& from, const Mask& mask, T* dx, int64_t i, int count) {
  Group<T, kWhole> group;
  mask_gradients<T, kWhole, kCount>(from, i * kGroup, count, mask.template byte<kWhole>(i, count), group);
  group.store(dx + i * kGroup, count);
}

template <typename T, int kCount, typename Mask>
static void backward(const BiasReluBackward& a, const Mask& mask) {
  T* dx = static_cast<T*>(a.dx.data_ptr());
  const Gradients<T> from = a.gradients<T>();
  const int64_t numel = a.places.numel;
  torch::stable::parallel_for(0, ceil_div(numel, kGroup), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < std::min(end, numel / kGroup); ++i) {
      backward_group<T, true, kCount>(from, mask, dx, i, kGroup);
    }
    if (end * kGroup > numel) backward_group<T, false, kCount>(from, mask, dx, end - 1, numel % kGroup);
  });
  if (a.sums()) channel_sums(static_cast<const T*>(dx), a.places, a.sums());
}

static std::tuple<Tensor, Tensor> bias_relu_backward(const Tensor& grad, const Tensor& mask, bool sums,
                                                     const std::optional<Tensor>& second,
                                                     const std::optional<Tensor>& third) {
  const BiasReluBackward a(grad, mask, sums, second, third);
  for_floating(grad, "the gradient", [&](auto zero) {
    using T = decltype(zero);
    a.for_kind<T>([&](auto count, auto mask) { backward<T, count.value>(a, mask); });
  });
  return {a.dx, a.dbias};
}

}  // namespace detcore

SCHEMAS(m) {
  m.def("bias_relu(Tensor x, Tensor bias, Tensor? residual, bool keep) -> (Tensor, Tensor)");
  m.def(
      "bias_relu_backward(Tensor grad, Tensor mask, bool sums, Tensor? second=None, Tensor? third=None) -> (Tensor, "
      "Tensor)");
}
CPU_OPS(m) {
  m.impl("bias_relu", TORCH_BOX(&detcore::bias_relu));
  m.impl("bias_relu_backward", TORCH_BOX(&detcore::bias_relu_backward));
}
