// Multiplies a gradient, in place, by what arrives from above divided by the constant that it was kept with.
#pragma once

#include "kernel.h"

namespace detcore {

// The arguments of both implementations, checked.
struct Scale {
  const float* upstream;
  float constant;

  Scale(const Tensor& gradient, const Tensor& upstream_, double constant_)
      : upstream(static_cast<const float*>(contiguous(upstream_, "upstream").data_ptr())),
        constant(static_cast<float>(constant_)) {
    contiguous(gradient, "gradient");
    check(upstream_.scalar_type() == ScalarType::Float && upstream_.numel() == 1, "upstream must be one float32");
  }
};

}  // namespace detcore
