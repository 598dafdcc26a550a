#include <algorithm>
#include <vector>

#include "norm_act.h"
#include "vectors.h"

namespace detcore {

constexpr int kWide = 32;            // neighbours in memory at once
constexpr int64_t kChunks = 64;      // of them in a line
constexpr int64_t kGrain = 1 << 14;  // values a thread takes at least

// Up to kChunks times kWide values, which have one set of Lanes: some channels in some rows of a channels_last tensor,
// or a piece of one channel's plane.
struct Line {
  int64_t part, channel;
  int lanes, of_channels;       // how many lanes; 1: each is a channel, 0: all are one channel
  int64_t first, chunks, step;  // places
  int last;                     // values in the last chunk; the others have as many as there are lanes
};

// The lines of a tensor; each channel has one in each part.
struct Lines {
  Places places;
  int64_t across, pieces, parts;  // lines of a row, or of a plane

  explicit Lines(const Places& p) : places(p) {
    const int64_t rows = p.numel / p.channels;
    across = p.inner == 1 ? ceil_div(p.channels, kWide) : p.channels;
    pieces = ceil_div(p.inner, kWide * kChunks);
    parts = p.inner == 1 ? ceil_div(rows, kChunks) : rows / p.inner * pieces;
  }

  Line line(int64_t i) const {
    const Places& p = places;
    if (p.inner == 1) {
      const int64_t part = i / across, channel = i % across * kWide, row = part * kChunks;
      const int lanes = static_cast<int>(std::min<int64_t>(kWide, p.channels - channel));
      return {part,       channel, lanes, 1, row * p.channels + channel, std::min(kChunks, p.numel / p.channels - row),
              p.channels, lanes};
    }
    const int64_t plane = i / pieces, begin = i % pieces * (kWide * kChunks);
    const int64_t values = std::min(kWide * kChunks, p.inner - begin), chunks = ceil_div(values, kWide);
    return {plane / p.channels * pieces + i % pieces,
            plane % p.channels,
            kWide,
            0,
            plane * p.inner + begin,
            chunks,
            kWide,
            static_cast<int>(values - (chunks - 1) * kWide)};
  }

  // f(line) for all of them, by several threads.
  template <typename F>
  void each(F&& f) const {
    torch::stable::parallel_for(0, parts * across, ceil_div(kGrain, kWide * kChunks), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(line(i));
    });
  }
};

// f(place, number of values, whether they are kWide) for each chunk.
template <typename F>
static inline void for_chunks(const Line& l, F&& f) {
  for (int64_t j = 0; j < l.chunks; ++j) {
    const int count = j + 1 < l.chunks ? l.lanes : l.last;
    if (count == kWide) {
      f(l.first + j * l.step, kWide, std::true_type());
    } else {
      f(l.first + j * l.step, count, std::false_type());
    }
  }
}

// A channel's parts follow each other: [channels, parts]. Each lane of a line is added to its channel's.
template <template <typename, int> typename Kind>
struct Parts {
  int64_t count;
  std::vector<Kind<float, 1>> all;

  explicit Parts(const Lines& lines) : count(lines.parts), all(count * lines.places.channels, Kind<float, 1>{}) {}

  void add(const Line& l, int lane, const Kind<float, 1>& values) {
    all[(l.channel + lane * l.of_channels) * count + l.part].add(values);
  }

  // to.write(channel, its parts together).
  template <typename To>
  void merge(const To& to) const {
    const int64_t channels = static_cast<int64_t>(all.size()) / count;
    torch::stable::parallel_for(0, channels, ceil_div(kGrain, count), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        Kind<double, 1> whole{};
        for (int64_t part = 0; part < count; ++part) whole.add(widened(all[c * count + part]));
        to.write(c, whole);
      }
    });
  }
};

template <typename T>
WIDE_VECTORS FLAT static void line_moments(const Line& l, const T* x, Parts<Moments>& parts) {
  float means[kWide] = {}, squares[kWide] = {}, counts[kWide];
  for (int k = 0; k < kWide; ++k) counts[k] = static_cast<float>(k < l.last ? l.chunks : l.chunks - 1);
  for_chunks(l, [&](int64_t at, int count, auto whole) {
    float values[kWide];
    load_group<T, whole.value, kWide>(x + at, 1, count, values);
    for (int k = 0; k < kWide; ++k) means[k] += values[k];
  });
  for (int k = 0; k < kWide; ++k) means[k] = counts[k] > 0.0f ? means[k] / counts[k] : 0.0f;
  for_chunks(l, [&](int64_t at, int count, auto whole) {
    float values[kWide];
    load_group<T, whole.value, kWide>(x + at, 1, count, values);
    for (int k = 0; k < kWide; ++k) {
      const float apart = values[k] - means[k];
      squares[k] = k < count ? squares[k] + apart * apart : squares[k];
    }
  });
  for (int k = 0; k < l.lanes; ++k) parts.add(l, k, {counts[k], means[k], squares[k]});
}

