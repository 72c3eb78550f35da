"""A model judges pairs of sampled responses, as simulated annotators do in ``keel.feedback.pairing``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.feedback.opinion import Comparer, Opinion
from keel.feedback.pairing import PairChoice, make_comparisons
from keel.feedback.simulated import draw
from keel.store import NewVote, Response, Store, ai_labels, work
from keel.store.records import Assignment
from keel.types import Reporter, UserError

FEW = 20  # where fewer are left, they are asked with the batch before
AT_ONCE = 64  # pairs that are asked together: what a killed run may have to ask again
ORDERS = "orders.jsonl"  # in the stage's folder: what a comparer said with the left reply shown first, and second


def judge_responses(
    store: Store,
    comparer: Comparer,
    name: str,
    made_by: str,
    batch: str,
    choice: PairChoice,
    guideline: str,
    seed: int,
    reporter: Reporter,
    folder: Path,
    hard: bool = False,
) -> dict[str, Any]:
    """One vote of the model ``name`` on each pair of the responses with the fingerprint ``made_by``, in the queue
    ``batch``; each vote has the probability that its choice is right (``hard``: the choice alone). A pair without an
    opinion is left out.

    Stopped and done again, it asks for what is missing. Returns ``judgements``, ``pairs``, ``missing``, ``ties`` and
    ``left`` (shares; left of those that are no ties), ``probability`` (the mean of the votes' own: how sure the model
    is), and ``flipped``: the share of choices that turned with the order, None for who reads one reply at a time.
    UserError when no pair has an opinion.
    """
    responses = {r.id: r for r in store.responses() if r.fingerprint == made_by}
    pairs, _ = make_comparisons(list(responses.values()), choice, 0.0, seed)
    with store.session() as session:
        session.add_guideline(guideline)
        who = session.add_annotator(name, "model")
        items = session.add_comparisons(pairs, batch=batch)
    pair_of = {item: (responses[a], responses[b]) for item, (a, b) in zip(items, pairs, strict=True)}
    reporter.start("judging", store.progress(batch).open)
    while held := _take(store, who, batch):
        shown = [_as_shown(one, pair_of[one.item_id]) for one in held]
        prompts = [one.prompt for one in held]
        left, right = ([pair[side].completion() for pair in shown] for side in (0, 1))
        opinions = comparer.compare(prompts, left, right)
        places = [(seed, name, batch, one.item_id) for one in held]
        tokens = [draw("vote", *place).randbytes(12).hex() for place in places]
        _keep_orders(folder / ORDERS, tokens, opinions)
        with store.session() as session:
            for assignment, opinion, token in zip(held, opinions, tokens, strict=True):
                _hand_in(session, assignment, opinion, token, who, guideline, hard)
        reporter.advance(len(held))
    return _summary(store, batch, len(pairs), _flipped(folder / ORDERS))


def _take(store: Store, who: int, batch: str) -> list[Assignment]:
    """``AT_ONCE`` pairs of the queue, those that are held already first; as many more as are left, where these are few:
    of a few, one that cannot be judged would be too many."""
    held: dict[str, Assignment] = {}
    with store.session() as session:
        while len(held) < AT_ONCE + FEW:
            found = session.next_assignment(who, batch, holding=held.keys(), seeded=True)
            if found is None:
                return list(held.values())
            held[found.handle] = found
    return list(held.values())[:AT_ONCE]


def _as_shown(assignment: Assignment, pair: tuple[Response, Response]) -> tuple[Response, Response]:
    return pair if pair[0].text == assignment.left else (pair[1], pair[0])


def _hand_in(
    session: Store, assignment: Assignment, opinion: Opinion | None, token: str, who: int, guideline: str, hard: bool
) -> None:
    if opinion is None:
        with session.transaction(writes=True) as connection:
            work.skip(
                connection, assignment.id, "no opinion", token=token, guideline=guideline, annotator_id=who,
                now=session.now,
            )  # fmt: skip
        return
    sure = opinion.probability
    if sure is not None and opinion.choice == "right":
        sure = 1 - sure
    vote = NewVote(
        opinion.choice,
        opinion.strength,
        token=token,
        seconds=opinion.seconds,
        guideline=guideline,
        reason=opinion.reason or None,
        probability=None if hard else sure,
    )
    judgement = session.submit(assignment.id, vote)
    if opinion.labels:
        with session.transaction(writes=True) as connection:
            ai_labels.add(connection, judgement, opinion.labels, session.now)


def _keep_orders(path: Path, tokens: Sequence[str], opinions: Sequence[Opinion | None]) -> None:
    both = [(token, one) for token, one in zip(tokens, opinions, strict=True) if one is not None and one.orders]
    if both:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")  # behind a line that a killed run left torn
            for token, one in both:
                file.write(json.dumps({"token": token, "orders": one.orders, "flipped": one.flipped}) + "\n")


def _flipped(path: Path) -> float | None:
    """Each vote counts once, as it was asked last; the vote of a line that a killed run left torn was asked again."""
    found: dict[str, bool] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row: Mapping[str, Any] = json.loads(line)
        except ValueError:
            continue
        found[row["token"]] = row["flipped"]
    return sum(found.values()) / len(found) if found else None


def _summary(store: Store, batch: str, pairs: int, flipped: float | None) -> dict[str, Any]:
    votes = [one for one in store.judgements(batch) if one.annotator_kind == "model"]
    if not votes:
        raise UserError("the judge has no opinion on any of the pairs; look at what it was shown, or name another")
    sided = [vote for vote in votes if vote.preferred is not None]
    sure = [vote.probability for vote in votes if vote.probability is not None]
    return {
        "judgements": len(votes),
        "pairs": pairs,
        "missing": pairs - len(votes),
        "ties": 1 - len(sided) / len(votes),
        "left": sum(vote.choice == "left" for vote in sided) / len(sided) if sided else None,
        "probability": sum(sure) / len(sure) if sure else None,
        "flipped": flipped,
    }
