"""What a forward pass keeps for the backward pass: all, one tensor a layer, or that and what is dear to compute."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from keel.recipe.sections import Checkpointing

ATEN = torch.ops.aten
# Products and attention are most of a pass's time; what lies between them is most of its memory.
DEAR = [
    ATEN.mm.default,
    ATEN.addmm.default,
    ATEN.bmm.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_cudnn_attention.default,
]


def checkpointing_settings(kind: Checkpointing) -> dict[str, Any]:
    """Of torch's checkpoint function, for transformers."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, DEAR)
    return settings


def offloaded(device: str) -> contextlib.AbstractContextManager[Any]:
    """Within it a forward pass keeps in the CPU's memory what it keeps."""
    return torch.autograd.graph.save_on_cpu(pin_memory=device.startswith("cuda"))
