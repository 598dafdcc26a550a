// Masks of detections laid into their images, as COCO's compressed run lengths, without the images.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "kernel.h"

namespace detcore {

constexpr int64_t kFarthest = int64_t{1} << 30;  // pixels; where a box reaches beyond, it ends there
constexpr float kNear = 1e-4f;                   // of the threshold: closer than that all pixels are looked at

// Along one axis, where the pixels of a box take their values from: `weight` of the source after `from`, the rest of
// it.
struct PasteAxis {
  int64_t begin, end;  // the pixels of the box that lie within the image
  std::vector<int> from;
  std::vector<float> weight;

  // low, high: the box. sources: of the mask with its border. side: pixels of the image.
  PasteAxis(float low, float high, int sources, int64_t side) {
    const float half = (high - low) * .5f, centre = (high + low) * .5f;
    const float reach = half * static_cast<float>(static_cast<double>(sources) / (sources - 2));
    const int64_t first = whole(centre - reach), last = whole(centre + reach);
    begin = std::max<int64_t>(first, 0);
    end = std::max(std::min(last + 1, side), begin);
    const float scale = static_cast<float>(sources) / static_cast<float>(std::max<int64_t>(last - first + 1, 1));
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      // Rounded once, as PyTorch's interpolation has it.
      const float middle = static_cast<float>(pixel - first) + .5f;
      const float at = std::max(static_cast<float>(static_cast<double>(scale) * middle - .5), 0.f);
      const int source = std::min(static_cast<int>(at), sources - 1);
      from.push_back(source);
      weight.push_back(std::min(at - static_cast<float>(source), 1.f));
    }
  }

  static int64_t whole(float value) {
    if (!(value > -kFarthest)) return -kFarthest;
    return value < kFarthest ? static_cast<int64_t>(value) : kFarthest;
  }
};

// The places, counted down the columns of an image, from which on pixels are on the other side of a mask.
class PasteChanges {
 public:
  void set(bool inside, int64_t place) {
    if (inside == inside_) return;
    places_.push_back(place);
    inside_ = inside;
  }

  // COCO's letters: numbers by five bits, from the fourth on the difference to the one two before. area: the pixels
  // inside, every second count.
  std::string text(int64_t pixels, int64_t& area) {
    if (places_.empty() || places_.back() < pixels) places_.push_back(pixels);
    std::string letters;
    int64_t before[3] = {0, 0, 0};  // the two counts before, and the place
    for (size_t i = 0; i < places_.size(); ++i) {
      const int64_t count = places_[i] - before[2];
      if (i % 2) area += count;
      int64_t number = i > 2 ? count - before[i % 2] : count;
      before[i % 2] = count;
      before[2] = places_[i];
      for (bool more = true; more;) {
        int letter = static_cast<int>(number & 0x1f);
        number >>= 5;
        more = letter & 0x10 ? number != -1 : number != 0;
        letters.push_back(static_cast<char>((more ? letter | 0x20 : letter) + 48));
      }
    }
    return letters;
  }

 private:
  std::vector<int64_t> places_;
  bool inside_ = false;
};

// One mask with a border of zeros, column after column.
static std::vector<float> bordered(const float* mask, int side) {
  const int size = side + 2;
  std::vector<float> out(static_cast<size_t>(size) * size, 0.f);
  for (int y = 0; y < side; ++y) {
    for (int x = 0; x < side; ++x) out[static_cast<size_t>(x + 1) * size + y + 1] = mask[y * side + x];
  }
  return out;
}

