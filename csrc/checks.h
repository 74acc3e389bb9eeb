// What every entry checks before it takes a pointer: once, with the numbers in the message. Shared by all devices.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace epmoe {

using torch::headeronly::BFloat16;
using torch::headeronly::DeviceType;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAnySize = -1;
constexpr int64_t kUnfilled = -1;  // in a list of tokens: a row that belongs to none

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// A ValueError in Python, where STD_TORCH_CHECK would be a RuntimeError with a line of this file in front.
#define EPMOE_CHECK(condition, ...)                              \
  if (!(condition)) [[unlikely]] {                               \
    throw std::invalid_argument(::epmoe::message(__VA_ARGS__));  \
  }

template <class Sizes>
std::string in_brackets(const Sizes& sizes) {
  std::ostringstream text;
  const char* separator = "[";
  for (const int64_t size : sizes) {
    text << separator;
    if (size == kAnySize) {
      text << "any";
    } else {
      text << size;
    }
    separator = ", ";
  }
  text << (*separator == '[' ? "[]" : "]");
  return text.str();
}

// The name that PyTorch users know.
inline std::string name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return message(dtype);
  }
}

// The checks of one operator, in the words of epmoe/ops/checks.py. Those of tensors return the tensor in contiguous
// memory.
struct Check {
  const char* op;
  DeviceType device;
  int32_t device_index;  // which one of them; the CPU has no number

  Check(const char* op, DeviceType device, const Tensor& first)
      : op(op), device(device), device_index(first.get_device_index()) {}

  // Any of the four floating dtypes.
  Tensor floating(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    const ScalarType dtype = tensor.scalar_type();
    EPMOE_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
            dtype == ScalarType::Half,
        op, ": ", name, " must be float32, float64, bfloat16 or float16, got ", name_of(dtype));
    return placed(tensor, name, sizes);
  }

  // A dtype that sums and probabilities may have.
  Tensor wide(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    const ScalarType dtype = tensor.scalar_type();
    EPMOE_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::Double,
        op, ": ", name, " must be float32 or float64, got ", name_of(dtype));
    return placed(tensor, name, sizes);
  }

  Tensor of(ScalarType wanted, const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    dtype(wanted, tensor, name);
    return placed(tensor, name, sizes);
  }

  void dtype(ScalarType wanted, const Tensor& tensor, const char* name) const {
    const ScalarType actual = tensor.scalar_type();
    EPMOE_CHECK(actual == wanted, op, ": ", name, " must be ", name_of(wanted), ", got ", name_of(actual));
  }

  Tensor placed(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    shaped(tensor, name, sizes);
    if (tensor.is_contiguous()) {
      return tensor;
    }
    return allocated(
        name, tensor.sizes(), tensor.scalar_type(), [&] { return torch::stable::contiguous(tensor); });
  }

  // Device, sizes and memory only: for what torch itself will read, whatever its strides.
  void shaped(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) const {
    EPMOE_CHECK(
        tensor.device().type() == device && (device == DeviceType::CPU || tensor.get_device_index() == device_index),
        op, ": ", name, " must be on the same device as the other tensors");
    const auto actual = tensor.sizes();
    bool fits = actual.size() == sizes.size();
    for (size_t dim = 0; fits && dim < sizes.size(); ++dim) {
      const int64_t wanted = sizes.begin()[dim];
      fits = wanted == kAnySize || wanted == actual[dim];
    }
    EPMOE_CHECK(
        fits, op, ": ", name, " must have shape ", in_brackets(sizes), ", got ", in_brackets(actual));
    has_memory(tensor, name);
  }

  // A storage can be shrunk under its tensors, which then point beyond its end.
  void has_memory(const Tensor& tensor, const char* name) const {
    if (tensor.numel() == 0) {
      return;
    }
    int64_t last = tensor.storage_offset();
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      last += (tensor.size(dim) - 1) * tensor.stride(dim);
    }
    int64_t bytes = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
    const int64_t held = bytes / static_cast<int64_t>(tensor.element_size());
    EPMOE_CHECK(
        last < held,
        op, ": ", name, " of shape ", in_brackets(tensor.sizes()), " reaches element ", last, " of a storage that holds ",
        held);
  }

  // Memory for a result, not filled.
  Tensor fresh(
      const Tensor& like,
      const char* name,
      std::initializer_list<int64_t> sizes,
      std::optional<ScalarType> dtype = std::nullopt) const {
    return allocated(name, sizes, dtype.value_or(like.scalar_type()), [&] {
      return torch::stable::new_empty(like, sizes, dtype);
    });
  }

  // The stable ABI does not tell why torch could not give memory; at these sizes there is one reason, and the words are
  // torch's own, for those who look for them.
  template <class Sizes, class Allocate>
  Tensor allocated(const char* name, const Sizes& sizes, ScalarType dtype, const Allocate& allocate) const {
    try {
      return allocate();
    } catch (const std::runtime_error&) {
      throw std::runtime_error(message(
          op, ": can't allocate memory for ", name, " of shape ", in_brackets(sizes), " and dtype ", name_of(dtype)));
    }
  }

  void at_least(int64_t least, int64_t value, const char* name) const {
    EPMOE_CHECK(value >= least, op, ": ", name, "=", value, " must be at least ", least);
  }

  void at_most(int64_t most, int64_t value, const char* name) const {
    EPMOE_CHECK(value <= most, op, ": ", name, "=", value, " must be at most ", most);
  }

  // The product of two sizes that are not negative.
  int64_t product(int64_t a, int64_t b, const char* name) const {
    EPMOE_CHECK(
        a == 0 || b <= std::numeric_limits<int64_t>::max() / a, op, ": ", name, "=", a, "*", b, " overflows int64");
    return a * b;
  }
};

// Of host memory: a kernel of another device treats an index out of range as though its entry were not there. One cheap
// pass; the culprit is looked for only when there is one.
inline void check_indices(
    const char* op, const Tensor& indices, int64_t bound, const char* name, int64_t least = 0) {
  const int64_t* values = indices.const_data_ptr<int64_t>();
  const int64_t count = indices.numel();
  bool bad = false;
  for (int64_t i = 0; i < count; ++i) {
    bad |= values[i] < least || values[i] >= bound;
  }
  for (int64_t i = 0; bad && i < count; ++i) {
    EPMOE_CHECK(
        values[i] >= least && values[i] < bound,
        op, ": ", name, "[", i, "]=", values[i], " must be in [", least, ", ", bound, ")");
  }
}

// The dtype of sums and weights: at least float32.
template <class Scalar>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class Scalar>
using compute_t = typename Compute<Scalar>::type;

// Flags as bytes: a bool tensor can hold others than 0 and 1, which C++ may not read as bool.
inline const uint8_t* flags_of(const Tensor& tensor) {
  return static_cast<const uint8_t*>(tensor.const_data_ptr());
}

inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body.operator()<Scalar>() with the C++ type of a checked dtype.
template <class Body>
void for_floating(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Float) {
    body.template operator()<float>();
  } else if (dtype == ScalarType::Double) {
    body.template operator()<double>();
  } else if (dtype == ScalarType::BFloat16) {
    body.template operator()<BFloat16>();
  } else {
    body.template operator()<Half>();
  }
}

template <class Body>
void for_wide(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::Float) {
    body.template operator()<float>();
  } else {
    body.template operator()<double>();
  }
}

}  // namespace epmoe
