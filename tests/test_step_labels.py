"""Labels of steps by Monte Carlo: estimates against exact probabilities of a model that is a table; what stops, what is
left open, what is shared, what a killed stage finds again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tabular import Tabular
from tiny import Counting, tiny_tokenizer

from keel.data.chat import Chat
from keel.data.steps import prefixes_in_tokens
from keel.feedback.convincing import Chosen, Rated, choose_at_random, choose_convincing, gains
from keel.feedback.step_labels import CutReply, Labeller, Reply, agreed, cut_replies
from keel.recipe.sections import SamplingConfig
from keel.recipe.step_labels import StepLabelsStage
from keel.recipe.steps import Steps
from keel.rollout.continuations import Continuations, Prefix, Tally
from keel.run import Silent
from keel.types import Completion, Message, Prompt, StepLabels, UserError

LINES = Steps()
SAMPLING = SamplingConfig(max_new_tokens=24)
P_RISE, P_FALL = 0.55, 0.3  # of a walk over levels; the answer is right at the top


def walk(_: str, reply: str) -> Sequence[tuple[str, float]]:
    """A walk of four lines: "up" with 0.55, "down" with 0.3, "salt" else, after which nothing is right any more."""
    lines = reply.split("\n")[:-1]
    if "salt" in lines or len(lines) == 4:
        return [("yes!" if right(reply) else "no!", 1.0)]
    return [("up\n", P_RISE), ("down\n", P_FALL), ("salt\n", 1 - P_RISE - P_FALL)]


def right(reply: str) -> bool:
    lines = reply.split("\n")
    return "salt" not in lines and lines.count("up") >= 3


def exact(lines: tuple[str, ...]) -> float:
    """By adding over all ways to go on."""
    if "salt" in lines or len(lines) == 4:
        return float(right("\n".join(lines)))
    return P_RISE * exact((*lines, "up")) + P_FALL * exact((*lines, "down"))


CHAT = Chat(tiny_tokenizer())


@dataclass
class World:
    """``options`` as a model, and what labels its replies."""

    options: Any = walk
    k: int = 8
    seed: int = 0
    first: bool = False
    kept: Path | None = None
    context: int | None = None
    judged: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chat = CHAT
        self.sampler = Tabular(self.options)
        self.continuations = Continuations(
            self.sampler, self.chat, self.right, SAMPLING, self.k, self.seed, self.first, self.context, self.kept
        )

    def right(self, _: Sequence[Prompt], replies: Sequence[Completion]) -> list[bool]:
        self.judged += [reply.text for reply in replies]
        return [reply.text.endswith("yes") for reply in replies]

    def reply(self, text: str, prompt: str = "p", finished: bool = True) -> Reply:
        asked = Prompt(prompt, (Message("user", "go on"),))
        row = self.chat.encode_reply(asked.messages, text, False)
        return Reply(asked, row.prompt_ids, row.ids[len(row.prompt_ids) :], Completion(text, finished=finished))

    def cut(self, *texts: str, **how: Any) -> list[CutReply]:
        return cut_replies(self.chat, [self.reply(text, **how) for text in texts], LINES)[0]

    def label(self, *replies: CutReply, cap: int | None = None, estimate: Any = "soft") -> Any:
        return Labeller(self.continuations, estimate, cap, Silent()).label(replies)


# ---------------------------------------------------------------------------------------------------- the estimate


def test_the_estimate_is_unbiased() -> None:
    """K = 8 for many prompts: the mean of soft labels is the exact probability, and hard ones are 1 - (1 - p)^8."""
    seeds, text, world = 300, "up\ndown\nup\nup\nyes", World()
    [cut] = world.cut(text)
    asked = [replace(cut, reply=replace(cut.reply, prompt=replace(cut.prompt, id=f"p{n}"))) for n in range(seeds)]
    records = world.label(*asked).records
    assert {record.labels[-1] for record in records} == {1.0}
    soft = [record.labels[:-1] for record in records]
    lines = text.split("\n")
    for step in range(4):
        p = exact(tuple(lines[: step + 1]))
        tolerance = 4 * math.sqrt(p * (1 - p) / (8 * seeds)) + 1e-9
        assert sum(labels[step] for labels in soft) / seeds == pytest.approx(p, abs=tolerance)
        hopeful = 1 - (1 - p) ** 8
        spread = 4 * math.sqrt(hopeful * (1 - hopeful) / seeds) + 1e-9
        assert sum(labels[step] > 0 for labels in soft) / seeds == pytest.approx(hopeful, abs=spread)


def test_hard_labels_say_whether_any_completion_is_right() -> None:
    """The same whether all K are drawn or no more than are needed: 1, 1, 2, 4."""
    texts = ["down\nup\nup\nup\nyes", "up\nup\ndown\ndown\nno", "up\nsalt\nno", "down\ndown\nup\nup\nyes"]
    every, needed = World(), World(first=True)
    shares = every.label(*every.cut(*texts))
    whether = needed.label(*needed.cut(*texts), estimate="hard")
    for soft, hard in zip(shares.records, whether.records, strict=True):
        assert [float(label > 0) for label in soft.labels] == list(hard.labels)
    tallies = {key: tally.drawn for key, tally in needed.continuations.known.items()}
    assert set(tallies.values()) <= {1, 2, 4, 8}
    assert {8} == {tallies[key] for key, tally in every.continuations.known.items() if not tally.right}
    assert whether.figures["completions"] == sum(tallies.values()) < shares.figures["completions"]


def test_the_cap_counts_what_was_drawn() -> None:
    world = World(lambda *_: [("yes!", 1.0)], first=True)
    labelled = world.label(*world.cut("up\nup\nup\nup\nyes"), cap=10, estimate="hard")
    assert labelled.records[0].labels == (1.0, 1.0, 1.0, None, 1.0)  # 1 each, and a fourth could have been 8


def test_prefixes_are_gone_on_from_token_by_token() -> None:
    """Each request is the prompt's tokens and the reply's own, cut behind a line's end."""
    asked: list[str] = []

    def options(question: str, reply: str) -> Sequence[tuple[str, float]]:
        asked.append(f"{question}|{reply}")
        return walk(question, reply)

    world = World(options, k=1)
    world.label(*world.cut("up\ndown\nup\nup\nyes"))
    first = [one for one in asked if one.count("\n") == 1]
    assert first[0] == "go on|up\n"
    assert all(one.startswith("go on|up\n") for one in asked)


