// Many tensors, each multiplied row by row by its scale and rounded to another type, by one launch.
#pragma once

#include <type_traits>
#include <vector>

#include "bias_relu.h"

namespace detcore {

constexpr int kMostEntries = 64;  // of a launch: they are a kernel's argument
constexpr int64_t kChunk = 8192;  // values of a block
constexpr int64_t kMostBlocks = 1 << 30;

// One tensor of numel values in rows of `row`, which is one channel of a convolution's output. scale: one a row, or
// null.
struct Entry {
  const void* from;
  void* to;
  const float* scale;
  int64_t numel, row;
  bool whole;  // both may be read and written by 16 bytes

  Entry() = default;
  Entry(const Tensor& out, const Tensor& value, const float* scale_)
      : from(value.data_ptr()),
        to(out.data_ptr()),
        scale(scale_),
        numel(value.numel()),
        row(numel > 0 ? numel / value.size(0) : 1),
        whole((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0) {}
};

struct Entries {
  Entry at[kMostEntries];
  int first_block[kMostEntries + 1];
  int count;
};

// 8 values from place `first` on, of which `count` exist.
template <typename From, typename To, bool kWhole>
HOST_DEVICE void fold_group(const Entry& entry, int64_t first, int count) {
  Group<From, kWhole> in;
  Group<To, kWhole> out;
  in.load(static_cast<const From*>(entry.from) + first, count);
  int64_t row = first / entry.row, place = first % entry.row;
  for (int k = 0; k < kGroup; ++k) {
    const float factor = entry.scale && k < count ? entry.scale[row] : 1.0f;
    out.at[k] = static_cast<To>(static_cast<float>(in.at[k]) * factor);
    if (++place == entry.row) {
      place = 0;
      ++row;
    }
  }
  out.store(static_cast<To*>(entry.to) + first, count);
}

template <typename From, typename To>
HOST_DEVICE void fold_group(const Entry& entry, int64_t first) {
  const int64_t left = entry.numel - first;
  if (entry.whole && left >= kGroup) {
    fold_group<From, To, true>(entry, first, kGroup);
  } else {
    fold_group<From, To, false>(entry, first, static_cast<int>(left < kGroup ? left : kGroup));
  }
}

// The arguments of both implementations, checked, as launches of at most kMostEntries tensors.
struct Fold {
  std::vector<Entries> launches;

  Fold(const std::vector<Tensor>& out, const std::vector<Tensor>& values, const std::vector<Tensor>& scales) {
    check(out.size() == values.size() && (scales.empty() || scales.size() == values.size()),
          "out, values and scales must be lists of one length");
    for (size_t i = 0; i < values.size(); ++i) {
      check(out[i].scalar_type() == out[0].scalar_type() && values[i].scalar_type() == values[0].scalar_type(),
            "all of out must have one dtype, and all values");
      check(alike(out[i], values[i]),
            "out and values must have the same shapes and layouts, contiguous or channels_last");
      const float* scale = nullptr;
      if (!scales.empty()) {
        check(contiguous(scales[i], "scale").scalar_type() == ScalarType::Float && scales[i].dim() == 1 &&
                  scales[i].numel() == values[i].size(0),
              "scales must be float32 of one value a row");
        scale = static_cast<const float*>(scales[i].data_ptr());
      }
      add(Entry(out[i], values[i], scale));
    }
  }

  // Calls f with values of the two types.
  template <typename F>
  static void for_types(const Tensor& out, const Tensor& value, F&& f) {
    for_floating(value, "values", [&](auto from) {
      using From = decltype(from);
      for_floating(out, "out", [&](auto to) {
        if constexpr (std::is_same_v<From, float> || std::is_same_v<decltype(to), float>) {
          f(From(), to);
        } else {
          check(false, "values or out must be float32");
        }
      });
    });
  }

 private:
  static bool alike(const Tensor& out, const Tensor& value) {
    if (out.dim() != value.dim() || value.dim() == 0) return false;
    for (int64_t d = 0; d < value.dim(); ++d) {
      if (out.size(d) != value.size(d)) return false;
    }
    if (value.dim() == 4) return Places(out).inner == Places(value).inner;
    return out.is_contiguous() && value.is_contiguous();
  }

  void add(const Entry& entry) {
    const int64_t blocks = ceil_div(entry.numel, kChunk);
    check(blocks < kMostBlocks, "a tensor is too large");
    if (launches.empty() || launches.back().count == kMostEntries ||
        launches.back().first_block[launches.back().count] + blocks > kMostBlocks) {
      launches.push_back({});
    }
    Entries& last = launches.back();
    last.at[last.count] = entry;
    last.first_block[last.count + 1] = last.first_block[last.count] + static_cast<int>(blocks);
    ++last.count;
  }
};

}  // namespace detcore
