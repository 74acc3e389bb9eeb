#include "activate.cuh"

#include "kernels.h"
#include "launch.h"
#include "operators.h"
#include "rows.cuh"

namespace epmoe::cuda {
namespace {

// Calls body.operator()<Kind, Scalar, kCount>(vectors per activated row).
template <class Body>
void for_activated_vectors(const Activated& given, std::initializer_list<const void*> addresses, const Body& body) {
  for_vectors(
      given.hidden_RX.scalar_type(), given.width, addresses, [&]<class Scalar, int kCount>(int64_t vectors) {
        if (given.activation == Activation::swiglu) {
          body.template operator()<SwiGLU, Scalar, kCount>(vectors);
        } else if (given.activation == Activation::gelu) {
          body.template operator()<GELU, Scalar, kCount>(vectors);
        } else {
          body.template operator()<ReLU, Scalar, kCount>(vectors);
        }
      });
}

template <class Wide>
const Wide* weights_of(const Activated& given) {
  return given.weight_R.has_value() ? given.weight_R->const_data_ptr<Wide>() : nullptr;
}

}  // namespace

Tensor activate(const Tensor& hidden_in, const std::optional<Tensor>& weight_in, const std::string& kind) {
  const Activate given(Check("activate", kDevice, hidden_in), hidden_in, weight_in, kind);
  if (given.act_RF.numel() == 0) {
    return given.act_RF;
  }
  const Launcher launch("activate", given.act_RF);
  const void* hidden = given.hidden_RX.const_data_ptr();
  void* act = given.act_RF.mutable_data_ptr();
  for_activated_vectors(given, {hidden, act}, [&]<class Kind, class Scalar, int kCount>(int64_t vectors) {
    launch(
        &activate_kernel<Kind, Scalar, kCount>, given.num_rows, row_threads(vectors), given.num_rows, vectors,
        static_cast<const Pack<Scalar, kCount>*>(hidden), weights_of<compute_t<Scalar>>(given),
        static_cast<Pack<Scalar, kCount>*>(act));
  });
  return given.act_RF;
}

std::tuple<Tensor, Tensor, Tensor> activate_backward(
    const Tensor& d_act_in,
    const Tensor& hidden_in,
    const std::optional<Tensor>& weight_in,
    const std::string& kind) {
  const ActivateBackward given(
      Check("activate_backward", kDevice, hidden_in), d_act_in, hidden_in, weight_in, kind);
  if (given.num_rows != 0) {
    const Launcher launch("activate_backward", given.hidden_RX);
    const void* d_act = given.d_act_RF.const_data_ptr();
    const void* hidden = given.hidden_RX.const_data_ptr();
    void* d_hidden = given.d_hidden_RX.mutable_data_ptr();
    void* act = given.act_RF.mutable_data_ptr();
    const auto addresses = {d_act, hidden, static_cast<const void*>(d_hidden), static_cast<const void*>(act)};
    for_activated_vectors(given, addresses, [&]<class Kind, class Scalar, int kCount>(int64_t vectors) {
      using Vector = Pack<Scalar, kCount>;
      using Wide = compute_t<Scalar>;
      launch(
          &activate_backward_kernel<Kind, Scalar, kCount>, given.num_rows, row_threads(vectors), given.num_rows,
          vectors, static_cast<const Vector*>(d_act), static_cast<const Vector*>(hidden), weights_of<Wide>(given),
          static_cast<Vector*>(d_hidden), static_cast<Vector*>(act), given.d_weight_R.mutable_data_ptr<Wide>());
    });
  }
  return {given.d_hidden_RX, given.act_RF, given.d_weight_R};
}

}  // namespace epmoe::cuda
