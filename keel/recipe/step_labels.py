"""Settings of labelling steps by completions from them (Math-Shepherd; Wang et al. 2023, arXiv:2312.08935)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import ROWS, Makes, ModelUse, Reference, Scoring, prompt_pool
from keel.recipe.judges import PythonRef, RewardModelRef
from keel.recipe.sections import DataConfig, SamplingConfig
from keel.recipe.stage import StageBase, Surroundings, start_has_template
from keel.recipe.steps import ProcessRef, PythonStepsRef, Steps, StepsRef
from keel.recipe.verify import VerifyRef


class StepLabelsStage(StageBase):
    help: ClassVar[str] = "label the steps of replies by where completions from them lead"
    makes: ClassVar[tuple[Makes, ...]] = ("step labels",)

    kind: Literal["step_labels"] = "step_labels"
    seed: int | None = Field(None, ge=0, description="of replies, completions and the choice; default: the recipe's")
    model: str = Field("sft", description="what completes: a stage, a folder, or 'base'")
    responses: str | None = Field(
        None, description="a sample stage whose replies are labelled; default: replies of model"
    )
    prompts: str | None = Field(None, description="without responses: what model replies to; default: data.prompts")
    per_prompt: int = Field(4, ge=1, description="without responses: replies sampled a prompt; equal ones are one")
    steps: Steps = Field(Steps(), description="where a step ends")
    verify: Annotated[VerifyRef | PythonRef, Field(discriminator="kind")] = Field(
        description="what says whether a reply is right: its answer held against the prompt's, or a Python function "
        "whose score is above 0.5"
    )
    k: int = Field(8, ge=1, description="completions of each prefix of a reply")
    estimate: Literal["hard", "soft"] = Field(
        "hard", description="a step's label: 1 where any completion behind it is right, else 0; or their share"
    )
    cap: int | None = Field(None, ge=1, description="completions sampled for one prompt, at most; default: no limit")
    judge: StepsRef | None = Field(
        None, description="a second opinion: where its score, 0.5 or more, says otherwise than the label, there is none"
    )
    replies: int | None = Field(None, ge=1, description="replies labelled, at most; default: every one")
    choose: Literal["random", "convincing"] = Field(
        "random", description="which replies: at random, or those with a wrong answer that scorer thinks most of"
    )
    random_share: float = Field(
        0.15, ge=0, le=1, description="choose: convincing: share of the replies that is drawn at random all the same"
    )
    scorer: Annotated[ProcessRef | PythonStepsRef | RewardModelRef, Field(discriminator="kind")] | None = Field(
        None, description="choose: convincing: a process reward model, a Python function of steps, or a reward model"
    )
    sampling: SamplingConfig = Field(
        SamplingConfig(), description="of completions, and of replies; max_new_tokens: of each by itself"
    )

    def references(self) -> Iterator[Reference]:
        yield Reference("model", self.model, ("policy",))
        if self.responses is not None:
            yield Reference("responses", self.responses, ("responses",))
        yield from super().references()

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        yield "verify", self.verify
        if self.judge is not None:
            yield "judge", self.judge
        if self.scorer is not None:
            yield "scorer", self.scorer

    def cuts(self) -> tuple[str, Steps] | None:
        return None if self.responses is None else (self.responses, self.steps)

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return ROWS if self.responses is not None else (*prompt_pool(data), *ROWS)

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {} if self.prompts is None else {"prompts": self.prompts}

    def loads(self) -> Iterator[ModelUse]:
        yield ModelUse(self.model)

    def seed_of(self, recipe_seed: int) -> int:
        return recipe_seed if self.seed is None else self.seed

    def samples(self) -> SamplingConfig:
        return self.sampling

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        start_has_template(self, self.model, recipe)
        read = {stage.name: how.steps for stage in recipe.stages if (how := stage.steps_read()) is not None}
        for field, ref in (("judge", self.judge), ("scorer", self.scorer)):
            if isinstance(ref, ProcessRef):
                self.cuts_alike(field, read.get(ref.model, self.steps))

    def cuts_alike(self, field: str, trained: Steps) -> None:
        """ValueError where what ``field`` names was trained to judge other steps."""
        if trained != self.steps:
            raise ValueError(
                f"{self.name}.steps: {self.steps.by} cuts replies otherwise than {self.name}.{field} was trained to "
                f"judge them ({trained.by}); set steps to that"
            )

    @model_validator(mode="after")
    def _whose_replies(self) -> StepLabelsStage:
        if self.responses is not None and {"prompts", "per_prompt"} & self.model_fields_set:
            raise ValueError(
                "prompts and per_prompt are of replies that the stage samples, and responses names others; leave one "
                "of the two out"
            )
        if self.sampling.temperature == 0 and self.k > 1:
            raise ValueError(
                f"sampling.temperature: 0 makes all {self.k} completions of a prefix the same; raise it, or set k: 1"
            )
        if self.cap is not None and self.cap < self.k:
            raise ValueError(f"cap: {self.cap} leaves no prefix its k: {self.k} completions; raise cap, or lower k")
        return self

    @model_validator(mode="after")
    def _who_chooses(self) -> StepLabelsStage:
        if self.choose == "convincing" and (self.scorer is None or self.replies is None):
            raise ValueError(
                "choose: convincing takes those that a scorer thinks most of; name a scorer, and set replies"
            )
        if self.choose == "random" and {"scorer", "random_share"} & self.model_fields_set:
            raise ValueError("scorer and random_share go with choose: convincing; set it, or leave them out")
        return self
