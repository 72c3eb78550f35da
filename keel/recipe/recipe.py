"""The recipe: what a run does, as strict data. Unknown keys are errors; impossible combinations fail here, before any
compute. This file imports no torch: ``keel --help`` and ``keel check`` must answer at once.

A recipe is a YAML file of this shape::

    name: assistant
    seed: 0
    model: {path: ./my-base}
    data: {demonstrations: demos.jsonl, preferences: pairs.parquet}
    stages:
      - {kind: sft, name: sft, model: base}
      - {kind: reward, name: reward, model: sft}
      - ...

``model:`` of a stage names the stage whose checkpoint it starts from (``base`` is the recipe's own model).
On the command line ``section.key=value`` changes the recipe's sections, and ``STAGE.key=value`` a stage.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field, model_validator

from keel.recipe.annotate import AnnotateStage
from keel.recipe.critique import CritiqueStage
from keel.recipe.declared import PEOPLE, Makes
from keel.recipe.dpo import DpoStage
from keel.recipe.eval import EvalStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.ppo import PpoStage
from keel.recipe.process_reward import ProcessRewardStage
from keel.recipe.report import ReportStage
from keel.recipe.reward import RewardStage
from keel.recipe.sample import SampleStage
from keel.recipe.sections import DataConfig, LoggingConfig, ModelConfig, Strict
from keel.recipe.sft import SftStage
from keel.recipe.stage import StageBase
from keel.recipe.step_labels import StepLabelsStage

Stage = Annotated[
    SftStage
    | SampleStage
    | CritiqueStage
    | AnnotateStage
    | RewardStage
    | StepLabelsStage
    | ProcessRewardStage
    | DpoStage
    | PpoStage
    | GrpoStage
    | EvalStage
    | ReportStage,
    Field(discriminator="kind"),
]


# Every kind of stage, by its name in a recipe.
STAGES: dict[str, type[StageBase]] = {
    stage.model_fields["kind"].default: stage for stage in get_args(get_args(Stage)[0])
}


def kinds_making(*what: Makes) -> tuple[str, ...]:
    """The kinds of stage that make any of this."""
    return tuple(kind for kind, stage in STAGES.items() if set(what) & set(stage.makes))


class Recipe(Strict):
    name: str = "run"
    seed: int = Field(0, ge=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores")
    model: ModelConfig
    data: DataConfig = DataConfig()
    store: str | None = Field(None, description="feedback database URL; default: feedback.db in the run directory")
    logging: LoggingConfig = LoggingConfig()
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _graph(self) -> Recipe:
        seen = {"base"}
        reserved = {*type(self).model_fields, PEOPLE}
        for stage in self.stages:
            if stage.name in seen or stage.name in reserved:
                raise ValueError(
                    f"stage name {stage.name!r} is used twice or is a recipe section or 'people'; rename it"
                )
            seen.add(stage.name)
        return self

    @model_validator(mode="after")
    def _stages_fit_in(self) -> Recipe:
        for stage in self.stages:
            stage.check_in(self)
        return self

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