class Pieces:
    """A tokenizer of given tokens."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("pieces", "steps", "lengths"),
    [
        (("up", "\n", "down"), ("up\n", "down"), (2, 3)),
        (("up", ".\n", "down", "\n"), ("up.\n", "down\n"), (2, 4)),
        (("up", "\n", "\n", "down"), ("up\n\n", "down"), (3, 4)),
        (("up", " ", "\n", "  ", "down"), ("up \n", "  down"), (3, 5)),  # indentation is the next step's
        (("up", "\n  ", "down"), ("up\n", "  down"), (2, 3)),  # unless it is one token with the line's end
        (("up", "\ndo", "wn"), ("up\n", "down"), (1, 3)),  # a sign of the next step never is
        (("up", "<s>", "\n", "down"), ("up<s>\n", "down"), (3, 4)),
    ],
)
def test_a_prefix_holds_what_separates_its_step_from_the_next(
    pieces: tuple[str, ...], steps: tuple[str, ...], lengths: tuple[int, ...]
) -> None:
    tokenizer: Any = Pieces(*pieces)
    assert prefixes_in_tokens(tokenizer, range(len(pieces)), steps) == lengths


# ------------------------------------------------------------------------------------------ what stops, what is open


def test_a_hopeless_prefix_ends_the_sampling() -> None:
    world = World()
    labelled = world.label(*world.cut("up\nsalt\nup\nup\nno"))
    [record] = labelled.records
    assert record.labels[0] > 0
    assert record.labels[1:] == (0.0, 0.0, 0.0, 0.0)
    assert labelled.figures["hopeless"] == 1
    assert (labelled.figures["prefixes"], labelled.figures["completions"]) == (2, 16)
    assert world.sampler.calls == [8, 8]


def test_a_right_reply_is_never_hopeless() -> None:
    """It is a right completion itself: the steps behind an unlucky prefix are sampled, and the last is its answer."""

    def lucky(_: str, reply: str) -> Sequence[tuple[str, float]]:
        return [("yes!" if reply.count("\n") > 1 else "no!", 1.0)]

    world = World(lucky)
    labelled = world.label(*world.cut("up\nup\nyes"))
    assert labelled.records[0].labels == (0.0, 1.0, 1.0)
    assert labelled.figures["hopeless"] == 0
    [wrong] = world.label(*world.cut("up\nup\nno")).records
    assert wrong.labels == (0.0, 0.0, 0.0)


def test_the_cap_is_a_problem_s() -> None:
    world = World()
    texts = ("up\nup\ndown\nup\nyes", "down\nup\nup\nup\nyes")
    labelled = world.label(*world.cut(*texts), *world.cut(texts[0], prompt="q"), cap=24)
    first, second, other = labelled.records
    # Round by round: both first prefixes, then the first reply's second; the other prompt has a cap of its own.
    assert [label is None for label in first.labels] == [False, False, True, True, False]
    assert [label is None for label in second.labels] == [False, True, True, True, False]
    assert [label is None for label in other.labels] == [False, False, False, True, False]
    assert labelled.figures["completions"] == 48
    assert labelled.figures["capped"] == 3
    assert labelled.figures["unjudged_steps"] == 6


def test_what_is_cut_is_not_right() -> None:
    """A completion that does not end, a prefix that fills the context, and the half step of a reply that was cut."""
    world = World(lambda *_: [("up ", 1.0)])
    labelled = world.label(*world.cut("up\nyes", "down\nup\nya", finished=False))
    assert [record.labels for record in labelled.records] == [(0.0, 0.0), (0.0, 0.0, 0.0)]
    assert labelled.figures["completions_cut"] == 1.0
    assert labelled.figures["generated_tokens"] == 2 * 8 * SAMPLING.max_new_tokens
    assert not world.judged, "nothing ended, so there was nothing to judge"
    [hopeful] = World().cut("up\nup\nu", finished=False)
    [record] = World(lambda *_: [("yes!", 1.0)]).label(hopeful).records
    assert record.labels == (1.0, 1.0, None)
    assert not record.finished
    full = World(context=3)
    full.label(*full.cut("up\nup\nno"))
    assert full.sampler.calls == []


def test_empty_and_short_replies() -> None:
    world = World()
    replies = [world.reply(text) for text in ("", " \n", "yes", "no", "up\nyes")]
    cut, left_out = cut_replies(world.chat, replies, LINES)
    assert (len(cut), left_out) == (3, {"empty": 2})
    labelled = world.label(*cut)
    assert [record.labels for record in labelled.records][:2] == [(1.0,), (0.0,)]
    assert world.sampler.calls == [8], "one step is labelled by the reply's own answer"
    with pytest.raises(UserError, match=r"steps\.by: blank_line makes one step of each of 3 replies"):
        cut_replies(world.chat, replies, Steps(by="blank_line"))
    with pytest.raises(UserError, match="each of 2 replies is empty"):
        cut_replies(world.chat, replies[:2], LINES)


# --------------------------------------------------------------------------------- what is shared, what is found again


def test_labels_depend_on_no_batch_and_no_order() -> None:
    """Replies that begin alike share what was drawn; each has the labels that it has alone."""
    texts = ("up\ndown\nup\nup\nyes", "up\ndown\nsalt\nno", "down\nup\nup\nup\nyes", "up\nup\nup\ndown\nyes")
    alone = []
    for text in texts:
        world = World()
        alone += world.label(*world.cut(text)).records
    world = World()
    together = world.label(*world.cut(*texts))
    assert [record.labels for record in together.records] == [record.labels for record in alone]
    assert world.sampler.calls[0] == 2 * 8, "three replies begin alike"
    back = World()
    assert [record.labels for record in back.label(*back.cut(*texts[::-1])).records][::-1] == [
        record.labels for record in alone
    ]


def test_a_killed_stage_finds_what_it_had(tmp_path: Path) -> None:
    texts = ("up\ndown\nup\nup\nyes", "down\nup\nup\nup\nyes", "up\nsalt\nup\nno")
    whole = World(kept=tmp_path / "whole" / "tallies.jsonl")
    expected = whole.label(*whole.cut(*texts))
    path = tmp_path / "state" / "tallies.jsonl"
    path.parent.mkdir()
    lines = (tmp_path / "whole" / "tallies.jsonl").read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][: len(lines[2]) // 2])  # the kill cut the third in half
    again = World(kept=path)
    found = again.label(*again.cut(*texts))
    assert found == expected
    assert again.sampler.calls == whole.sampler.calls[2:]
    last = World(kept=path)
    assert last.label(*last.cut(*texts)) == expected
    assert last.sampler.calls == []


def test_a_prefix_is_known_by_its_prompt_and_its_tokens() -> None:
    prompt = Prompt("p", (Message("user", "a"),))
    one = Prefix(prompt, (1, 2), (3,))
    others = [
        Prefix(prompt, (1,), (2, 3)),
        Prefix(Prompt("q", prompt.messages), (1, 2), (3,)),
        Prefix(prompt, (1, 2), (4,)),
    ]
    assert len({one.key, *(other.key for other in others)}) == 4
    world = World()
    world.continuations.known[one.key] = Tally(8, 8, 0, 5)
    world.continuations.sample([one])
    assert world.sampler.calls == []


def test_progress_comes_to_its_end() -> None:
    reporter, world = Counting(), World()
    replies = world.cut("up\nsalt\nup\nup\nno", "up\nup\nup\nup\nyes", "no")
    Labeller(world.continuations, "soft", 40, reporter).label(replies)
    assert reporter.started == [("labelling steps", 8)]
    assert reporter.steps == 8


# ------------------------------------------------------------------------------------------------- consensus, choice


@dataclass
class Says:
    scores: list[tuple[float, ...]]

    def score_steps(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> Sequence[tuple[float, ...]]:
        assert [len(one) for one in replies] == [len(one) for one in self.scores]
        return self.scores


def test_consensus_keeps_what_both_say() -> None:
    prompt = Prompt("p", (Message("user", "a"),))
    records = [
        StepLabels("a", prompt, ("x\n", "y\n", "z"), (1.0, 0.0, None)),
        StepLabels("b", prompt, ("x\n", "y"), (0.25, 0.75)),
        StepLabels("c", prompt, ("x",), (1.0,)),
    ]
    kept, counts = agreed(records, Says([(0.5, 0.7, 0.1), (0.4, 0.9), (0.49,)]))
    assert [record.labels for record in kept] == [(1.0, None, None), (0.25, 0.75), (None,)]
    assert counts == {"agree": 3, "disagree": 2, "left_out": 1}


def test_convincing_replies_are_wrong_and_score_high() -> None:
    rated = [Rated(None)] * 3 + [Rated(True, 0.99)] * 5 + [Rated(False, score / 20) for score in range(12)]
    chosen = choose_convincing(rated, 10, 0.2, seed=3)
    assert len(chosen.random) == 2
    rest = [place for place in range(19, 7, -1) if place not in chosen.random]
    assert list(chosen.convincing) == rest[:8]
    assert not chosen.filled
    assert chosen.places == sorted(chosen.places)
    assert len(set(chosen.places)) == 10
    assert chosen == choose_convincing(rated, 10, 0.2, seed=3)
    assert gains({"a": Rated(False, 0.2), "b": Rated(True, 0.9), "c": Rated(None), "d": Rated(False)}) == {"a": 0.2}


def test_a_choice_is_filled_and_its_random_part_is_of_all() -> None:
    rated = [Rated(True)] * 9 + [Rated(False, 0.3)]
    chosen = choose_convincing(rated, 5, 0.4, seed=0)
    assert len(chosen.random) == 2
    assert 9 in (*chosen.random, *chosen.convincing)
    assert len(chosen.places) == 5
    counts = [0] * 10
    for seed in range(2000):
        for place in choose_convincing(rated, 5, 0.4, seed).random:
            counts[place] += 1
    assert min(counts) > 330
    assert max(counts) < 470  # 400 each, four deviations of 18
    assert choose_convincing(rated, 50, 0.0, 0).places == list(range(10))
    assert choose_convincing([], 5, 0.4, 0) == Chosen(())
    assert choose_at_random(4, None, 0).places == [0, 1, 2, 3]
    assert len(choose_at_random(100, 7, 0).places) == 7


# ------------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"responses": "sample", "per_prompt": 2}, "leave one of the two out"),
        ({"sampling": {"temperature": 0}}, "makes all 8 completions of a prefix the same"),
        ({"choose": "convincing"}, "name a scorer, and set replies"),
        ({"random_share": 0.5}, "go with choose: convincing"),
        ({"verify": {"kind": "endpoint"}}, "verify"),
        ({"k": 0}, "greater than or equal to 1"),
        ({"cap": 0}, "greater than or equal to 1"),
        ({"cap": 7}, "cap: 7 leaves no prefix its k: 8 completions"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        StepLabelsStage.model_validate({"name": "mc", "verify": {"kind": "verify"}, **settings})
