"""An annotator who keeps everything that a browser is sent, has this source, and knows in which order the queue was
filled, tries to tell gold items from others and which response was stored first. Nothing beats a coin."""

from __future__ import annotations

import math
import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from labelling_world import Client, World
from sqlalchemy import select

from keel.store import Store
from keel.store.tables import assignments, items, responses
from keel.web.app.limits import Buckets

ITEMS, GOLD, SEEN = 300, 60, 280
CHANCE = 1e-6  # that a guesser without any knowledge does as well as a test allows


@dataclass
class Sight:
    """What one item came with: its place in the stream, the handle, the texts, the figures, the size of the answers."""

    handle: str
    number: int  # of the question, which tells where in the queue's file it stood
    left: str
    right: str
    numbers: list[float] = field(default_factory=list)
    gold: bool = False  # the truth, from the database
    first_left: bool = False


def watch(world: World, client: Client) -> list[Sight]:
    """One annotator's work with items fetched ahead, skips and undos in between; all that was sent, in its order."""
    ahead: list[Sight] = []
    seen: list[Sight] = []
    last = {"today": 0, "done": 0, "wanted": 0}
    while len(seen) < SEEN:
        while len(ahead) < 3:
            answer = client.api("next", {"kind": "compare", "holding": [sight.handle for sight in ahead]})
            item, progress = answer.json()["item"], answer.json()["progress"]
            assert item is not None
            left, right = (shown["text"] for shown in item["shown"])
            number = int(re.findall(r"\d+", item["messages"][0]["html"])[0])
            moved = [progress[name] - last[name] for name in ("today", "done", "wanted")]
            size = len(answer.text) - len(left) - len(right) - len(item["messages"][0]["html"])
            ahead.append(Sight(item["id"], number, left, right, [*moved, size, len(answer.headers)]))
            last = progress
        sight = ahead.pop(0)
        vote = {"assignment": sight.handle, "token": uuid.uuid4().hex, "choice": "left"}
        answer = client.api("judge", vote)
        if len(seen) % 7 == 3:  # taken back and judged again
            back = client.api("undo", {"kind": "compare"})
            assert back.json()["item"]["id"] == sight.handle
            sight.numbers.append(len(back.text) - len(sight.left) - len(sight.right))
            answer = client.api("judge", vote | {"token": uuid.uuid4().hex})
        else:
            sight.numbers.append(0)
        progress = answer.json()["progress"]
        sight.numbers += [progress[name] - last[name] for name in ("today", "done", "wanted")]
        sight.numbers += [len(answer.text), answer.status_code]
        last = progress
        seen.append(sight)
    return seen


def truth(store: Store, seen: Sequence[Sight]) -> None:
    with store.transaction(writes=False) as connection:
        query = select(assignments.c.handle, assignments.c.shown, items.c.gold).join(items)
        rows = {row.handle: row for row in connection.execute(query)}
        text = {row.id: row.text for row in connection.execute(select(responses.c.id, responses.c.text))}
    for sight in seen:
        row = rows[sight.handle]
        sight.gold, sight.first_left = row.gold is not None, row.shown[0] < row.shown[1]
        assert text[row.shown[0]] == sight.left


def features(seen: Sequence[Sight]) -> np.ndarray:
    """Everything about a sight as numbers, with its neighbours' and its place in the stream."""
    rows = []
    for place, sight in enumerate(seen):
        near = [seen[max(0, min(len(seen) - 1, place + step))].number for step in (-2, -1, 1, 2)]
        code = [ord(letter) for letter in sight.handle[:6]] + [ord(letter) for letter in sight.handle[-3:]]
        order = [place, sight.number, sight.number - place, *(abs(sight.number - other) for other in near)]
        texts = [len(sight.left), len(sight.right), sight.left < sight.right, place % 20, place % 4]
        rows.append([*order, *texts, *sight.numbers, *code])
    table = np.array(rows, dtype=float)
    return (table - table.mean(0)) / np.maximum(table.std(0), 1e-9)


