"""Adapters by themselves: the folder ``adapter`` of a checkpoint, in peft's format, and which base they belong to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from keel.model import marks
from keel.model.merged import merged_weights
from keel.model.modules import inner_model
from keel.model.places import ADAPTER

DIGEST_ENTRIES = 1024  # of each weight: enough to tell two trainings apart, and read in no time


def save_adapter(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the adapters and head of a model trained with LoRA, unmerged, to ``folder``/adapter, with the rows of the
    embeddings that were trained beside them, the tokenizer, the configuration (the scale of scores) and the ends of a
    reply. That can be named wherever a model can, as long as its base lies where it did."""
    target, inner = folder / ADAPTER, inner_model(model)
    rows = list(marks.trained_rows(inner))
    settings: Any = model.peft_config[model.active_adapter]  # type: ignore[index, union-attr]
    settings.trainable_token_indices = {name: ids.tolist() for name, _, ids in rows} or None
    try:
        model.save_pretrained(str(target), save_embedding_layers=False)  # type: ignore[operator]
    finally:
        settings.trainable_token_indices = None  # peft has not trained them
    if rows:
        file = target / "adapter_model.safetensors"
        trained = {
            f"base_model.model.{name}.token_adapter.trainable_tokens_delta": weight.cpu() for name, weight, _ in rows
        }
        save_file(load_file(file) | trained, file, {"format": "pt"})
    inner.config.save_pretrained(str(target))
    if inner.can_generate():
        inner.generation_config.to_json_file(str(target / GENERATION_CONFIG_NAME), keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(str(target))
    (target / "base.json").write_text(json.dumps({"digest": digest(model)}) + "\n", encoding="utf-8")


def digest(model: nn.Module) -> str:
    """Tells base models apart: a hash of evenly spaced entries of every weight below the heads. Adapters are left out,
    and so are the rows of zeros at the embedding's end, where a reward model's padding may be
    (``keel.model.padding``)."""
    inner = inner_model(model)
    prefix = inner.base_model_prefix + "."
    embedding = next((n for n, module in inner.named_modules() if module is inner.get_input_embeddings()), None)
    found = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(_base_weights(model)):
        if name == f"{embedding}.weight":
            weight = weight[: int(weight.detach().any(1).nonzero().max()) + 1]
        if name.startswith(prefix):
            flat = weight.detach().flatten()
            entries = flat[:: max(1, flat.numel() // DIGEST_ENTRIES)].float().cpu()
            found.update(f"{name} {tuple(weight.shape)}".encode() + entries.numpy().tobytes())
    return found.hexdigest()


def _base_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    if not hasattr(model, "disable_adapter"):
        return list(merged_weights(model))
    with model.disable_adapter():  # type: ignore[operator]
        return list(merged_weights(model))
