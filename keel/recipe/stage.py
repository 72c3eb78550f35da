"""What a kind of stage says of itself, and what kinds have in common: training, a policy, learning from preferences,
learning from own samples."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, model_validator

from keel.recipe.checkpoints import Keep, percents
from keel.recipe.declared import (
    PEOPLE,
    ROWS,
    VOTERS,
    Doubt,
    How,
    LearnsFrom,
    Makes,
    ModelUse,
    Reference,
    Scoring,
    StoreRead,
    Voter,
    Voters,
    listed,
    prompt_pool,
    source_references,
    terms,
)
from keel.recipe.judges import PythonRef, RewardModelRef, RewardTerm
from keel.recipe.sections import DataConfig, ModelConfig, OptimConfig, SamplingConfig, Strict


class Surroundings(Protocol):
    """The recipe, as one of its stages sees it."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def stages(self) -> Sequence[StageBase]: ...


class StageBase(Strict):
    """A stage and, in what follows the name, what its kind is. A kind changes what differs from these defaults.

    The graph, the fingerprint, the check, the command line and the labelling app ask; a runner can read no more than
    what is declared here (`keel.stages.context.StageContext`).
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")

    help: ClassVar[str]  # its line in ``keel --help``
    makes: ClassVar[tuple[Makes, ...]] = ()
    learns_from: ClassVar[LearnsFrom | None] = None
    uses_model: ClassVar[bool] = True  # its result depends on the recipe's model section and on the kind of device
    stored: ClassVar[Literal["nothing", "copy", "all"]] = "nothing"  # how much of its result lies in the store
    of_what_is_there: ClassVar[bool] = False  # it takes what the earlier stages have made so far, and waits for none
    gives_template: ClassVar[bool] = False  # its model has a chat template, whatever it starts from
    compares_models: ClassVar[bool] = False  # the models that it loads are asked the same
    weights_on_disk: ClassVar[int] = 0  # float32 copies of the model in its folder while it works, but for those kept
    # Settings that this class got after runs had been made. At their defaults they do what was done before, and a
    # fingerprint leaves them out, so that those runs still stand.
    later: ClassVar[frozenset[str]] = frozenset()

    def needs_model(self) -> bool:
        """``uses_model``, where that is a matter of its settings."""
        return self.uses_model

    def settings(self) -> dict[str, Any]:
        """What its result depends on of its own fields, as JSON has it."""
        later = frozenset[str]().union(*(kind.__dict__.get("later", ()) for kind in type(self).__mro__))
        fields = type(self).model_fields
        same = {name for name in later if getattr(self, name) == fields[name].get_default(call_default_factory=True)}
        return self.model_dump(mode="json", exclude={"name", "log_every", "save_every_seconds", *same})

    def references(self) -> Iterator[Reference]:
        """Every field that names a stage or a checkpoint folder."""
        for place, source in self.scored_by():
            if isinstance(source, RewardModelRef):
                yield Reference(f"{place}.model", source.model, ("reward model",))

    def also_uses(self, before: Sequence[StageBase]) -> Iterator[str]:
        """The names of earlier stages that it uses without naming them."""
        yield from ()

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        """(dotted name of the field, source) of everything that scores, judges or annotates for it."""
        yield from ()

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        """The settings of ``data`` that its result depends on. It can read no others."""
        return ()

    def held_out(self, data: DataConfig) -> float | None:
        """The share of prompts that it keeps out of what it learns from, to measure on; None: it keeps out none."""
        return None

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        """Its own fields that name files to read, with the file; or with several, some of which may be stages or
        'people'."""
        return {}

    def rating_bounds(self) -> tuple[float, float] | None:
        """Between which bounds a rating in its files is neither up nor down."""
        return None

    def from_store(self, voted: Collection[str]) -> StoreRead:
        """What it learns from in the store. ``voted``: the stages that make votes."""
        return StoreRead()

    def loads(self) -> Iterator[ModelUse]:
        """The checkpoints that it starts from or evaluates."""
        yield from ()

    def kept(self) -> tuple[int, ...]:
        """The per cents of its run at which it keeps a checkpoint (`keel.recipe.checkpoints`), rising."""
        return ()

    def samples(self) -> SamplingConfig | None:
        """How it samples from each language model that it loads; None: not at all."""
        return None

    def compares(self) -> tuple[str, str] | None:
        """The policy and the reference whose log-probabilities it compares, by the names of their checkpoints."""
        return None

    def training(self) -> TrainBase | None:
        """Itself, where it trains a model."""
        return None

    def seed_of(self, recipe_seed: int) -> int:
        """The seed of its random numbers."""
        return recipe_seed

    def worth_talking_to(self) -> bool:
        """Whether its model is meant to be used, and not there to show what goes wrong."""
        return True

    def check_in(self, recipe: Surroundings) -> None:
        """Raises ValueError for settings that do not fit the rest of the recipe."""

    def doubts(self, products: str) -> Iterator[Doubt]:
        """Settings that will hardly do what is meant. ``products``: the precision of matrix products."""
        yield from ()

    def resolved(self) -> str:
        """What its preset and its settings come to, in one line for ``keel check``; empty: nothing to speak of."""
        return ""


def start_has_template(stage: StageBase, start: str, recipe: Surroundings) -> None:
    """ValueError when the recipe sets a template and ``stage`` starts from a model that nobody gave it to."""
    if recipe.model.chat_template is not None and start == "base":
        raise ValueError(
            f"model.chat_template is given to a model by an SFT stage, and {stage.name} starts from the model "
            f"itself; set {stage.name}.model to an SFT stage, or save the template with the model's tokenizer"
        )


class TrainBase(StageBase):
    weights_on_disk: ClassVar[int] = 5  # the weights, two moments, the best weights, and what replaces them
    adapter_dropout: ClassVar[bool] = True  # False: log-probabilities of several models are compared
    starts_from: ClassVar[tuple[Makes, ...]] = ("policy",)

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

    def references(self) -> Iterator[Reference]:
        yield Reference("model", self.model, self.starts_from)
        yield from super().references()

    def loads(self) -> Iterator[ModelUse]:
        yield ModelUse(self.model)

    def training(self) -> TrainBase:
        return self

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        if not self.gives_template:
            start_has_template(self, self.model, recipe)
        if recipe.model.weights == "bf16" and self.precision == "fp32":
            raise ValueError(
                f"model.weights: bf16 holds weights for products in bfloat16, and {self.name}.precision is fp32; set "
                "model.weights: auto, or precision: bf16"
            )


class PtxConfig(Strict):
    """Next-token prediction on plain text (``data.pretraining``) as a part of every optimizer step, so that what
    neither demonstrations nor rewards speak of is not forgotten (Ouyang et al. 2022)."""

    coef: float = Field(gt=0, description="weight of the texts' loss, a mean over their tokens")
    batch_size: int = Field(8, ge=1, description="texts per optimizer step")


class PolicyBase(TrainBase):
    """What stages that train a language model have in common."""

    makes: ClassVar[tuple[Makes, ...]] = ("policy",)
    later: ClassVar[frozenset[str]] = frozenset({"keep"})

    keep: Keep = Field(
        0,
        description="checkpoints on the way, called NAME@PERCENT: how many, evenly spaced, or a list of per cents of "
        "the run",
    )
    ptx: PtxConfig | None = Field(None, description="pretraining text mixed into every step; default: none")

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return (*super().reads(data), *(("pretraining",) if self.ptx is not None else ()))

    def kept(self) -> tuple[int, ...]:
        return percents(self.keep)

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        if self.ptx is not None and recipe.data.pretraining is None:
            raise ValueError(f"{self.name}.ptx mixes in plain text; set data.pretraining=FILE or leave ptx out")


class PreferenceBase(TrainBase):
    """What stages that learn from preferences have in common."""

    learns_from: ClassVar[LearnsFrom | None] = "preferences"

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
        description="each vote a record; each item's majority, ties out; votes weighted by annotators' reliability; or "
        "posterior: one record an item, with the probability that its response is the better one",
    )

    @property
    def sources(self) -> tuple[str, ...]:
        """``preferences`` as a list."""
        return listed(self.preferences)

    def references(self) -> Iterator[Reference]:
        yield from super().references()
        yield from source_references("preferences", self.preferences, "votes")

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return ("preferences", *ROWS, *super().reads(data))

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {"preferences": self.sources}

    def from_store(self, voted: Collection[str]) -> StoreRead:
        asked: set[Voter] = {"people"} if PEOPLE in self.sources else set()
        if not set(self.sources).isdisjoint(voted):
            asked |= set(VOTERS) if self.voters == "all" else {self.voters}
        return StoreRead(frozenset(asked))


class OnlineBase(PolicyBase):
    """What stages that learn from their own samples have in common. An episode is one prompt with one completion."""

    learns_from: ClassVar[LearnsFrom | None] = "rewards"
    adapter_dropout: ClassVar[bool] = False

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

    def kl_weight(self) -> float:
        """How strongly its policy is held to the reference."""
        raise NotImplementedError

    def on_its_base(self) -> list[str]:
        """With ``one_base``: the names of the reward models that share it."""
        return [term.source.model for term in self.rewards if isinstance(term.source, RewardModelRef)]

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
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
