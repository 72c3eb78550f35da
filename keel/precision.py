"""Which precision pays on a device, for products and for weights at rest."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

from keel.recipe.sections import Weights

Precision = Literal["fp32", "bf16"]


def pick_precision(name: Literal["auto", "fp32", "bf16"], device: str) -> Precision:
    """``auto`` is bf16 where the hardware multiplies it natively: there it is about twice as fast."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
    return "fp32"


def held_dtype(weights: Weights, products: Precision | None, device: str, stored: torch.dtype | None) -> torch.dtype:
    """In what the matrices of a model lie in memory. ``products``: the precision that it computes in, None where it is
    trained: a step of training is lost in bfloat16's three digits, so trained weights are float32. ``stored``: what the
    whole checkpoint is in, None where that is not one thing. Nothing is ever lost unless ``weights`` is ``bf16``:
    float16 does not fit bfloat16, so such a checkpoint is float32 here. On a CPU bfloat16 must be asked for: the
    compiled layers read float32."""
    if products != "bf16" or weights == "fp32":
        return torch.float32
    kept = device.startswith("cuda") and stored == torch.bfloat16
    return torch.bfloat16 if weights == "bf16" or kept else torch.float32


def in_four_bits(weights: Weights, products: Precision | None) -> bool:
    """Whether the linear layers of a model lie in memory in four bits. ``products`` as in :func:`held_dtype`."""
    return weights == "nf4" and products is not None


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[object]:
    """Matrix products in bfloat16 over float32 master weights, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.split(":")[0], torch.bfloat16)
    return contextlib.nullcontext()
