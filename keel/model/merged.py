"""A model's weights as one checkpoint would hold them: low-rank adapters added in, names without the wrappers'."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from keel.model import marks, nf4
from keel.model.held import is_matrix
from keel.model.modules import inner_model
from keel.types import UserError

# What peft, and the parametrisation of trained rows, put between a module and its weights.
WRAPPERS = ("base_layer", "modules_to_save", "original_module", "parametrizations")
NUMBERED = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")
PART = 2**26  # bytes: smaller models are written in one file


def merged_weight(layer: Any) -> Tensor:
    """The weight that ``layer`` computes with: its own, and what its active plain LoRA adapters add to it, which a
    weight in half precision would round away: the sum is in the adapters' precision."""
    base = getattr(layer, "base_layer", layer)
    weight = base.weight
    if base is not layer and not layer.disable_adapters and not layer.merged:
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter)
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
        if _within_wrapper(path.removeprefix(outer)):
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


def file_parts(model: nn.Module, dtype: torch.dtype, least: int = PART) -> Iterator[dict[str, Tensor]]:
    """The language model's state as files in ``dtype`` have it, in parts: what lies outside the layers, then the
    layers, as many together as come to ``least`` bytes. Adapters of whatever kind are merged in, names plain, tied
    weights one tensor. A head of one score and tables (buffers) stay as they are.

    A layer is copied and merged in float32, and rounded once; what that makes lies on the CPU. Whoever keeps no part
    needs the memory of the model and of one part.
    """
    inner = inner_model(model)
    layers: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in inner.named_modules():
        if not _within_wrapper(path):
            layers.setdefault(_layer_of(path), []).append((path + "." if path else "", module))
    part: dict[str, Tensor] = {}
    for modules in layers.values():
        part.update(_file_weights(modules, dtype))
        if sum(tensor.nbytes for tensor in part.values()) >= least:
            yield part
            part = {}
    if part:
        yield part


def _layer_of(path: str) -> str:
    """The layer that a module is a part of: its path up to the first number; empty outside the layers."""
    found = NUMBERED.match(path)
    return found[0] if found else ""


@torch.no_grad()
def _file_weights(modules: Sequence[tuple[str, nn.Module]], dtype: torch.dtype) -> dict[str, Tensor]:
    made: dict[int, Tensor] = {}  # by the weight that it was made of: tied ones stay one
    found: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor, origin: Tensor) -> None:
        if id(origin) not in made:
            low = isinstance(origin, nn.Parameter) and (tensor.dim() < 2 or is_matrix(tensor.shape))
            written = tensor.detach().to(dtype) if low else tensor.detach()
            same = written.data_ptr() == origin.data_ptr()
            made[id(origin)] = written if same else written.cpu()
        found[name] = made[id(origin)]

    for prefix, module in modules:  # first: what is tied to an adapted weight is the merged one
        if hasattr(module, "base_layer"):
            for name, tensor, origin in _merged_layer(module):
                add(prefix + name, tensor, origin)
    for prefix, module in modules:
        if hasattr(module, "base_layer"):
            continue
        for name, tensor, origin in _own_state(module):
            add(prefix + name, tensor, origin)
    return found


def _within_wrapper(path: str) -> bool:
    return any(part in WRAPPERS or part.startswith("lora_") for part in path.split("."))


def _merged_layer(layer: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, tensor, the tensor that it was made of) of a layer with its adapters."""
    own = layer.get_base_layer()
    if nf4.is_quantised(own):
        weight = nf4.plain_weight(own)
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter)
        yield "weight", weight, own.weight
        if own.bias is not None:
            yield "bias", own.bias, own.bias
        return
    merged = copy.deepcopy(layer)
    marks.settle_rows(merged.get_base_layer())
    merged.get_base_layer().float()
    while hasattr(merged, "base_layer"):  # experts have one inside another
        merged.merge()
        merged = merged.base_layer
    origins = {name: origin for name, _, origin in _own_state(own)}
    for name, tensor, _ in _own_state(merged):
        yield name, tensor, origins[name]


def _own_state(module: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """As :func:`_merged_layer`, of a module without adapters, its parts left out."""
    if hasattr(module, "original_module"):  # trained whole beside the adapters
        for name, tensor in module.modules_to_save[module.active_adapters[0]].state_dict(keep_vars=True).items():
            yield name, tensor, tensor
        return
    if parametrize.is_parametrized(module, "weight"):
        yield "weight", module.weight, module.parametrizations.weight.original
    for name, parameter in module.named_parameters(recurse=False):
        four_bits = name == "weight" and nf4.is_quantised(module)
        yield name, nf4.plain_weight(module) if four_bits else parameter, parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer, buffer
