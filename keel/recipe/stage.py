"""What kinds of stages have in common: training, a policy, learning from preferences, learning from own samples."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from keel.recipe.judges import PythonRef, RewardTerm
from keel.recipe.sections import OptimConfig, SamplingConfig, Strict


class StageBase(Strict):
    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")


class TrainBase(StageBase):
    model: str = Field("base", description="stage whose checkpoint this starts from, a folder, or 'base'")
    optim: OptimConfig = OptimConfig()
    batch_tokens: int = Field(8192, ge=16, description="tokens in one forward pass (packed, no padding)")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="torch.compile the forward and backward passes of the trained model; auto: on a GPU, for models of "
        "100M parameters or more (half a minute at the start, then up to 1.6 times as fast)",
    )
    log_every: int = Field(1, ge=1)
    save_every_seconds: float = Field(60.0, ge=0, description="how much work a killed run may lose; 0: every step")


class PtxConfig(Strict):
    """Next-token prediction on plain text (``data.pretraining``) as a part of every optimizer step, so that what
    neither demonstrations nor rewards speak of is not forgotten (Ouyang et al. 2022)."""

    coef: float = Field(gt=0, description="weight of the texts' loss, a mean over their tokens")
    batch_size: int = Field(8, ge=1, description="texts per optimizer step")


class PolicyBase(TrainBase):
    """What stages that train a language model have in common."""

    ptx: PtxConfig | None = Field(None, description="pretraining text mixed into every step; default: none")


PEOPLE = "people"  # as a source: what people wrote or judged in the store
Voter = Literal["people", "models", "simulated"]
VOTERS: tuple[Voter, ...] = ("people", "models", "simulated")
Voters = Literal["all", Voter]
How = Literal["raw", "majority", "weighted"]


def listed(sources: str | list[str] | None) -> tuple[str, ...]:
    if sources is None:
        return ()
    return (sources,) if isinstance(sources, str) else tuple(sources)


class PreferenceBase(TrainBase):
    """What stages that learn from preferences have in common."""

    model: str = "sft"
    preferences: str | list[str] | None = Field(
        None,
        description="annotate stages, 'people' (people's votes in the store), or a file; several in a list; default: "
        "data.preferences",
    )
    voters: Voters = Field(
        "all",
        description="with an annotate stage: its simulated votes, and whatever people and models have judged in the "
        "store so far; or one of the three alone",
    )
    votes: How = Field(
        "raw",
        description="each vote a record; each item's majority, ties out; or votes weighted by annotators' reliability",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """``preferences`` as a list."""
        return listed(self.preferences)

    def whose(self, annotated: Collection[str]) -> frozenset[Voter]:
        """Whose votes in the store this learns from; ``annotated``: the names of the recipe's annotate stages."""
        asked: set[Voter] = {"people"} if PEOPLE in self.sources else set()
        if not set(self.sources).isdisjoint(annotated):
            asked |= set(VOTERS) if self.voters == "all" else {self.voters}
        return frozenset(asked)


class OnlineBase(PolicyBase):
    """What stages that learn from their own samples have in common. An episode is one prompt with one completion."""

    model: str = "sft"
    reference: str | None = Field(None, description="default: model")
    rewards: list[RewardTerm] = Field(min_length=1)
    prompts: str | None = Field(None, description="default: data.prompts")
    episodes: int = Field(4096, ge=1, description="completions in all")
    rollout_batch: int = Field(256, ge=1, description="completions per rollout")
    group_size: int = Field(
        1, ge=1, description="completions per prompt, which is run once for all of them; rollout_batch is a multiple"
    )
    minibatches: int = Field(2, ge=1, description="optimizer steps per epoch over a rollout")
    epochs: int = Field(1, ge=1, description="passes over each rollout")
    sampling: SamplingConfig = SamplingConfig()
    one_base: bool = Field(
        False,
        description="policy, reference, reward models and critic as adapters on one copy of the model in memory; "
        "needs model.lora, and reward models trained with it from the same checkpoint",
    )
    missing_eos_penalty: float = Field(1.0, ge=0, description="subtracted from the score of a cut completion")
    reward_clip: float | None = Field(
        None,
        gt=0,
        description="scores are held within this of 0 (after the terms' weights); default: not at all, whatever the "
        "source's unit is",
    )
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        "trainer",
        description="whose log-probabilities the ratios divide by; auto: the sampler's while they are the trainer's",
    )
    watch: PythonRef | None = Field(None, description="a judge that only watches: its mean is logged as eval/gold")

    @model_validator(mode="after")
    def _whole_groups(self) -> OnlineBase:
        if self.rollout_batch % self.group_size:
            raise ValueError(
                f"rollout_batch counts completions and {self.rollout_batch} is no multiple of group_size = "
                f"{self.group_size}; set it to group_size x the number of prompts per rollout"
            )
        if self.minibatches > self.rollout_batch // self.group_size:
            raise ValueError(
                f"a rollout has {self.rollout_batch // self.group_size} prompts, which do not make "
                f"{self.minibatches} minibatches; lower minibatches or raise rollout_batch"
            )
        return self

    @model_validator(mode="after")
    def _samples_what_it_trains(self) -> OnlineBase:
        sampling, name = self.sampling, type(self).__name__.removesuffix("Stage").upper()
        if sampling.temperature == 0:
            raise ValueError(f"{name} learns from differences between samples; set sampling.temperature above 0")
        if sampling.top_k or sampling.top_p < 1 or sampling.min_p:
            raise ValueError(
                f"top_k, top_p and min_p make {name}'s ratios those of another distribution than it samples from; "
                "leave them out of sampling and lower the temperature instead"
            )
        return self
