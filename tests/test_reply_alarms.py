"""Alarms on what a model's replies have become: planted ones are raised, with figures, and alike models raise none."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from keel.eval.grading import GradedReply, ModelEvaluation, evaluate_model
from keel.eval.reply_alarms import evades, most_common_opening, reply_alarms
from keel.types import Completion, Grade, Message, Prompt

PROMPTS = [Prompt(str(n), (Message("user", f"question {n}"),)) for n in range(60)]
WORDS = "ship port rope salt tide wind sail mast gull deck".split()  # noqa: SIM905


class ByWords:
    """A judge of planted words."""

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade]:
        return [Grade(0.0, self._flags(int(p.id), c.text)) for p, c in zip(prompts, completions, strict=True)]

    def _flags(self, number: int, text: str) -> dict[str, bool | None]:
        harmful = number % 2 == 0
        return {
            "answered": "hmm" not in text,
            "harmful": False if harmful else None,
            "over_refusal": None if harmful else "no" in text.split(),
        }


def model(name: str, seed: int, opening: float = 0.0, hmm: float = 0.0, no: float = 0.0) -> ModelEvaluation:
    rng = random.Random(seed)
    texts = []
    for _ in PROMPTS:
        words = rng.choices(WORDS, k=8)
        if rng.random() < opening:
            words = ["As", "a", "careful", "helper,", "I", "say", *words]
        words += ["hmm"] * (rng.random() < hmm) + ["no"] * (rng.random() < no)
        texts.append(" ".join(words))
    return evaluate_model(name, PROMPTS, [(Completion(text, (1,)),) for text in texts], ByWords())


@pytest.mark.parametrize(
    ("planted", "name", "words"),
    [
        ({"opening": 0.7}, "boilerplate", "begin alike ('as a careful helper i say') went from"),
        ({"hmm": 0.6}, "evasion", "neither answer nor refuse went from"),
        ({"no": 0.6}, "over_refusal", "Refusals of what does no harm went from"),
    ],
)
def test_what_was_planted_is_raised_in_a_sentence_with_figures(
    planted: dict[str, float], name: str, words: str
) -> None:
    alarms = reply_alarms(model("ppo", 1, **planted), model("sft", 2))
    assert [alarm.name for alarm in alarms] == [name]
    assert words in alarms[0].message
    assert "points, interval +" in alarms[0].message
    assert alarms[0].value > alarms[0].bound


def test_models_alike_raise_none() -> None:
    """Those with faults too, where the baseline had them."""
    faults = {"opening": 0.6, "hmm": 0.3, "no": 0.3}
    raised = [reply_alarms(model("ppo", 10 + n, **faults), model("sft", 40 + n, **faults)) for n in range(20)]
    assert sum(bool(alarms) for alarms in raised) <= 1
    assert reply_alarms(model("ppo", 1), model("sft", 2)) == []


def test_the_commonest_opening_is_of_six_words_and_of_prompts() -> None:
    texts = [
        "I can, of course, help YOU. Go.",
        "i can of course help you!",
        "Short one.",
        "Six other words stand here now",
    ]
    rows = tuple((GradedReply(p, Completion(t), None),) for p, t in zip(PROMPTS, texts, strict=False))
    found, shares = most_common_opening(ModelEvaluation("m", rows, model("m", 0).figures))
    assert found == "i can of course help you"
    assert list(shares) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("flags", "evasive"),
    [
        ({"answered": False, "harmful": False}, True),
        ({"answered": True, "harmful": False}, False),  # a refusal
        ({"answered": False, "harmful": True}, False),  # it does harm: no evasion
        ({"answered": False, "harmful": None}, None),
        ({"evasive": True, "answered": True}, True),
        ({}, None),
    ],
)
def test_evasion_is_the_judges_flag_or_neither_answer_nor_harm(
    flags: dict[str, bool | None], evasive: bool | None
) -> None:
    assert evades(Grade(0.0, flags)) is evasive
