// Images to the network's input: uint8 in either layout -> scale * value + shift in channels_last.
#pragma once

#include "kernel.h"

namespace detcore {

constexpr int kColours = 3;

template <typename T>
HOST_DEVICE T normalized(uint8_t value, float scale, float shift) {
  return static_cast<T>(fmaf(static_cast<float>(value), scale, shift));
}

// Where a value stands in uint8 images: planes [N, 3, HW] or interleaved [N, HW, 3].
HOST_DEVICE int64_t source_offset(int64_t image, int64_t pixel, int colour, int64_t pixels, bool planes) {
  return planes ? (image * kColours + colour) * pixels + pixel : (image * pixels + pixel) * kColours + colour;
}

// The arguments of both implementations, checked; out: [N, 3, H, W] in channels_last.
struct Normalize {
  const uint8_t* images;
  const float* scale;
  const float* shift;
  Tensor out;
  int64_t count, pixels;
  bool planes;

  Normalize(const Tensor& images_, const Tensor& scale_, const Tensor& shift_, ScalarType dtype)
      : images(static_cast<const uint8_t*>(images_.data_ptr())),
        scale(static_cast<const float*>(contiguous(scale_, "scale").data_ptr())),
        shift(static_cast<const float*>(contiguous(shift_, "shift").data_ptr())),
        out(torch::stable::empty({images_.size(0), kColours, images_.size(2), images_.size(3)}, dtype, std::nullopt,
                                 images_.device(), std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast)),
        count(images_.size(0)),
        pixels(images_.size(2) * images_.size(3)),
        planes(images_.is_contiguous()) {
    check(images_.scalar_type() == ScalarType::Byte && images_.dim() == 4 && images_.size(1) == kColours,
          "images must be uint8 [N, 3, H, W]");
    check(planes || (images_.stride(1) == 1 && images_.stride(3) == kColours &&
                     images_.stride(2) == kColours * images_.size(3) && images_.stride(0) == kColours * pixels),
          "images must be contiguous or channels_last");
    check(scale_.scalar_type() == ScalarType::Float && shift_.scalar_type() == ScalarType::Float &&
              scale_.numel() == kColours && shift_.numel() == kColours,
          "scale and shift must be float32 of 3 values");
  }
};

}  // namespace detcore
