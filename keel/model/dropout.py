"""Dropout, off wherever it is: policy ratios, KL and rewards are defined for the model, not for a thinning of it.

The model stays in training mode, which transformers' gradient checkpointing asks for. So every dropout rate is set to
0. These are the rates in ``nn.Dropout`` and its kin, in layers that pass one of their own to ``F.dropout`` or skip
themselves (layerdrop), and in the configuration, which many layers read as they run. They are found by their names. The
checkpoint that is saved has the original's rates (:func:`as_configured`).

Dropout within new LoRA adapters is there on purpose. It is off too, but where a loss is computed
(:func:`adapters_thinned`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel

THINS = "drop"  # in the name of every such number: dropout, attn_pdrop, layerdrop, drop_path_rate, ...
JITTERS = "jitter"  # in the name of the noise that routers of experts put on their inputs


class _Changed(NamedTuple):
    """A configuration's number as the checkpoint had it."""

    config: PretrainedConfig
    name: str
    value: Any


def turn_off(model: PreTrainedModel) -> None:
    """Training mode, in which two passes are equal to the bit and equal to evaluation mode."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero(module)
    changed: list[_Changed] = getattr(model, "keel_as_loaded", [])
    for config in _configs(model):
        changed += [_Changed(config, name, value) for name, value in _zero(config).items()]
    model.keel_as_loaded = changed  # type: ignore[assignment]
    model.train()
    for module in model.modules():
        # PhiMoE reads the same number in evaluation, as a threshold: it is left, and the module is not in training.
        if any(JITTERS in name for name in vars(module)):
            module.training = False


def _zero(holder: nn.Module | PretrainedConfig) -> dict[str, Any]:
    """Sets the numbers that thin to 0; returns those that were not."""
    found = {name: value for name, value in vars(holder).items() if THINS in name.lower() and _is_share(value)}
    for name, value in found.items():
        setattr(holder, name, [0.0] * len(value) if isinstance(value, list | tuple) else 0.0)
    return found


def _is_share(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_share, value))
    return (isinstance(value, float) and value > 0) or (type(value) is int and value == 1)


def _configs(model: nn.Module) -> Iterator[PretrainedConfig]:
    """Every configuration that a module holds, parts of configurations included, each once."""
    seen: set[int] = set()
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PretrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield config
            waiting += vars(config).values()


@contextlib.contextmanager
def as_configured(model: PreTrainedModel) -> Iterator[None]:
    """Within it the configuration says what the checkpoint's said."""
    changed: list[_Changed] = getattr(model, "keel_as_loaded", [])
    for config, name, value in changed:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, _, _ in changed:
            _zero(config)


# ------------------------------------------------------------------------------------------------------- adapters


def of_adapters(model: nn.Module) -> list[nn.Module]:
    """The dropout layers of the model's adapters."""
    return [module for name, module in model.named_modules() if "lora_dropout" in name.split(".")]


def measure_whole(model: nn.Module) -> None:
    """Turns the dropout of the model's adapters off."""
    for module in of_adapters(model):
        module.training = False


@contextlib.contextmanager
def adapters_thinned(thinned: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the dropout of adapters (``of_adapters``) is on: around a loss and its backward pass, in which gradient
    checkpointing computes layers again."""
    for module in thinned:
        module.training = True
    try:
        yield
    finally:
        for module in thinned:
            module.training = False
