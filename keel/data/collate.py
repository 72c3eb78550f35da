"""Encoded conversations -> packed tensors, and the orders in which they are seen. Pure: no tokenizer, no files.

A batch is *packed*: its sequences lie end to end in one row of ``T`` real tokens, with no padding anywhere. So a result
depends neither on a padding side nor on the lengths of a sequence's batch mates. Shape suffixes: see ``keel.types``.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from keel.types import (
    Demonstration,
    Encoded,
    LabelledCompletion,
    Message,
    PackedBatch,
    Preference,
    Prompt,
    StepLabels,
    UserError,
)

if TYPE_CHECKING:
    import torch  # the two functions that lay tensors down import it: readers of files need this module's hashes alone

Record = Prompt | Demonstration | Preference | LabelledCompletion | StepLabels
R = TypeVar("R", bound=Record)
T = TypeVar("T")


def pack(sequences: Sequence[Encoded], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay B sequences end to end.

    Returns a ``PackedBatch``: ids_T, positions_T (0, 1, 2, ... in each sequence), cu_seqlens [B+1], mask_T. A
    sequence's first token is never predicted (nothing precedes it), so its mask is False whatever the record says.
    """
    import torch

    assert sequences, "pack needs at least one sequence"
    assert all(s.ids and len(s.ids) == len(s.mask) for s in sequences), (
        "each token has one mask value, and there is one"
    )
    lengths_B = torch.tensor([len(s.ids) for s in sequences])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
    starts_B = cu_seqlens[:-1]
    mask_T = torch.tensor([learned for s in sequences for learned in s.mask], dtype=torch.bool)
    mask_T[starts_B] = False
    ids_T = torch.tensor([token for s in sequences for token in s.ids], dtype=torch.int64)
    positions_T = torch.arange(ids_T.numel()) - starts_B.repeat_interleave(lengths_B)
    return PackedBatch(ids_T=ids_T, positions_T=positions_T, cu_seqlens=cu_seqlens, mask_T=mask_T).to(device)


def pieces(row: Encoded, longest: int) -> list[Encoded]:
    """A text cut every ``longest`` tokens, as in pretraining; a piece of which nothing is predicted is left out."""
    cut = [Encoded(row.ids[i : i + longest], row.mask[i : i + longest]) for i in range(0, len(row.ids), longest)]
    return [piece for piece in cut if piece.predicted]


SHARED_ROW_UP_TO = 256  # tokens of a prompt and the completions behind it; attention's work grows with its square


def shared_rows(sequences: Sequence[Encoded], longest: int = SHARED_ROW_UP_TO) -> list[list[Encoded]]:
    """Sequences that begin alike, cut into rows for :func:`pack_shared` of at most ``longest`` tokens each (a sequence
    that leaves no room for a second one goes alone)."""
    shared = common_prefix(sequences)
    groups = batches_by_tokens([len(s.ids) - shared for s in sequences], max(1, longest - shared))
    return [[sequences[i] for i in group] for group in groups]


def common_prefix(sequences: Sequence[Encoded]) -> int:
    """How many first tokens all sequences share, none of them to be predicted, and each has at least one more."""
    first = sequences[0]
    shared = min(min(len(s.prompt_ids), len(s.ids) - 1) for s in sequences)
    for s in sequences[1:]:
        if s.ids[:shared] != first.ids[:shared]:
            shared = next(i for i, (a, b) in enumerate(zip(s.ids, first.ids, strict=False)) if a != b)
    return shared


def pack_shared(rows: Sequence[Sequence[Encoded]], device: torch.device | str = "cpu") -> PackedBatch:
    """As :func:`pack`, over all sequences of all rows, but what the sequences of a row begin with in common is there
    once, with the first of them. Completions of one prompt then cost their own tokens only."""
    import torch

    sequences, own, forks, end = [], [], [], 0
    for row in rows:
        shared = common_prefix(row) if len(row) > 1 else 0
        fork = end + shared - 1
        for i, sequence in enumerate(row):
            begin = shared if i else 0
            sequences.append(sequence)
            own.append(range(begin, len(sequence.ids)))
            forks.append(fork if begin else -1)
            end += len(own[-1])
    if max(forks) < 0:
        return pack(sequences, device)
    lengths_B = torch.tensor([len(places) for places in own])
    mask_T = torch.tensor([s.mask[i] for s, places in zip(sequences, own, strict=True) for i in places])
    positions_T = torch.tensor([i for places in own for i in places])
    return PackedBatch(
        ids_T=torch.tensor([s.ids[i] for s, places in zip(sequences, own, strict=True) for i in places]),
        positions_T=positions_T,
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)]),
        mask_T=mask_T & (positions_T > 0),
        fork_B=torch.tensor(forks),
    ).to(device)


