// Batch normalisation by the batch's own statistics and an activation, act((x - mean) * inverse * weight + bias) with
// inverse = 1 / sqrt(variance + eps), and its gradients. Between the two directions x, mean and inverse are kept.
//
// A channel's statistics are made of parts: of each its mean and the squares around it, merged in a fixed order (Chan,
// Golub, LeVeque 1979), so that nothing cancels. x lies in memory as bias_relu.h says. A thread has 8 channels of some
// places, or one where 16 bytes can't be read at once; on a CPU there are more at once.
#pragma once

#include "activation.h"

namespace detcore {

// Statistics of kWidth channels, of equally many values each: how many, then their means, then the sums of the squares
// of their distances from it.
template <typename Real, int kWidth>
struct Moments {
  static constexpr int kValues = 1 + 2 * kWidth;
  Real at[kValues];

  HOST_DEVICE void add(const Moments& other) {
    if (other.at[0] == Real(0)) return;
    const Real all = at[0] + other.at[0], share = other.at[0] / all, between = at[0] * share;
    UNROLL for (int k = 1; k <= kWidth; ++k) {
      const Real apart = other.at[k] - at[k];
      at[k] += apart * share;
      at[k + kWidth] += other.at[k + kWidth] + apart * apart * between;
    }
    at[0] = all;
  }
};

// Sums over the batch for kWidth channels, of the gradients g of what the activation takes, then of g * (x - mean).
template <typename Real, int kWidth>
struct Sums {
  static constexpr int kValues = 2 * kWidth;
  Real at[kValues];

  HOST_DEVICE void add(const Sums& other) { UNROLL for (int v = 0; v < kValues; ++v) at[v] += other.at[v]; }
};

// A part of one channel in double.
template <template <typename, int> typename Kind>
HOST_DEVICE Kind<double, 1> widened(const Kind<float, 1>& part) {
  Kind<double, 1> wide;
  for (int v = 0; v < wide.kValues; ++v) wide.at[v] = part.at[v];
  return wide;
}

// Where a channel's statistics go.
struct Statistics {
  float *mean, *inverse;
  float *running_mean, *running_variance;  // null where none are kept
  double momentum, eps;

  HOST_DEVICE void write(int64_t channel, const Moments<double, 1>& m) const {
    const double count = m.at[0];
    mean[channel] = static_cast<float>(m.at[1]);
    inverse[channel] = static_cast<float>(1.0 / sqrt(m.at[2] / count + eps));
    if (!running_mean) return;
    const double unbiased = m.at[2] / (count - 1.0), kept = 1.0 - momentum;
    running_mean[channel] = static_cast<float>(kept * running_mean[channel] + momentum * m.at[1]);
    running_variance[channel] = static_cast<float>(kept * running_variance[channel] + momentum * unbiased);
  }
};

// The gradients of a channel's weight and bias, from the sums.
struct ParameterGradients {
  const float* inverse;
  float *weight, *bias;

  HOST_DEVICE void write(int64_t channel, const Sums<double, 1>& s) const {
    bias[channel] = static_cast<float>(s.at[0]);
    weight[channel] = static_cast<float>(s.at[1] * inverse[channel]);
  }
};

// z = (x - mean) * scale + bias, for kWidth values.
template <int kWidth>
struct Lanes {
  float mean[kWidth], scale[kWidth], bias[kWidth];

  HOST_DEVICE void normalise(const float* x, float* apart, float* z) const {
    UNROLL for (int k = 0; k < kWidth; ++k) {
      apart[k] = x[k] - mean[k];
      z[k] = apart[k] * scale[k] + bias[k];
    }
  }
};

// What the means over the batch take from the gradient of x: flat + (x - mean) * tilt.
template <int kWidth>
struct Means {
  float flat[kWidth], tilt[kWidth];
};

struct Parameters {
  const float *mean, *inverse, *weight, *bias;

  // Of `count` channels `step` apart; step 0: all are one. kWhole: as for load_group.
  template <bool kWhole, int kWidth>
  HOST_DEVICE Lanes<kWidth> lanes(int64_t channel, int step, int count) const {
    Lanes<kWidth> to;
    float factor[kWidth];
    load_group<float, kWhole, kWidth>(mean + channel, step, count, to.mean);
    load_group<float, kWhole, kWidth>(inverse + channel, step, count, to.scale);
    load_group<float, kWhole, kWidth>(weight + channel, step, count, factor);
    load_group<float, kWhole, kWidth>(bias + channel, step, count, to.bias);
    UNROLL for (int k = 0; k < kWidth; ++k) to.scale[k] *= factor[k];
    return to;
  }

