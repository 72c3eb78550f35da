"""Preference pairs as the reward model and DPO train on them: encoded, grouped by prompt, within length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keel.data.chat import Chat
from keel.data.collate import group_by_prompt, split_by_prompt
from keel.train.context import TrainContext, within_length
from keel.types import Encoded, Preference


@dataclass(frozen=True)
class Pair:
    record: Preference
    chosen: Encoded
    rejected: Encoded

    @property
    def tokens(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)


def encode_pairs(records: Sequence[Preference], chat: Chat, context: TrainContext) -> list[Pair]:
    """Both completions of every pair."""
    replies = [
        (r.prompt.messages, text, finished)
        for r in records
        for text, finished in ((r.chosen, r.chosen_finished), (r.rejected, r.rejected_finished))
    ]
    encoded = chat.encode_replies(replies)
    both = list(zip(encoded[0::2], encoded[1::2], strict=True))
    kept, parts = within_length(records, both, [r.id for r in records], context.data, context.reporter)
    return [Pair(record, chosen, rejected) for record, (chosen, rejected) in zip(kept, parts, strict=True)]


def split_pairs(
    records: Sequence[Preference], chat: Chat, fraction: float, context: TrainContext
) -> tuple[list[list[Pair]], list[Pair]]:
    """(training pairs in groups of one prompt each, held-out pairs). A prompt is on one side whole."""
    training, heldout = split_by_prompt(records, fraction, context.seed)
    pairs = {id(pair.record): pair for pair in encode_pairs(training, chat, context)}
    groups = group_by_prompt([pair.record for pair in pairs.values()])
    return [[pairs[id(record)] for record in group] for group in groups], encode_pairs(heldout, chat, context)


def groups_per_batch(groups: Sequence[Sequence[Pair]], pairs_per_batch: int) -> int:
    """How many prompts make a batch of about ``pairs_per_batch`` pairs."""
    return max(1, round(pairs_per_batch * len(groups) / sum(len(group) for group in groups)))
