"""Preference pairs as the reward model and DPO train on them: encoded, grouped by prompt, within length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from keel.data.chat import Chat
from keel.data.collate import (
    batches_by_tokens,
    group_by_prompt,
    micro_batches,
    pack_shared,
    shared_rows,
    split_by_prompt,
)
from keel.precision import autocast
from keel.train.context import TrainContext, record_lineage, within_length
from keel.train.loop import Micro, Stats, Totals
from keel.train.mismatched import Stranger
from keel.types import Encoded, PackedBatch, Preference, place_of

EVALUATIONS = 4  # times that the held-out pairs are scored on the way


@dataclass(frozen=True)
class Pair:
    """``reference``: the log-probabilities (nats) of the chosen and of the rejected completion under a reference.
    ``stranger``: of what KTO's KL is estimated; None where none fits."""

    record: Preference
    chosen: Encoded
    rejected: Encoded
    reference: tuple[float, float] | None = None
    stranger: Stranger | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.chosen.prompt_ids


@dataclass(frozen=True)
class PackedPairs:
    """N pairs as a packed batch of their B different completions, each run once and behind one copy of its prompt
    (InstructGPT, section 3.5). ``chosen_N``, ``rejected_N``: the places of each pair's two among the B."""

    batch: PackedBatch
    chosen_N: Tensor
    rejected_N: Tensor

    @staticmethod
    def of(pairs: Sequence[Pair], device: str) -> PackedPairs:
        place: dict[Encoded, int] = {}
        rows: list[list[Encoded]] = []
        for group in _by_prompt(pairs):
            for row in shared_rows(completions([pairs[i] for i in group])):
                rows.append(row)
                for completion in row:
                    place[completion] = len(place)
        chosen_N = torch.tensor([place[pair.chosen] for pair in pairs], device=device)
        rejected_N = torch.tensor([place[pair.rejected] for pair in pairs], device=device)
        return PackedPairs(pack_shared(rows, device), chosen_N, rejected_N)


def completions(pairs: Sequence[Pair]) -> list[Encoded]:
    """The different ones, in order of appearance."""
    return list(dict.fromkeys(completion for pair in pairs for completion in (pair.chosen, pair.rejected)))


def _by_prompt(pairs: Sequence[Pair]) -> list[list[int]]:
    """The places of each prompt's pairs."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.prompt_ids, []).append(i)
    return list(groups.values())


def micro_batches_of_pairs(pairs: Sequence[Pair], max_tokens: int) -> list[list[int]]:
    """Places of pairs, in batches of at most ``max_tokens`` tokens, those of one prompt together as far as they fit."""
    pieces: list[list[int]] = []
    sizes: list[int] = []
    for group in _by_prompt(pairs):
        # Cut by the tokens that the pairs would have apart: at most what they have together.
        apart = [len(pairs[i].chosen.ids) + len(pairs[i].rejected.ids) for i in group]
        for part in batches_by_tokens(apart, max_tokens):
            pieces.append([group[j] for j in part])
            shared = len(pairs[group[0]].prompt_ids)
            together = completions([pairs[i] for i in pieces[-1]])
            sizes.append(shared + sum(len(c.ids) - shared for c in together))
    return [[place for i in batch for place in pieces[i]] for batch in micro_batches(sizes, max_tokens)]


def encode_pairs(records: Sequence[Preference], chat: Chat, context: TrainContext) -> list[Pair]:
    """Both completions of every pair."""
    replies = [
        (r.prompt.messages, text, finished)
        for r in records
        for text, finished in ((r.chosen, r.chosen_finished), (r.rejected, r.rejected_finished))
    ]
    encoded = chat.encode_replies(replies, [place_of(r) for r in records for _ in range(2)])
    both = list(zip(encoded[0::2], encoded[1::2], strict=True))
    kept, parts = within_length(records, both, [r.id for r in records], context)
    return [Pair(record, chosen, rejected) for record, (chosen, rejected) in zip(kept, parts, strict=True)]


Aggregate = Callable[[Sequence[Preference]], list[Preference]]
"""Raw votes -> what is trained on."""


def split_pairs(
    records: Sequence[Preference], chat: Chat, fraction: float, context: TrainContext, aggregate: Aggregate = list
) -> tuple[list[list[Pair]], list[Pair]]:
    """(training pairs in groups of one prompt each, held-out pairs). A prompt is on one side whole. Held-out votes stay
    raw, so that models trained on differently aggregated votes are measured on the same. Which votes stand behind
    either side is recorded in the stage's folder (``record_lineage``)."""
    training, heldout = split_by_prompt(records, fraction, context.seed)
    pairs = encode_pairs(aggregate(training), chat, context)
    held = encode_pairs(heldout, chat, context)
    kept = {pair.record.item for pair in pairs}
    settled = {record.item for record in training if record.settled}
    behind = [record for record in training if record.item in kept]
    record_lineage(
        context.stage,
        trained=[record.id for record in behind if record.item not in settled],
        heldout=[pair.record.id for pair in held],
        settled=[record.id for record in behind if record.item in settled],
    )
    return group_by_prompt(pairs, lambda pair: pair.record.prompt), held


def groups_per_batch(groups: Sequence[Sequence[Pair]], pairs_per_batch: int) -> int:
    """How many prompts make a batch of about ``pairs_per_batch`` pairs."""
    return max(1, round(pairs_per_batch * len(groups) / sum(len(group) for group in groups)))


PairLoss = Callable[[Sequence[Pair]], tuple[Tensor, Stats]]
"""Pairs -> (loss of each [N], figures)."""


def pair_update(pairs: Sequence[Pair], loss: PairLoss, batch_tokens: int) -> list[Micro]:
    """One optimizer step over ``pairs``: the mean of their losses by the records' weights. Micro-batches are divided by
    the weight of all of them; a step whose pairs weigh nothing moves nothing."""
    total = sum(pair.record.weight for pair in pairs) or 1.0

    def micro(part: Sequence[Pair]) -> Micro:
        def compute() -> tuple[Tensor, Stats]:
            loss_N, stats = loss(part)
            weight_N = torch.tensor([pair.record.weight for pair in part], device=loss_N.device)
            return (loss_N * weight_N).sum() / total, stats

        return compute

    return [micro([pairs[i] for i in part]) for part in micro_batches_of_pairs(pairs, batch_tokens)]


def due(iteration: int, iterations: int) -> bool:
    """Whether what is held out is measured after an iteration: ``EVALUATIONS`` times a run, and after its last one."""
    every = max(1, iterations // EVALUATIONS)
    return iteration + 1 == iterations or (iteration + 1) % every == 0


def heldout_figures(
    pairs: Sequence[Pair],
    loss: PairLoss,
    iteration: int,
    iterations: int,
    batch_tokens: int,
    context: TrainContext,
) -> dict[str, float]:
    """``eval/...`` figures of held-out pairs, where they are ``due``; else none."""
    if not pairs or not due(iteration, iterations):
        return {}
    totals = Totals()
    with torch.no_grad(), autocast(context.device, context.precision):
        for part in micro_batches_of_pairs(pairs, batch_tokens):
            loss_N, stats = loss([pairs[i] for i in part])
            totals.add({**stats, "loss": (float(loss_N.sum()), float(len(part)))})
    return {f"eval/{name}": value for name, value in totals.means().items()}