static std::string paste_one(const float* mask, int side, const float* box, int64_t height, int64_t width,
                             float threshold, int64_t& area) {
  const int size = side + 2;
  const PasteAxis across(box[0], box[2], size, width), down(box[1], box[3], size, height);
  const std::vector<float> columns = bordered(mask, side);
  const int64_t rows = down.end - down.begin;
  std::vector<float> profile(size);
  PasteChanges changes;
  for (int64_t k = 0; rows > 0 && k < across.end - across.begin; ++k) {
    const int x = across.from[k], next = std::min(x + 1, size - 1);
    const float right = across.weight[k], left = 1 - right;
    const float *one = &columns[static_cast<size_t>(x) * size], *two = &columns[static_cast<size_t>(next) * size];
    for (int j = 0; j < size; ++j) profile[j] = one[j] * left + two[j] * right;
    const int64_t top = (across.begin + k) * height;
    if (down.begin > 0) changes.set(false, top);
    for (int64_t row = 0; row < rows;) {  // all rows between the same two sources at once
      const int from = down.from[row];
      const float a = profile[from], b = profile[std::min(from + 1, size - 1)];
      int64_t last = row + 1;
      while (last < rows && down.from[last] == from) ++last;
      const bool above = a > threshold + kNear && b > threshold + kNear;
      if (above || (a < threshold - kNear && b < threshold - kNear)) {
        changes.set(above, top + down.begin + row);
      } else {
        for (int64_t r = row; r < last; ++r) {
          const float below = down.weight[r];
          changes.set(a * (1 - below) + b * below > threshold, top + down.begin + r);
        }
      }
      row = last;
    }
    if (down.end < height) changes.set(false, top + down.end);
  }
  if (across.end < width) changes.set(false, across.end * height);
  return changes.text(height * width, area);
}

static std::tuple<Tensor, Tensor, Tensor> paste(const Tensor& masks, const Tensor& boxes, const Tensor& sizes,
                                                double threshold) {
  check(masks.scalar_type() == ScalarType::Float && masks.dim() == 3 && masks.size(1) == masks.size(2) &&
            masks.size(1) > 0 && masks.size(1) < (1 << 15),
        "masks must be float32 [D, M, M], M from 1 to 2^15 - 1");
  const int64_t count = masks.size(0), side = masks.size(1);
  check(boxes.scalar_type() == ScalarType::Float && boxes.dim() == 2 && boxes.size(0) == count && boxes.size(1) == 4,
        "boxes must be float32 [D, 4], as many as masks");
  check(sizes.scalar_type() == ScalarType::Long && sizes.dim() == 2 && sizes.size(0) == count && sizes.size(1) == 2,
        "sizes must be int64 [D, 2], as many as masks");
  const auto* mask = static_cast<const float*>(contiguous(masks, "masks").data_ptr());
  const auto* box = static_cast<const float*>(contiguous(boxes, "boxes").data_ptr());
  const auto* size = static_cast<const int64_t*>(contiguous(sizes, "sizes").data_ptr());
  for (int64_t i = 0; i < 2 * count; ++i) check(size[i] > 0 && size[i] < (1 << 30), "sizes must be from 1 to 2^30 - 1");
  std::vector<std::string> texts(count);
  const Tensor areas = torch::stable::empty({count}, ScalarType::Long, std::nullopt, masks.device());
  auto* area = static_cast<int64_t*>(areas.data_ptr());
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      area[i] = 0;
      texts[i] = paste_one(mask + i * side * side, static_cast<int>(side), box + 4 * i, size[2 * i], size[2 * i + 1],
                           static_cast<float>(threshold), area[i]);
    }
  });
  int64_t letters = 0;
  for (const std::string& text : texts) letters += static_cast<int64_t>(text.size());
  const Tensor all = torch::stable::empty({letters}, ScalarType::Byte, std::nullopt, masks.device());
  const Tensor counts = torch::stable::empty({count}, ScalarType::Long, std::nullopt, masks.device());
  auto* at = static_cast<uint8_t*>(all.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    at = std::copy(texts[i].begin(), texts[i].end(), at);
    static_cast<int64_t*>(counts.data_ptr())[i] = static_cast<int64_t>(texts[i].size());
  }
  return {all, counts, areas};
}

}  // namespace detcore

SCHEMAS(m) { m.def("paste(Tensor masks, Tensor boxes, Tensor sizes, float threshold) -> (Tensor, Tensor, Tensor)"); }
CPU_OPS(m) { m.impl("paste", TORCH_BOX(&detcore::paste)); }
