"""Settings of judging responses: pairs of them by simulated annotators or a model, single ones by the former."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import Makes, ModelUse, Reference, Scoring, terms
from keel.recipe.judge_card import JudgeCard
from keel.recipe.judges import (
    ComparerRef,
    EndpointRef,
    LanguageModelRef,
    MixedRef,
    PythonFeedbackRef,
    PythonRef,
    RewardModelRef,
)
from keel.recipe.preference_loss import PreferenceLossBase
from keel.recipe.principled import PrincipledBase
from keel.recipe.sections import SamplingConfig
from keel.recipe.stage import PreferenceBase, Surroundings, start_has_template
from keel.recipe.steps import ProcessRef
from keel.recipe.thumbs import ThumbsBase


class AnnotateStage(PrincipledBase):
    help: ClassVar[str] = "have simulated annotators or a model judge pairs of responses"
    makes: ClassVar[tuple[Makes, ...]] = ("votes",)
    uses_model: ClassVar[bool] = False
    stored: ClassVar[Literal["nothing", "copy", "all"]] = "all"
    later: ClassVar[frozenset[str]] = frozenset(
        {"ask", "liked", "replies", "judge", "judge_temperature", "overlap_times", "card"}
    )

    kind: Literal["annotate"] = "annotate"
    responses: str = "sample"
    annotators: PythonRef | None = Field(
        None, description="returns the simulated population: a callable seed -> list of annotators"
    )
    judge: ComparerRef | None = Field(
        None,
        description="in their place: what scores replies (a reward model, a sum, a Python function) or compares two in "
        "both orders (an endpoint, a language model); its votes have probabilities",
    )
    judge_temperature: float | None = Field(
        None,
        gt=0,
        description="of a judge that scores, in its unit: P = sigmoid(difference / temperature); default: what fits a "
        "reward stage's held-out votes, else 1",
    )
    pairs_per_prompt: int = Field(1, ge=1, description="pairs of one prompt, at most")
    pairs: int | None = Field(None, ge=1, description="pairs in all, at most; default: those of every prompt")
    choice: Literal["random", "uncertain"] = Field(
        "random", description="which pairs: at random, or those on which the reward models named in rewards disagree"
    )
    rewards: list[str] = Field(
        default_factory=list,
        description="reward stages that choose (choice: uncertain); what they were trained on is not asked again",
    )
    overlap: float = Field(
        0.1, ge=0, le=1, description="share of pairs judged twice, to measure agreement (a judge judges each once)"
    )
    overlap_times: int = Field(2, ge=2, description="how often those are judged: by so many annotators")
    guideline: str = "1"
    ask: Literal["pairs", "thumbs"] = Field(
        "pairs", description="which of two responses is better, or thumbs up or down on single ones"
    )
    liked: float = Field(
        0.5, gt=0, lt=1, description="ask: thumbs: an annotator's bar lets this share of all responses pass"
    )
    card: JudgeCard | None = Field(
        None,
        description="the judge is measured before it labels: the bounds that it must keep; default: it is not. Other "
        "bounds judge nothing again",
    )
    replies: int | None = Field(None, ge=1, description="ask: thumbs: responses in all, at most; default: every one")

    def settings(self) -> dict[str, Any]:
        """Its card's bounds are those of every card."""
        settings = super().settings()
        if self.card is not None:
            same = {name: bound for name, bound in JudgeCard().bounds().items() if name in settings["card"]}
            settings["card"] = {**settings["card"], **same}
        return settings

    def card_bounds(self) -> dict[str, Any] | None:
        return None if self.card is None else self.card.bounds()

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        yield Reference("responses", self.responses, ("responses",))
        for i, reward in enumerate(self.rewards):
            yield Reference(f"rewards.{i}", reward, ("reward model",))
        if isinstance(self.judge, LanguageModelRef):
            yield Reference("judge.model", self.judge.model, ("policy",))

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        if self.annotators is not None:
            yield "annotators", self.annotators
        if self.card is not None and isinstance(self.card.against, PythonRef):
            yield "card.against", self.card.against
        if isinstance(self.judge, MixedRef):
            yield from terms("judge.rewards", self.judge.rewards)
        elif isinstance(self.judge, PythonFeedbackRef):
            yield "judge", PythonRef(ref=self.judge.ref)
        elif self.judge is not None and not isinstance(self.judge, LanguageModelRef):
            yield "judge", self.judge

    def loads(self) -> Iterator[ModelUse]:
        if isinstance(self.judge, LanguageModelRef):
            yield ModelUse(self.judge.model)

    def samples(self) -> SamplingConfig | None:
        return self.thought if isinstance(self.judge, LanguageModelRef) else None

    def needs_model(self) -> bool:
        judges = isinstance(self.judge, LanguageModelRef)
        return judges or any(isinstance(one, RewardModelRef | ProcessRef) for _, one in self.scored_by())

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        if self.constitution is not None and isinstance(self.judge, LanguageModelRef):
            start_has_template(self, self.judge.model, recipe)
        self._check_readers(recipe)
        alone = {stage.name: stage for stage in recipe.stages if isinstance(stage, AnnotateStage) and stage.judged_once}
        for other in recipe.stages:
            if not isinstance(other, PreferenceBase) or other.votes not in ("weighted", "posterior"):
                continue
            if self.name in other.sources and alone.keys() >= set(other.sources):
                first = alone[other.sources[0]]
                why = (
                    f"{first.name}.overlap is 0; raise it or" if first.judge is None else f"{first.name} has one judge;"
                )
                raise ValueError(
                    f"{other.name}.votes: {other.votes} tells annotators apart by what two of them judged, and {why} "
                    "use votes: raw"
                )

    def _check_readers(self, recipe: Surroundings) -> None:
        """Pairs and thumbs are learned from by fields of their own."""
        for other in recipe.stages:
            if isinstance(other, PreferenceBase) and self.ask == "thumbs" and self.name in other.sources:
                raise ValueError(
                    f"{other.name}.preferences: {self.name} asks for thumbs on single responses (ask: thumbs); name it "
                    f"in the thumbs of a dpo stage, or set {self.name}.ask: pairs"
                )
            if isinstance(other, ThumbsBase) and self.ask == "pairs" and self.name in other.thumb_sources:
                raise ValueError(
                    f"{other.name}.thumbs: {self.name} asks for pairs; name it in preferences, beside thumbs or alone, "
                    f"or set {self.name}.ask: thumbs"
                )
            if self.judge is not None and isinstance(other, PreferenceBase) and self.name in other.sources:
                self._check_reader_of_a_judge(other)

    def _check_reader_of_a_judge(self, other: PreferenceBase) -> None:
        """A judge's votes are of kind "models", have a probability, and no strength."""
        if other.voters in ("people", "simulated"):
            raise ValueError(
                f"{other.name}.voters: {other.voters} leaves out the votes of {self.name}, which a judge gives; use "
                "models or all"
            )
        if isinstance(other, ThumbsBase) and other.thumbs is not None:
            raise ValueError(
                f"{other.name}.preferences: the votes of {self.name} are probabilities, and a thumb is up or down; "
                "learn from them alone (leave thumbs out)"
            )
        alone = other.sources == (self.name,)
        if alone and isinstance(other, PreferenceLossBase) and other.preference_loss().strength_margin:
            raise ValueError(
                f"{other.name}.strength_margin: a judge, as in {self.name}, does not say how much better a reply is; "
                "use loss: dpo"
            )

    @property
    def judged_once(self) -> bool:
        """Whether no pair is judged by two."""
        return self.overlap == 0 or self.judge is not None

    @model_validator(mode="after")
    def _who_judges(self) -> AnnotateStage:
        if (self.annotators is None) == (self.judge is None):
            raise ValueError("who judges? name annotators (simulated ones) or a judge, one of the two")
        if self.judge_temperature is not None and isinstance(
            self.judge, EndpointRef | LanguageModelRef | PythonFeedbackRef | None
        ):
            raise ValueError("judge_temperature is of a judge that scores replies; leave it out")
        if self.card is not None and self.judge is None:
            raise ValueError("card is a judge's, and annotators are simulated; name a judge, or leave card out")
        if self.judge is not None and self.ask == "thumbs":
            raise ValueError("a judge compares pairs, and ask is thumbs; name annotators, or set ask: pairs")
        return self

    @model_validator(mode="after")
    def _what_is_asked(self) -> AnnotateStage:
        if self.ask == "pairs" and (self.replies is not None or self.liked != 0.5):
            raise ValueError("replies and liked go with ask: thumbs; set it, or leave them out")
        if self.ask == "thumbs" and (self.choice != "random" or self.pairs is not None or self.pairs_per_prompt != 1):
            raise ValueError(
                "pairs, pairs_per_prompt and choice say which pairs are asked, and ask is thumbs; use replies"
            )
        return self

    @model_validator(mode="after")
    def _who_chooses(self) -> AnnotateStage:
        if self.choice == "uncertain" and len(set(self.rewards)) < 2:
            raise ValueError(
                "choice: uncertain compares reward models; name two reward stages or more in rewards, with seeds of "
                "their own"
            )
        if self.choice == "random" and self.rewards:
            raise ValueError("rewards choose pairs with choice: uncertain; set it, or leave rewards out")
        return self
