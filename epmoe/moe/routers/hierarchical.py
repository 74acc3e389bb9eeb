"""Two levels of noisy top-k, groups and then experts inside them: arXiv:1701.06538 appendix B."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from epmoe.config_routers import HierarchicalOptions
from epmoe.moe.routers.common import Choices, as_routing, choose, drawn_normal, numbers_given
from epmoe.moe.routers.family import Family, RouterTensor, zeros
from epmoe.moe.routers.noisy_topk import win_probability
from epmoe.moe.routers.topk import normalizes
from epmoe.ops import philox, route_topk
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: HierarchicalOptions, top_k: int) -> Routing:
    """The best groups, and the best experts inside each; a weight is the group's gate times the expert's.

    Experts of a group are consecutive. ``probs_TE`` is the group's probability times the expert's inside it;
    ``logits_TE``, from which the z-loss is made, is the sum of both logits.
    """
    groups = inputs.group_logits_TP
    assert groups is not None  # a part of the family
    num_groups, kept = groups.shape[1], options.groups_per_token
    num_tokens, num_experts = inputs.logits_TE.shape
    size, inside = num_experts // num_groups, top_k // kept
    scale_TE = F.softplus(_present(inputs.noise_logits_TE)) + options.noise_floor
    scale_TP = F.softplus(_present(inputs.group_noise_logits_TP)) + options.noise_floor
    clean_TPJ = inputs.logits_TE.view(num_tokens, num_groups, size)
    # A group without an available expert is not available; one with a broken logit breaks the token.
    closed_TP = (clean_TPJ == -torch.inf).all(-1)
    broken_T1 = (clean_TPJ.isnan() | (clean_TPJ == torch.inf)).any(-1).any(-1, keepdim=True)
    clean_TP = groups.masked_fill(closed_TP, -torch.inf).masked_fill(broken_T1, torch.nan)
    noisy_TE, noisy_TP = inputs.logits_TE, clean_TP
    if inputs.training:
        normal_TE, normal_TP = _normals(inputs, num_experts, num_groups)
        noisy_TE, noisy_TP = noisy_TE + normal_TE * scale_TE, noisy_TP + normal_TP * scale_TP
    outer = choose(inputs, kept, normalize=normalizes(None, kept), logits_TE=noisy_TP)
    usable_T = outer.active_TK[:, 0]
    # The second level is the same decision for T*P tokens of J experts each; groups not chosen are left out later.
    probs_XJ, ids_XK, weights_XK, active_XK = route_topk(
        noisy_TE.reshape(-1, size),
        usable_T.repeat_interleave(num_groups),
        None, None, None, inside, normalizes(None, inside), "all", 0.5, 0, 0,
    )  # fmt: skip
    choices = _combine(outer, probs_XJ, ids_XK, weights_XK, active_XK)
    load_E = None
    if inputs.training:
        load_E = _load(
            outer, (clean_TP, noisy_TP, scale_TP), (inputs.logits_TE, noisy_TE, scale_TE), kept, inside
        )
    joint_TE = noisy_TE + noisy_TP.repeat_interleave(size, dim=1)
    return as_routing(inputs, options, choices, logits_TE=joint_TE, load_E=load_E)


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # a part of the family
    return tensor


def _normals(inputs: RouterInputs, num_experts: int, num_groups: int) -> tuple[Tensor, Tensor]:
    """Noise of the experts and of the groups; drawn, the groups' lanes come after the experts'."""
    num_tokens = inputs.logits_TE.shape[0]
    normal_TE = numbers_given(inputs, "normal_TE", (num_tokens, num_experts), "noise")
    normal_TP = numbers_given(inputs, "group_normal_TP", (num_tokens, num_groups), "noise")
    if normal_TE is not None and normal_TP is not None:
        return normal_TE, normal_TP
    both = drawn_normal(inputs, philox.NOISE, num_experts + num_groups)
    return both[:, :num_experts], both[:, num_experts:]


def _combine(
    outer: Choices, probs_XJ: Tensor, ids_XK: Tensor, weights_XK: Tensor, active_XK: Tensor
) -> Choices:
    """Choices of both levels as choices of experts: all of the best group, then all of the second best, ..."""
    num_tokens, num_groups = outer.probs_TE.shape
    size, inside = probs_XJ.shape[1], ids_XK.shape[1]
    row_TK = torch.arange(num_tokens, device=ids_XK.device).unsqueeze(1) * num_groups + outer.ids_TK
    rows = row_TK.reshape(-1)
    shape = (num_tokens, outer.ids_TK.shape[1], inside)
    ids = outer.ids_TK.unsqueeze(-1) * size + ids_XK.index_select(0, rows).view(shape)
    active = outer.active_TK.unsqueeze(-1) & active_XK.index_select(0, rows).view(shape)
    weights = outer.weights_TK.unsqueeze(-1) * weights_XK.index_select(0, rows).view(shape)
    probs_TPJ = outer.probs_TE.unsqueeze(-1) * probs_XJ.view(num_tokens, num_groups, size)
    return Choices(
        probs_TE=probs_TPJ.flatten(1),
        ids_TK=ids.flatten(1),
        weights_TK=weights.flatten(1),
        active_TK=active.flatten(1),
    )


Level = tuple[Tensor, Tensor, Tensor]
"""Clean logits, noisy logits, scale of the noise."""


def _load(outer: Choices, groups: Level, experts: Level, kept: int, inside: int) -> Tensor:
    """Load_H[i, j] = Load_groups[i] * Load_i[j] / number of tokens that chose group i -> ``[E]``.

    Load_i adds up over the tokens that chose group i, whose number is a constant; 0 where there are none. A level
    where everything is chosen is counted.
    """
    num_tokens, num_groups = outer.probs_TE.shape
    size = experts[0].shape[1] // num_groups
    usable_T = outer.active_TK[:, 0]
    chosen_TP = torch.zeros_like(groups[0], dtype=torch.bool).scatter(1, outer.ids_TK, outer.active_TK)
    count_P = chosen_TP.sum(0).to(groups[0].dtype)
    load_P = count_P
    if kept < num_groups:
        load_P = win_probability(*groups, kept, usable_T, own=True).sum(0)
    clean_XJ, noisy_XJ, scale_XJ = (level.reshape(-1, size) for level in experts)
    chosen_X = chosen_TP.reshape(-1)
    if inside < size:
        wins_XJ = win_probability(clean_XJ, noisy_XJ, scale_XJ, inside, chosen_X, own=True)
    else:
        wins_XJ = (chosen_X.unsqueeze(1) & (clean_XJ != -torch.inf)).to(clean_XJ.dtype)
    load_PJ = wins_XJ.view(num_tokens, num_groups, size).sum(0)
    return (load_PJ * (load_P / count_P.clamp(min=1.0)).unsqueeze(1)).flatten()


def _parts(options: HierarchicalOptions, num_experts: int) -> tuple[RouterTensor, ...]:
    groups = options.num_groups
    return (
        RouterTensor(name="noise_weight", field="noise_logits_TE", num_rows=num_experts, projects=True),
        RouterTensor(name="group_weight", field="group_logits_TP", num_rows=groups, projects=True),
        RouterTensor(
            name="group_noise_weight", field="group_noise_logits_TP", num_rows=groups, projects=True
        ),
    )


FAMILY = Family(route=route, parts=_parts, weight_init=zeros)
