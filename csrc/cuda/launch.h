// How a kernel is started: on the current stream of a tensor's device, with its error looked at, never waiting.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "checks.h"

// Tests change these: to run the same code in host memory, and to reach long loops with short inputs.
#ifndef EPMOE_EMULATED
#define EPMOE_KERNEL_DEVICE CUDA
#define EPMOE_MAX_BLOCKS (int64_t{1} << 16)
#define EPMOE_MOST_COUNTS (int64_t{1} << 21)
#define EPMOE_CACHE_BYTES (int64_t{1} << 25)
#endif

namespace epmoe::cuda {

constexpr DeviceType kDevice = DeviceType::EPMOE_KERNEL_DEVICE;
constexpr int64_t kMaxBlocks = EPMOE_MAX_BLOCKS;  // every kernel walks on with the stride of the grid

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Makes a tensor's device the current one while it lives, and launches on that device's current stream.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& on) : op_(op) {
    const int32_t index = on.get_device_index();
    expect(aoti_torch_create_cuda_guard(index, &guard_) == 0, "no device guard");
    void* stream = nullptr;
    const bool found = aoti_torch_get_current_cuda_stream(index, &stream) == 0;
    if (!found) {
      aoti_torch_delete_cuda_guard(guard_);
    }
    expect(found, "no current stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;
  ~Launcher() { aoti_torch_delete_cuda_guard(guard_); }

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int64_t threads, Arguments... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::clamp(blocks, int64_t{1}, kMaxBlocks)));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    succeed(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }

  void zero(const Tensor& tensor) const {
    const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
    if (bytes != 0) {
      succeed(cudaMemsetAsync(tensor.mutable_data_ptr(), 0, bytes, stream_));
    }
  }

  // Memory that only this operator uses. Freed in stream order: no wait.
  Tensor scratch(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    return Check(op_, kDevice, like).fresh(like, "scratch", sizes, dtype);
  }

 private:
  void succeed(cudaError_t error) const {
    if (error != cudaSuccess) [[unlikely]] {
      cudaGetLastError();  // so that nobody else finds it
      expect(false, cudaGetErrorString(error));
    }
  }

  void expect(bool condition, const char* reason) const {
    if (!condition) [[unlikely]] {
      throw std::runtime_error(message(op_, ": CUDA: ", reason));
    }
  }

  const char* op_;
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

}  // namespace epmoe::cuda
