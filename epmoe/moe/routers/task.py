"""One choice for all tokens of a task: Task-MoE, arXiv:2110.03742."""

from __future__ import annotations

import numpy as np
import torch

from epmoe.config_routers import TaskOptions
from epmoe.moe.inputs import numbers_of_valid
from epmoe.moe.routers import gshard_top2
from epmoe.moe.routers.family import Family, FloatArray, RouterTensor
from epmoe.moe.routers.sentence import of_units
from epmoe.ops import permute
from epmoe.types import RouterInputs, Routing


def route(inputs: RouterInputs, options: TaskOptions, top_k: int = 2) -> Routing:
    """``gshard_top2`` of the logits of each token's task, which no token changes.

    A sequence is of one task, and its tokens share the random second expert. So for one task the model needs no more
    than that task's experts.

    Raises:
        ValueError: In training, without tasks.
    """
    num_tokens, num_experts = inputs.logits_TE.shape
    task_T = inputs.task_T
    if task_T is None and inputs.training:
        raise ValueError(
            f"router task has experts for each of num_tasks={options.num_tasks} tasks and needs TokenContext.task_B in "
            f"training; pass ctx=TokenContext(task_B=...)"
        )
    token_T = torch.arange(num_tokens, device=inputs.valid_T.device)
    if task_T is None:
        task_T = torch.full_like(token_T, options.default_task)
    task_T = numbers_of_valid("task_B", task_T, inputs.valid_T, options.num_tasks)
    task_logits = inputs.task_logits_X
    assert task_logits is not None  # a part of the family
    # What comes in is 0, or NaN for a token that is broken and stays so.
    logits_TE = inputs.logits_TE + permute(task_logits.view(options.num_tasks, num_experts), task_T)
    seq_len = max(inputs.seq_len or num_tokens, 1)
    return gshard_top2.route(of_units(inputs, token_T // seq_len * seq_len, logits_TE), options, top_k)


def _small(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatArray:
    return np.float32(0.02) * rng.standard_normal(shape, dtype=np.float32)


def _parts(options: TaskOptions, num_experts: int) -> tuple[RouterTensor, ...]:
    rows = options.num_tasks * num_experts
    return (
        RouterTensor(name="task_logits", field="task_logits_X", num_rows=rows, projects=False, init=_small),
    )


FAMILY = Family(route=route, parts=_parts, has_weight=False)
