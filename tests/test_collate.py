"""Packing, batching and splitting, against hand-made examples and properties that hold for any input."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.data.collate import (
    batches_by_tokens,
    epoch_order,
    group_by_prompt,
    messages_hash,
    micro_batches,
    micro_batches_by_prompt,
    pack,
    pack_by_prompt,
    pack_shared,
    shared_rows,
    split_by_prompt,
)
from keel.types import (
    Demonstration,
    Encoded,
    LabelledCompletion,
    Message,
    Preference,
    Prompt,
    StepLabels,
    UserError,
)


def prompt(text: str) -> Prompt:
    return Prompt(id=text, messages=(Message("user", text),))


def pair(text: str, number: int) -> Preference:
    return Preference(f"{text}-{number}", prompt(text), "a", "b")


def test_pack_by_hand() -> None:
    batch = pack([Encoded((5, 6, 7), (False, True, True)), Encoded((8,), (True,)), Encoded((9, 4), (True, True))])
    assert batch.ids_T.tolist() == [5, 6, 7, 8, 9, 4]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    # The first token of each sequence is never predicted: nothing comes before it.
    assert batch.mask_T.tolist() == [False, True, True, False, False, True]
    assert batch.ids_T.dtype == batch.positions_T.dtype == batch.cu_seqlens.dtype == torch.int64
    assert batch.mask_T.dtype == torch.bool
    assert (batch.num_sequences, batch.num_tokens, batch.lengths().tolist()) == (3, 6, [3, 1, 2])


def test_a_shared_beginning_is_laid_down_once() -> None:
    def reply(*ids: int) -> Encoded:
        return Encoded((5, 6, *ids), (False, False, *(True for _ in ids)))

    batch = pack_shared([[reply(7, 8), reply(9), reply(7)], [Encoded((4, 3), (False, True))]])
    assert batch.ids_T.tolist() == [5, 6, 7, 8, 9, 7, 4, 3]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 2, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 6, 8]
    assert batch.mask_T.tolist() == [False, False, True, True, True, True, False, True]
    assert batch.fork_B is not None
    assert batch.fork_B.tolist() == [-1, 1, 1, -1]
    # What is predicted is never shared, and every sequence has a token of its own.
    learned = Encoded((5, 6, 7), (False, True, True))
    assert pack_shared([[learned, learned]]).ids_T.tolist() == [5, 6, 7, 6, 7]
    assert pack_shared([[Encoded((5,), (False,)), Encoded((5, 6), (False, True))]]).fork_B is None


def test_rows_that_share_a_beginning_stay_short() -> None:
    replies = [Encoded((1, 2, *range(n)), (False, False, *(True for _ in range(n)))) for n in (3, 3, 4, 9)]
    assert [[len(s.ids) for s in row] for row in shared_rows(replies, longest=8)] == [[5, 5], [6], [11]]


def test_pack_refuses_what_is_no_sequence() -> None:
    for broken in ([], [Encoded((), ())], [Encoded((1, 2), (True,))]):
        with pytest.raises(AssertionError):
            pack(broken)


tokens = st.lists(st.tuples(st.integers(0, 2**40), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(tokens, min_size=1, max_size=8))
def test_pack_loses_nothing(rows: list[list[tuple[int, bool]]]) -> None:
    sequences = [Encoded(tuple(t for t, _ in row), tuple(m for _, m in row)) for row in rows]
    batch = pack(sequences)
    assert batch.num_tokens == sum(len(row) for row in rows)
    pieces = list(pairwise(batch.cu_seqlens.tolist()))
    assert [tuple(batch.ids_T[i:j].tolist()) for i, j in pieces] == [s.ids for s in sequences]
    assert [tuple(batch.mask_T[i:j].tolist()) for i, j in pieces] == [(False, *s.mask[1:]) for s in sequences]
    assert batch.positions_T.tolist() == [i for row in rows for i in range(len(row))]


def test_batches_keep_the_order_and_let_the_long_one_go_alone() -> None:
    lengths = [3, 4, 20, 2, 2, 2]
    assert batches_by_tokens(lengths, 7) == [[0, 1], [2], [3, 4, 5]]
    assert batches_by_tokens(lengths, 7, order=[5, 2, 0, 1, 3]) == [[5], [2], [0, 1], [3]]
    assert batches_by_tokens([], 7) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 50), st.randoms(use_true_random=False))
def test_batches_hold_each_sequence_once_within_the_bound(lengths: list[int], bound: int, random) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    batches = batches_by_tokens(lengths, bound, order)
    assert [i for batch in batches for i in batch] == order
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= bound for batch in batches)
    for batch, following in pairwise(batches):  # greedy: no batch could have taken one more
        assert sum(lengths[i] for i in batch) + lengths[following[0]] > bound


def completions(own: list[tuple[int, int]]) -> list[Encoded]:
    """(which prompt, tokens behind it); prompt p is p + 3 tokens long, and every completion differs."""
    return [
        Encoded((p,) * (p + 3) + tuple(range(100 * i, 100 * i + n)), (False,) * (p + 3) + (True,) * n)
        for i, (p, n) in enumerate(own, start=1)
    ]


def test_completions_of_one_prompt_are_packed_in_the_order_given() -> None:
    rows = completions([(0, 2), (1, 2), (1, 1), (0, 1)])
    batch = pack_by_prompt(rows)
    assert batch.ids_T.tolist() == [0, 0, 0, 100, 101, 1, 1, 1, 1, 200, 201, 300, 0, 0, 0, 400]
    assert batch.ids_T[batch.mask_T].tolist() == pack(rows).ids_T[pack(rows).mask_T].tolist()
    assert batch.num_sequences == 4


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=40), st.integers(1, 400))
def test_micro_batches_by_prompt_hold_everything_once_within_the_limit(own: list[tuple[int, int]], bound: int) -> None:
    rows = completions(own)
    batches = micro_batches_by_prompt(rows, bound)
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    for batch in batches:
        packed = pack_by_prompt([rows[i] for i in batch])
        assert packed.num_tokens <= bound or len(batch) == 1
        learned = [t for i in batch for t in rows[i].ids[own[i][0] + 3 :]]
        assert packed.ids_T[packed.mask_T].tolist() == learned


def test_members_of_a_group_share_a_micro_batch_as_far_as_they_fit() -> None:
    rows = completions([(0, 5), (1, 5), (0, 5), (1, 5), (0, 5)])
    assert micro_batches_by_prompt(rows, 40) == [[1, 3, 0, 2, 4]]  # 4 + 10 tokens, 3 + 15 tokens
    assert micro_batches_by_prompt(rows, 18) == [[1, 3], [0, 2, 4]]
    assert micro_batches_by_prompt(rows, 17) == [[4], [0, 2], [1, 3]]  # 8, 13 and 14 tokens
    assert micro_batches_by_prompt(rows, 3) == [[0], [2], [4], [1], [3]]


def test_micro_batches_are_of_similar_lengths_within_the_limit() -> None:
    assert micro_batches([5, 1, 9, 3, 7, 2], 10) == [[1, 5, 3], [0], [4], [2]]
    assert micro_batches([], 10) == []


def test_epoch_order_depends_on_seed_and_epoch_alone() -> None:
    # Fixed for good: a run that is resumed under another version must find its place.
    assert epoch_order(8, seed=3, epoch=1) == [4, 2, 7, 3, 5, 0, 1, 6]
    assert sorted(epoch_order(100, 0, 0)) == list(range(100))
    orders = {tuple(epoch_order(100, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_prompt_lies_on_one_side_whatever_record_holds_it() -> None:
    texts = [f"question {i}" for i in range(200)]
    prompts = [prompt(t) for t in texts]
    pairs = [pair(t, i) for t in texts for i in range(3)]
    reply = Message("assistant", "x")
    demos = [Demonstration(t, (*prompt(t).messages, reply, Message("user", f"more, {t}"), reply)) for t in texts]
    thumbs = [LabelledCompletion(t, prompt(t), "x", True) for t in texts]
    steps = [StepLabels(t, prompt(t), ("x",), (1.0,)) for t in texts]
    train, heldout = split_by_prompt(prompts, 0.2, seed=1)
    held = {p.id for p in heldout}
    assert [p for p in prompts if p.id not in held] == train  # in the order given
    assert 20 <= len(heldout) <= 60  # 200 draws at 0.2: 40, and 3.5 standard deviations are 20
    assert {p.prompt.id for p in split_by_prompt(pairs, 0.2, seed=1)[1]} == held
    assert len(split_by_prompt(pairs, 0.2, seed=1)[1]) == 3 * len(held)
    for records in (demos, thumbs, steps):
        assert {r.id for r in split_by_prompt(records, 0.2, seed=1)[1]} == held
    # More data leaves every earlier prompt on its side; another seed draws anew.
    assert {p.id for p in split_by_prompt([prompt("new"), *prompts], 0.2, seed=1)[1]} - {"new"} == held
    assert {p.id for p in split_by_prompt(prompts, 0.2, seed=2)[1]} != held


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_small_sets_have_two_sides(count: int, fraction: float) -> None:
    for seed in range(20):
        train, heldout = split_by_prompt([prompt(str(i)) for i in range(count)], fraction, seed)
        assert train and heldout  # noqa: PT018
        assert len(train) + len(heldout) == count


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(UserError, match="3 records have 1 different prompts"):
        split_by_prompt([pair("same", i) for i in range(3)], 0.1, 0)
    with pytest.raises(UserError, match="0 records"):
        split_by_prompt([], 0.1, 0)


def test_hash_sees_roles_and_borders() -> None:
    variants = [
        [Message("user", "ab"), Message("user", "c")],
        [Message("user", "a"), Message("user", "bc")],
        [Message("system", "ab"), Message("user", "c")],
        [Message("user", "ab")],
    ]
    assert len({messages_hash(v) for v in variants}) == 4
    # Fixed for good: ids and splits of earlier runs hang on it.
    assert messages_hash([Message("user", "hello")]) == "541e6c9035e4e824e9c4c34bb8c6028c"


def test_pairs_of_a_prompt_stay_together() -> None:
    pairs = [pair("x", 0), pair("y", 0), pair("x", 1), pair("z", 0), pair("y", 1)]
    groups = group_by_prompt(pairs, lambda pair: pair.prompt)
    assert [[p.id for p in group] for group in groups] == [["x-0", "x-1"], ["y-0", "y-1"], ["z-0"]]
