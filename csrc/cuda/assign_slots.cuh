// A stable counting sort in list order without atomics. The list is cut into tiles, each walked by one warp:
//
//   rank    each entry's place among the entries of its bin in its tile; how many a tile has of each bin
//   scan    for each bin, how many the tiles before have; the sum is the demand
//   place   the sum of both is the slot
#pragma once

#include "operators.h"
#include "warp.cuh"

namespace epmoe::cuda {

struct SlotPointers {
  int64_t num_entries;
  const int64_t* expert_A;
  const int64_t* group_A;
  const bool* active_A;
  int64_t num_groups;
  int64_t num_experts;
  int64_t capacity;
  int64_t tile_size;
  int64_t num_tiles;
  int64_t* count_BT;  // by bin (group and expert) and tile; zero at first
  int64_t* slot_A;
  int64_t* demand_B;

  // -1 for an entry that takes no slot: inactive, or out of range.
  __device__ int64_t bin(int64_t a) const {
    const int64_t expert = expert_A[a];
    const int64_t group = group_A[a];
    const bool known = expert >= 0 && expert < num_experts && group >= 0 && group < num_groups;
    return active_A[a] && known ? group * num_experts + expert : -1;
  }
};

static __global__ void rank_kernel(SlotPointers data) {
  const int lane = lane_id();
  for (int64_t tile = warp_id(); tile < data.num_tiles; tile += num_warps()) {
    const int64_t begin = tile * data.tile_size;
    const int64_t end = begin + data.tile_size < data.num_entries ? begin + data.tile_size : data.num_entries;
    for (int64_t base = begin; base < end; base += kWarp) {
      const int64_t a = base + lane;
      const int64_t bin = a < end ? data.bin(a) : -1;
      const unsigned peers = __match_any_sync(kAllLanes, static_cast<unsigned long long>(bin));
      int64_t* count = data.count_BT + bin * data.num_tiles + tile;
      const int64_t before = bin >= 0 ? *count : 0;
      __syncwarp();  // all have read before one writes
      if (bin >= 0 && (peers & lanes_below(lane)) == 0) {
        *count = before + __popc(peers);
      }
      if (a < end) {
        data.slot_A[a] = bin >= 0 ? before + __popc(peers & lanes_below(lane)) : -1;
      }
      __syncwarp();  // and it is written before anybody reads it again
    }
  }
}

static __global__ void scan_kernel(SlotPointers data) {
  const int lane = lane_id();
  const int64_t num_bins = data.num_groups * data.num_experts;
  for (int64_t bin = warp_id(); bin < num_bins; bin += num_warps()) {
    int64_t* count_T = data.count_BT + bin * data.num_tiles;
    int64_t total = 0;
    for (int64_t base = 0; base < data.num_tiles; base += kWarp) {
      const int64_t tile = base + lane;
      const int64_t own = tile < data.num_tiles ? count_T[tile] : 0;
      int64_t inclusive = own;
      for (int step = 1; step < kWarp; step *= 2) {
        const int64_t lower = __shfl_up_sync(kAllLanes, inclusive, step);
        inclusive += lane >= step ? lower : 0;
      }
      if (tile < data.num_tiles) {
        count_T[tile] = total + inclusive - own;
      }
      total += __shfl_sync(kAllLanes, inclusive, kWarp - 1);
    }
    if (lane == 0) {
      data.demand_B[bin] = total;
    }
  }
}

static __global__ void place_kernel(SlotPointers data) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t a = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; a < data.num_entries; a += stride) {
    const int64_t rank = data.slot_A[a];
    if (rank >= 0) {
      const int64_t slot = data.count_BT[data.bin(a) * data.num_tiles + a / data.tile_size] + rank;
      data.slot_A[a] = data.capacity == kDropless || slot < data.capacity ? slot : -1;
    }
  }
}

}  // namespace epmoe::cuda
