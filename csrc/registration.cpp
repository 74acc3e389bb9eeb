// Gives the operators that epmoe/ops/registration.py defines their native kernels, and Python a module to import.
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "kernels.h"

STABLE_TORCH_LIBRARY_IMPL(epmoe, CPU, library) {
  library.impl("route_topk", TORCH_BOX(&epmoe::cpu::route_topk));
  library.impl("route_topk_backward", TORCH_BOX(&epmoe::cpu::route_topk_backward));
  library.impl("assign_slots", TORCH_BOX(&epmoe::cpu::assign_slots));
  library.impl("permute", TORCH_BOX(&epmoe::cpu::permute));
  library.impl("uniform", TORCH_BOX(&epmoe::cpu::uniform));
  library.impl("combine", TORCH_BOX(&epmoe::cpu::combine));
  library.impl("combine_backward", TORCH_BOX(&epmoe::cpu::combine_backward));
  library.impl("expert_ffn", TORCH_BOX(&epmoe::cpu::expert_ffn));
  library.impl("expert_ffn_backward", TORCH_BOX(&epmoe::cpu::expert_ffn_backward));
}

#ifdef EPMOE_CUDA
STABLE_TORCH_LIBRARY_IMPL(epmoe, CUDA, library) {
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
#else
#define EPMOE_CUDA ""
#endif

// Importing the module is what registers the kernels; all it holds is the torch it was built with, and the CUDA
// architectures it has kernels for.
extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && (PyModule_AddStringConstant(module, "torch_version", EPMOE_TORCH_VERSION) < 0 ||
                            PyModule_AddStringConstant(module, "cuda_architectures", EPMOE_CUDA) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
