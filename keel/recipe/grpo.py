"""Settings of GRPO and its family: independent choices, and presets that are known combinations of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.declared import Doubt
from keel.recipe.grpo_presets import PRESETS, PresetName
from keel.recipe.judges import CheckRef
from keel.recipe.online import OnlineBase
from keel.recipe.sections import Strict
from keel.recipe.steps import ProcessRef

# Bounds of ``sampler_correction`` where the recipe has none: truncated importance sampling, and IcePop.
CORRECTION_BOUNDS = {"clip": (0.0, 2.0), "mask": (0.5, 5.0)}
WIDE_SEQUENCE_CLIP = 0.05  # a whole reply's ratio, a geometric mean, hardly ever moves so far


class GroupKl(Strict):
    """Where the KL of weight ``beta`` stands, and how it is estimated."""

    place: Literal["loss", "reward"] = Field(
        "loss", description="a term of each token's loss, or k1 of the whole reply taken from its score (RLOO)"
    )
    estimator: Literal["k2", "k3"] = Field("k3", description="of each token, in the loss")
    unbiased: bool = Field(
        False, description="weigh the estimate by the ratio, so that its gradient is the KL's (DeepSeek-V3.2)"
    )


def step_conflict(setting: str) -> str:
    return (
        f"the rewards value single steps of a reply, and {setting} knows whole replies alone; leave it out, or take a "
        "reward without steps"
    )


class GrpoStage(OnlineBase):
    """No critic: a completion's baseline comes from scores, by default the mean of its group, the completions of one
    prompt."""

    help: ClassVar[str] = "optimise a policy for a reward without a critic, by groups of replies"
    later: ClassVar[frozenset[str]] = frozenset(
        {
            "baseline",
            "ratio",
            "clip",
            "cap",
            "kl",
            "no_spread",
            "max_resamples",
            "overlong",
            "overlong_from",
            "sampler_correction",
            "correction_bounds",
            "combine",
        }
    )

    kind: Literal["grpo"] = "grpo"
    preset: PresetName | None = Field(
        None, description="a known combination of the settings below: it fills those that the recipe leaves open"
    )
    reference: str | None = Field(None, description="default: model when beta is above 0, else none (no KL is logged)")
    group_size: int = Field(8, ge=2, description="completions per prompt; rollout_batch is a multiple")
    baseline: Literal["group", "others", "batch", "none", "critic"] = Field(
        "group",
        description="what a score is held against: the mean of its group, of the others of its group (RLOO), of the "
        "rollout, or nothing. A critic is PPO's",
    )
    scale_rewards: Literal["group", "batch", "mean", "none"] = Field(
        "group",
        description="divide advantages by the standard deviation of their group or of the rollout, by the mean of "
        "their group (MaxRL), or not (Dr. GRPO)",
    )
    combine: Literal["sum", "each"] = Field(
        "sum", description="several rewards: advantages of their weighted sum, or of each, then summed (GDPO)"
    )
    normalise: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="mean loss over the step's tokens (DAPO), of means over each completion (GRPO), or the sum over "
        "completions x max_new_tokens (Dr. GRPO)",
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="each token's ratio, or for all tokens of a completion its geometric mean (GSPO)"
    )
    clip: Literal["ppo", "detached", "none"] = Field(
        "ppo",
        description="the clipped surrogate; the ratio as a weight without gradient, at most cap (CISPO); or no ratio "
        "(REINFORCE)",
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="with ppo, ratios are held above 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="with ppo, ratios are held below 1 + clip_high (DAPO: 0.28)")
    cap: float | None = Field(
        None, gt=0, description="a ratio. detached: the largest weight (CISPO: 5); ppo: no ratio counts for more (3, 4)"
    )
    beta: float = Field(0.04, ge=0, description="weight of the KL to the reference")
    kl: GroupKl = GroupKl()
    no_spread: Literal["keep", "drop", "resample"] = Field(
        "keep",
        description="groups whose scores are all equal: kept (they count in means), left out of the loss, or replaced "
        "by other prompts' (DAPO)",
    )
    max_resamples: int = Field(10, ge=1, description="resample: times a rollout is filled up before it is left short")
    overlong: Literal["penalty", "soft", "mask"] = Field(
        "penalty",
        description="cut completions lose missing_eos_penalty; soft: so do long ones, from overlong_from on rising "
        "(DAPO); mask: cut completions are left out of loss and baseline",
    )
    overlong_from: float = Field(0.8, gt=0, lt=1, description="soft: the share of max_new_tokens that costs nothing")
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        "auto",
        description="whose log-probabilities the ratios divide by; auto: the sampler's, as long as a probe "
        "agrees with the trainer, and the trainer's at the step itself where each rollout gets one step",
    )
    sampler_correction: Literal["off", "clip", "mask"] = Field(
        "off",
        description="weigh tokens by trainer's / sampler's probability, held within correction_bounds, or 0 outside",
    )
    correction_bounds: tuple[float, float] | None = Field(
        None, description="ratios; default: at most 2 for clip, 0.5 to 5 for mask"
    )

    # ------------------------------------------------------------------------------------------- what it comes to

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        name = given.get("preset") if isinstance(given, dict) else None
        preset = PRESETS.get(name) if isinstance(name, str) else None
        if preset is None:
            return given
        kl = given.get("kl", {})
        inner = {"kl": {**preset.get("kl", {}), **kl}} if isinstance(kl, dict) else {}
        return {**preset, **given, **inner}

    def settings(self) -> dict[str, Any]:
        """A preset is but a name for what is written out: the same choices are the same stage."""
        return {name: value for name, value in super().settings().items() if name != "preset"}

    def kl_weight(self) -> float:
        return self.beta

    def overlong_begins(self) -> float:
        return self.overlong_from if self.overlong == "soft" else 1.0

    @property
    def one_step(self) -> bool:
        """Whether each rollout gets a single optimizer step: the policy of that step is then the one that sampled."""
        return self.epochs * self.minibatches == 1

    @property
    def correction_range(self) -> tuple[float, float]:
        """Of ``sampler_correction``, where it is not off."""
        return self.correction_bounds or CORRECTION_BOUNDS[self.sampler_correction]

    def choices(self) -> dict[str, Any]:
        """The choices that make up the algorithm, whether the recipe, the preset or a default made them."""
        names = (
            *("baseline", "scale_rewards", "combine", "normalise", "ratio", "clip", "clip_low", "clip_high", "cap"),
            *("beta", "kl", "no_spread", "max_resamples", "overlong", "overlong_from", "missing_eos_penalty"),
            *("sampler_correction", "epochs", "minibatches"),
        )
        return self.model_dump(mode="json", include=set(names))

    def resolved(self) -> str:
        bounds = {
            "ppo": f"ppo at ratios {1 - self.clip_low:g} to {1 + self.clip_high:g}"
            + (f", capped at {self.cap:g}" if self.cap else ""),
            "detached": f"detached, ratios capped at {self.cap}",
            "none": "none",
        }[self.clip]
        kl = "k1 in the reward" if self.kl.place == "reward" else f"{self.kl.estimator} in the loss"
        unbiased = ", unbiased" if self.kl.unbiased and self.kl.place == "loss" else ""
        resampled = f" up to {self.max_resamples} times" if self.no_spread == "resample" else ""
        cut = {
            "penalty": f"cut replies lose {self.missing_eos_penalty:g}",
            "soft": f"replies lose up to {self.missing_eos_penalty:g} from {self.overlong_from:g} x max_new_tokens on",
            "mask": "cut replies left out",
        }[self.overlong]
        parts = [
            f"preset {self.preset}" if self.preset else "no preset",
            f"baseline {self.baseline}, scale {self.scale_rewards}, normalise {self.normalise}",
            f"ratio {self.ratio}, clip {bounds}",
            f"KL {self.beta:g} x {kl}{unbiased}" if self.beta else "no KL",
            f"groups without spread: {self.no_spread}{resampled}",
            cut,
        ]
        if self.combine == "each":
            parts.append("each reward normalised by itself")
        if self.sampler_correction != "off":
            low, high = self.correction_range
            parts.append(f"sampler correction {self.sampler_correction} at {low:g} to {high:g}")
        if self.one_step:
            parts.append("one optimizer step a rollout: every ratio is 1, so ratio, clip and bounds change nothing")
        return "; ".join(parts)

    def doubts(self, products: str) -> Iterator[Doubt]:
        yield from super().doubts(products)
        models = any(isinstance(source, ProcessRef) for _, source in self.scored_by())
        if self.scale_rewards == "group" and models and self.pays_steps():
            sentence = (
                "scores of steps are hardly ever all equal, and where all replies are right this makes much of noise"
            )
            yield Doubt("scale_rewards", sentence, "set scale_rewards: batch or none")
        if self.clip == "none" and not self.one_step:
            steps = self.epochs * self.minibatches
            sentence = f"without a ratio, the later of a rollout's {steps} steps learn as if their policy had sampled"
            yield Doubt("clip", sentence, "set epochs: 1 and minibatches: 1, or clip: ppo")
        if self.ratio == "sequence" and self.clip == "ppo" and self.clip_low >= WIDE_SEQUENCE_CLIP:
            sentence = f"a reply's ratio is a mean over its tokens and hardly ever leaves {1 - self.clip_low:g} to "
            yield Doubt("clip_low", sentence + f"{1 + self.clip_high:g}", "GSPO has 0.0003 and clip_high: 0.0004")

    # ---------------------------------------------------------------------------------------- what makes no sense

    @model_validator(mode="after")
    def _fits_together(self) -> GrpoStage:
        for wrong, sentence in (*self._of_advantages(), *self._of_the_loss(), *self._of_rollouts()):
            if wrong:
                raise ValueError(sentence)
        return self

    def _of_advantages(self) -> Iterator[tuple[bool, str]]:
        own = self.baseline in ("group", "others")
        scale = self.scale_rewards
        checks = [source for _, source in self.scored_by() if isinstance(source, CheckRef)]
        below = any(check.lowest < 0 for check in checks) or any(term.weight < 0 for term in self.rewards)
        negative = bool(self.reward_models()) or below
        yield self.baseline == "critic", "baseline: critic is PPO, which has GAE with it; use a stage of kind: ppo"
        yield (
            scale == "group" and not own,
            f"scale_rewards: group divides by 0 where a group's scores are equal, and baseline: {self.baseline} leaves "
            "such a group its advantage; use scale_rewards: batch or none, or baseline: group",
        )
        yield (
            scale == "mean" and self.baseline != "group",
            f"scale_rewards: mean divides by the baseline (MaxRL) and goes with baseline: group, not {self.baseline}",
        )
        yield (
            scale == "mean" and negative,
            "scale_rewards: mean needs rewards that are never negative, and scores of reward models and terms of "
            "negative weight may be; use scale_rewards: group, batch or none",
        )
        yield (
            scale == "mean" and self.missing_eos_penalty > 0 and self.overlong != "mask",
            "scale_rewards: mean needs rewards that are never negative; set missing_eos_penalty: 0 or overlong: mask",
        )
        yield (
            scale == "batch" and self.baseline == "none",
            "scale_rewards: batch divides by 0 where all scores are equal, and baseline: none leaves them their "
            "advantage; use scale_rewards: none, or baseline: batch",
        )
        if self.pays_steps():
            for setting, given in self.knows_replies_alone().items():
                yield given, step_conflict(setting)
        if self.combine == "each":
            yield (
                self.missing_eos_penalty > 0 and any(term.weight < 0 for term in self.rewards),
                "combine: each takes missing_eos_penalty from each reward, and a negative weight would make it a gain; "
                "set missing_eos_penalty: 0, or turn the reward's sign round",
            )
            yield len(self.rewards) < 2, "combine: each is for several rewards; add one or leave combine out"
            yield (
                scale in ("none", "mean") or not own,
                "combine: each divides each reward's advantages by their deviation; it goes with baseline: group or "
                "others and scale_rewards: group or batch",
            )
            yield self.reward_clip is not None, "reward_clip holds the rewards' sum, and combine: each makes none"

    def knows_replies_alone(self) -> dict[str, bool]:
        """The settings with which single steps of a reply have no advantages, and whether they are given."""
        return {
            "ratio: sequence": self.ratio == "sequence",
            "scale_rewards: mean": self.scale_rewards == "mean",
            f"baseline: {self.baseline}": self.baseline not in ("group", "others"),
            "combine: each": self.combine == "each",
        }

    def _of_the_loss(self) -> Iterator[tuple[bool, str]]:
        yield (
            self.ratio == "sequence" and self.normalise == "token",
            "ratio: sequence gives a reply one ratio, and normalise: token would weigh it by its length; set "
            "normalise: sequence (GSPO) or constant",
        )
        yield (
            self.clip == "detached" and self.cap is None,
            "clip: detached bounds a token's weight by cap, a ratio, and nothing else; set cap (CISPO: 5)",
        )
        yield (
            self.clip == "none" and self.cap is not None,
            "clip: none has no ratio for cap to hold; leave cap out, or use clip: detached",
        )
        yield (
            self.clip == "ppo" and self.cap is not None and self.cap <= 1 + self.clip_high,
            f"cap is a ratio beyond the clip; set it above 1 + clip_high = {1 + self.clip_high:g}, or leave it out",
        )
        yield (
            self.clip == "detached" and self.cap is not None and self.cap < 1,
            "cap is a ratio, not a distance from 1: below 1 it would hold on-policy tokens too; CISPO's is 5",
        )
        yield (
            self.kl.place == "reward" and (self.kl.unbiased or self.kl.estimator != "k3"),
            "kl.place: reward takes k1 of the whole reply; leave out kl.estimator and kl.unbiased",
        )

    def _of_rollouts(self) -> Iterator[tuple[bool, str]]:
        in_reward = self.kl.place == "reward" and self.beta > 0
        yield (
            in_reward and self.scale_rewards == "mean",
            "kl.place: reward can make a reward negative, and scale_rewards: mean needs those that never are; set "
            "kl.place: loss",
        )
        yield in_reward and self.combine == "each", "combine: each has no sum to take a KL from; set kl.place: loss"
        yield (
            self.no_spread != "keep" and self.baseline not in ("group", "others"),
            f"no_spread: {self.no_spread} leaves out groups that teach nothing, and with baseline: {self.baseline} a "
            "group of equal scores does teach; set no_spread: keep",
        )
        yield (
            self.overlong == "soft" and self.missing_eos_penalty == 0,
            "overlong: soft rises to missing_eos_penalty, which is 0; set it above 0 (DAPO: 1), or overlong: penalty",
        )
        yield (
            self.sampler_correction != "off" and self.old_logprobs == "sampler",
            "sampler_correction weighs by the trainer's probabilities, which old_logprobs: sampler leaves out, and its "
            "ratios hold the difference already; set old_logprobs: auto or trainer",
        )
        low, high = self.correction_bounds or (0.0, 1.0)
        yield (
            not 0 <= low < high or (self.correction_bounds is not None and not low <= 1 <= high),
            "correction_bounds are two ratios with 1 between them, such as [0.5, 5]",
        )
