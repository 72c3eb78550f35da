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

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    # Built at first use: a help page reads the fields alone.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), defer_build=True)


Weights = Literal["auto", "fp32", "bf16"]
SaveAs = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint is read from: a folder or a hub id, of which ``revision`` may be named. One that brings Python
    code of its own is loaded with ``trust_remote_code`` alone. ``weights``, ``save_as``: see ``ModelConfig``."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    weights: Weights = "auto"
    save_as: SaveAs = "auto"

    @staticmethod
    def of(place: str | Path | Source) -> Source:
        """A place alone means: no revision, no code."""
        return place if isinstance(place, Source) else Source(str(place))


# ------------------------------------------------------------------------------------------------- shared sections


class LoraConfig(Strict):
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="in the losses of sft and reward stages; dpo, ppo and grpo compare models and have 0",
    )
    targets: list[str] | Literal["all-linear"] = "all-linear"

    def whole(self) -> LoraConfig:
        """Without dropout: where log-probabilities of policy, old policy and reference must be of one model."""
        return self.model_copy(update={"dropout": 0.0})


class ModelConfig(Strict):
    path: str = Field(description="folder or hub id of a transformers causal LM")
    revision: str | None = Field(None, description="of a hub model: a branch, tag or commit")
    chat_template: str | None = Field(
        None,
        description="Jinja file, or one of Keel's built-in names (keel, chatml); default: the model's own, else keel",
    )
    lora: LoraConfig | None = None
    trust_remote_code: bool = Field(
        False,
        description="run the Python code that the recipe's models and tokenizers bring; read it first",
    )
    weights: Weights = Field(
        "auto",
        description="how matrices that a stage does not train lie in memory (the base below adapters, references, "
        "reward models, models that only sample). auto: in bfloat16 where the checkpoint is, products are, and the "
        "device is a GPU; bf16: wherever products are, whatever the checkpoint is in, experts too (auto leaves "
        "them in float32, in which autocast computes them); fp32: never. Trained ones are float32",
    )
    save_as: SaveAs = Field(
        "auto", description="precision of the checkpoints that stages write; auto: that of the one they start from"
    )

    def source(self, path: str | Path | None = None) -> Source:
        """Where the model is read from, or a checkpoint of another ``path`` that the recipe names."""
        own = path is None or str(path) == self.path
        return Source(
            self.path if own else str(path),
            self.revision if own else None,
            self.trust_remote_code,
            self.weights,
            self.save_as,
        )


class DataConfig(Strict):
    """Files (JSONL, JSON, CSV, Parquet), folders of them, or hub ids (``hub:owner/name:split``,
    ``hub:owner/name:config:split``)."""

    demonstrations: str | None = None
    prompts: str | None = Field(None, description="prompts to sample from and to run PPO or GRPO on")
    preferences: str | None = None
    heldout_prompts: str | None = Field(None, description="evaluation prompts; default: split off by prompt")
    heldout_fraction: float = Field(0.1, gt=0, lt=0.9)
    pretraining: str | None = Field(None, description="plain text rows such as the base model learned from (ptx)")
    base_text: str | None = Field(None, description="plain text rows: what the base model's loss is measured on")
    facts: str | None = Field(None, description="multiple-choice rows prompt+choices+answer: capability kept")
    max_length: int = Field(1024, ge=8, description="tokens of prompt and completion together")
    max_prompt_length: int = Field(
        512, ge=4, description="longer prompts are an error, or left out with over_length: skip"
    )
    over_length: Literal["error", "skip"] = "error"
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="skip: rows that cannot be read are left out, counted, and listed in bad_rows.jsonl"
    )


class OptimConfig(Strict):
    kind: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit: moments in 8 bits (an extra)")
    lr: float = Field(1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.05, ge=0, description="share of the steps when below 1, else steps")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = Field(0.1, ge=0, le=1, description="end of the schedule as a share of lr")
    max_grad_norm: float = Field(1.0, gt=0)
    average: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="the checkpoint is the mean of the weights over this last share of the run; 0: the last weights",
    )


class SamplingConfig(Strict):
    temperature: float = Field(1.0, ge=0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="0 is off")
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    max_new_tokens: int = Field(256, ge=1)
    stop: list[str] = Field(default_factory=list, description="stop tokens besides the model's end tokens")
    batch_size: int = Field(128, ge=1, description="sequences decoded together")
    backend: Literal["auto", "embedded", "transformers", "vllm"] = "auto"


