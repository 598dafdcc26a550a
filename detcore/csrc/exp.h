// A fast exponential for losses and scores, the same operations in every program.
#pragma once

#include <cstring>

#include "kernel.h"

namespace detcore {

// exp(x) for x of -87..0; not a number where x is none.
HOST_DEVICE float exp_above_least(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  // 2^n exp(r) with a polynomial for exp(r) (Cephes, expf): plain operations, which become vector instructions.
  const float shift = 12582912.f;  // adding it rounds to an integer, which stands in the lowest bits
  const float shifted = x * 1.44269504f + shift;
  const float n = shifted - shift;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;  // the exponent of 2^n; the bits of `shift` above it fall out
  float power;
  memcpy(&power, &bits, sizeof(power));
  return y * power;
#endif
}

// The least x whose exponential is told from its neighbours' on the CPU.
HOST_DEVICE float at_least(float x) { return x < -87.f ? -87.f : x; }

// exp(x) for x <= 0.
HOST_DEVICE float exp_of_negative(float x) {
#if defined(__CUDA_ARCH__)
  return exp_above_least(x);
#else
  return exp_above_least(at_least(x));
#endif
}

}  // namespace detcore
