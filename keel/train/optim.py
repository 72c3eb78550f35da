"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from keel.recipe.sections import OptimConfig
from keel.train.adamw8bit import adamw8bit


def make_optimizer(
    modules: Mapping[str, nn.Module], config: OptimConfig, lrs: Mapping[str, float]
) -> torch.optim.Optimizer:
    """One AdamW, of the recipe's kind, with a parameter group for each module that is trained; ``lrs`` overrides the
    rate by module name.

    Weight decay applies to matrices only: decaying norms and biases pulls activations to zero for no gain.
    """
    groups = []
    for name, module in modules.items():
        trained = [p for p in module.parameters() if p.requires_grad]
        lr = lrs.get(name, config.lr)
        for params, decay in (
            ([p for p in trained if p.ndim >= 2], config.weight_decay),
            ([p for p in trained if p.ndim < 2], 0.0),
        ):
            if params:
                groups.append({"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay, "module": name})
    if config.kind == "adamw8bit":
        return adamw8bit(groups, config)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)


def lr_factor(update: int, total: int, config: OptimConfig) -> float:
    """Share of the base rate at optimizer step ``update`` (from 0) of ``total``: linear warm-up, then the schedule down
    to ``final_lr``. 0 before the first step: the module does not learn yet."""
    if update < 0:
        return 0.0
    warmup = config.warmup * total if config.warmup < 1 else config.warmup
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1.0, total - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_lr + (1 - config.final_lr) * shape


def set_lr(optimizer: torch.optim.Optimizer, factors: Mapping[str, float]) -> float:
    """Sets every group's rate by its module's factor; returns the first group's, which the metrics show."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factors[group["module"]]
    return float(optimizer.param_groups[0]["lr"])
