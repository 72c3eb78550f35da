"""Models with random weights in the shapes of public ones, made on the device.

The shapes are those of the models' own config.json; ``tests/test_bench_gpu.py`` counts their parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from bench.gpu.setting import Setting
from bench.models import word_tokenizer
from bench.work import EOS, PAD, Shape
from keel.model.checkpoint import frozen, prepared, scalar_head
from keel.model.heads import ScalarModel
from keel.model.held import KINDS, settle
from keel.recipe.sections import LoraConfig

LORA = LoraConfig(rank=16, alpha=32.0)  # on all linear layers


@dataclass(frozen=True)
class Architecture(Shape):
    """A decoder of one of three families: ``qwen2`` (biases of queries, keys and values), ``qwen3`` (norms of queries
    and keys), ``llama``."""

    family: str
    width: int
    theta: float
    positions: int

    @property
    def head_dim(self) -> int:
        return self.width

    @property
    def parameters(self) -> int:
        qkv = (self.heads + 2 * self.kv_heads) * self.width
        more = {"qwen2": qkv, "qwen3": 2 * self.width, "llama": 0}[self.family]
        return super().parameters + self.layers * more

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on all linear layers but the head."""
        inner, kv = self.heads * self.width, self.kv_heads * self.width
        ends = [(self.hidden, inner), (self.hidden, kv), (self.hidden, kv), (inner, self.hidden)]
        ends += [(self.hidden, self.ffn), (self.hidden, self.ffn), (self.ffn, self.hidden)]
        return self.layers * rank * sum(a + b for a, b in ends)

    def config(self) -> PretrainedConfig:
        kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[self.family]
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.theta}
        if self.family == "llama":
            rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope |= {"original_max_position_embeddings": 8192}
        found: PretrainedConfig = kind(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.width,
            tie_word_embeddings=self.tied,
            rope_parameters=rope,
            rms_norm_eps=1e-5 if self.family == "llama" else 1e-6,
            max_position_embeddings=self.positions,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        return found


def _qwen(family: str, hidden: int, layers: int, heads: int, kv: int, width: int, ffn: int, positions: int) -> Any:
    return Architecture(151_936, hidden, layers, heads, kv, ffn, True, family, width, 1e6, positions)


ARCHITECTURES: dict[str, Architecture] = {
    "qwen2.5-0.5b": _qwen("qwen2", 896, 24, 14, 2, 64, 4864, 32_768),
    "qwen3-0.6b": _qwen("qwen3", 1024, 28, 16, 8, 128, 3072, 40_960),
    "qwen3-1.7b": _qwen("qwen3", 2048, 28, 16, 8, 128, 6144, 40_960),
    "qwen3-4b": _qwen("qwen3", 2560, 36, 32, 8, 128, 9728, 40_960),
    "llama-3.1-8b": Architecture(128_256, 4096, 32, 32, 8, 14_336, False, "llama", 128, 5e5, 131_072),
}
# A tiny run's, by family: the same parts, of next to nothing.
TINY: dict[str, Architecture] = {
    family: Architecture(256, 32, 2, 4, 2, 64, family != "llama", family, 8, 1e4, 16_384)
    for family in ("qwen2", "qwen3", "llama")
}


def architecture(setting: Setting, name: str) -> Architecture:
    found = ARCHITECTURES[name]
    return TINY[found.family] if setting.tiny else found


@cache
def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word a token, as beside the models of ``bench.models``."""
    return word_tokenizer(vocab)


def plain(setting: Setting, name: str, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """The causal language model as transformers makes it, of the same numbers in either precision: bfloat16's."""
    torch.manual_seed(seed)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(architecture(setting, name).config(), dtype=torch.bfloat16)
    return model.to(dtype)  # type: ignore[no-any-return]


def held(setting: Setting, model: PreTrainedModel) -> PreTrainedModel:
    """As Keel reads a bfloat16 checkpoint that nothing trains: matrices in bfloat16, all else in float32."""
    if not setting.cuda:
        return model
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            matrix = type(module) in KINDS and parameter.ndim == 2
            parameter.data = parameter.data.to(torch.bfloat16 if matrix else torch.float32)
    settle(model)
    return model


def reader(setting: Setting, name: str, seed: int = 0) -> nn.Module:
    """A reference, or a base that roles share."""
    model = held(setting, plain(setting, name, read_in(setting), seed))
    return frozen(prepared(model, setting.device, None, False, "CAUSAL_LM", []))


def read_in(setting: Setting) -> torch.dtype:
    return torch.bfloat16 if setting.cuda else torch.float32


def policy(
    setting: Setting, name: str, *, lora: LoraConfig | None = None, checkpointing: bool = False, seed: int = 0
) -> nn.Module:
    """As ``load_policy`` hands it over: float32 master weights; below adapters the device's own precision."""
    if lora is None:
        model = plain(setting, name, torch.float32, seed)
    else:
        model = held(setting, plain(setting, name, read_in(setting), seed))
    return prepared(model, setting.device, lora, checkpointing, "CAUSAL_LM", [])


def scalar(
    setting: Setting,
    name: str,
    head_seed: int,
    *,
    lora: LoraConfig | None = None,
    checkpointing: bool = False,
    read: bool = False,
) -> ScalarModel:
    """As ``load_scalar`` hands it over, with a new head; ``read``: nothing of it is trained."""
    shape = architecture(setting, name)
    config = shape.config()
    config.num_labels = 1
    torch.manual_seed(head_seed)
    with torch.device(setting.device):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model = held(setting, model) if read or lora is not None else model
    head = scalar_head(model, name)
    with torch.no_grad():
        nn.init.normal_(head.weight, std=(shape.hidden + 1) ** -0.5)  # type: ignore[arg-type]
    prepared_model = prepared(model, setting.device, lora, checkpointing, "SEQ_CLS", ["score"])
    return keels(ScalarModel(prepared_model, tokenizer(shape.vocab)))


def keels(model: ScalarModel) -> ScalarModel:
    """Marked as Keel's own, which scores a reply at its end."""
    model.set_scale(0.0, 1.0)
    return model