  // share: of a value in the means.
  template <bool kWhole, int kWidth>
  HOST_DEVICE Means<kWidth> means(const ParameterGradients& of, float share, int64_t channel, int step,
                                  int count) const {
    Means<kWidth> to;
    float factor[kWidth];
    load_group<float, kWhole, kWidth>(of.bias + channel, step, count, to.flat);
    load_group<float, kWhole, kWidth>(of.weight + channel, step, count, to.tilt);
    load_group<float, kWhole, kWidth>(inverse + channel, step, count, factor);
    UNROLL for (int k = 0; k < kWidth; ++k) {
      to.flat[k] *= share;
      to.tilt[k] *= factor[k] * share;
    }
    return to;
  }
};

template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void forward_group(const Lanes<kWidth>& p, Activation kind, const T* x, T* out, int count) {
  float values[kWidth], apart[kWidth], z[kWidth];
  load_group<T, kWhole, kWidth>(x, 1, count, values);
  p.normalise(values, apart, z);
  activate<kWidth>(kind, z);
  store_group<T, kWhole, kWidth>(z, out, 1, count);
}

// x - mean, and the gradient of what the activation takes.
template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void gradient_group(const Lanes<kWidth>& p, Activation kind, const T* x, const T* grad, int count,
                                float* apart, float* z) {
  float values[kWidth], gradient[kWidth];
  load_group<T, kWhole, kWidth>(x, 1, count, values);
  load_group<T, kWhole, kWidth>(grad, 1, count, gradient);
  p.normalise(values, apart, z);
  differentiate<kWidth>(kind, gradient, z);
}

// The gradient of x.
template <typename T, bool kWhole, int kWidth>
HOST_DEVICE void input_group(const Lanes<kWidth>& p, const Means<kWidth>& means, Activation kind, const T* x,
                             const T* grad, T* dx, int count) {
  float apart[kWidth], z[kWidth];
  gradient_group<T, kWhole, kWidth>(p, kind, x, grad, count, apart, z);
  UNROLL for (int k = 0; k < kWidth; ++k) z[k] = (z[k] - means.flat[k] - apart[k] * means.tilt[k]) * p.scale[k];
  store_group<T, kWhole, kWidth>(z, dx, 1, count);
}

inline Tensor floats(int64_t count, const Tensor& like) {
  return torch::stable::empty({count}, ScalarType::Float, std::nullopt, like.device());
}

// A float32 value for each channel.
inline float* of_channels(const Tensor& t, const Places& p, const char* what) {
  check(t.scalar_type() == ScalarType::Float && t.numel() == p.channels && t.is_contiguous(), what);
  return static_cast<float*>(t.data_ptr());
}

// The arguments of both implementations, checked.
struct NormAct {
  Places places;
  Tensor out, mean, inverse;
  Activation kind;
  Parameters parameters;
  Statistics statistics;

  NormAct(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& running_mean,
          const std::optional<Tensor>& running_variance, double momentum, double eps, int64_t activation)
      : places(x),
        out(torch::stable::empty_like(x)),
        mean(floats(places.channels, x)),
        inverse(floats(places.channels, x)),
        kind(activation_of(activation)) {
    check(places.channels > 0 && places.numel / places.channels > 1, "x must have more than one value a channel");
    check(running_mean.has_value() == running_variance.has_value(), "running mean and variance come together");
    float* means = static_cast<float*>(mean.data_ptr());
    float* inverses = static_cast<float*>(inverse.data_ptr());
    parameters = {means, inverses, of_channels(weight, places, "weight must be float32, one a channel"),
                  of_channels(bias, places, "bias must be float32, one a channel")};
    statistics = {means, inverses, nullptr, nullptr, momentum, eps};
    if (!running_mean) return;
    statistics.running_mean = of_channels(*running_mean, places, "the running mean must be float32, one a channel");
    statistics.running_variance =
        of_channels(*running_variance, places, "the running variance must be float32, one a channel");
  }
};

// Arguments of the gradient, checked.
struct NormActBackward {
  Places places;
  Tensor dx, dweight, dbias;
  Activation kind;
  Parameters parameters;
  ParameterGradients gradients;
  float share;  // of a value in the means

  NormActBackward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                  const Tensor& inverse, int64_t activation)
      : places(x),
        dx(torch::stable::empty_like(x)),
        dweight(floats(places.channels, x)),
        dbias(floats(places.channels, x)),
        kind(activation_of(activation)) {
    check_like(x, grad, "the gradient must be like x", "the gradient must have the shape and layout of x");
    check(places.numel > 0, "x must have values");
    parameters = {of_channels(mean, places, "mean must be float32, one a channel"),
                  of_channels(inverse, places, "inverse must be float32, one a channel"),
                  of_channels(weight, places, "weight must be float32, one a channel"),
                  of_channels(bias, places, "bias must be float32, one a channel")};
    gradients = {parameters.inverse, static_cast<float*>(dweight.data_ptr()), static_cast<float*>(dbias.data_ptr())};
    share = 1.0f / static_cast<float>(places.numel / places.channels);
  }
};

}  // namespace detcore
