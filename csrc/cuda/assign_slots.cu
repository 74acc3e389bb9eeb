#include "assign_slots.cuh"

#include "kernels.h"
#include "launch.h"

namespace epmoe::cuda {
namespace {

constexpr int64_t kSlotThreads = 128;
constexpr int64_t kWarpsPerBlock = kSlotThreads / kWarp;
constexpr int64_t kTile = 256;                      // short enough for many warps on an ordinary list
constexpr int64_t kMostCounts = EPMOE_MOST_COUNTS;  // 16 MiB; with more bins the tiles are longer and fewer

}  // namespace

std::tuple<Tensor, Tensor> assign_slots(
    const Tensor& expert_in,
    const Tensor& group_in,
    const Tensor& active_in,
    int64_t num_groups,
    int64_t num_experts,
    int64_t capacity) {
  const AssignSlots given(kDevice, expert_in, group_in, active_in, num_groups, num_experts, capacity);
  const int64_t num_entries = given.expert_A.numel();
  const int64_t num_bins = num_groups * num_experts;
  if (num_entries == 0 && num_bins == 0) {
    return {given.slot_A, given.demand_GE};
  }
  const Launcher launch("assign_slots", given.expert_A);
  if (num_entries == 0) {
    launch.zero(given.demand_GE);
    return {given.slot_A, given.demand_GE};
  }
  const int64_t most_tiles = std::max<int64_t>(kMostCounts / std::max<int64_t>(num_bins, 1), 1);
  const int64_t tile_size = std::max(kTile, ceil_div(ceil_div(num_entries, most_tiles), kWarp) * kWarp);
  const int64_t num_tiles = ceil_div(num_entries, tile_size);
  const Tensor count_BT = launch.scratch(given.expert_A, {num_bins, num_tiles}, ScalarType::Long);
  launch.zero(count_BT);
  const SlotPointers data{
      num_entries,
      given.expert_A.const_data_ptr<int64_t>(),
      given.group_A.const_data_ptr<int64_t>(),
      given.active_A.const_data_ptr<bool>(),
      num_groups,
      num_experts,
      capacity,
      tile_size,
      num_tiles,
      count_BT.mutable_data_ptr<int64_t>(),
      given.slot_A.mutable_data_ptr<int64_t>(),
      given.demand_GE.mutable_data_ptr<int64_t>()};
  launch(&rank_kernel, ceil_div(num_tiles, kWarpsPerBlock), kSlotThreads, data);
  launch(&scan_kernel, ceil_div(num_bins, kWarpsPerBlock), kSlotThreads, data);
  launch(&place_kernel, ceil_div(num_entries, kSlotThreads), kSlotThreads, data);
  return {given.slot_A, given.demand_GE};
}

}  // namespace epmoe::cuda
