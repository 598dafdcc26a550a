// relu(maximum of 3x3 values at stride 2, one of padding, + bias): what follows the first convolution of a network.
//
// x and the output are channels_last; 8 channels of a place of the output are a group, which a thread has.
#pragma once

#include "bias_relu.h"

namespace detcore {

constexpr int kWindow = 3, kStride = 2, kPadding = 1;

// As torch's max_pool2d: the first of equal values, and NaN where there is one.
HOST_DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }

// Sizes, and where the window of a group lies.
struct Pool {
  int64_t images, channels, height, width, rows, columns;  // rows and columns: the output's

  explicit Pool(const Tensor& x) {
    check(x.dim() == 4, "x must be [N, C, H, W]");
    images = x.size(0), channels = x.size(1), height = x.size(2), width = x.size(3);
    check(Places(x).inner == 1, "x must be channels_last");
    check(channels > 0 && height > 0 && width > 0, "x has no values to choose from");
    rows = (height - 1) / kStride + 1;
    columns = (width - 1) / kStride + 1;
    check(groups() <= std::numeric_limits<int>::max(), "x is too large");
  }

  HOST_DEVICE int64_t groups_of_place() const { return (channels + kGroup - 1) / kGroup; }
  HOST_DEVICE int64_t groups() const { return images * rows * columns * groups_of_place(); }
};

// Group i of the output. kWhole: channels % 8 == 0 and aligned tensors.
template <typename T, bool kWhole>
HOST_DEVICE void pool_group(const Pool& p, const T* x, const float* bias, T* out, int i) {
  const int groups = static_cast<int>(p.groups_of_place()), columns = static_cast<int>(p.columns);
  const int rows = static_cast<int>(p.rows), place = i / groups, line = place / columns;
  const int64_t channel = static_cast<int64_t>(i % groups) * kGroup;
  const int64_t column = place % columns, row = line % rows, image = line / rows;
  const int count = static_cast<int>(p.channels - channel < kGroup ? p.channels - channel : kGroup);
  float largest[kGroup];
  for (int k = 0; k < kGroup; ++k) largest[k] = -INFINITY;
  for (int dy = 0; dy < kWindow; ++dy) {
    const int64_t y = row * kStride - kPadding + dy;
    if (y < 0 || y >= p.height) continue;
    for (int dx = 0; dx < kWindow; ++dx) {
      const int64_t at = column * kStride - kPadding + dx;
      if (at < 0 || at >= p.width) continue;
      Group<T, kWhole> group;
      group.load(x + ((image * p.height + y) * p.width + at) * p.channels + channel, count);
      for (int k = 0; k < kGroup; ++k) largest[k] = larger(largest[k], static_cast<float>(group.at[k]));
    }
  }
  Group<float, kWhole> shift;
  shift.load(bias + channel, count);
  Group<T, kWhole> group;
  for (int k = 0; k < kGroup; ++k) {
    const float sum = bias_added(static_cast<T>(largest[k]), shift.at[k]);
    group.at[k] = static_cast<T>(sum < 0.0f ? 0.0f : sum);
  }
  group.store(out + place * p.channels + channel, count);
}

// The arguments of both implementations, checked; out: [N, C, ceil(H / 2), ceil(W / 2)] in channels_last.
struct PoolBiasRelu {
  Pool pool;
  Tensor out;
  const float* bias;

  PoolBiasRelu(const Tensor& x, const Tensor& bias_)
      : pool(x),
        out(torch::stable::empty({pool.images, pool.channels, pool.rows, pool.columns}, x.scalar_type(), std::nullopt,
                                 x.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast)),
        bias(static_cast<const float*>(contiguous(bias_, "bias").data_ptr())) {
    check(bias_.scalar_type() == ScalarType::Float && bias_.numel() == pool.channels,
          "bias must be float32 of one value a channel");
  }

  // Whether accesses of 16 bytes may be used.
  bool whole(const Tensor& x) const {
    const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
    return pool.channels % kGroup == 0 && aligned(x.data_ptr()) && aligned(out.data_ptr()) && aligned(bias);
  }
};

}  // namespace detcore
