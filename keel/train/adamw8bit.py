"""AdamW with 8-bit moments (Dettmers et al. 2022), from bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from keel.recipe.sections import OptimConfig
from keel.types import UserError


def require() -> None:
    """UserError where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optim.kind: adamw8bit needs the package bitsandbytes; pip install 'keel-rlhf[adamw8bit]', or use adamw"
        )


def adamw8bit(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Moments in blocks of 8-bit numbers with a scale each: two bytes a weight instead of eight. Tensors of fewer than
    4,096 entries keep theirs in float32, as in the paper's implementation."""
    require()
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=config.betas, eps=config.eps)
    return optimizer
