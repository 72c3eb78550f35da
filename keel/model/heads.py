"""Scalar heads: the reward model, the process reward model and the critic.

All are transformers' own sequence classifiers with one label: a trunk and a linear ``score`` without activation. So a
reward model saved by Keel loads with ``AutoModelForSequenceClassification`` as it is, and a critic starts from a reward
model by loading its checkpoint.

Keel's own reward models are trained to score a conversation at the end of its reply. One from elsewhere scores it where
transformers' classifiers do: at the last token of the template's whole rendering that is not the padding token. A
process reward model's head is read at the end of each step (`keel.data.steps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from keel.data.chat import Chat
from keel.data.collate import common_prefix
from keel.model.logprobs import predicting
from keel.model.packed import hidden_states, inner_model
from keel.types import Encoded, Message, PackedBatch

CONFIG_KEY = "keel_reward"  # {"mean": float, "std": float} in the checkpoint's config.json
PROCESS_KEY = "keel_process"  # of a process reward model: {"steps": {...}, "aggregate": "min", "level": "steps"}


class ScalarModel:
    """A trunk with a scalar head, its tokenizer and chat template.

    ``mean`` and ``std`` centre and scale the raw head: score = (raw - mean) / std.
    ``foreign``: it was trained elsewhere, for its config has no centre and scale of Keel's.
    ``process``: what a process reward model's config says of steps; None for a model of another kind.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer)
        kept: dict[str, Any] = getattr(inner_model(model).config, CONFIG_KEY, None) or {}
        self.foreign = not kept
        self.mean = float(kept.get("mean", 0.0))
        self.std = float(kept.get("std", 1.0))
        self.process: dict[str, Any] | None = getattr(inner_model(model).config, PROCESS_KEY, None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def set_scale(self, mean: float, std: float) -> None:
        """Keeps the centre and scale in the checkpoint's config, which makes it Keel's own."""
        self.foreign = False
        self.mean, self.std = mean, max(std, 1e-6)
        setattr(inner_model(self.model).config, CONFIG_KEY, {"mean": self.mean, "std": self.std})

    def set_process(self, process: dict[str, Any] | None) -> None:
        """Makes it a process reward model, which its checkpoint's config says; None: it is none any longer."""
        self.process, config = process, inner_model(self.model).config
        if process is None:
            delattr(config, PROCESS_KEY)
        else:
            setattr(config, PROCESS_KEY, process)

    def encode_replies(
        self, replies: Sequence[tuple[Sequence[Message], str, bool]], places: Sequence[str] = ()
    ) -> list[Encoded]:
        """What the model reads of many (messages, reply, finished), to the token that it scores. One from elsewhere
        knows whole renderings alone: a reply that was cut is to it as one that ended.
        ``places``: where each comes from, for errors."""
        if not self.foreign:
            return self.chat.encode_replies(replies, places)
        talks = [(*messages, Message("assistant", reply)) for messages, reply, _ in replies]
        rows = [self._to_scored(ids) for ids in self.chat.encode_whole(talks, places)]
        of_prompt: dict[tuple[Message, ...], list[Encoded]] = {}
        for talk, row in zip(talks, rows, strict=True):
            of_prompt.setdefault(talk[:-1], []).append(row)
        # What replies to one prompt begin with in common is run once: that, and no more, is outside the mask.
        shared = {prompt: common_prefix(some) if len(some) > 1 else 0 for prompt, some in of_prompt.items()}
        return [
            replace(row, mask=tuple(i >= shared[talk[:-1]] for i in range(len(row.ids))))
            for talk, row in zip(talks, rows, strict=True)
        ]

    def _to_scored(self, ids: Sequence[int]) -> Encoded:
        """Up to the token that transformers' classifiers score a text at: the last that is not padding."""
        pad = inner_model(self.model).config.get_text_config().pad_token_id
        last = max((i for i, token in enumerate(ids) if token != pad), default=0)
        return Encoded(tuple(ids[: last + 1]), (False,) * (last + 1))

    def raw_packed(self, batch: PackedBatch) -> Tensor:
        """Raw head output at each sequence's last token: [B]."""
        last_B = batch.cu_seqlens[1:] - 1
        return self._head(hidden_states(self.model, batch, last_B))

    def raw_at(self, batch: PackedBatch, places_W: Tensor) -> Tensor:
        """Raw head output at places of the batch's tokens: [W]."""
        return self._head(hidden_states(self.model, batch, places_W))

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
