// Boxes by their corners, and float operations that no compiler may change: ties are found by equality.
//
// No product may be contracted with a sum: on the GPU the intrinsics say so, for host compilers setup.py does
// (-ffp-contract=off).
#pragma once

#include "kernel.h"

namespace detcore {

struct Corners {
  float x1, y1, x2, y2;
};

HOST_DEVICE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

HOST_DEVICE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// As fminf and fmaxf, in a form that host compilers turn into vector instructions; b where one is not a number.
HOST_DEVICE float smaller(float a, float b) { return a < b ? a : b; }
HOST_DEVICE float larger(float a, float b) { return a > b ? a : b; }

HOST_DEVICE float area(Corners box) { return product(box.x2 - box.x1, box.y2 - box.y1); }

}  // namespace detcore
