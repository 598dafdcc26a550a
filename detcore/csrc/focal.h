// Sigmoid focal loss and its derivative, with gamma 2 from one exponential.
#pragma once

#include <optional>

#include "exp.h"
#include "targets.h"

namespace detcore {

struct Term {
  float loss, gradient;
};

HOST_DEVICE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

// a * b + c: one instruction on GPUs, where the kernel's arithmetic takes as long as its memory and would be 1.4 times
// as much with both apart. Apart on CPUs, not all of which have it; exponential and reciprocal differ there anyway.
HOST_DEVICE float madd(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

// log(1 + x) for x in 0..1: x times the polynomial with the least relative error, 3e-8.
HOST_DEVICE float log_1_plus(float x) {
  float y = 0.005232690833508968f;
  y = madd(y, x, -0.029505228623747826f);
  y = madd(y, x, 0.07822594791650772f);
  y = madd(y, x, -0.13663245737552643f);
  y = madd(y, x, 0.19106008112430573f);
  y = madd(y, x, -0.2484298199415207f);
  y = madd(y, x, 0.3331909775733948f);
  y = madd(y, x, -0.4999949336051941f);
  y = madd(y, x, 0.9999999403953552f);
  return y * x;
}

// p^2 softplus(x) and its derivative p^2 (2 (1 - p) softplus(x) + p), with p = sigmoid(x): times 1 - alpha the loss of
// a logit whose target is 0; of -x, times alpha and -alpha, that of one whose target is 1. The derivative is
// below 1.08.
struct SquaredTerm {
  HOST_DEVICE Term operator()(float x) const {
    const float e = exp_of_negative(-fabsf(x));
    const float d = reciprocal(1.f + e), ed = e * d;
    const float p = x > 0 ? d : ed, q = x > 0 ? ed : d;
    const float softplus = (x > 0 ? x : 0.f) + log_1_plus(e);
    const float square = p * p;
    return {square * softplus, square * madd(2.f * q, softplus, p)};
  }
};

// The same with any gamma and with label smoothing s, half = s / 2: p^gamma c with the cross-entropy of the smoothed
// target, c = softplus(x) - half x, and its derivative p^gamma (gamma (1 - p) c + p - half).
struct PowerTerm {
  float gamma, half;

  HOST_DEVICE Term operator()(float x) const {
    const float e = exp_of_negative(-fabsf(x));
    const float d = reciprocal(1.f + e), ed = e * d;
    const float p = x > 0 ? d : ed, q = x > 0 ? ed : d;
    const float log_1_e = log_1_plus(e);
    const float power = exp_of_negative(gamma * ((x > 0 ? 0.f : x) - log_1_e));  // of log p
    const float entropy = (x > 0 ? x : 0.f) + log_1_e - half * x;
    return {power * entropy, power * madd(gamma * q, entropy, p - half)};
  }
};

// The arguments of both implementations, checked; gradient like logits, loss float32 [], bias_gradient float32 like the
// bias, or [0] without one. A cell's anchors are `per_cell` rows that follow each other, of `columns` logits in all.
struct Focal {
  Targets targets;
  int64_t rows;  // of all images
  int classes;
  Tensor gradient, loss;
  float alpha, gamma, half;  // half the label smoothing
  const float* bias;
  int64_t columns, per_cell;
  Tensor bias_gradient;

  Focal(const Tensor& logits, const Tensor& matched, const Tensor& labels, const Tensor& weight, int64_t first,
        double alpha_, double gamma_, double smoothing, const std::optional<Tensor>& bias_)
      : targets(matched, labels, weight, logits.dim() == 3 ? logits.size(1) : 0, first),
        rows(logits.dim() == 3 ? logits.size(0) * logits.size(1) : 0),
        classes(logits.dim() == 3 ? static_cast<int>(logits.size(2)) : 0),
        gradient(torch::stable::empty_like(contiguous(logits, "logits"))),
        loss(torch::stable::empty({}, ScalarType::Float, std::nullopt, logits.device())),
        alpha(static_cast<float>(alpha_)),
        gamma(static_cast<float>(gamma_)),
        half(static_cast<float>(smoothing / 2)),
        bias(bias_ ? static_cast<const float*>(contiguous(*bias_, "bias").data_ptr()) : nullptr),
        columns(bias_ ? bias_->numel() : classes),
        per_cell(classes > 0 ? columns / classes : 0),
        bias_gradient(torch::stable::empty({bias_ ? columns : 0}, ScalarType::Float, std::nullopt, logits.device())) {
    check(logits.dim() == 3 && logits.size(0) == targets.images, "logits must be [N, R, K]");
    check(logits.size(2) > 0 && logits.size(2) < (1 << 20), "there must be 1 to 2^20 classes");
    check(0 < alpha_ && alpha_ < 1, "alpha must be between 0 and 1");
    check(0 <= gamma_ && gamma_ <= 16, "gamma must be 0 to 16");
    check(0 <= smoothing && smoothing <= 1, "smoothing must be 0 to 1");
    if (bias_) {
      check(bias_->scalar_type() == ScalarType::Float && bias_->dim() == 1 && columns > 0 && columns < (1 << 24) &&
                columns % classes == 0 && targets.rows % per_cell == 0,
            "bias must be float32, one value a class of each anchor of a cell, and R whole cells");
    }
  }

  // What a float16 gradient is multiplied by while it is kept, which would lose the small ones, and not overflow: the
  // derivatives are below 1.08 with gamma to 2, else below 2. As ops/focal.py.
  template <typename T>
  float constant() const {
    if (!std::is_same_v<T, Half>) return 1.f;
    return gamma <= 2 && alpha <= 0.9f && alpha >= 0.1f ? 65536.f : 16384.f;
  }

  // Calls f with what computes a term.
  template <typename F>
  void with_term(F f) const {
    if (gamma == 2 && half == 0) {
      f(SquaredTerm{});
    } else {
      f(PowerTerm{gamma, half});
    }
  }

  int64_t cells() const { return rows / per_cell; }
  float* bias_sums() const { return bias ? static_cast<float*>(bias_gradient.data_ptr()) : nullptr; }
};

}  // namespace detcore
