"""The operators as this package calls them: what a kernel refuses is a ``ValueError`` in every version of torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

NAMES = (
    *(
        "route_topk",
        "route_topk_backward",
        "assign_slots",
        "permute",
        "uniform",
        "combine",
        "combine_backward",
    ),
    *("activate", "activate_backward", "expert_ffn", "expert_ffn_backward"),
)
NO_REFUSALS = ("can't allocate memory", "CUDA: ")
"""Beginnings of what a kernel says when the arguments were right."""


def refusing(name: str) -> Callable[..., Any]:
    """The operator of that name. Whatever a native kernel throws arrives as a ``RuntimeError`` in torch 2.15."""

    def call(*args: Any) -> Any:
        try:
            return getattr(torch.ops.epmoe, name)(*args)
        except RuntimeError as error:
            refused = str(error).removeprefix(f"{name}: ")
            if refused == str(error) or refused.startswith(NO_REFUSALS):
                raise
            raise ValueError(str(error)) from None

    return call


ops = SimpleNamespace(**{name: refusing(name) for name in NAMES})
