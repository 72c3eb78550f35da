"""Small things that many tests need: a tokenizer, random models, records. Made in memory, never downloaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keel.types import Demonstration, Message, Preference, Prompt

WORDS = "the a ship port captain sails from to salt rope what is good day yes no one two three four five".split()  # noqa: SIM905


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the harbor's special tokens and no chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()), eos_token="<|end|>", pad_token="<|pad|>"
    )


def tiny_llama(seed: int = 0, hidden: int = 32) -> LlamaForCausalLM:
    """A random Llama of about 30,000 parameters that fits :func:`tiny_tokenizer`."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder of a tiny base model."""
    tiny_llama(seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def prompt(n: int) -> Prompt:
    text = f"what is {WORDS[n % len(WORDS)]} {WORDS[(n // len(WORDS)) % len(WORDS)]} {n}"
    return Prompt(id=f"p{n}", messages=(Message("user", text),), kind="even" if n % 2 == 0 else "odd")


def demonstrations(count: int) -> list[Demonstration]:
    return [
        Demonstration(f"d{n}", (*prompt(n).messages, Message("assistant", " ".join(WORDS[n % 7 : n % 7 + 2 + n % 5]))))
        for n in range(count)
    ]


def preferences(count: int) -> list[Preference]:
    """Longer replies with 'good' are preferred; every seventh is a tie."""
    return [
        Preference(f"r{n}", prompt(n), chosen="good day captain", rejected=WORDS[n % 9], tie=n % 7 == 6)
        for n in range(count)
    ]


@dataclass
class Counting:
    """A reporter that remembers what it was told."""

    started: list[tuple[str, int]] = field(default_factory=list)
    steps: int = 0

    def start(self, task: str, total: int) -> None:
        self.started.append((task, total))

    def advance(self, steps: int = 1, **_: float) -> None:
        self.steps += steps

    def note(self, text: str) -> None:
        pass
