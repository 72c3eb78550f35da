"""A model's weights as one checkpoint would hold them: low-rank adapters added in, names without the wrappers'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from keel.model.modules import inner_model
from keel.types import UserError

# What peft, and the parametrisation of trained rows, put between a module and its weights.
WRAPPERS = ("base_layer", "modules_to_save", "original_module", "parametrizations")


def merged_weight(layer: Any) -> Tensor:
    """The weight that ``layer`` computes with: its own, and what its active plain LoRA adapters add to it."""
    base = getattr(layer, "base_layer", layer)
    weight = base.weight
    if base is not layer and not layer.disable_adapters and not layer.merged:
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def is_plain_lora(layer: Any) -> bool:
    """Whether adapters only add a low-rank product to a linear layer's weight (no DoRA or other variant, no bias)."""
    linear = hasattr(layer, "get_delta_weight") and type(getattr(layer, "base_layer", None)) is nn.Linear
    return linear and not layer.lora_variant and not any(layer.lora_bias.values())


def head_weight(head: Any) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) that an output layer computes with, adapters added in so that they get their gradients; dropout
    inside them is left out. UserError for adapters other than plain LoRA, trained rows and layers trained whole."""
    base = getattr(head, "base_layer", head)
    if base is not head and not hasattr(head, "get_merged_weights") and not is_plain_lora(head):
        raise UserError(
            f"model.lora.targets: Keel cannot train {type(head).__name__} adapters on the output layer; "
            "use plain LoRA, or leave the output layer out"
        )
    weight = merged_weight(head) if base is not head and is_plain_lora(head) else head.weight
    return weight, getattr(base, "bias", None)


def _bare(layer: Any) -> nn.Module:
    """A layer without its adapters, of which experts have one inside another."""
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer  # type: ignore[no-any-return]


@torch.no_grad()
def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint, tensor) of every weight of the language model; tied ones under each of their names.

    One layer is merged at a time, so no second copy of the model is made. The tensors are the model's own where there
    is nothing to add: copy them, do not change them. UserError for adapters that are not plain LoRA.
    """
    yield from _weights(inner_model(model), "")


def _weights(within: nn.Module, outer: str) -> Iterator[tuple[str, Tensor]]:
    for path, module in within.named_modules(prefix=outer):
        inside = path.removeprefix(outer).split(".")
        if any(part in WRAPPERS or part.startswith("lora_") for part in inside):
            continue  # comes with the layer that it wraps
        prefix = path + "." if path else ""
        if hasattr(module, "base_layer"):
            if not is_plain_lora(module):
                if not module.disable_adapters:
                    raise UserError(f"{path}: only plain LoRA on linear layers can be merged while training goes on")
                yield from _weights(_bare(module), path)  # experts, whose weights are of any name and number
                continue
            yield prefix + "weight", merged_weight(module)
            if module.base_layer.bias is not None:
                yield prefix + "bias", module.base_layer.bias
            continue
        if hasattr(module, "original_module"):  # trained whole beside the adapters
            adapter: Any = module.active_adapters[0]  # type: ignore[index]
            module = module.original_module if module.disable_adapters else module.modules_to_save[adapter]  # type: ignore[index, assignment]
        if parametrize.is_parametrized(module, "weight"):
            yield prefix + "weight", module.weight.detach()  # type: ignore[operator]
        for name, parameter in module.named_parameters(recurse=False):
            yield prefix + name, parameter.detach()
