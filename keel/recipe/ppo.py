"""Settings of PPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import MODELS, ModelUse, Reference
from keel.recipe.online import OnlineBase
from keel.recipe.sections import Strict


class KlConfig(Strict):
    """The keel. ``coef`` weighs the per-token k1 penalty; with ``target`` (nats a sequence) it adapts."""

    coef: float = Field(0.05, ge=0)
    target: float | None = Field(None, gt=0)
    horizon: int = Field(10_000, ge=1, description="episodes over which the adaptive controller reacts")

    @model_validator(mode="after")
    def _can_adapt(self) -> KlConfig:
        if self.target is not None and self.coef == 0:
            raise ValueError("an adaptive coefficient cannot grow from 0; set kl.coef above 0 or leave out kl.target")
        return self


class PpoStage(OnlineBase):
    help: ClassVar[str] = "optimise a policy for a reward under a KL penalty"
    weights_on_disk: ClassVar[int] = 8  # the critic's too

    kind: Literal["ppo"] = "ppo"
    critic: str | None = Field(
        None,
        description="stage or folder of a reward model or language model; default: the first reward model, or the "
        "policy where that reads other tokens or there is none",
    )
    kl: KlConfig = KlConfig()
    clip: float = Field(0.2, gt=0)
    value_clip: float = Field(0.2, gt=0)
    value_coef: float = Field(0.5, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    critic_lr: float | None = Field(None, gt=0, description="default: optim.lr")
    critic_warmup: int = Field(
        0,
        ge=0,
        description="rollouts in which only the critic learns; the policy's schedule and kl.target begin after them",
    )

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        if self.critic is not None:
            yield Reference("critic", self.critic, MODELS)

    def loads(self) -> Iterator[ModelUse]:
        yield ModelUse(self.model, scalar=True)

    def on_its_base(self) -> list[str]:
        return [*super().on_its_base(), *([self.critic] if self.critic else [])]

    def kl_weight(self) -> float:
        return self.kl.coef

    def worth_talking_to(self) -> bool:
        return self.kl.coef > 0 or self.kl.target is not None

    @model_validator(mode="after")
    def _policy_learns(self) -> PpoStage:
        rollouts = -(-self.episodes // self.rollout_batch)
        if self.critic_warmup >= rollouts:
            raise ValueError(
                f"episodes make {rollouts} rollouts and critic_warmup = {self.critic_warmup} takes them all, so the "
                "policy would never learn; lower critic_warmup or raise episodes"
            )
        return self

    @model_validator(mode="after")
    def _steers_by_every_episode(self) -> PpoStage:
        if self.kl.target is not None and self.old_logprobs != "trainer":
            raise ValueError(
                "kl.target steers by the KL of the whole rollout, which the sampler's log-probabilities leave to a "
                "probe; set old_logprobs: trainer or leave out kl.target"
            )
        return self
