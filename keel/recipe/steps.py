"""Steps of a reply: where one ends and the next begins, what says how good each is, and where thinking ends."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from keel.recipe.sections import Strict

_BLANK = r"(?:[^\S\n]*\n)"  # a line without a word; the indentation of the next one is the next one's
_BEGIN = r"(?<![^\S\n])"  # where white space begins: a run of it is looked at once
_ENDS = {"line": re.compile(f"{_BEGIN}{_BLANK}+"), "blank_line": re.compile(f"{_BEGIN}{_BLANK}{{2,}}")}


class Steps(Strict):
    """How a reply is cut into steps. The same everywhere: in data, when people label, in training, search and RL."""

    by: Literal["line", "blank_line", "marker"] = Field(
        "line", description="a step ends with its line, with a blank line, or with a marker of the model's own"
    )
    marker: str | None = Field(None, min_length=1, description="with by: marker, the text that ends a step")

    @model_validator(mode="after")
    def _marker_fits(self) -> Steps:
        if (self.by == "marker") != (self.marker is not None):
            raise ValueError("by: marker and marker: TEXT go together; give both, or neither")
        return self

    def split(self, text: str) -> tuple[str, ...]:
        """The steps of ``text``, each with what separates it from the next: joined, they are the text. White space
        before the first step is that step's, and any other that of the step before it: a marker of white space makes no
        blank steps. Text of white space alone is one step; no text, none."""
        end = re.compile(f"{re.escape(self.marker)}{_BLANK}*") if self.marker is not None else _ENDS[self.by]
        begin, last = len(text) - len(text.lstrip()), len(text.rstrip())
        found = [match.end() for match in end.finditer(text, begin) if match.end() < last]
        cuts = [a for a, b in pairwise([*found, len(text)]) if not text[a:b].isspace()]
        return tuple(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if b > a)


class ProcessRef(Strict):
    """A process reward model: a stage's name or a folder. It says of each step how probable it is that it is right."""

    kind: Literal["process"] = "process"
    model: str


class PythonStepsRef(Strict):
    """A Python callable ``(prompt, steps) -> list of numbers in [0, 1]``, one a step: ``module:name`` or
    ``path/to/file.py:name``."""

    kind: Literal["python_steps"] = "python_steps"
    ref: str


# What says how good each step of a reply is.
StepsRef = Annotated[ProcessRef | PythonStepsRef, Field(discriminator="kind")]
Aggregate = Literal["min", "product", "last", "mean"]


@dataclass(frozen=True)
class StepsRead:
    """How a stage reads labelled steps. ``outcome``: the last one's label alone is learned. ``bound``: a step is right
    where its label is above it. ``answer``: where in a prompt's meta the answer stands that replies are held against,
    which with ``outcome`` says what the label is; "": by labels alone."""

    steps: Steps
    neutral: Literal["good", "bad", "out"] = "good"
    outcome: bool = False
    bound: float = 0.5
    answer: str = ""


class Thinking(Strict):
    """The marks between which a model thinks before it answers."""

    open: str = Field("<think>", min_length=1)
    close: str = Field("</think>", min_length=1)
    opened: bool = Field(
        False, description="the model's template opens it: a reply without the closing mark is thinking that never ends"
    )

    def split(self, text: str) -> tuple[str | None, str | None]:
        """(what was thought, the answer). Thought is None where the reply has none; the answer is None where thinking
        never ends, wherever it began. What stands before the last closing mark is thought: a template may have opened
        it."""
        before, closed, answer = text.rpartition(self.close)
        if self.open in answer or (self.opened and not closed):
            return self._without_mark(text), None
        return (self._without_mark(before), answer) if closed else (None, text)

    def shown(self, text: str) -> str:
        """What is shown to whom the answer alone is shown: without the white space before it, none where thinking
        never ends."""
        thought, answer = self.split(text)
        return text if thought is None else (answer or "").lstrip()

    def _without_mark(self, thought: str) -> str:
        begun = thought.lstrip()
        return begun[len(self.open) :] if begun.startswith(self.open) else thought