# ------------------------------------------------------------------------------------------------------- judges


class PythonRef(Strict):
    """A Python callable: ``module:name`` or ``path/to/file.py:name``."""

    kind: Literal["python"] = "python"
    ref: str


class RewardModelRef(Strict):
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


class RewardTerm(Strict):
    """One source of reward, with its weight in the sum."""

    source: Annotated[PythonRef | RewardModelRef, Field(discriminator="kind")]
    weight: float = 1.0


class MixedRef(Strict):
    """The weighted sum of several sources of reward, as in a PPO stage's ``rewards``."""

    kind: Literal["mixed"] = "mixed"
    rewards: list[RewardTerm] = Field(min_length=1)


JudgeRef = Annotated[PythonRef | RewardModelRef | MixedRef | EndpointRef, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------------- stages


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


class SftStage(PolicyBase):
    kind: Literal["sft"] = "sft"
    demonstrations: str | list[str] | None = Field(
        None,
        description="a file, a sample stage that chose its replies by rewards, or 'people' (the replies that people "
        "wrote or edited in the store); several in a list; default: data.demonstrations",
    )
    epochs: float = Field(2.0, gt=0)
    batch_size: int = Field(64, ge=1, description="conversations per optimizer step")
    eval_every: int = Field(0, ge=0, description="steps between held-out losses; 0: four times an epoch")
    patience: int = Field(3, ge=1, description="early stopping: held-out losses without a new best")

    @property
    def sources(self) -> tuple[str, ...]:
        """``demonstrations`` as a list."""
        return _listed(self.demonstrations)

    @model_validator(mode="after")
    def _keeps_its_best(self) -> SftStage:
        if self.optim.average:
            raise ValueError(
                "sft keeps the weights of its best held-out loss, so there is nothing to average; leave "
                "optim.average out"
            )
        return self


class SampleStage(StageBase):
    kind: Literal["sample"] = "sample"
    model: str = "sft"
    prompts: str | None = Field(None, description="default: data.prompts")
    per_prompt: int = Field(4, ge=1, description="responses kept a prompt")
    candidates: int = Field(0, ge=0, description="responses sampled a prompt before near-duplicates go; 0: per_prompt")
    max_similarity: float = Field(
        0.95, ge=0, le=1, description="token-set similarity at which two responses are the same; 0: the least alike"
    )
    rewards: list[RewardTerm] = Field(
        default_factory=list,
        description="best-of-n: the kept responses are those of the candidates with the highest weighted sum; default: "
        "none, they are the first that differ",
    )
    min_reward: float | None = Field(None, description="responses whose reward is lower are left out")
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _something_to_choose(self) -> SampleStage:
        if self.min_reward is not None and not self.rewards:
            raise ValueError("min_reward is a bound on the sum of rewards; name them in rewards, or leave it out")
        if self.rewards and self.min_reward is None and self.candidates <= self.per_prompt:
            raise ValueError(
                f"rewards choose per_prompt = {self.per_prompt} of the candidates, and there are "
                f"{max(self.candidates, self.per_prompt)} of them; raise candidates or set min_reward"
            )
        return self


class AnnotateStage(StageBase):
    kind: Literal["annotate"] = "annotate"
    responses: str = "sample"
    annotators: PythonRef = Field(description="returns the simulated population: a callable seed -> list of annotators")
    pairs_per_prompt: int = Field(1, ge=1, description="pairs of one prompt, at most")
    pairs: int | None = Field(None, ge=1, description="pairs in all, at most; default: those of every prompt")
    choice: Literal["random", "uncertain"] = Field(
        "random", description="which pairs: at random, or those on which the reward models named in rewards disagree"
    )
    rewards: list[str] = Field(
        default_factory=list,
        description="reward stages that choose (choice: uncertain); what they were trained on is not asked again",
    )
    overlap: float = Field(0.1, ge=0, le=1, description="share of pairs judged twice, to measure agreement")
    guideline: str = "1"

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


def _listed(sources: str | list[str] | None) -> tuple[str, ...]:
    if sources is None:
        return ()
    return (sources,) if isinstance(sources, str) else tuple(sources)


class PreferenceBase(TrainBase):
    """What stages that learn from preferences have in common."""

    model: str = "sft"
    preferences: str | list[str] | None = Field(
        None,
        description="annotate stages, 'people' (the store's votes by anybody but simulated annotators), or a file; "
        "several in a list; default: data.preferences",
    )
    voters: Literal["all", "people", "simulated"] = Field(
        "all",
        description="of annotate stages: the simulated votes and whatever people have judged in the store so far, or "
        "one of the two alone",
    )
    votes: Literal["raw", "majority", "weighted"] = Field(
        "raw",
        description="each vote a record; each item's majority, ties out; or votes weighted by annotators' reliability",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """``preferences`` as a list."""
        return _listed(self.preferences)


class RewardStage(PreferenceBase):
    kind: Literal["reward"] = "reward"
    seed: int | None = Field(None, ge=0, description="of its head and of the order of the pairs; default: the recipe's")
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="pairs per optimizer step")
    margin_weight: float = Field(0.0, ge=0, description="margin in the Bradley-Terry loss a unit of strength (Llama 2)")
    center_coef: float = Field(0.01, ge=0, description="pulls the mean of a pair's rewards to zero")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    heldout_fraction: float = Field(0.1, gt=0, lt=0.9, description="prompts kept out for accuracy and calibration")


class DpoStage(PreferenceBase, PolicyBase):
    kind: Literal["dpo"] = "dpo"
    reference: str | None = Field(None, description="default: model")
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="pairs per optimizer step")
    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    length_normalised: bool = Field(False, description="log-ratios per token instead of per sequence")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    heldout_fraction: float = Field(0.05, gt=0, lt=0.9)

    @model_validator(mode="after")
    def _check(self) -> DpoStage:
        if self.loss == "ipo" and self.label_smoothing > 0:
            raise ValueError("loss: ipo takes no label_smoothing; set label_smoothing: 0 or use loss: sigmoid")
        return self


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


