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
from keel.recipe.dpo import DpoStage
from keel.recipe.eval import EvalStage
from keel.recipe.grpo import GrpoStage
from keel.recipe.judges import RewardModelRef
from keel.recipe.ppo import PpoStage
from keel.recipe.report import ReportStage
from keel.recipe.reward import RewardStage
from keel.recipe.sample import SampleStage
from keel.recipe.sections import DataConfig, LoggingConfig, ModelConfig, Strict
from keel.recipe.sft import SftStage
from keel.recipe.stage import PEOPLE, OnlineBase, PolicyBase, PreferenceBase, StageBase, TrainBase

Stage = Annotated[
    SftStage | SampleStage | AnnotateStage | RewardStage | DpoStage | PpoStage | GrpoStage | EvalStage | ReportStage,
    Field(discriminator="kind"),
]


# Every kind of stage, by its name in a recipe.
STAGES: dict[str, type[StageBase]] = {
    stage.model_fields["kind"].default: stage for stage in get_args(get_args(Stage)[0])
}


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
    def _sft_installs_the_template(self) -> Recipe:
        for stage in self.stages:
            if isinstance(stage, SftStage) or not isinstance(stage, TrainBase | SampleStage):
                continue
            if self.model.chat_template is not None and stage.model == "base":
                raise ValueError(
                    f"model.chat_template is given to a model by an SFT stage, and {stage.name} starts from the model "
                    f"itself; set {stage.name}.model to an SFT stage, or save the template with the model's tokenizer"
                )
        return self

    @model_validator(mode="after")
    def _half_weights_half_products(self) -> Recipe:
        exact = [s.name for s in self.stages if isinstance(s, TrainBase) and s.precision == "fp32"]
        if self.model.weights == "bf16" and exact:
            raise ValueError(
                f"model.weights: bf16 holds weights for products in bfloat16, and {exact[0]}.precision is fp32; set "
                "model.weights: auto, or precision: bf16"
            )
        return self

    @model_validator(mode="after")
    def _ptx_needs_text(self) -> Recipe:
        for stage in self.stages:
            if isinstance(stage, PolicyBase) and stage.ptx is not None and self.data.pretraining is None:
                raise ValueError(f"{stage.name}.ptx mixes in plain text; set data.pretraining=FILE or leave ptx out")
        return self

    @model_validator(mode="after")
    def _weights_need_overlap(self) -> Recipe:
        overlap = {stage.name: stage.overlap for stage in self.stages if isinstance(stage, AnnotateStage)}
        for stage in self.stages:
            if not isinstance(stage, PreferenceBase) or stage.votes != "weighted":
                continue
            shares = [overlap.get(source) for source in stage.sources]
            if shares and all(share == 0 for share in shares):
                raise ValueError(
                    f"{stage.name}.votes: weighted tells annotators apart by what two of them judged, and "
                    f"{stage.sources[0]}.overlap is 0; raise it or use votes: raw"
                )
        return self

    @model_validator(mode="after")
    def _one_base_for_all(self) -> Recipe:
        stages = {stage.name: stage for stage in self.stages}
        for stage in self.stages:
            if not isinstance(stage, OnlineBase) or not stage.one_base:
                continue
            if self.model.lora is None:
                raise ValueError(f"{stage.name}.one_base: roles differ by their adapters; set model.lora")
            if stage.reference not in (None, stage.model):
                raise ValueError(f"{stage.name}.one_base: the reference is the base; leave {stage.name}.reference out")
            named = [term.source.model for term in stage.rewards if isinstance(term.source, RewardModelRef)]
            named += [stage.critic] if isinstance(stage, PpoStage) and stage.critic else []
            for other in (stages[name] for name in named if name in stages):
                if not isinstance(other, RewardStage) or other.model != stage.model:
                    raise ValueError(
                        f"{stage.name}.one_base: {other.name} must be a reward stage with model: {stage.model}, "
                        f"the checkpoint that {stage.name} starts from; or set one_base: false"
                    )
        return self

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)
