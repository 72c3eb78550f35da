"""Settings that PPO and GRPO share: learning from own samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.checkpoints import moments
from keel.recipe.declared import ROWS, Doubt, LearnsFrom, Reference, Scoring, cards_of, prompt_pool, terms
from keel.recipe.judges import ProcessTerm, PythonRef, RewardModelRef, RewardTerm, judges_steps, names_of_their_own
from keel.recipe.sections import DataConfig, SamplingConfig
from keel.recipe.stage import PolicyBase, Surroundings
from keel.recipe.steps import ProcessRef


class OnlineBase(PolicyBase):
    """What stages that learn from their own samples have in common. An episode is one prompt with one completion."""

    learns_from: ClassVar[LearnsFrom | None] = "rewards"
    adapter_dropout: ClassVar[bool] = False
    whole_lr: ClassVar[float] = 1e-6

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
        description="whose log-probabilities the ratios divide by; auto: the sampler's, as long as a "
        "probe agrees with the trainer (0.002 nats a token)",
    )
    watch: PythonRef | None = Field(None, description="a judge that only watches: its mean is logged as eval/gold")

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        if self.watch is not None:
            yield "watch", self.watch
        yield from terms("rewards", self.rewards)

    def cards(self) -> Iterator[tuple[str, str]]:
        yield from cards_of("rewards", self.rewards)

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        if self.reference is not None:
            yield Reference("reference", self.reference, ("policy",))

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return (*prompt_pool(data), *ROWS, *super().reads(data))

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {} if self.prompts is None else {"prompts": self.prompts}

    def samples(self) -> SamplingConfig:
        return self.sampling

    def compares(self) -> tuple[str, str]:
        return self.model, self.reference or self.model

    def doubts(self, products: str) -> Iterator[Doubt]:
        yield from super().doubts(products)
        if self.old_logprobs == "sampler" and products == "bf16":
            sentence = "in bfloat16 the sampler's log-probabilities differ from the trainer's, and ratios with them"
            yield Doubt("old_logprobs", sentence, "use old_logprobs: auto")
        for i, source in self._process_terms():
            if isinstance(source.scores, ProcessRef) and source.card is None:
                sentence = "nobody has seen what a wrong number and mere style do to the process reward model's scores"
                remedy = f"set {self.name}.rewards.{i}.source.card.replies to a step_labels stage or a file"
                yield Doubt(f"rewards.{i}.source.card", sentence, remedy)

    def kl_weight(self) -> float:
        """How strongly its policy is held to the reference."""
        raise NotImplementedError

    def overlong_begins(self) -> float:
        """The share of ``max_new_tokens`` above which a reply that ended pays for its length; 1: it never does."""
        return 1.0

    def on_its_base(self) -> list[str]:
        """With ``one_base``: the names of the reward models that share it."""
        return self.reward_models()

    def reward_models(self) -> list[str]:
        """The names of those that score whole replies."""
        return [one.model for _, one in terms("rewards", self.rewards) if isinstance(one, RewardModelRef)]

    def pays_steps(self) -> bool:
        """Whether a process reward gives values to single steps of a reply."""
        return any(
            isinstance(term.source, ProcessTerm) and term.source.pays_steps and term.weight for term in self.rewards
        )

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        made_here = {stage.name: stage.steps_read() for stage in recipe.stages if "process reward model" in stage.makes}
        for i, source in self._process_terms():
            if source.model in made_here and (how := made_here[source.model]) is not None:
                judges_steps(f"{self.name}.rewards.{i}.source", source, how.steps, how.outcome)
        if not self.one_base:
            return
        if recipe.model.lora is None:
            raise ValueError(f"{self.name}.one_base: roles differ by their adapters; set model.lora")
        if self.reference not in (None, self.model):
            raise ValueError(f"{self.name}.one_base: the reference is the base; leave {self.name}.reference out")
        stages = {stage.name: stage for stage in recipe.stages}
        for other in (stages[name] for name in self.on_its_base() if name in stages):
            made = other.training()
            if "reward model" not in other.makes or made is None or made.model != self.model:
                raise ValueError(
                    f"{self.name}.one_base: {other.name} must be a reward stage with model: {self.model}, "
                    f"the checkpoint that {self.name} starts from; or set one_base: false"
                )

    @model_validator(mode="after")
    def _checkpoints_fit(self) -> OnlineBase:
        if self.kept():
            try:
                moments(self.kept(), math.ceil(self.episodes / self.rollout_batch))
            except ValueError as error:
                raise ValueError(f"keep: {error}") from error
        return self

    @model_validator(mode="after")
    def _one_process(self) -> OnlineBase:
        terms = list(self._process_terms())
        if len(terms) > 1:
            raise ValueError("rewards: two terms value the steps of a reply; leave one out")
        for i, source in terms:
            clip, weight = self.reward_clip, abs(self.rewards[i].weight)
            if clip is not None and clip < weight and source.form in ("progress", "min"):
                raise ValueError(
                    f"reward_clip = {clip:g} would cut what a step changes of the score, weighed by {weight:g}, so "
                    f"that steps no longer add up and more of them pay; raise it to {weight:g}, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _rewards_are_different(self) -> OnlineBase:
        names_of_their_own(self.rewards)
        return self

    def _process_terms(self) -> Iterator[tuple[int, ProcessTerm]]:
        """Those of the rewards that read steps, with their places."""
        return ((i, t.source) for i, t in enumerate(self.rewards) if isinstance(t.source, ProcessTerm))

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