template <typename T>
WIDE_VECTORS FLAT static void line_forward(const Line& l, const NormAct& a, const T* x, T* out) {
  const Lanes<kWide> p = a.parameters.lanes<false, kWide>(l.channel, l.of_channels, l.lanes);
  for_chunks(l, [&](int64_t at, int count, auto whole) {
    forward_group<T, whole.value, kWide>(p, a.kind, x + at, out + at, count);
  });
}

template <typename T>
WIDE_VECTORS FLAT static void line_sums(const Line& l, const NormActBackward& a, const T* x, const T* grad,
                                        Parts<Sums>& parts) {
  const Lanes<kWide> p = a.parameters.lanes<false, kWide>(l.channel, l.of_channels, l.lanes);
  float plain[kWide] = {}, products[kWide] = {};
  for_chunks(l, [&](int64_t at, int count, auto whole) {
    float apart[kWide], z[kWide];
    gradient_group<T, whole.value, kWide>(p, a.kind, x + at, grad + at, count, apart, z);
    for (int k = 0; k < kWide; ++k) {
      plain[k] = k < count ? plain[k] + z[k] : plain[k];
      products[k] = k < count ? products[k] + z[k] * apart[k] : products[k];
    }
  });
  for (int k = 0; k < l.lanes; ++k) parts.add(l, k, {plain[k], products[k]});
}

template <typename T>
WIDE_VECTORS FLAT static void line_input(const Line& l, const NormActBackward& a, const T* x, const T* grad, T* dx) {
  const Parameters& from = a.parameters;
  const Lanes<kWide> p = from.lanes<false, kWide>(l.channel, l.of_channels, l.lanes);
  const Means<kWide> means = from.means<false, kWide>(a.gradients, a.share, l.channel, l.of_channels, l.lanes);
  for_chunks(l, [&](int64_t at, int count, auto whole) {
    input_group<T, whole.value, kWide>(p, means, a.kind, x + at, grad + at, dx + at, count);
  });
}

static std::tuple<Tensor, Tensor, Tensor> norm_act(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   const std::optional<Tensor>& running_mean,
                                                   const std::optional<Tensor>& running_variance, double momentum,
                                                   double eps, int64_t activation) {
  const NormAct a(x, weight, bias, running_mean, running_variance, momentum, eps, activation);
  const Lines lines(a.places);
  for_floating(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.data_ptr());
    T* to = static_cast<T*>(a.out.data_ptr());
    Parts<Moments> parts(lines);
    lines.each([&](const Line& l) { line_moments(l, from, parts); });
    parts.merge(a.statistics);
    lines.each([&](const Line& l) { line_forward(l, a, from, to); });
  });
  return {a.out, a.mean, a.inverse};
}

static std::tuple<Tensor, Tensor, Tensor> norm_act_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                            const Tensor& bias, const Tensor& mean,
                                                            const Tensor& inverse, int64_t activation) {
  const NormActBackward a(grad, x, weight, bias, mean, inverse, activation);
  const Lines lines(a.places);
  for_floating(x, "x", [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.data_ptr());
    const T* upstream = static_cast<const T*>(grad.data_ptr());
    T* to = static_cast<T*>(a.dx.data_ptr());
    Parts<Sums> parts(lines);
    lines.each([&](const Line& l) { line_sums(l, a, from, upstream, parts); });
    parts.merge(a.gradients);
    lines.each([&](const Line& l) { line_input(l, a, from, upstream, to); });
  });
  return {a.dx, a.dweight, a.dbias};
}

}  // namespace detcore

SCHEMAS(m) {
  m.def(
      "norm_act(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_variance, "
      "float momentum, float eps, int activation) -> (Tensor, Tensor, Tensor)");
  m.def(
      "norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor inverse, "
      "int activation) -> (Tensor, Tensor, Tensor)");
}
CPU_OPS(m) {
  m.impl("norm_act", TORCH_BOX(&detcore::norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&detcore::norm_act_backward));
}
