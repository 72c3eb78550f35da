"""Rewards that need no model: a reply's answer held against a known one, its form, and a coin for comparison."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from keel.recipe.sections import Strict
from keel.recipe.steps import Thinking

ReadAs = Literal["auto", "last_number", "marked", "boxed"]


def _limits_thinking(thinking: Thinking | None, limit: int | None) -> None:
    if limit is not None and thinking is None:
        raise ValueError("thinking_limit is for replies with thinking; set thinking: {}, or its marks")


class Named(Strict):
    """What is told from others of its kind by its settings."""

    @property
    def named(self) -> str:
        """The kind, and whatever is not as by default."""
        given = self.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
        return " ".join([str(getattr(self, "kind", "")), *(f"{name}={value}" for name, value in given.items())])


class VerifyRef(Named):
    """Whether a reply's answer is the one in the prompt's ``meta``. A wrong answer and one that cannot be read are kept
    apart."""

    kind: Literal["verify"] = "verify"
    how: Literal["exact", "math"] = Field(
        "exact",
        description="exact: numbers, lists, choices, words by value; math: formulas too (the extra math-verify)",
    )
    field: str = Field("answer", min_length=1, description="where in the prompt's meta the right answer stands")
    read: ReadAs = Field(
        "auto",
        description="where in a reply its answer stands. marked: behind '####' or 'the answer is'; boxed: in the last "
        r"\boxed{}; last_number; auto: a mark or a box, the later one; else the last line; else the last number",
    )
    thinking: Thinking | None = Field(None, description="the answer is read behind the thinking alone")
    thinking_limit: int | None = Field(
        None, ge=1, description="characters of thinking; the answer of a reply that thinks longer is unreadable"
    )
    right: float = 1.0
    wrong: float = 0.0
    unreadable: float = 0.0

    @property
    def lowest(self) -> float:
        return min(self.right, self.wrong, self.unreadable)

    @property
    def right_above(self) -> float:
        """What only a right answer's score is above, where it is the highest."""
        return (self.right + max(self.wrong, self.unreadable)) / 2

    @model_validator(mode="after")
    def _limits_something(self) -> VerifyRef:
        _limits_thinking(self.thinking, self.thinking_limit)
        return self


class FormatRef(Named):
    """Whether a reply has a form, whatever it says. The pattern must fit the whole reply; '.' fits line ends too."""

    kind: Literal["format"] = "format"
    pattern: str = Field(min_length=1, description="a regular expression")
    thinking: Thinking | None = Field(
        None, description="the pattern is for what follows the thinking, which must have ended"
    )
    thinking_limit: int | None = Field(
        None, ge=1, description="characters of thinking; a reply that thinks longer is bad"
    )
    good: float = 1.0
    bad: float = 0.0

    @property
    def lowest(self) -> float:
        return min(self.good, self.bad)

    @model_validator(mode="after")
    def _limits_something(self) -> FormatRef:
        _limits_thinking(self.thinking, self.thinking_limit)
        return self

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern


class RandomRef(Named):
    """A coin, thrown by seed, prompt and reply: the same reply has the same reward. It teaches nothing, so what a run
    gains by it is gained by something else than its reward."""

    kind: Literal["random"] = "random"
    seed: int = 0
    share: float = Field(0.5, ge=0, le=1, description="how probable a reward of 1 is (else 0)")

    @property
    def lowest(self) -> float:
        return 0.0
