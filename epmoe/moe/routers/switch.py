"""Switch's top-1 router, arXiv:2101.03961 section 2.1."""

from __future__ import annotations

import torch

from epmoe.config_routers import SwitchOptions
from epmoe.moe.routers.common import Choices, as_routing, choose, groups_of, token_order
from epmoe.moe.routers.family import Family
from epmoe.ops import DROPLESS, assign_slots
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: SwitchOptions, top_k: int = 1) -> Routing:
    """One expert per token, weighted by its raw probability (normalised it would be 1 and train nothing).

    With ``attempts`` > 1 a token that finds its expert full goes to its next best one: no token left behind.
    """
    best = choose(inputs, max(top_k, options.attempts), normalize=False)
    if options.attempts == 1:
        return as_routing(inputs, options, best)
    # Losses know nothing of capacity, so importance is that of first choices, before any retry.
    importance_E = best.probs_TE.new_zeros(best.probs_TE.shape[1])
    importance_E = importance_E.index_add(0, best.ids_TK[:, 0], best.weights_TK[:, 0])
    return as_routing(inputs, options, _until_there_is_room(inputs, options, best), importance_E=importance_E)


def _until_there_is_room(inputs: RouterInputs, options: SwitchOptions, choices: Choices) -> Choices:
    """Choice i is active where the choices before it found no slot.

    The paper's appendix B: attempt i of all tokens comes after attempt i-1 of all, counters go on. The planner, which
    takes the list in the same order, gives the same slots again.
    """
    num_tokens, num_experts = choices.probs_TE.shape
    num_groups, group_size = groups_of(inputs)
    order_T = token_order(inputs, options, choices.probs_TE)
    if order_T is None:
        order_T = torch.arange(num_tokens, device=choices.ids_TK.device)
    group_T = order_T // max(group_size, 1)
    ids_TK, usable_TK = choices.ids_TK[order_T], choices.active_TK[order_T]
    full_GE = torch.zeros(num_groups, num_experts, dtype=torch.int64, device=order_T.device)
    waiting_T = torch.ones_like(usable_TK[:, 0])
    tried = []
    for attempt in range(options.attempts):
        expert_T = ids_TK[:, attempt]
        trying_T = waiting_T & usable_TK[:, attempt]
        slot_T, demand_GE = assign_slots(expert_T, group_T, trying_T, num_groups, num_experts, DROPLESS)
        slot_T = slot_T + full_GE[group_T, expert_T]
        if inputs.capacity != DROPLESS:
            waiting_T = waiting_T & ~(trying_T & (slot_T < inputs.capacity))
        else:
            waiting_T = waiting_T & ~trying_T
        full_GE = full_GE + demand_GE
        tried.append(trying_T)
    active_TK = torch.empty_like(usable_TK).index_copy(0, order_T, torch.stack(tried, dim=1))
    return Choices(
        probs_TE=choices.probs_TE,
        ids_TK=choices.ids_TK,
        weights_TK=choices.weights_TK * active_TK,
        active_TK=active_TK,
    )


FAMILY = Family(route=route)
