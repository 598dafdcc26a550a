// What every kernel of this project shares: scalar types, checks, 16-byte accesses, launching, registration.
//
// A kernel's arithmetic stands in HOST_DEVICE functions of a header. <op>_gpu.cu calls them from the CUDA kernel,
// <op>_cpu.cpp from a loop on the CPU. OPS is the name of the library, defined by setup.py.
// With EMULATED_GPU (tests/emulation) a .cu file is compiled by the host compiler and its kernels run thread by thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(EMULATED_GPU)
#include "emulated_gpu.h"
#define HOST_DEVICE inline
#else
#define HOST_DEVICE inline
#endif

namespace detcore {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 16 bytes of T, read and written by one instruction on the GPU.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

inline void check(bool right, const char* what) { STD_TORCH_CHECK(right, what); }

// The layout in which the kernels index a tensor as one row-major array.
inline const Tensor& contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  return t;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with a value of the tensor's floating type; f is a lambda with one `auto` parameter.
template <typename F>
void for_floating(const Tensor& t, const char* name, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Half:
      return f(Half());
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

#if defined(__CUDACC__)

// Makes the tensor's GPU the current one while in scope, and gives the stream to launch on.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    const int index = t.get_device_index();
    check(cudaGetDevice(&before_) == cudaSuccess && cudaSetDevice(index) == cudaSuccess, "the GPU can't be selected");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  // kernel<<<blocks, threads>>>(arguments...); nothing to do when there are no blocks.
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) const {
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "a launch of ", blocks, " blocks is too large");
    if (blocks > 0) {
      kernel<<<static_cast<unsigned>(blocks), threads, 0, stream_>>>(static_cast<Parameters>(arguments)...);
    }
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA launch failed: ", cudaGetErrorString(error));
  }

 private:
  int before_ = 0;
  cudaStream_t stream_ = nullptr;
};

#endif

}  // namespace detcore

// Registration: SCHEMAS(m) { m.def("op(Tensor x) -> Tensor"); } and CPU_OPS(m) in <op>_cpu.cpp, GPU_OPS(m) in
// <op>_gpu.cu, each with m.impl("op", TORCH_BOX(&function)). torch's macros turn the library's name into text before
// OPS is replaced; the macros between replace it first.
#define DETCORE_SCHEMAS(ops, m) STABLE_TORCH_LIBRARY_FRAGMENT(ops, m)
#define DETCORE_IMPLEMENTATIONS(ops, key, m) STABLE_TORCH_LIBRARY_IMPL(ops, key, m)
#define SCHEMAS(m) DETCORE_SCHEMAS(OPS, m)
#if defined(EMULATED_GPU)
#define GPU_OPS(m) DETCORE_IMPLEMENTATIONS(OPS, CPU, m)
#define CPU_OPS(m) \
  [[maybe_unused]] static void C10_CONCATENATE(unused_, __LINE__)(torch::stable::detail::StableLibrary & m)
#else
#define GPU_OPS(m) DETCORE_IMPLEMENTATIONS(OPS, CUDA, m)
#define CPU_OPS(m) DETCORE_IMPLEMENTATIONS(OPS, CPU, m)
#endif
