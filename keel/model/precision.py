"""Which precision pays on a device."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

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


def autocast(device: str, precision: str) -> contextlib.AbstractContextManager[object]:
    """Matrix products in bfloat16 over float32 master weights, or nothing."""
    if precision == "bf16":
        return torch.autocast(device.split(":")[0], torch.bfloat16)
    return contextlib.nullcontext()