def logistic(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights of a logistic regression with a little decay, by plain gradient steps."""
    weights = np.zeros(table.shape[1] + 1)
    ones = np.hstack([table, np.ones((len(table), 1))])
    for _ in range(400):
        p = 1 / (1 + np.exp(-np.clip(ones @ weights, -30, 30)))
        weights -= 0.5 * (ones.T @ (p - labels) / len(labels) + 0.01 * weights)
    return weights


def hits(table: np.ndarray, labels: np.ndarray) -> tuple[int, int, int]:
    """(hits, picks, how many there are) on the second half, when the regression of the first half picks as many as
    there are there."""
    half = len(table) // 2
    weights = logistic(table[:half], labels[:half])
    scores = table[half:] @ weights[:-1]
    wanted = int(labels[half:].sum())
    picked = np.argsort(-scores, kind="stable")[:wanted]
    return int(labels[half:][picked].sum()), wanted, len(scores)


def bound(tries: int, chance: float) -> int:
    """The least number of successes that chance reaches with probability below CHANCE (binomial)."""
    tail, count = 1.0, 0
    while tail > CHANCE and count <= tries:
        tail -= math.comb(tries, count) * chance**count * (1 - chance) ** (tries - count)
        count += 1
    return count


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[Sight]:
    patch = pytest.MonkeyPatch()
    patch.setattr(Buckets, "take", lambda self, key: 0.0)  # an attacker has time, and a test has none
    folder: Path = tmp_path_factory.mktemp("attack")
    with Store(folder / "feedback.db") as store:
        world = World(store, items=ITEMS)
        manage = world.app.state.services.manage
        # picked all over the queue: where an admin takes the first ones, their questions tell whoever knows the file
        for item in random.Random(0).sample(world.items, GOLD):
            manage.set_gold(item, "first", "admin")
        manage.set_gold_every(4, "admin")
        found = watch(world, world.client("ann"))
        truth(store, found)
    patch.undo()
    return found


def test_it_is_an_honest_test(seen: list[Sight]) -> None:
    """There is enough to find, and what could be found is found: were one of the figures to tell, or the order."""
    gold = np.array([sight.gold for sight in seen], dtype=float)
    assert 40 <= gold.sum() <= GOLD  # one in four of 280 is drawn as gold: fewer than 40 by a chance of 1e-5
    assert 100 <= sum(sight.first_left for sight in seen) <= 180  # 280 fair coins, out of it by a chance of 1e-6
    table = features(seen)
    for leak in (gold, np.where(gold, -1.0, 1.0) + np.random.default_rng(0).normal(0, 0.5, len(gold))):
        got, wanted, among = hits(np.hstack([table, leak[:, None]]), gold)
        assert got >= bound(wanted, wanted / among)


def test_no_regression_on_all_that_is_sent_finds_gold_items(seen: list[Sight]) -> None:
    # the middle of the stream: at its end the gold items are used up, which a clock tells without any attack
    used_up = max(place for place, sight in enumerate(seen) if sight.gold) + 1
    middle = seen[:used_up]
    got, wanted, among = hits(features(middle), np.array([sight.gold for sight in middle], dtype=float))
    assert got < bound(wanted, wanted / among), (got, wanted, among)


def test_no_regression_finds_which_response_was_stored_first(seen: list[Sight]) -> None:
    table = features(seen)
    numbered = np.array([[int(sight.left[-1]) == 0] for sight in seen], dtype=float)
    labels = np.array([sight.first_left for sight in seen], dtype=float)
    assert (
        hits(np.hstack([table, numbered]), labels)[0] == labels[len(labels) // 2 :].sum()
    )  # the text tells: a control
    order = [index for index in range(table.shape[1]) if index != 9]  # (column 9 compares these very texts)
    got, wanted, among = hits(table[:, order], labels)
    assert got < bound(wanted, wanted / among), (got, wanted, among)


def test_the_seeds_that_the_source_names_tell_nothing(seen: list[Sight]) -> None:
    """The attack that worked: sides and gold items from fixed seeds and running numbers."""
    sides = []
    for guess in (lambda sight, place: sight.number + 1, lambda sight, place: place + 1):
        for person in (1, 2):
            right = 0
            for place, sight in enumerate(seen):
                shown = [0, 1]
                random.Random(f"sides/0/{guess(sight, place)}/{person}").shuffle(shown)
                right += (shown[0] == 0) == sight.first_left
            sides.append(right)
    assert max(sides) < bound(len(seen), 0.5)
    guesses: list[Callable[[int, int], float]] = [
        lambda place, person: random.Random(f"gold/0/{person}/{place}").random(),
        lambda place, person: random.Random(f"gold/0/{person}/{place + 1}").random(),
    ]
    share = sum(sight.gold for sight in seen) / len(seen)
    for guess in guesses:
        for person in (1, 2):
            told = [place for place in range(len(seen)) if guess(place, person) < 1 / 4]
            assert sum(seen[place].gold for place in told) < bound(len(told), share)


def test_handles_are_random_and_never_come_twice(seen: list[Sight]) -> None:
    handles = [sight.handle for sight in seen]
    assert len(set(handles)) == len(handles)  # nor does a gold pair
    assert {len(handle) for handle in handles} == {22}  # 128 bits in base 64
    rising = sum(a < b for a, b in pairwise(handles))
    assert abs(rising - len(handles) / 2) < 5 * math.sqrt(len(handles) / 12)  # of a random order: variance n/12
