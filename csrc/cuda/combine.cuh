// Rows on their way: one block per token (or row), one vector of 16 bytes per thread where the rows allow it.
//
// A token's sum has one owner, which takes its rows in ascending order: the same bits in every run. For that a first
// kernel lists the rows of each token. Lists are filled in any order and sorted when they are read.
#pragma once

#include <cstdint>

#include "checks.h"
#include "rows.cuh"
#include "warp.cuh"

namespace epmoe::cuda {

constexpr int64_t kListed = kWarp;  // rows of a token that are listed; a token with more of them looks for all itself
constexpr int kGroup = 2;           // rows a thread has under way at a time

struct RowLists {
  int64_t num_rows;
  int64_t num_tokens;
  const int64_t* token_N;
  unsigned long long* count_T;  // zero at first
  int64_t* row_TX;              // kListed per token
};

// Memory of a row without a token, for which nobody else writes: set to zero. Null where there is none.
struct Stray {
  char* row_N = nullptr;
  int64_t row_bytes = 0;
  char* weight_N = nullptr;
  int64_t weight_bytes = 0;
};

// By all lanes of a warp.
__device__ inline void zero_bytes(char* begin, int64_t count, int lane) {
  using Vector = Pack<int32_t, kVectorBytes / sizeof(int32_t)>;
  const bool in_vectors = (reinterpret_cast<uintptr_t>(begin) | static_cast<uintptr_t>(count)) % kVectorBytes == 0;
  const int64_t size = in_vectors ? kVectorBytes : 1;
  for (int64_t at = lane * size; at < count; at += kWarp * size) {
    if (in_vectors) {
      *reinterpret_cast<Vector*>(begin + at) = Vector{};
    } else {
      begin[at] = 0;
    }
  }
}

static __global__ void list_rows_kernel(RowLists lists, Stray stray) {
  const int lane = lane_id();
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t base = int64_t{blockIdx.x} * blockDim.x + threadIdx.x - lane; base < lists.num_rows; base += stride) {
    const int64_t n = base + lane;
    const int64_t t = n < lists.num_rows ? lists.token_N[n] : 0;
    const bool known = t >= 0 && t < lists.num_tokens;
    if (n < lists.num_rows && known) {
      const unsigned long long place = atomicAdd(lists.count_T + t, 1ull);
      if (place < kListed) {
        lists.row_TX[t * kListed + static_cast<int64_t>(place)] = n;
      }
    }
    unsigned strays = __ballot_sync(kAllLanes, n < lists.num_rows && !known);
    for (; strays != 0; strays &= strays - 1) {
      const int64_t row = base + __ffs(static_cast<int>(strays)) - 1;
      zero_bytes(stray.row_N + row * stray.row_bytes, stray.row_bytes, lane);
      zero_bytes(stray.weight_N + row * stray.weight_bytes, stray.weight_bytes, lane);
    }
  }
}

// Up to kGroup rows, the same in every lane.
struct RowGroup {
  int64_t row[kGroup];
  int count;
};

// The rows of one token, for a whole warp.
class TokenRows {
 public:
  __device__ TokenRows(const RowLists& lists, int64_t t, int lane) : lists_(lists), t_(t), lane_(lane) {
    const unsigned long long count = lists.count_T[t];
    listed_ = count <= kListed;
    if (listed_) {
      const int size = static_cast<int>(count);
      const bool here = lane < size;
      row_ = sorted(here ? lists.row_TX[t * kListed + lane] : 0, size);
      lanes_ = size == kWarp ? kAllLanes : lanes_below(size);
    }
  }

  // body(group) for all of them, ascending.
  template <class Body>
  __device__ void each(const Body& body) const {
    const int64_t end = listed_ ? kWarp : lists_.num_rows;
    for (int64_t base = 0; base < end; base += kWarp) {
      int64_t row = row_;
      unsigned lanes = lanes_;
      if (!listed_) {
        row = base + lane_;
        lanes = __ballot_sync(kAllLanes, row < lists_.num_rows && lists_.token_N[row] == t_);
      }
      while (lanes != 0) {
        body(take_group(row, lanes));
      }
    }
  }

 private:
  // Lane i gets the i-th smallest of the first `size` lanes' numbers, which all differ.
  __device__ int64_t sorted(int64_t number, int size) const {
    int rank = 0;
    for (int lane = 0; lane < size; ++lane) {
      rank += __shfl_sync(kAllLanes, number, lane) < number;
    }
    int64_t result = number;
    for (int lane = 0; lane < size; ++lane) {
      const int place = __shfl_sync(kAllLanes, rank, lane);
      const int64_t candidate = __shfl_sync(kAllLanes, number, lane);
      result = place == lane_ ? candidate : result;
    }
    return result;
  }

  // The next rows of the lanes that have one, which is then struck out.
  __device__ static RowGroup take_group(int64_t row, unsigned& lanes) {
    RowGroup group{{}, 0};
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (lanes != 0) {
        group.row[j] = __shfl_sync(kAllLanes, row, __ffs(static_cast<int>(lanes)) - 1);
        group.count = j + 1;
        lanes &= lanes - 1;
      }
    }
    return group;
  }

  const RowLists& lists_;
  int64_t t_;
  int lane_;
  bool listed_;
  int64_t row_ = 0;
  unsigned lanes_ = 0;
};

