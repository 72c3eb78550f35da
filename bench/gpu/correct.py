"""What the checks of ``bench.gpu.correctness`` share: what a check says, small random models, texts of random tokens,
and the model's own numbers, which are their oracle.

Shape suffixes: see ``keel.types``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from keel.types import Encoded


class Setting(Protocol):
    """Where and how much is checked. ``device``: cpu, cuda or cuda:1; ``tiny``: on next to nothing."""

    @property
    def device(self) -> str: ...
    @property
    def tiny(self) -> bool: ...
    @property
    def out(self) -> Path: ...


@dataclass(frozen=True)
class Gap:
    """What was compared, how far apart it was, and how far it may be."""

    what: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # never where it is no number


@dataclass(frozen=True)
class LeftOut:
    """What was not compared, and why."""

    what: str
    why: str


Said = Iterator[Gap | LeftOut]


@dataclass(frozen=True)
class Check:
    """``tiny``: whether it belongs to a tiny run, too."""

    name: str
    run: Callable[[Setting], Said]
    tiny: bool = True


# ------------------------------------------------------------------------------------------------------- numbers


def relative(found: Tensor, right: Tensor) -> float:
    """The difference's norm over the right one's; where that is 0 (a window of one token gives queries no gradient),
    the root of the mean square."""
    found, right = found.detach().double(), right.detach().double().to(found.device)
    size = float(right.norm())
    return float((found - right).norm()) / (size if size > 0 else found.numel() ** 0.5)


def furthest(found: Tensor, right: Tensor) -> float:
    """The largest difference of an element; NaN where there is one."""
    difference = found.detach().double() - right.detach().double().to(found.device)
    return float(difference.abs().max()) if difference.numel() else 0.0


def low(device: str, precision: str) -> contextlib.AbstractContextManager[object]:
    """torch's autocast to bfloat16, or nothing."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=precision == "bf16")


# -------------------------------------------------------------------------------------------------------- models


def small(kind: str, **changes: Any) -> PreTrainedModel:
    """A random causal language model of one of transformers' types, float32 on the CPU, in evaluation mode."""
    return drawn(AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**changes), dtype=torch.float32))


def drawn(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with weights that show what each layer does: transformers' own (std 0.02) leave a small model so nearly
    uniform that whatever is wrong in it moves nothing."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in embeddings:
                parameter.copy_(noise * min(0.3, 2 / parameter.shape[-1] ** 0.5))
            elif parameter.dim() >= 2 and parameter.shape[-1] > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def llama(vocab: int = 512, hidden: int = 64, **changes: Any) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    return small("llama", **{**shape, **changes})


MARKS = ("<pad>", "<end>", "<user>", "<assistant>", "<system>", "<turn>")


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, behind some marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*MARKS, *letters])}
    inside = Tokenizer(models.BPE(vocabulary, []))
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inside.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inside.add_special_tokens(list(MARKS))
    return PreTrainedTokenizerFast(tokenizer_object=inside, eos_token="<end>", pad_token="<pad>")


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A checkpoint folder of the model, with the tokenizer of bytes."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------------- texts


def text(length: int, vocab: int, seed: int, begins: Sequence[int] = (), prompt: int = 1) -> Encoded:
    """Random tokens behind ``begins``, ``length`` in all; those behind the first ``prompt`` are predicted."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randint(min(8, vocab - 1), vocab, (length - len(begins),), generator=generator).tolist()
    return Encoded((*begins, *own), tuple(i >= prompt for i in range(length)))


def forked(prompt: int, replies: Sequence[int], vocab: int, seed: int) -> list[Encoded]:
    """Replies of so many tokens to one prompt."""
    begins = text(prompt, vocab, seed).ids
    return [text(prompt + n, vocab, 1000 * seed + i, begins, prompt) for i, n in enumerate(replies)]


# -------------------------------------------------------------------------------------------------- the model's own


@dataclass(frozen=True)
class Own:
    """What a model says of some sequences, each by itself and unpadded: hidden states that its head reads and
    log-probabilities of the masked tokens, in a row each, and the gradients of the sum of the latter's."""

    hidden: Tensor
    logp: Tensor
    gradients: dict[str, Tensor]


def own(model: PreTrainedModel, rows: Sequence[Encoded], device: str, precision: str = "fp32") -> Own:
    """By transformers' own forward pass alone."""
    model.zero_grad(set_to_none=True)
    hidden: list[Tensor] = []
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0].detach().float()))
    logps = []
    try:
        for row in rows:
            logp = row_logps(model, row, device, precision)
            if logp.numel():
                logp.sum().backward()
            logps.append(logp.detach())
    finally:
        hook.remove()
    return Own(torch.cat(hidden), torch.cat(logps), gradients(model))


def row_logps(model: nn.Module, row: Encoded, device: str, precision: str = "fp32") -> Tensor:
    """Log-probabilities of the masked tokens of one sequence, with their graph."""
    ids = torch.tensor([row.ids], device=device)
    with low(device, precision):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    logp = F.log_softmax(wide[:-1], -1).gather(1, ids[0, 1:, None]).squeeze(1)
    return logp[torch.tensor(row.mask[1:], dtype=torch.bool, device=device)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def apart(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """As :func:`relative`, over all gradients together."""
    assert found.keys() == right.keys(), f"gradients of other parameters: {sorted(found.keys() ^ right.keys())[:3]}"
    return relative(torch.cat([found[n].flatten() for n in right]), torch.cat([right[n].flatten() for n in right]))


def copied(model: PreTrainedModel, device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers alone computes it, by plain attention."""
    twin = copy.deepcopy(model).to(device=device, dtype=dtype).eval()
    twin.set_attn_implementation("eager")
    return twin
