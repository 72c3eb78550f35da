"""What training makes of raw votes: aggregation by hand and on simulated truths, weights in the loss, and which reward
model a gold judge calls the best."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import preferences, save_tiny
from torch import Tensor

from keel.data.sources import read_preferences
from keel.eval.reward_quality import gold_accuracy, reward_quality
from keel.feedback.aggregate import aggregate
from keel.model.checkpoint import load_scalar
from keel.recipe.recipe import Recipe
from keel.recipe.reward import RewardStage
from keel.store.settled import settle
from keel.train.pairs import Pair, encode_pairs
from keel.train.reward import RewardTraining
from keel.types import Completion, Grade, Message, Preference, Prompt, Scores, UserError


def vote(n: int, chosen: str, annotator: str, other: str = "", **more: object) -> Preference:
    prompt = Prompt(f"p{n}", (Message("user", f"question {n}"),))
    rejected = other or {"yes": "no", "no": "yes"}[chosen]
    return Preference(f"{n}/{annotator}", prompt, chosen, rejected, annotator=annotator, **more)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- by hand


def test_raw_votes_stay_as_they_are() -> None:
    votes = [vote(1, "yes", "a"), vote(1, "no", "b", tie=True)]
    assert aggregate(votes, "raw") == votes


def test_majority_by_hand() -> None:
    votes = [
        *(vote(1, "yes", "a", margin=3.0), vote(1, "no", "b"), vote(1, "yes", "c", margin=1.0)),  # yes, 2 to 1
        *(vote(2, "yes", "a"), vote(2, "no", "b")),  # no majority
        *(vote(3, "yes", "a", tie=True), vote(3, "no", "b")),  # the tie stays out: no, 1 to 0
        vote(4, "yes", "c", tie=True),
        *(vote(5, "yes", "a"), vote(5, "yes", "a", other="maybe")),  # two items
    ]
    made = aggregate(votes, "majority")
    assert [(p.prompt.id, p.chosen, p.rejected, p.margin, p.annotator, p.tie, p.weight) for p in made] == [
        ("p1", "yes", "no", 2.0, "", False, 1.0),
        ("p3", "no", "yes", 0.0, "", False, 1.0),
        ("p5", "yes", "no", 0.0, "", False, 1.0),
        ("p5", "yes", "maybe", 0.0, "", False, 1.0),
    ]
    with pytest.raises(UserError, match="every item is a tie"):
        aggregate([vote(4, "yes", "c", tie=True)], "majority")


def test_an_item_is_a_pair_of_responses_whichever_was_chosen() -> None:
    assert vote(1, "yes", "a").item == vote(1, "no", "b").item
    assert vote(1, "yes", "a").item != vote(2, "yes", "a").item
    assert vote(1, "yes", "a").item != vote(1, "yes", "a", chosen_finished=False).item


def test_weights_need_items_with_two_judges() -> None:
    with pytest.raises(UserError, match=r"there is none.*annotate\.overlap"):
        aggregate([vote(n, "yes", "ab"[n % 2]) for n in range(6)], "weighted")


def test_an_adversary_is_turned_round_and_a_coin_weighs_nothing() -> None:
    rng = random.Random(0)
    votes = []
    for n in range(600):
        truth = rng.random() < 0.5
        for name, right in rng.sample([("good", 0.9), ("fine", 0.85), ("coin", 0.5), ("bad", 0.1), ("also", 0.9)], 3):
            says = truth == (rng.random() < right)
            votes.append(vote(n, "yes" if says else "no", name, tie=rng.random() < 0.1))
    made = aggregate(votes, "weighted")
    assert [p.id for p in made] == [v.id for v in votes]  # every vote is kept, in its place
    weight = {p.annotator: p.weight for p in made}
    expected = {"good": 0.8, "fine": 0.7, "coin": 0.0, "bad": 0.8, "also": 0.8}  # |2 eta - 1|
    assert weight == pytest.approx(expected, abs=0.12)
    for record, raw in zip(made, votes, strict=True):
        turned = raw.annotator == "bad" or (raw.annotator == "coin" and record.chosen != raw.chosen)
        assert replace(record, weight=1.0) == (raw.swapped() if turned and not raw.tie else raw)


# ------------------------------------------------------------------------------------------- a reviewer's last word


def settled_votes() -> list[Preference]:
    """Item 1 was settled for "no" against two of three votes, item 2 as a tie, item 3 by nobody."""
    return [
        vote(1, "yes", "a", margin=3.0, settled="rejected"),
        vote(1, "yes", "b", margin=2.0, settled="rejected"),
        vote(1, "no", "c", margin=1.0, settled="chosen"),
        vote(2, "yes", "a", settled="tie"),
        vote(2, "no", "b", margin=2.0, settled="tie"),
        vote(3, "yes", "a"),
        vote(3, "yes", "b"),
        vote(3, "no", "c"),
    ]


def row(p: Preference) -> tuple[str, str, bool, float, str]:
    return p.prompt.id, p.chosen, p.tie, p.margin, p.annotator


def test_the_reviewers_word_stands_for_the_votes_whatever_training_takes() -> None:
    votes = settled_votes()
    word, tie = ("p1", "no", False, 1.0, ""), ("p2", "yes", True, 0.0, "")
    open_votes = [("p3", "yes", False, 0.0, "a"), ("p3", "yes", False, 0.0, "b"), ("p3", "no", False, 0.0, "c")]
    assert [row(p) for p in aggregate(votes, "raw")] == [word, tie, *open_votes]
    assert [row(p) for p in aggregate(votes, "majority")] == [word, ("p3", "yes", False, 0.0, "")]  # ties are out
    weighted = aggregate(votes, "weighted")
    assert [row(p)[:2] for p in weighted[:2]] == [("p1", "no"), ("p2", "yes")]
    assert [p.weight for p in weighted[:2]] == [1.0, 1.0]
    assert votes == settled_votes()  # and the votes are as they were
    assert settle(settle(votes)) == settle(votes)
    assert settle(votes[5:]) == votes[5:]


def test_a_word_that_nobody_said_turns_a_vote_round() -> None:
    (only,) = settle([vote(1, "yes", "a", margin=3.0, settled="rejected"), vote(1, "yes", "b", settled="rejected")])
    assert (*row(only), only.rejected, only.settled) == ("p1", "no", False, 0.0, "", "yes", "chosen")
    (said,) = settle([vote(1, "yes", "a", tie=True, settled="chosen")])
    assert row(said) == ("p1", "yes", False, 0.0, "")
    # settled in two batches: the later word counts
    (late,) = settle([vote(1, "yes", "a", settled="chosen"), vote(1, "yes", "b", settled="rejected")])
    assert late.chosen == "no"
    swapped = vote(1, "yes", "a", settled="chosen").swapped()
    assert (swapped.chosen, swapped.settled) == ("no", "rejected")


def test_annotators_are_judged_by_the_reviewers_word() -> None:
    """Two who always agree, and one who never does: the majority would call that one an adversary. The reviewer says
    that the lone one is right."""
    votes = []
    for n in range(60):
        for name, said in (("a", "yes"), ("b", "yes"), ("lone", "no")):
            word = "" if n > 9 else "chosen" if said == "no" else "rejected"
            votes.append(vote(n, said, name, settled=word))
    made = {p.prompt.id: p for p in aggregate(votes, "weighted") if p.annotator in ("a", "")}
    assert all(made[f"p{n}"].chosen == "no" for n in range(60))
    assert all(p.weight > 0.9 for p in made.values())


def test_the_word_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        '{"prompt": "a", "chosen": "x", "rejected": "y", "settled": "rejected"}\n'
        '{"prompt": "a", "chosen": "x", "rejected": "y", "settled": null}\n'
    )
    first, second = read_preferences(file)
    assert (first.settled, second.settled) == ("rejected", "")
    assert first.id != second.id
    file.write_text('{"prompt": "a", "chosen": "x", "rejected": "y", "settled": "x"}\n')
    with pytest.raises(UserError, match="'settled': expected chosen, rejected, tie or nothing"):
        read_preferences(file)


# ------------------------------------------------------------------------------------------- what it is good for


def linear_accuracy(x_ND: np.ndarray, records: Sequence[Preference], true_D: np.ndarray) -> float:
    """A Bradley-Terry model that is linear in features, fitted to weighted records by Newton's method; how often it
    sides with the truth on fresh pairs. Response "yes" of prompt n has features x[n], "no" has none."""
    rows = np.array([int(p.prompt.id[1:]) for p in records])
    sign = np.array([1.0 if p.chosen == "yes" else -1.0 for p in records])
    w = np.array([p.weight for p in records])
    features, b = x_ND[rows] * sign[:, None], np.zeros(x_ND.shape[1])
    for _ in range(25):
        right = 1 / (1 + np.exp(-features @ b))
        slope = features.T @ (w * (1 - right)) - b
        b += np.linalg.solve((features * (w * right * (1 - right))[:, None]).T @ features + np.eye(len(b)), slope)
    fresh = np.random.default_rng(99).normal(size=(20_000, len(b)))
    return float(((fresh @ b > 0) == (fresh @ true_D > 0)).mean())


def test_weights_recover_most_of_what_bad_votes_cost() -> None:
    """20 annotators, two lazy and two adversarial (a fifth of the votes), a fifth of the items judged twice."""
    recovered = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        true_D = rng.normal(size=24) * 0.5
        x_ND = rng.normal(size=(2000, 24))
        clean, noisy = [], []
        for n, x_D in enumerate(x_ND):
            for k in rng.choice(20, 1 + (n % 5 == 0), replace=False):
                says = bool(rng.random() < 1 / (1 + np.exp(-x_D @ true_D)))
                clean.append(vote(n, "yes" if says else "no", f"a{k}"))
                said = not says if k < 2 else bool(rng.random() < 0.5) if k < 4 else says
                noisy.append(vote(n, "yes" if said else "no", f"a{k}"))
        best, raw, weighted = (
            linear_accuracy(x_ND, records, true_D)
            for records in (clean, aggregate(noisy, "raw"), aggregate(noisy, "weighted"))
        )
        assert best - raw > 0.01  # the bad votes did cost something
        recovered.append((weighted - raw) / (best - raw))
    assert sum(recovered) / 3 > 0.5


# ------------------------------------------------------------------------------------------------ weights in the loss


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def gradients(folder: Path, records: Sequence[Preference], batch_tokens: int, **settings: object) -> list[Tensor]:
    """Of one reward-model update over the records."""
    from test_train import context

    scorer = load_scalar(folder, new_head_seed=0)
    c = context(folder.parent / "run", "r", folder)
    pairs = encode_pairs(records, scorer.chat, c)
    stage = RewardStage(name="r", batch_size=99, batch_tokens=batch_tokens, **settings)  # type: ignore[arg-type]
    training = RewardTraining(scorer, [pairs], list[Pair](), stage, c)
    for update in training.updates(0):
        for micro in update:
            loss, _ = micro()
            loss.backward()
    return [p.grad.clone() for p in scorer.model.parameters() if p.grad is not None]


def test_a_weight_counts_like_repeated_records_however_the_batch_is_cut(model: Path) -> None:
    a, b, c, d = preferences(4)
    whole = [replace(a, weight=2.0), replace(b, weight=1.0), replace(c, weight=0.0), replace(d, weight=1.0)]
    expected = gradients(model, [a, a, b, d], 10_000)
    for batch_tokens in (10_000, 60):
        for found, right in zip(gradients(model, whole, batch_tokens), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)
    scaled = [replace(p, weight=7 * p.weight) for p in whole]  # only ratios matter
    for found, right in zip(gradients(model, scaled, 10_000), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)


def test_a_batch_that_weighs_nothing_moves_nothing(model: Path) -> None:
    none = [replace(p, weight=0.0) for p in preferences(3)]
    assert all(not grad.any() for grad in gradients(model, none, 10_000))


# ------------------------------------------------------------------------------------------------- the gold judge


class Length:
    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade]:
        return [Grade(float(len(c.text))) for c in completions]


class TextScores:
    def __init__(self, **scores: float) -> None:
        self.scores = scores

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        return Scores(torch.tensor([self.scores[c.text] for c in completions]))


RANKS = ([6.5, 3.5, 1, 3.5, 6.5, 3.5, 3.5], [5.5, 3, 3, 5.5, 1, 3, 7])


def test_gold_accuracy_by_hand() -> None:
    pairs = [
        *(vote(1, "yes", "a"), vote(1, "no", "b")),  # one pair, however often it was judged: gold says "yes"
        vote(2, "a", "a", other="bb"),
        vote(2, "a", "b", other="ccc"),
        vote(3, "no", "a", other="it"),  # the judge can't tell them apart
    ]
    good = TextScores(yes=1, no=0, a=0, bb=1, ccc=-1, it=5)  # right on 1 and on the first of 2
    table = gold_accuracy(pairs, Length(), {"good": good, "flat": TextScores(yes=0, no=0, a=0, bb=0, ccc=0, it=0)}, 200)
    assert table["good"]["pairs"] == 3
    assert table["good"]["accuracy"][0] == pytest.approx(2 / 3)
    assert table["flat"] == {"accuracy": None, "pairs": 0, "rank_correlation": None}
    # of yes, no, a, bb, ccc, and of the third prompt no, it: their lengths and their scores, ranked by hand
    assert table["good"]["rank_correlation"] == pytest.approx(np.corrcoef(*RANKS)[0, 1])
    nothing = {"accuracy": None, "pairs": 0, "rank_correlation": None}
    assert gold_accuracy([], Length(), {"good": good}) == {"good": nothing}


def test_accuracy_of_each_annotators_votes_by_hand() -> None:
    votes = [(vote(n, "yes", "ann"), 1.0 if n < 8 else -1.0, 3, 3) for n in range(10)]  # 8 of 10
    votes += [(vote(n, "yes", "bo"), -1.0, 3, 3) for n in range(4)]  # 0 of 4
    votes += [(vote(1, "yes", "bo", tie=True), 1.0, 3, 3), (vote(1, "yes", ""), 1.0, 3, 3)]  # ties, votes of nobody
    ann, bo = reward_quality(votes, {}, None, 0)["annotators"]
    # Wilson's interval of 8 in 10, z = 1.959964: centre (0.8 + 0.192073) / 1.384146, half width 0.226574
    assert ann == {"annotator": "ann", "accuracy": 0.8, "votes": 10} | {
        "low": pytest.approx(0.490162, abs=1e-5),
        "high": pytest.approx(0.943318, abs=1e-5),
    }
    # of 0 in 4: from 0 to z^2 / (4 + z^2)
    assert bo == {"annotator": "bo", "accuracy": 0.0, "votes": 4, "low": 0.0, "high": pytest.approx(0.489900, abs=1e-5)}
    assert reward_quality(votes[-2:-1], {}, None, 0)["annotators"] == []


def test_the_share_of_the_ceiling_is_of_the_same_votes() -> None:
    # Votes for "yes" on prompts 0 to 9. The majority (q > 1/2) sides with 8 of them, the model with 6, of a possible
    # 0.9 on average: by luck the votes went against the majority twice, and the share does not suffer from it.
    votes = [(vote(n, "yes", "ann"), 1.0 if n < 6 else -1.0, 3, 3) for n in range(10)]
    truth = {row[0].id: 0.9 if n < 8 else 0.1 for n, row in enumerate(votes)}
    figures = reward_quality(votes, truth, None, 0)
    assert (figures["accuracy"], figures["ceiling"]) == (0.6, pytest.approx(0.9))
    assert figures["ceiling_on_votes"] == 0.8
    point, low, high = figures["share_of_ceiling"]
    assert point == pytest.approx(0.75)
    assert 0.3 < low < 0.75 < high <= 1
    unknown = reward_quality(votes, {}, 0.74, 0)
    assert unknown["ceiling_on_votes"] is unknown["share_of_ceiling"] is None


def test_weights_without_overlap_fail_before_anything_runs() -> None:
    def recipe(overlap: float) -> Recipe:
        annotate = {"kind": "annotate", "name": "annotate", "annotators": {"ref": "a.py:b"}, "overlap": overlap}
        reward = {"kind": "reward", "name": "reward", "preferences": "annotate", "votes": "weighted"}
        return Recipe.model_validate({"model": {"path": "m"}, "stages": [annotate, reward]})

    recipe(0.1)
    with pytest.raises(ValueError, match=r"annotate\.overlap is 0; raise it"):
        recipe(0.0)