def pack_by_prompt(sequences: Sequence[Encoded], device: torch.device | str = "cpu") -> PackedBatch:
    """As :func:`pack`, in the same order, but those of one prompt that follow one another stand behind one copy of it,
    in rows of :func:`shared_rows`."""
    runs = [list(run) for _, run in groupby(sequences, key=lambda sequence: sequence.prompt_ids)]
    return pack_shared([row for run in runs for row in shared_rows(run)], device)


def batches_by_tokens(lengths: Sequence[int], max_tokens: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Cut an order of sequences into batches of at most ``max_tokens`` tokens; a longer sequence goes alone.

    ``lengths[i]`` is the number of tokens of sequence i; ``order`` (default: as they come) is kept, batch after batch.
    """
    batches: list[list[int]] = []
    room = 0
    for index in range(len(lengths)) if order is None else order:
        if not batches or lengths[index] > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Batches of at most ``max_tokens`` tokens and of similar lengths, the shortest first: attention pads within a
    batch."""
    return batches_by_tokens(lengths, max_tokens, sorted(range(len(lengths)), key=lengths.__getitem__))


def micro_batches_by_prompt(sequences: Sequence[Encoded], max_tokens: int) -> list[list[int]]:
    """Batches for :func:`pack_by_prompt`, of at most ``max_tokens`` tokens and of rows of similar lengths: sequences of
    one prompt lie side by side as far as they share a copy of it."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(sequence.prompt_ids, []).append(i)
    rows: list[list[int]] = []
    sizes: list[int] = []
    for prompt, members in groups.items():
        own = [len(sequences[i].ids) - len(prompt) for i in members]
        for part in batches_by_tokens(own, max(1, min(SHARED_ROW_UP_TO, max_tokens) - len(prompt))):
            rows.append([members[j] for j in part])
            sizes.append(len(prompt) + sum(own[j] for j in part))
    return [[i for row in batch for i in rows[row]] for batch in micro_batches(sizes, max_tokens)]


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(n)`` that depends on the seed and the epoch alone, so a resumed run finds its place.

    From Python's generator rather than torch's: the order is the same on every device and version.
    """
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def prompt_messages(record: Record) -> tuple[Message, ...]:
    """What the assistant answers in this record.

    Of a demonstration that is everything before its first reply, because each of its replies is trained on; plain
    text stands for itself.
    """
    if isinstance(record, Prompt):
        return record.messages
    if not isinstance(record, Demonstration):
        return record.prompt.messages
    if record.plain:
        return record.messages
    first_reply = next(i for i, message in enumerate(record.messages) if message.role == "assistant")
    return record.messages[:first_reply]


def messages_hash(messages: Sequence[Message], salt: str = "") -> str:
    """32 hex digits that depend on the roles and texts (and the salt, and what is not learned) alone, the same on every
    machine."""
    turns = ([m.role, m.content] if m.learned else [m.role, m.content, False] for m in messages)
    content = json.dumps([salt, *turns], ensure_ascii=False)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def split_by_prompt(records: Sequence[R], fraction: float, seed: int) -> tuple[list[R], list[R]]:
    """(train, held out), each in the order given.

    A hash of the prompt's messages decides, so a prompt lies on one side whole, and on the same side in every file
    that is split with this seed and fraction. ``fraction`` of the *prompts* is held out, give or take the hash's
    chance; in a small set the prompt nearest to the border crosses it when a side would be empty.

    Raises UserError when there are fewer than two different prompts.
    """
    draws = [messages_hash(prompt_messages(record), salt=f"split {seed}") for record in records]
    different = sorted(set(draws))
    if len(different) < 2:
        raise UserError(
            f"cannot hold out prompts: the {len(records)} records have {len(different)} different prompts and need at "
            "least 2; add data, or name a separate held-out file"
        )
    border = f"{int(fraction * 16**16):016x}"  # hashes of hex digits compare as the numbers do
    border = min(max(border, different[0] + "0"), different[-1])
    train = [record for record, draw in zip(records, draws, strict=True) if draw >= border]
    heldout = [record for record, draw in zip(records, draws, strict=True) if draw < border]
    return train, heldout


def group_by_prompt(items: Sequence[T], prompt: Callable[[T], Prompt]) -> list[list[T]]:
    """What belongs to each prompt together: InstructGPT, section 3.5, puts the pairs of one in one batch, for seen
    apart they overfit. Groups and their members keep the order of first appearance."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(messages_hash(prompt(item).messages), []).append(item)
    return list(groups.values())
