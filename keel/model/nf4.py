"""Frozen matrices in four bits: NF4 numbers in blocks, whose scales are numbers of eight bits (Dettmers et al. 2023),
from bitsandbytes. Half a byte a weight; products are computed with the numbers made plain again, layer by layer."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from keel.model.modules import backbone, inner_model
from keel.types import UserError


def require() -> None:
    """UserError where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.weights: nf4 needs the package bitsandbytes; pip install 'keel-rlhf[qlora]', or use weights: auto"
        )


@torch.no_grad()
def quantise(model: nn.Module, device: str) -> None:
    """Puts the linear layers below the heads in four bits, one after the other, on ``device``; all else is left."""
    require()
    inner = inner_model(model)
    heads = {id(head) for head in (inner.get_output_embeddings(), getattr(inner, "score", None)) if head is not None}
    for module in list(backbone(model).modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and id(child) not in heads:
                setattr(module, name, _in_four_bits(child, device))


def _in_four_bits(linear: nn.Linear, device: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = {"compress_statistics": True, "quant_type": "nf4"}
    layer: Any = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, torch.float32, device="meta", **settings
    )
    layer.weight = Params4bit(linear.weight.data.contiguous(), requires_grad=False, **settings).to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False  # it would repack weights in evaluation, and round otherwise there
    layer.train(linear.training)
    return layer  # type: ignore[no-any-return]


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer is one of :func:`quantise`."""
    return type(module).__module__.startswith("bitsandbytes")


def plain_weight(layer: Any) -> Tensor:
    """The weight that a layer in four bits computes with, in float32."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()  # type: ignore[no-any-return]
