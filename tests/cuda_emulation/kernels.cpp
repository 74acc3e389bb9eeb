// csrc/cuda as it is, compiled for host memory and registered as epmoe_emulated.
#define EPMOE_EMULATED
#define EPMOE_KERNEL_DEVICE CPU
#define EPMOE_MAX_BLOCKS int64_t{7}
#define EPMOE_MOST_COUNTS int64_t{1024}
#define EPMOE_CACHE_BYTES int64_t{2048}

#include <torch/csrc/stable/library.h>

#include "cuda/route_topk.cu"
#include "cuda/assign_slots.cu"
#include "cuda/combine.cu"
#include "cuda/activate.cu"
#include "cuda/uniform.cu"

extern "C" {
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
}

STABLE_TORCH_LIBRARY_IMPL(epmoe_emulated, CPU, library) {
  library.impl("route_topk", TORCH_BOX(&epmoe::cuda::route_topk));
  library.impl("route_topk_backward", TORCH_BOX(&epmoe::cuda::route_topk_backward));
  library.impl("assign_slots", TORCH_BOX(&epmoe::cuda::assign_slots));
  library.impl("permute", TORCH_BOX(&epmoe::cuda::permute));
  library.impl("uniform", TORCH_BOX(&epmoe::cuda::uniform));
  library.impl("combine", TORCH_BOX(&epmoe::cuda::combine));
  library.impl("combine_backward", TORCH_BOX(&epmoe::cuda::combine_backward));
  library.impl("activate", TORCH_BOX(&epmoe::cuda::activate));
  library.impl("activate_backward", TORCH_BOX(&epmoe::cuda::activate_backward));
}