// Expert-major: each row reads its token's.
template <class Vector>
__global__ void gather_rows_kernel(
    int64_t num_rows,
    int64_t num_tokens,
    int64_t vectors,
    const Vector* x_TV,
    const int64_t* token_N,
    Vector* rows_NV) {
  for (int64_t n = blockIdx.x; n < num_rows; n += gridDim.x) {
    const int64_t t = token_N[n];
    const bool known = t >= 0 && t < num_tokens;
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      rows_NV[n * vectors + v] = known ? x_TV[t * vectors + v] : Vector{};
    }
  }
}

// Token-major: each token is read once and written to all of its rows.
template <class Vector>
__global__ void spread_rows_kernel(RowLists lists, int64_t vectors, const Vector* x_TV, Vector* rows_NV) {
  const int lane = lane_id();
  for (int64_t t = blockIdx.x; t < lists.num_tokens; t += gridDim.x) {
    const TokenRows rows(lists, t, lane);
    for (int64_t base = threadIdx.x - lane; base < vectors; base += blockDim.x) {
      const int64_t v = base + lane;
      const Vector own = v < vectors ? x_TV[t * vectors + v] : Vector{};
      rows.each([&](const RowGroup& group) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (j < group.count && v < vectors) {
            rows_NV[group.row[j] * vectors + v] = own;
          }
        }
      });
    }
  }
}

template <class Scalar, int kCount>
__global__ void __launch_bounds__(kMaxRowWarps * kWarp, kRowBlocks) combine_kernel(
    RowLists lists,
    int64_t vectors,
    const Pack<Scalar, kCount>* rows_NV,
    const compute_t<Scalar>* weight_N,
    Pack<Scalar, kCount>* y_TV) {
  using Wide = compute_t<Scalar>;
  const int lane = lane_id();
  for (int64_t t = blockIdx.x; t < lists.num_tokens; t += gridDim.x) {
    const TokenRows rows(lists, t, lane);
    for (int64_t base = threadIdx.x - lane; base < vectors; base += blockDim.x) {
      const int64_t v = base + lane;
      Wide sum[kCount] = {};
      rows.each([&](const RowGroup& group) {
        Pack<Scalar, kCount> row[kGroup];
        Wide weight[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {  // all under way before the first is used
          if (j < group.count && v < vectors) {
            row[j] = rows_NV[group.row[j] * vectors + v];
            weight[j] = weight_N == nullptr ? Wide{1} : weight_N[group.row[j]];
          }
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (j < group.count && v < vectors) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              sum[i] += static_cast<Wide>(row[j].at[i]) * weight[j];
            }
          }
        }
      });
      if (v < vectors) {
        Pack<Scalar, kCount> y;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          y.at[i] = static_cast<Scalar>(sum[i]);
        }
        y_TV[t * vectors + v] = y;
      }
    }
  }
}

// d_row = weight * d_y for a group of rows, with d_y read once; returns this thread's share of <d_y, row> in dot.
template <class Scalar, int kCount>
__device__ void scale_and_dot(
    const RowGroup& group,
    int64_t vectors,
    const Pack<Scalar, kCount>* d_y_V,
    const Pack<Scalar, kCount>* rows_NV,
    const compute_t<Scalar>* weight_N,
    Pack<Scalar, kCount>* d_rows_NV,
    compute_t<Scalar> (&dot)[kGroup]) {
  using Wide = compute_t<Scalar>;
  Wide weight[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    weight[j] = j < group.count ? weight_N[group.row[j]] : Wide{0};
  }
  for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
    const Pack<Scalar, kCount> d_y = d_y_V[v];
    Pack<Scalar, kCount> row[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (j < group.count) {
        row[j] = rows_NV[group.row[j] * vectors + v];
      }
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (j < group.count) {
        Pack<Scalar, kCount> d_row;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const Wide upstream = static_cast<Wide>(d_y.at[i]);
          d_row.at[i] = static_cast<Scalar>(upstream * weight[j]);
          dot[j] += upstream * static_cast<Wide>(row[j].at[i]);
        }
        d_rows_NV[group.row[j] * vectors + v] = d_row;
      }
    }
  }
}

template <class Scalar, int kCount>
__global__ void __launch_bounds__(kMaxRowWarps * kWarp, kRowBlocks) combine_backward_kernel(
    RowLists lists,
    int64_t vectors,
    const Pack<Scalar, kCount>* d_y_TV,
    const Pack<Scalar, kCount>* rows_NV,
    const compute_t<Scalar>* weight_N,
    Pack<Scalar, kCount>* d_rows_NV,
    compute_t<Scalar>* d_weight_N) {
  using Wide = compute_t<Scalar>;
  __shared__ Wide dot_of_warp[kMaxRowWarps][kGroup];
  const int lane = lane_id();
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  for (int64_t t = blockIdx.x; t < lists.num_tokens; t += gridDim.x) {
    const TokenRows rows(lists, t, lane);  // the same rows in every warp, so that all of them meet at the barriers
    rows.each([&](const RowGroup& group) {
      Wide dot[kGroup] = {};
      scale_and_dot(group, vectors, d_y_TV + t * vectors, rows_NV, weight_N, d_rows_NV, dot);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        dot[j] = warp_sum(dot[j]);
        if (lane == 0) {
          dot_of_warp[warp][j] = dot[j];
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (warp == 0 && lane == j && j < group.count) {
          Wide sum{0};
          for (int other = 0; other < static_cast<int>(blockDim.x / kWarp); ++other) {
            sum += dot_of_warp[other][j];
          }
          d_weight_N[group.row[j]] = sum;
        }
      }
      __syncthreads();  // the sums are read before the next group's are written
    });
  }
}

}  // namespace epmoe::cuda
