"""Scalar heads: the reward model and the critic.

Both are transformers' own sequence classifiers with one label (a trunk and a linear ``score`` without activation), so
that a reward model saved by Keel loads with ``AutoModelForSequenceClassification`` as it is, and a critic starts from
a reward model by loading its checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.model.logprobs import predicting
from keel.model.packed import hidden_states, inner_model
from keel.types import PackedBatch

CONFIG_KEY = "keel_reward"  # {"mean": float, "std": float} in the checkpoint's config.json


class ScalarModel:
    """A trunk with a scalar head, its tokenizer and chat template.

    ``mean`` and ``std`` centre and scale the raw head: score = (raw - mean) / std.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer)
        kept: dict[str, Any] = getattr(inner_model(model).config, CONFIG_KEY, None) or {}
        self.mean = float(kept.get("mean", 0.0))
        self.std = float(kept.get("std", 1.0))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def set_scale(self, mean: float, std: float) -> None:
        """Keeps the centre and scale in the checkpoint's config."""
        self.mean, self.std = mean, max(std, 1e-6)
        setattr(inner_model(self.model).config, CONFIG_KEY, {"mean": self.mean, "std": self.std})

    def raw_packed(self, batch: PackedBatch) -> Tensor:
        """Raw head output at each sequence's last token: [B]."""
        last_B = batch.cu_seqlens[1:] - 1
        return self._head(hidden_states(self.model, batch, last_B))

    def score_packed(self, batch: PackedBatch) -> Tensor:
        """Centred and scaled scores: [B]."""
        return (self.raw_packed(batch) - self.mean) / self.std

    def values_packed(self, batch: PackedBatch) -> Tensor:
        """Values [C] of the states in which the masked tokens were chosen (the position before each), as a critic."""
        source_C, _ = predicting(batch)
        return (self._head(hidden_states(self.model, batch, source_C)) - self.mean) / self.std

    def _head(self, hidden_NH: Tensor) -> Tensor:
        head = inner_model(self.model).score
        # The head stays in float32: a reward must not be rounded to bfloat16's three digits.
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return head(hidden_NH.float()).squeeze(-1)
