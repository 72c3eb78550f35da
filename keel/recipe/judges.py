"""What scores, judges or annotates: a Python callable, a reward model, an endpoint, a weighted sum of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from keel.recipe.sections import Strict


class PythonRef(Strict):
    """A Python callable: ``module:name`` or ``path/to/file.py:name``."""

    kind: Literal["python"] = "python"
    ref: str


class RewardModelRef(Strict):
    """A reward model: a stage's name or a folder with an AutoModelForSequenceClassification checkpoint."""

    kind: Literal["model"] = "model"
    model: str


class EndpointRef(Strict):
    """An OpenAI-compatible chat endpoint; the key is read from the environment variable, never from the recipe."""

    kind: Literal["endpoint"] = "endpoint"
    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    instructions: str | None = None


class LanguageModelRef(Strict):
    """A language model that is shown two replies and asked for the better one: 'base', a stage's name, or a folder.
    ``instructions`` stand before the replies in the place of Keel's own; they must ask for A or B alone."""

    kind: Literal["language_model"] = "language_model"
    model: str
    instructions: str | None = None


class PythonFeedbackRef(Strict):
    """A Python callable that compares two replies under a principle, ``(prompt, first, second, principle) -> P(first is
    better)``: ``module:name`` or ``path/to/file.py:name``. It is asked in both orders."""

    kind: Literal["python_feedback"] = "python_feedback"
    ref: str


class RewardTerm(Strict):
    """One source of reward, with its weight in the sum."""

    source: Annotated[PythonRef | RewardModelRef, Field(discriminator="kind")]
    weight: float = 1.0


class MixedRef(Strict):
    """The weighted sum of several sources of reward, as in a PPO stage's ``rewards``."""

    kind: Literal["mixed"] = "mixed"
    rewards: list[RewardTerm] = Field(min_length=1)


JudgeRef = Annotated[PythonRef | RewardModelRef | MixedRef | EndpointRef, Field(discriminator="kind")]
# What can say which of two replies is better: by its score of each, or by comparing them.
ComparerRef = Annotated[
    PythonRef | RewardModelRef | MixedRef | EndpointRef | LanguageModelRef | PythonFeedbackRef,
    Field(discriminator="kind"),
]