class PpoStage(OnlineBase):
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


class GrpoStage(OnlineBase):
    """No critic: a completion's baseline is the mean score of its group, the completions of one prompt."""

    kind: Literal["grpo"] = "grpo"
    reference: str | None = Field(None, description="default: model when beta is above 0, else none (no KL is logged)")
    group_size: int = Field(8, ge=2, description="completions per prompt; rollout_batch is a multiple")
    beta: float = Field(0.04, ge=0, description="weight of the KL to the reference in the loss (k3, per token)")
    clip_low: float = Field(0.2, gt=0, lt=1, description="ratios are held above 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="ratios are held below 1 + clip_high (DAPO: 0.28)")
    scale_rewards: Literal["group", "none"] = Field(
        "group", description="divide advantages by the standard deviation of their group, or not (Dr. GRPO)"
    )
    normalise: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="mean loss over the step's tokens (DAPO), of means over each completion (GRPO), or the sum over "
        "completions x max_new_tokens (Dr. GRPO)",
    )
    old_logprobs: Literal["auto", "sampler", "trainer"] = Field(
        "auto",
        description="whose log-probabilities the ratios divide by; auto: the sampler's while they are the trainer's, "
        "and the trainer's at the step itself where each rollout gets one step",
    )


class EvalStage(StageBase):
    kind: Literal["eval"] = "eval"
    models: list[str] = Field(min_length=1)
    baseline: str = "sft"
    judge: JudgeRef | None = Field(None, description="default: the recipe's reward stage")
    reward: str | None = Field(None, description="reward stage or folder whose mean score is reported")
    rewards: list[RewardTerm] = Field(
        default_factory=list, description="several of them, whose weighted sum is reported beside each one's mean"
    )
    prompts: str | None = Field(None, description="default: data.heldout_prompts")
    sampling: SamplingConfig = SamplingConfig()
    bootstrap: int = Field(2000, ge=100)
    show: int = Field(10, ge=0, description="prompts shown side by side in the report")

    @model_validator(mode="after")
    def _one_proxy(self) -> EvalStage:
        if self.reward is not None and self.rewards:
            raise ValueError("reward names one model and rewards several with their weights; leave one of them out")
        return self


class ReportStage(StageBase):
    kind: Literal["report"] = "report"
    title: str = ""


Stage = Annotated[
    SftStage | SampleStage | AnnotateStage | RewardStage | DpoStage | PpoStage | GrpoStage | EvalStage | ReportStage,
    Field(discriminator="kind"),
]


class LoggingConfig(Strict):
    tensorboard: bool = True
    wandb_project: str | None = None


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
