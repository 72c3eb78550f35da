"""Scorers of steps (`keel.types.StepScorer`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keel.types import Prompt, UserError


class PythonSteps:
    """A Python function ``(prompt, steps) -> numbers in [0, 1]``, one a step, as a scorer of steps."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name

    def score_steps(self, prompts: Sequence[Prompt], replies: Sequence[tuple[str, ...]]) -> Sequence[tuple[float, ...]]:
        """Raises UserError, naming the prompt, when the function fails."""
        return [self._of(prompt, steps) for prompt, steps in zip(prompts, replies, strict=True)]

    def _of(self, prompt: Prompt, steps: tuple[str, ...]) -> tuple[float, ...]:
        try:
            return tuple(float(score) for score in self.function(prompt, list(steps)))
        except UserError:
            raise
        except Exception as error:  # whatever it raises
            raise UserError(f"{self.name} failed on prompt {prompt.id!r}: {type(error).__name__}: {error}") from error
