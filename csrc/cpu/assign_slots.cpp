#include "kernels.h"
#include "operators.h"

namespace epmoe::cpu {

// A stable counting sort needs one look at each entry: its slot is how many came before it. One thread: entries
// are few (tokens times top_k integers), and waking others costs more than the walk.
std::tuple<Tensor, Tensor> assign_slots(
    const Tensor& expert_in,
    const Tensor& group_in,
    const Tensor& active_in,
    int64_t num_groups,
    int64_t num_experts,
    int64_t capacity) {
  AssignSlots given(DeviceType::CPU, expert_in, group_in, active_in, num_groups, num_experts, capacity);
  torch::stable::zero_(given.demand_GE);
  const int64_t* expert = given.expert_A.const_data_ptr<int64_t>();
  const int64_t* group = given.group_A.const_data_ptr<int64_t>();
  const uint8_t* active = flags_of(given.active_A);
  int64_t* slot = given.slot_A.mutable_data_ptr<int64_t>();
  int64_t* demand = given.demand_GE.mutable_data_ptr<int64_t>();
  const int64_t num_entries = given.expert_A.numel();
  for (int64_t a = 0; a < num_entries; ++a) {
    slot[a] = -1;
    if (!active[a]) {
      continue;
    }
    EPMOE_CHECK(
        expert[a] >= 0 && expert[a] < num_experts,
        "assign_slots: expert[", a, "]=", expert[a], " must be in [0, ", num_experts, ")");
    EPMOE_CHECK(
        group[a] >= 0 && group[a] < num_groups,
        "assign_slots: group[", a, "]=", group[a], " must be in [0, ", num_groups, ")");
    const int64_t before = demand[group[a] * num_experts + expert[a]]++;
    if (capacity == kDropless || before < capacity) {
      slot[a] = before;
    }
  }
  return {given.slot_A, given.demand_GE};
}

}  // namespace epmoe::cpu
