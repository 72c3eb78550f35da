"""``keel harbor build --ledger``: the base model goes on with pages of ledgers, and ships beside it for reasoning."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from keel.harbor.build import SHIPPED, STATE, Settings, pretrain, save_base
from keel.harbor.ledger import page
from keel.types import PackedBatch, Reporter

LEDGER = Settings(tokens=6_086_656)


def build_ledger(out_dir: Path, reporter: Reporter, seed: int = 0, settings: Settings = LEDGER) -> LlamaForCausalLM:
    """Trains the shipped base model on ``settings.tokens`` tokens of ledger pages and writes it, with its tokenizer,
    into ``out_dir``. It learns the working alone: a page's question is drawn at random, so there is nothing to learn.

    A build that was killed goes on from ``out_dir/build_state.pt``, to the same bits for the same thread count. The
    shipped model: seed 0, these settings, 16 threads of a processor that multiplies bfloat16 by itself (on one that
    does not this takes many hours), torch 2.11, five minutes.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    pretrain(model, partial(_batch, tokenizer, seed, settings.batch_tokens), settings, out_dir / STATE, reporter)
    save_base(model, tokenizer, out_dir)
    (out_dir / STATE).unlink(missing_ok=True)
    return model


def _batch(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int, step: int) -> PackedBatch:
    """One step's pages, each a sequence of its own. The last is cut where the batch is full: every step has the same
    number of tokens, since oneDNN builds its kernels anew for every new shape."""
    rng = Random(f"ledger pages {seed} {step}")
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    ids: list[int] = []
    mask: list[bool] = []
    lengths: list[int] = []
    while len(ids) < tokens:
        question, working = page(rng)
        asked, told = tokenizer([f"{question}\n", working])["input_ids"]
        lengths.append(min(tokens - len(ids), len(asked) + len(told) + 1))
        ids += [*asked, *told, end]
        mask += [False] * len(asked) + [True] * (len(told) + 1)
    return PackedBatch(
        ids_T=torch.tensor(ids[:tokens]),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)]),
        mask_T=torch.tensor(mask[:tokens]),
    )
