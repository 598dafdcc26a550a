// Images to the network's input: uint8 in either layout, mirrored or not -> scale * value + shift in channels_last.
#pragma once

#include <optional>

#include "kernel.h"

namespace detcore {

constexpr int kColours = 3;

// How uint8 images lie in memory and which of them are mirrored.
struct Source {
  const uint8_t* values;
  const bool* flip;  // of each image, or null
  int64_t pixels;    // of an image
  int width;
  bool planes;  // [N, 3, H, W], else [N, H, W, 3]

  HOST_DEVICE uint8_t at(int64_t image, int64_t pixel, int colour) const {
    if (flip && flip[image]) {
      const int64_t column = pixel % width;
      pixel += width - 1 - 2 * column;
    }
    return values[planes ? (image * kColours + colour) * pixels + pixel : (image * pixels + pixel) * kColours + colour];
  }
};

template <typename T>
HOST_DEVICE T normalized(uint8_t value, float scale, float shift) {
  return static_cast<T>(fmaf(static_cast<float>(value), scale, shift));
}

// The value of channel c of an output with 3, 4 or 8 channels: 0 behind the colours.
template <typename T>
HOST_DEVICE T channel_value(const Source& source, const float* scale, const float* shift, int64_t image, int64_t pixel,
                            int c) {
  return c < kColours ? normalized<T>(source.at(image, pixel, c), scale[c], shift[c]) : T(0.0f);
}

// The arguments of both implementations, checked; out: [N, channels, H, W] in channels_last.
struct Normalize {
  Source source;
  const float* scale;
  const float* shift;
  Tensor out;
  int64_t count;

  Normalize(const Tensor& images, const Tensor& scale_, const Tensor& shift_, ScalarType dtype,
            const std::optional<Tensor>& flip, int64_t channels)
      : source(checked(images, flip, channels)),
        scale(three(scale_)),
        shift(three(shift_)),
        out(torch::stable::empty({images.size(0), channels, images.size(2), images.size(3)}, dtype, std::nullopt,
                                 images.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast)),
        count(images.size(0)) {}

 private:
  static Source checked(const Tensor& images, const std::optional<Tensor>& flip, int64_t channels) {
    check(channels == 3 || channels == 4 || channels == 8, "channels must be 3, 4 or 8");
    check(images.scalar_type() == ScalarType::Byte && images.dim() == 4 && images.size(1) == kColours,
          "images must be uint8 [N, 3, H, W]");
    const int64_t width = images.size(3), pixels = images.size(2) * width;
    const bool planes = images.is_contiguous();
    check(planes || (images.stride(1) == 1 && images.stride(3) == kColours && images.stride(2) == kColours * width &&
                     (images.stride(0) == kColours * pixels || images.size(0) == 1)),
          "images must be contiguous or channels_last");
    check(!flip || (flip->scalar_type() == ScalarType::Bool && flip->dim() == 1 && flip->size(0) == images.size(0) &&
                    flip->is_contiguous()),
          "flip must be bool [N]");
    return {static_cast<const uint8_t*>(images.data_ptr()), flip ? static_cast<const bool*>(flip->data_ptr()) : nullptr,
            pixels, static_cast<int>(width), planes};
  }

  static const float* three(const Tensor& t) {
    check(t.scalar_type() == ScalarType::Float && t.numel() == kColours && t.is_contiguous(),
          "scale and shift must be float32 of 3 values");
    return static_cast<const float*>(t.data_ptr());
  }
};

}  // namespace detcore
