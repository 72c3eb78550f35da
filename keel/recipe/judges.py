"""What scores, judges or annotates: a Python callable, a reward model, an endpoint, a weighted sum of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from keel.recipe.process_card import ProcessCard
from keel.recipe.sections import Strict
from keel.recipe.steps import ProcessRef, PythonStepsRef, Steps, StepsRef, Thinking
from keel.recipe.verify import FormatRef, RandomRef, VerifyRef


class _Shown(Strict):
    thinking: Thinking | None = Field(
        None,
        description="it is shown what follows the thinking alone, nothing where that never ends; default: the whole "
        "reply",
    )

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Recipes without it, and fingerprints that were made of them, stand."""
        return {name: value for name, value in handler(self).items() if name != "thinking" or value is not None}


class PythonRef(_Shown):
    """A Python callable: ``module:name`` or ``path/to/file.py:name``."""

    kind: Literal["python"] = "python"
    ref: str


class RewardModelRef(_Shown):
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


# What checks a reply without a model.
CheckRef = VerifyRef | FormatRef | RandomRef
# What scores a whole reply.
OutcomeRef = Annotated[PythonRef | RewardModelRef | VerifyRef | FormatRef | RandomRef, Field(discriminator="kind")]
StepForm = Literal["progress", "min", "sum", "gated"]


def right_above(source: object) -> float:
    """Above what score of a source a reply is right: half-way to what a verifier says of others, else 1/2."""
    return source.right_above if isinstance(source, VerifyRef) else 0.5


class ProcessTerm(Strict):
    """A reward for the steps of a reply, made of what a process reward model (or a function) says of each
    (``keel.reward.process_forms`` has the formulas)."""

    kind: Literal["process"] = "process"
    model: str | None = Field(
        None, description="a process_reward stage or a folder; the same as scorer: {kind: process}"
    )
    scorer: StepsRef | None = Field(None, description="what scores steps, where it is no process reward model's name")
    form: StepForm = Field(
        "progress",
        description="progress: what a step changes of the score, which more steps cannot raise; min: the lowest step "
        "counts (PURE); sum: each step's score (DeepSeekMath), which pays for more steps; gated: the outcome, where "
        "every step reaches bound",
    )
    temperature: float = Field(0.1, gt=0, description="min: the lower, the more the lowest step alone counts")
    bound: float = Field(0.5, gt=0, le=1, description="from where on a step is right, for gated and in figures")
    start: float = Field(
        0.5, ge=0, le=1, description="progress: the score before the first step; GRPO's baseline takes it out"
    )
    outcome: OutcomeRef | None = Field(None, description="gated: what scores the whole reply")
    steps: Steps | None = Field(None, description="where steps end; default: as the model was trained, else lines")
    step_pattern: str | None = Field(
        None,
        description="a regular expression that a step should match (an equation, say); those that do not are counted",
    )
    thinking: Thinking | None = Field(None, description="marks of thinking, whose length is logged")
    card: ProcessCard | None = Field(
        None, description="what a wrong number and mere style do to the scores, measured first; default: it is not"
    )

    @property
    def scores(self) -> StepsRef:
        """What scores the steps."""
        return self.scorer or ProcessRef(model=self.model or "")

    @property
    def pays_steps(self) -> bool:
        """Whether single steps have values (else the reply has one)."""
        return self.form != "gated"

    @field_validator("step_pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    @model_validator(mode="after")
    def _fits_together(self) -> ProcessTerm:
        if (self.model is None) == (self.scorer is None):
            raise ValueError("a process reward has a model (a process_reward stage or a folder) or a scorer; give one")
        if self.form == "gated" and self.outcome is None:
            raise ValueError("form: gated lets an outcome through; set outcome: {kind: ...}, what scores whole replies")
        if self.form != "gated" and self.outcome is not None:
            raise ValueError(
                f"outcome is what form: gated lets through, and form is {self.form}; give the outcome as a reward of "
                "its own, with its weight"
            )
        return self


def judges_steps(place: str, term: ProcessTerm, steps: Steps, outcome: bool) -> None:
    """ValueError where what a process reward names cannot score its steps. ``steps``, ``outcome``: as the model was
    trained."""
    if outcome:
        raise ValueError(
            f"{place}: {term.scores.model if isinstance(term.scores, ProcessRef) else ''} is an outcome reward model "
            "(level: outcome): of steps before the last it learned nothing; name one with level: steps"
        )
    if term.steps is not None and term.steps != steps:
        raise ValueError(
            f"{place}: it cuts replies otherwise than its model was trained to judge them; leave the reward's steps out"
        )


class RewardTerm(Strict):
    """One source of reward, with its weight in the sum. A process reward of weight 0 is only watched."""

    source: Annotated[
        PythonRef | RewardModelRef | ProcessTerm | VerifyRef | FormatRef | RandomRef, Field(discriminator="kind")
    ]
    weight: float = 1.0


def source_name(source: OutcomeRef | EndpointRef | ProcessTerm | StepsRef) -> str:
    """By which it is told from others, in figures too."""
    if isinstance(source, CheckRef):
        return source.named
    named = source.scores if isinstance(source, ProcessTerm) else source
    name = named.ref if isinstance(named, PythonRef | PythonStepsRef) else named.model
    return f"{name} (answer)" if isinstance(named, PythonRef | RewardModelRef) and named.thinking is not None else name


def names_of_their_own(terms: list[RewardTerm]) -> list[RewardTerm]:
    """ValueError for two terms that figures could not tell apart."""
    for i, term in enumerate(terms):
        for other in terms[:i]:
            if term.source == other.source:
                raise ValueError(
                    "rewards: two terms have the same source; leave one out and add its weight to the other's"
                )
            if (name := source_name(term.source)) == source_name(other.source):
                raise ValueError(
                    f"rewards: two terms are called {name}, and each has figures by its name; leave one out, or give "
                    "one's function or folder another name"
                )
    return terms


Rewards = Annotated[list[RewardTerm], AfterValidator(names_of_their_own)]


class MixedRef(Strict):
    """The weighted sum of several sources of reward, as in a PPO stage's ``rewards``."""

    kind: Literal["mixed"] = "mixed"
    rewards: Rewards = Field(min_length=1)

    @model_validator(mode="after")
    def _no_cards(self) -> MixedRef:
        if any(isinstance(term.source, ProcessTerm) and term.source.card for term in self.rewards):
            raise ValueError(
                "a judge's process reward is not tried on changed replies; leave card out, or set it in rewards"
            )
        return self


JudgeRef = Annotated[
    PythonRef | RewardModelRef | MixedRef | EndpointRef | VerifyRef | FormatRef | RandomRef,
    Field(discriminator="kind"),
]
# What can say which of two replies is better: by its score of each, or by comparing them.
ComparerRef = Annotated[
    PythonRef | RewardModelRef | MixedRef | EndpointRef | LanguageModelRef | PythonFeedbackRef,
    Field(discriminator="kind"),
]
