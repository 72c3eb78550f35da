"""Settings of comparing replies by the principles of a constitution (RLAIF; Bai et al. 2022, arXiv:2212.08073, 4.1)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import PrincipleUse
from keel.recipe.judges import ComparerRef, EndpointRef, LanguageModelRef, PythonFeedbackRef
from keel.recipe.sections import SamplingConfig
from keel.recipe.stage import StageBase

THOUGHT_CLAMP = (0.4, 0.6)  # what reasons make too sure of itself (Bai et al. 2022, section 4.1)


class PrincipledBase(StageBase):
    """What an annotate stage says of principles. Without a constitution all of it is left out."""

    later: ClassVar[frozenset[str]] = frozenset(
        {
            "constitution", "principle_ids", "tags", "principles_per_pair", "thought", "clamp", "labels", "votes_asked",
        }
    )  # fmt: skip

    judge: ComparerRef | None = None
    constitution: str | None = Field(
        None, description="the judge compares by its principles: a file, or the name of one that comes with Keel"
    )
    principle_ids: list[str] = Field(
        default_factory=list, description="principles that are drawn from, with those of tags; default: all"
    )
    tags: list[str] = Field(default_factory=list, description="groups of principles that are drawn from")
    principles_per_pair: int = Field(
        1, ge=1, description="different principles that a pair is judged by; the mean counts"
    )
    thought: SamplingConfig | None = Field(
        None, description="the judge writes its reasons first, sampled so; default: it answers at once"
    )
    clamp: tuple[float, float] | None = Field(
        None, description="probabilities are held between these; default: 0.4 and 0.6 with thought, else no bounds"
    )
    labels: Literal["soft", "hard"] = Field(
        "soft", description="votes have the judge's probability, or its choice alone"
    )
    votes_asked: int = Field(
        1,
        ge=1,
        description="of an endpoint that gives no log-probabilities: answers a question at temperature 1, whose share "
        "is the probability; with thought at its temperature",
    )

    def principles(self) -> PrincipleUse | None:
        if self.constitution is None:
            return None
        ids, tags, together = tuple(self.principle_ids), tuple(self.tags), self.principles_per_pair
        return PrincipleUse(self.constitution, ids, tags, at_once=together, counted_by="principles_per_pair")

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which a pair's probability is held."""
        return self.clamp or ((0.0, 1.0) if self.thought is None else THOUGHT_CLAMP)

    @model_validator(mode="after")
    def _whose_principles(self) -> PrincipledBase:
        if self.constitution is None:
            fields = PrincipledBase.model_fields
            set_ = [name for name in sorted(PrincipledBase.later) if getattr(self, name) != _default(fields[name])]
            if set_:
                raise ValueError(f"{set_[0]} goes with a constitution; name one, or leave {set_[0]} out")
            if isinstance(self.judge, PythonFeedbackRef):
                raise ValueError("a judge of kind python_feedback is asked under a principle; name a constitution")
            return self
        if not isinstance(self.judge, EndpointRef | LanguageModelRef | PythonFeedbackRef):
            raise ValueError(
                "a constitution is for a judge that compares two replies; name one of kind language_model, endpoint "
                "or python_feedback"
            )
        if isinstance(self.judge, EndpointRef | LanguageModelRef) and self.judge.instructions is not None:
            raise ValueError("judge.instructions and a principle both say what is asked; leave one of them out")
        return self

    @model_validator(mode="after")
    def _how_it_answers(self) -> PrincipledBase:
        if self.thought is not None and isinstance(self.judge, PythonFeedbackRef):
            raise ValueError("a Python function has no reasons to write; leave thought out")
        if self.thought is not None and self.thought.stop and isinstance(self.judge, EndpointRef):
            raise ValueError("thought.stop would end an endpoint's answer before its letter; leave it out")
        if self.votes_asked > 1 and not isinstance(self.judge, EndpointRef):
            raise ValueError("votes_asked is of an endpoint without log-probabilities; leave it out")
        if self.clamp is not None and not 0 <= self.clamp[0] <= 0.5 <= self.clamp[1] <= 1:
            raise ValueError(f"clamp is {list(self.clamp)}; give two probabilities, one below and one above a half")
        return self


def _default(field: object) -> object:
    return field.get_default(call_default_factory=True)  # type: ignore[attr-defined]
