"""What checks replies without a model, as judges: their answer, their form, a coin. Each is a scorer too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from keel.data.answers import final_answer
from keel.recipe.judges import CheckRef
from keel.recipe.verify import FormatRef, RandomRef, VerifyRef
from keel.reward import math_verify
from keel.reward.killable import Killable
from keel.reward.values import Verdict, value_of
from keel.reward.verify import compare, read_answer
from keel.types import Completion, Grade, Prompt, Scores, UserError, place_of


class Check(Protocol):
    """A judge that has a grade for every reply."""

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade]: ...


class CheckScorer:
    """The scores of a check's grades."""

    def __init__(self, check: Check) -> None:
        self.check = check

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Scores:
        grades = self.check.grade(prompts, completions)
        return Scores(torch.tensor([grade.score for grade in grades], dtype=torch.float32))


def make_check(ref: CheckRef) -> Check:
    if isinstance(ref, VerifyRef):
        return Verify(ref)
    return Format(ref) if isinstance(ref, FormatRef) else Coin(ref)


def answer_part(text: str, ref: VerifyRef | FormatRef) -> str | None:
    """What of a reply answers: all of it, or what follows the thinking; None where that never ends, or is longer than
    allowed."""
    if ref.thinking is None:
        return text
    thought, answer = ref.thinking.split(text)
    long = ref.thinking_limit is not None and len(thought or "") > ref.thinking_limit
    return None if long else answer


# ---------------------------------------------------------------------------------------------------------- answers


def known_answer(prompt: Prompt, field: str) -> str:
    """The right answer that a prompt carries: where that is a worked solution, its answer. Raises UserError where it
    has none."""
    value: Any = prompt.meta.get(field)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    if isinstance(value, Mapping) or not text.strip():
        raise UserError(
            f"{place_of(prompt)}: its meta has no answer in {field!r} that replies could be held against; give each "
            "prompt one, or name another field"
        )
    return final_answer(text) or text


def has_answer(prompt: Prompt, field: str) -> bool:
    """Whether a prompt carries an answer that replies can be held against."""
    try:
        known_answer(prompt, field)
    except UserError:
        return False
    return True


class Verify:
    """Whether a reply's answer is the prompt's, with the flags ``correct`` and ``unreadable``."""

    def __init__(self, ref: VerifyRef) -> None:
        self.ref = ref
        self._scores: dict[Verdict, float] = {"right": ref.right, "wrong": ref.wrong, "unreadable": ref.unreadable}
        self._math: Killable | None = math_verify.checker() if ref.how == "math" else None

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade]:
        """Raises UserError, naming it, for a prompt without an answer."""
        return [
            Grade(self._scores[verdict], {"correct": verdict == "right", "unreadable": verdict == "unreadable"})
            for verdict in self.verdicts(prompts, completions)
        ]

    def verdicts(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Verdict]:
        known = [known_answer(prompt, self.ref.field) for prompt in prompts]
        given = [self._read(reply) for reply in completions]
        found = [_exactly(a, b) for a, b in zip(known, given, strict=True)]
        if self._math is not None:
            asked = [
                (i, (a, b))
                for i, (a, b, verdict) in enumerate(zip(known, given, found, strict=True))
                if verdict == "unreadable" and b is not None and math_verify.formulas(a, b)
            ]
            for (i, _), verdict in zip(asked, self._math.map([pair for _, pair in asked]), strict=True):
                found[i] = verdict or "unreadable"
        return found

    def _read(self, reply: Completion) -> str | None:
        text = answer_part(reply.text, self.ref)
        return None if text is None else read_answer(text, self.ref.read, reply.finished)


def _exactly(known: str, given: str | None) -> Verdict:
    return "unreadable" if given is None else compare(value_of(known), value_of(given), known, given)


# -------------------------------------------------------------------------------------------------- form, and a coin


class Format:
    """Whether replies have a form, with the flag ``formatted``. A reply at which the pattern does not come to an end
    has not."""

    def __init__(self, ref: FormatRef) -> None:
        self.ref = ref
        self._fits = Killable("keel.reward.pattern:make")

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade]:
        parts = [answer_part(reply.text, self.ref) for reply in completions]
        known = list(dict.fromkeys(part for part in parts if part is not None))
        fit = dict(zip(known, self._fits.map([(self.ref.pattern, part) for part in known]), strict=True))
        found = [part is not None and fit[part] is True for part in parts]
        return [Grade(self.ref.good if good else self.ref.bad, {"formatted": good}) for good in found]


class Coin:
    """A reward that nothing can be learned from: of each prompt and reply the same, by chance 1 or 0."""

    def __init__(self, ref: RandomRef) -> None:
        self.ref = ref

    def grade(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Grade]:
        return [Grade(self._throw(p.id, reply.text)) for p, reply in zip(prompts, completions, strict=True)]

    def _throw(self, prompt: str, text: str) -> float:
        drawn = json.dumps([self.ref.seed, prompt, text]).encode()
        number = int.from_bytes(hashlib.blake2b(drawn, digest_size=8).digest(), "big") / 2**64
        return float(number < self.ref.share)
