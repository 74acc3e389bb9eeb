#!/bin/sh
# The stable ABI of torch: one binary loads into 2.13 and 2.15, and the same C++ exception arrives as another one in Python.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 2.13.0 2.15.0; do
    python3 -m venv "$version"
    "$version/bin/pip" install --quiet --disable-pip-version-check "torch==$version" numpy==2.4.6
done
cat > kernel.cpp <<'CPP'
#include <stdexcept>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

torch::stable::Tensor checked(const torch::stable::Tensor& rows) {
  if (rows.dim() != 2) {
    throw std::invalid_argument("rows must have two dimensions");
  }
  return rows;
}

STABLE_TORCH_LIBRARY(demo, library) { library.def("checked(Tensor rows) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(demo, CPU, library) { library.impl("checked", TORCH_BOX(&checked)); }
CPP
torch=$(2.13.0/bin/python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
c++ -std=c++20 -shared -fPIC -DTORCH_TARGET_VERSION=0x020b000000000000 "-I$torch/include" kernel.cpp -o kernel.so "-L$torch/lib" -ltorch_cpu
cat > call.py <<'PYTHON'
import torch

torch.ops.load_library("./kernel.so")
assert torch.ops.demo.checked(torch.zeros(3, 2)).shape == (3, 2)
try:
    torch.ops.demo.checked(torch.zeros(3))
except Exception as error:
    print(torch.__version__.split("+")[0], type(error).__name__, str(error).splitlines()[0])
PYTHON
echo "std::invalid_argument of a kernel compiled once, with torch 2.13 for the stable ABI of 2.11:"
for version in 2.13.0 2.15.0; do "$version/bin/python" call.py; done | tee seen
cat > expected <<'TEXT'
2.13.0 ValueError rows must have two dimensions
2.15.0 RuntimeError rows must have two dimensions
TEXT
cmp -s seen expected || { echo "the behaviour has changed"; exit 1; }
