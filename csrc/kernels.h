// The native kernels by device. Their meaning is epmoe/ops/reference.py, function by function.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"

namespace epmoe::cpu {
// permute has no kernel here: torch's index_select copies rows at the speed of memcpy, in the same threads.
#include "signatures.inc"
}  // namespace epmoe::cpu

namespace epmoe::cuda {
#include "signatures.inc"
Tensor permute(const Tensor& x_TD, const Tensor& token_N);
}  // namespace epmoe::cuda
