#include "combine.cuh"

#include "kernels.h"
#include "launch.h"
#include "operators.h"

namespace epmoe::cuda {
namespace {

constexpr int64_t kListThreads = 256;

// Lists the rows of each token, in memory that lives as long as this.
struct Listing {
  Tensor count_T, row_TX;
  RowLists lists;

  Listing(const Launcher& launch, const Tensor& token_N, int64_t num_tokens, const Stray& stray)
      : count_T(launch.scratch(token_N, {num_tokens}, ScalarType::Long)),
        row_TX(launch.scratch(token_N, {num_tokens, kListed}, ScalarType::Long)),
        lists{
            token_N.numel(),
            num_tokens,
            token_N.const_data_ptr<int64_t>(),
            reinterpret_cast<unsigned long long*>(count_T.mutable_data_ptr<int64_t>()),
            row_TX.mutable_data_ptr<int64_t>()} {
    launch.zero(count_T);
    launch(&list_rows_kernel, ceil_div(lists.num_rows, kListThreads), kListThreads, lists, stray);
  }
};

int64_t row_bytes(const Tensor& rows_ND) {
  return rows_ND.size(1) * static_cast<int64_t>(rows_ND.element_size());
}

}  // namespace

// By counts of bytes: token-major reads each token once, but needs the lists first. That pays where several rows read
// the same token and the tokens do not all stay in the cache in between.
Tensor permute(const Tensor& x_in, const Tensor& token_in) {
  const Permute given(kDevice, x_in, token_in);
  if (given.rows_ND.numel() == 0) {
    return given.rows_ND;
  }
  const Launcher launch("permute", given.x_TD);
  const void* x = given.x_TD.const_data_ptr();
  void* rows = given.rows_ND.mutable_data_ptr();
  const int64_t bytes = row_bytes(given.x_TD);
  const bool token_major = given.num_rows > given.num_tokens && given.num_tokens * bytes > EPMOE_CACHE_BYTES;
  std::optional<Listing> listing;
  if (token_major) {
    listing.emplace(launch, given.token_N, given.num_tokens, Stray{static_cast<char*>(rows), bytes, nullptr, 0});
  }
  for_vectors(given.x_TD.scalar_type(), given.width, {x, rows}, [&]<class Scalar, int kCount>(int64_t vectors) {
    using Vector = Pack<Scalar, kCount>;
    const auto* from = static_cast<const Vector*>(x);
    auto* to = static_cast<Vector*>(rows);
    if (token_major) {
      launch(&spread_rows_kernel<Vector>, given.num_tokens, row_threads(vectors), listing->lists, vectors, from, to);
    } else {
      launch(
          &gather_rows_kernel<Vector>, given.num_rows, row_threads(vectors), given.num_rows, given.num_tokens, vectors,
          from, given.token_N.const_data_ptr<int64_t>(), to);
    }
  });
  return given.rows_ND;
}

Tensor combine(
    const Tensor& rows_in, const std::optional<Tensor>& weight_in, const Tensor& token_in, int64_t num_tokens) {
  const Combine given(kDevice, rows_in, weight_in, token_in, num_tokens);
  if (given.y_TD.numel() == 0) {
    return given.y_TD;
  }
  const Launcher launch("combine", given.y_TD);
  const Listing listing(launch, given.token_N, num_tokens, Stray{});
  const void* rows = given.rows_ND.const_data_ptr();
  void* y = given.y_TD.mutable_data_ptr();
  for_vectors(given.rows_ND.scalar_type(), given.width, {rows, y}, [&]<class Scalar, int kCount>(int64_t vectors) {
    using Wide = compute_t<Scalar>;
    launch(
        &combine_kernel<Scalar, kCount>, num_tokens, row_threads(vectors), listing.lists, vectors,
        static_cast<const Pack<Scalar, kCount>*>(rows),
        given.weight_N.has_value() ? given.weight_N->const_data_ptr<Wide>() : static_cast<const Wide*>(nullptr),
        static_cast<Pack<Scalar, kCount>*>(y));
  });
  return given.y_TD;
}

std::tuple<Tensor, Tensor> combine_backward(
    const Tensor& d_y_in, const Tensor& rows_in, const Tensor& weight_in, const Tensor& token_in) {
  const CombineBackward given(kDevice, d_y_in, rows_in, weight_in, token_in);
  if (given.num_rows != 0) {
    const Launcher launch("combine_backward", given.rows_ND);
    const void* d_y = given.d_y_TD.const_data_ptr();
    const void* rows = given.rows_ND.const_data_ptr();
    void* d_rows = given.d_rows_ND.mutable_data_ptr();
    const Stray stray{
        static_cast<char*>(d_rows), row_bytes(given.d_rows_ND),
        static_cast<char*>(given.d_weight_N.mutable_data_ptr()),
        static_cast<int64_t>(given.d_weight_N.element_size())};
    const Listing listing(launch, given.token_N, given.num_tokens, stray);
    const auto dtype = given.rows_ND.scalar_type();
    for_vectors(dtype, given.width, {d_y, rows, d_rows}, [&]<class Scalar, int kCount>(int64_t vectors) {
      using Vector = Pack<Scalar, kCount>;
      using Wide = compute_t<Scalar>;
      launch(
          &combine_backward_kernel<Scalar, kCount>, given.num_tokens, row_threads(vectors), listing.lists, vectors,
          static_cast<const Vector*>(d_y), static_cast<const Vector*>(rows), given.weight_N.const_data_ptr<Wide>(),
          static_cast<Vector*>(d_rows), given.d_weight_N.mutable_data_ptr<Wide>());
    });
  }
  return {given.d_rows_ND, torch::stable::to(given.d_weight_N, weight_in.scalar_type())};
}

}  // namespace epmoe::cuda
