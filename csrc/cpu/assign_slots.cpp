#include "kernels.h"

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
  constexpr int64_t kDropless = -1;
  const Check check{"assign_slots", DeviceType::CPU};
  const Tensor expert_A = check.of(ScalarType::Long, expert_in, "expert", {kAnySize});
  const int64_t num_entries = expert_A.size(0);
  const Tensor group_A = check.of(ScalarType::Long, group_in, "group", {num_entries});
  const Tensor active_A = check.of(ScalarType::Bool, active_in, "active", {num_entries});
  check.at_least(0, num_groups, "num_groups");
  check.at_least(0, num_experts, "num_experts");
  check.at_least(kDropless, capacity, "capacity");
  check.product(num_groups, num_experts, "num_groups*num_experts");

  Tensor slot_A = check.fresh(expert_A, "slot", {num_entries});
  Tensor demand_GE = check.fresh(expert_A, "demand", {num_groups, num_experts});
  torch::stable::zero_(demand_GE);
  const int64_t* expert = expert_A.const_data_ptr<int64_t>();
  const int64_t* group = group_A.const_data_ptr<int64_t>();
  const uint8_t* active = flags_of(active_A);
  int64_t* slot = slot_A.mutable_data_ptr<int64_t>();
  int64_t* demand = demand_GE.mutable_data_ptr<int64_t>();
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
  return {slot_A, demand_GE};
}

}  // namespace epmoe::cpu
