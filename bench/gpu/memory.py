"""Peaks of memory: the head's loss above its hidden states, PPO on one base, SFT by length.

On a CPU everything runs and no peak is told: there torch does not count.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.gpu import data
from bench.gpu.models import LORA, architecture, policy
from bench.gpu.setting import Record, Setting
from bench.gpu.steps import one_base_step
from bench.gpu.timing import peak, reset_peak, timed_steps
from bench.gpu.training import FOREVER, settings_of
from bench.worker import clock
from bench.workers.keel import context_of
from keel.model.logprobs import head_logprobs
from keel.model.packed import inner_model
from keel.precision import autocast
from keel.recipe.sft import SftStage
from keel.train.sft import Sft

TOKENS = 32_768
LENGTHS = (1024, 4096, 16_384, 32_768)


def run(setting: Setting) -> dict[str, Any]:
    record = Record(setting, "memory")
    for model in setting.chosen("qwen3-1.7b", "qwen3-4b"):
        for trained in (False, True):
            kind = "trained" if trained else "frozen"
            record.case(f"head of {model}, {kind}", 20, lambda *of: _head(setting, *of), model, trained)
    for model in setting.chosen("llama-3.1-8b"):
        record.case(f"ppo {model}, LoRA, one base", 100, lambda *of: one_base_step(record, *of), model, False)
    for model, lora in (("qwen3-1.7b", False), ("llama-3.1-8b", True)):
        if model in setting.chosen(model):
            for length in LENGTHS[:1] if setting.tiny else LENGTHS:
                name = f"sft {model}{', LoRA' * lora}, checkpointing, {length:,} tokens"
                record.case(name, 30, lambda *of: _sft(setting, *of), model, lora, 64 if setting.tiny else length)
    return {"cases": record.cases, "failed": record.failed}


def _head(setting: Setting, name: str, trained: bool) -> dict[str, Any]:
    """Log-probabilities of 32,768 tokens and their gradients. ``above``: bytes at the peak that were not there before,
    the hidden states' gradient among them; where the head is trained, so is its own."""
    shape, tokens = architecture(setting, name), 64 if setting.tiny else TOKENS
    model = policy(setting, name)
    head = inner_model(model).get_output_embeddings().weight
    model.requires_grad_(False)
    head.requires_grad_(trained)
    hidden = torch.randn(tokens, shape.hidden, device=setting.device).requires_grad_()
    ids = torch.randint(shape.vocab, (tokens,), device=setting.device)
    took = []
    for _ in range(2):
        hidden.grad = head.grad = None
        before = torch.cuda.memory_allocated() if setting.cuda else 0
        reset_peak(setting.device)
        began = clock(setting.device)
        with autocast(setting.device, setting.precision):
            loss = -head_logprobs(model, hidden, ids).logp_C.mean()
        loss.backward()
        took.append(clock(setting.device) - began)
        del loss
    found = peak(setting.device)
    gradients = {"hidden_gradient": hidden.nbytes, "head_gradient": head.nbytes * trained}
    above = {"above": found["peak"] - before} if found else {}
    return {"tokens": tokens, "vocabulary": shape.vocab, "seconds": took[-1], **above, **gradients, **found}


def _sft(setting: Setting, name: str, lora: bool, length: int) -> dict[str, Any]:
    """One sequence a step."""
    rows = data.whole(1, length, architecture(setting, name).vocab)
    config = SftStage(**settings_of(setting, True), batch_tokens=length, batch_size=1, epochs=FOREVER)
    model = policy(setting, name, lora=LORA if lora else None, checkpointing=True)
    algorithm = Sft(model, rows, [], config, context_of(setting.device, setting.precision))
    found = timed_steps(algorithm, config, setting.device, setting.precision, 0.0)
    return {"tokens_a_second": length / found["step"], **found}
