"""One base, many roles: policy, reference, reward models and critic as adapters and heads on one frozen model that is
in memory once.

Each role gets a module tree of its own over the *same* parameters, with adapters of its own. No role switches another's
adapters on or off, so their forward passes may be mixed freely, gradient checkpointing's second pass included.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from keel.model.adapters import digest
from keel.model.checkpoint import Place, frozen, load_policy, load_tokenizer, prepared, scalar_head
from keel.model.dropout import measure_whole
from keel.model.heads import ScalarModel
from keel.model.loading import put_adapters
from keel.model.places import ADAPTER, read_config
from keel.precision import Precision
from keel.recipe.sections import Checkpointing, LoraConfig, Source
from keel.types import UserError


class SharedBase:
    """A causal LM, frozen and held once. A role's model costs the bytes of its adapters and head."""

    def __init__(self, place: Place, device: str, lora: LoraConfig, products: Precision | None = None) -> None:
        self.source = Source.of(place)
        model, self.tokenizer = load_policy(self.source, device=device, products=products)
        self.device, self.lora = device, lora.whole()
        self.model: PreTrainedModel = frozen(model)  # type: ignore[assignment]

    def policy(self, gradient_checkpointing: Checkpointing) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """As ``load_policy``, with new adapters."""
        return prepared(self._tree(), self.device, self.lora, gradient_checkpointing, "CAUSAL_LM", []), self.tokenizer

    def reference(self) -> nn.Module:
        """The base itself, without adapters."""
        return frozen(self._tree())

    def new_critic(self, head_seed: int, gradient_checkpointing: Checkpointing) -> ScalarModel:
        """As ``load_scalar`` with a new head, and new adapters."""
        model = self._classifier(self.source)
        scalar_head(model, self.source.path, head_seed)
        model = prepared(model, self.device, self.lora, gradient_checkpointing, "SEQ_CLS", ["score"])
        return ScalarModel(model, self.tokenizer)

    def reward_model(self, path: Path, gradient_checkpointing: Checkpointing = False) -> ScalarModel:
        """As ``load_scalar``, with the adapters and head that were trained at ``path``, which can be trained on.

        UserError when that reward model was trained without adapters, or on another base.
        """
        source = replace(self.source, path=str(path), revision=None)
        adapter, tokenizer = self._adapter_of(path), load_tokenizer(source)
        model = self._classifier(source)
        nn.init.zeros_(scalar_head(model, path).weight)  # type: ignore[arg-type]  # the adapter brings its own
        prepared(model, self.device, None, gradient_checkpointing, "SEQ_CLS", [])
        model.requires_grad_(False)
        wrapped = put_adapters(model, Source(str(adapter)), trainable=True)
        measure_whole(wrapped)
        return ScalarModel(wrapped, tokenizer)

    def _classifier(self, source: Source) -> Any:
        """The base below a head of unset weights; the configuration is that of ``source``."""
        config = read_config(source)
        config.num_labels = 1
        with torch.device("meta"):  # of these modules only the head is kept
            model: Any = AutoModelForSequenceClassification.from_config(
                config, dtype=torch.float32, trust_remote_code=source.trust_remote_code
            )
        setattr(model, model.base_model_prefix, self._tree().base_model)
        scalar_head(model, source.path).to_empty(device=self.device)
        return model

    def _tree(self) -> PreTrainedModel:
        """The model's modules anew, over the same parameters."""
        return copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})

    def _adapter_of(self, path: Path) -> Path:
        folder = path / ADAPTER
        if not (folder / "adapter_config.json").exists():
            raise UserError(
                f"{path}: no adapters there to put on one base; train this reward model with model.lora, "
                "or set one_base: false"
            )
        if json.loads((folder / "base.json").read_text(encoding="utf-8"))["digest"] != digest(self.model):
            raise UserError(
                f"{path}: its adapters were trained on another base than {self.source.path}; train it from the same "
                "checkpoint as the policy, or set one_base: false"
            )
        return folder
