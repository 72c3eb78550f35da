"""``keel harbor build --ledger``: the base model goes on with pages of ledgers, and ships beside it for reasoning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from keel.harbor.build import SHIPPED, STATE, Settings, Step, pretrain, save_base
from keel.harbor.ledger import checked_page, page
from keel.types import PackedBatch, Reporter

WORKED = Settings(tokens=6_086_656)
CHECKED = Settings(tokens=4_100_000, lr=1e-3, muon=False)
VERDICTS = {True: " right", False: " wrong"}

# Token ids of a sequence, and what each should be learned as: its own id, another, or None (not learned).
_Sequence = tuple[list[int], list[int | None]]


def build_ledger(
    out_dir: Path, reporter: Reporter, seed: int = 0, phases: tuple[Settings, Settings] = (WORKED, CHECKED)
) -> LlamaForCausalLM:
    """Trains the shipped base model on pages of ledgers and writes it, with its tokenizer, into ``out_dir``.
    ``phases``: on how many tokens, and how; first of pages that are worked, then of checked ones. It learns the working
    and the verdicts alone: a page's question is drawn at random, so there is nothing to learn.

    A build that was killed goes on from its last state in ``out_dir``, to the same bits for the same thread count. The
    shipped model: seed 0, these settings; the first phase on 16 threads of a processor that multiplies bfloat16 by
    itself (torch 2.11, five minutes), the second on one thread of such a one (torch 2.13, 26 minutes beside others).
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    batches: list[Callable[[int], Step]] = [
        partial(_worked, tokenizer, seed, phases[0].batch_tokens),
        partial(_checked, tokenizer, seed, phases[1].batch_tokens),
    ]
    states = [out_dir / f"{i}_{STATE}" for i in range(2)]
    for settings, batch, state in zip(phases, batches, states, strict=True):
        pretrain(model, batch, settings, state, reporter)
        model.to(torch.bfloat16).to(torch.float32)  # as its checkpoint has it
    save_base(model, tokenizer, out_dir)
    for state in states:
        state.unlink(missing_ok=True)
    return model


def _worked(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int, step: int) -> Step:
    rng = Random(f"ledger pages {seed} {step}")
    return _filled(tokens, (_worked_page(tokenizer, rng) for _ in repeat(None)))


def _checked(tokenizer: PreTrainedTokenizerFast, seed: int, tokens: int, step: int) -> Step:
    rng = Random(f"checked ledger pages {seed} {step}")
    return _filled(tokens, (_checked_page(tokenizer, rng) for _ in repeat(None)))


def _worked_page(tokenizer: PreTrainedTokenizerFast, rng: Random) -> _Sequence:
    question, working = page(rng)
    asked, told = tokenizer([f"{question}\n", working])["input_ids"]
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    return [*asked, *told, end], [*(None for _ in asked), *told, end]


def _checked_page(tokenizer: PreTrainedTokenizerFast, rng: Random) -> _Sequence:
    """The lines, and what was said of each: right, but for a last one that is wrong. Pages with a verdict behind their
    last line alone, one for each line, are read as one: in the newline's place the verdict is learned, so that the
    lines stand as they do in a reply."""
    question, lines, right = checked_page(rng)
    asked, newline, *told = tokenizer([f"{question}\n", "\n", *lines])["input_ids"]
    said = {mark: tokenizer(text)["input_ids"] for mark, text in VERDICTS.items()}
    assert all(len(ids) == 1 for ids in said.values())
    ids, wanted = list(asked), list[int | None]([None] * len(asked))
    for i, line in enumerate(told):
        ids += [*line, *newline]
        wanted += [*line, *said[right or i < len(told) - 1]]
    return ids, wanted


def _filled(tokens: int, pages: Iterable[_Sequence]) -> Step:
    """One step's pages, each a sequence of its own. The last is cut where the batch is full: every step has the same
    number of tokens, since oneDNN builds its kernels anew for every new shape."""
    ids: list[int] = []
    wanted: list[int | None] = []
    lengths: list[int] = []
    for page_ids, page_wanted in pages:
        lengths.append(min(tokens - len(ids), len(page_ids)))
        ids += page_ids
        wanted += page_wanted
        if len(ids) >= tokens:
            break
    batch = PackedBatch(
        ids_T=torch.tensor(ids[:tokens]),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)]),
        mask_T=torch.tensor([token is not None for token in wanted[:tokens]]),
    )
    return batch, torch.tensor([token for token in wanted[:tokens] if token is not None])
