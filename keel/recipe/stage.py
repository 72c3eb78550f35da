"""What a kind of stage says of itself, and what kinds have in common: training, a policy, learning from preferences."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field

from keel.recipe.benchmarks import TasksConfig
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
    PrincipleUse,
    Reference,
    Scoring,
    StoreRead,
    Voter,
    Voters,
    listed,
    source_references,
)
from keel.recipe.judges import RewardModelRef
from keel.recipe.process_card import cards_without_force
from keel.recipe.search import SearchConfig
from keel.recipe.sections import Checkpointing, DataConfig, ModelConfig, OptimConfig, SamplingConfig, Strict
from keel.recipe.steps import ProcessRef, Steps, StepsRead


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
    can_keep: ClassVar[bool] = False  # it takes ``keep``: checkpoints on its way
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
        left = self.model_dump(mode="json", exclude={"name", "log_every", "save_every_seconds", *same})
        settings: dict[str, Any] = cards_without_force(left)
        return settings

    def references(self) -> Iterator[Reference]:
        """Every field that names a stage or a checkpoint folder."""
        for place, source in self.scored_by():
            if isinstance(source, RewardModelRef):
                yield Reference(f"{place}.model", source.model, ("reward model",))
            elif isinstance(source, ProcessRef):
                yield Reference(f"{place}.model", source.model, ("process reward model",))
        for place, replies in self.cards():
            yield Reference(place, replies, ("step labels",))

    def also_uses(self, before: Sequence[StageBase]) -> Iterator[str]:
        """The names of earlier stages that it uses without naming them."""
        yield from ()

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        """(dotted name of the field, source) of everything that scores, judges or annotates for it."""
        yield from ()

    def cards(self) -> Iterator[tuple[str, str]]:
        """(dotted name of the field, stage or file) of the replies that its process rewards' cards change."""
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

    def principles(self) -> PrincipleUse | None:
        """The constitution that it draws from. Its field is left to the fingerprint, which hashes the principles."""
        return None

    def card_bounds(self) -> dict[str, Any] | None:
        """The bounds of its judge's card, where what it made stands under any others: they are no part of its settings.
        When they change it runs again, which asks its judge nothing, and holds the card against them."""
        return None

    def benchmarks(self) -> TasksConfig | None:
        """Tasks of others' that it asks models; None: none."""
        return None

    def rating_bounds(self) -> tuple[float, float] | None:
        """Between which bounds a rating in its files is neither up nor down."""
        return None

    def steps_read(self) -> StepsRead | None:
        """How it reads the files of labelled steps that it names in ``labels``; None: it names none."""
        return None

    def cuts(self) -> tuple[str, Steps] | None:
        """The stage whose replies it cuts into steps, and how; None: no stage's."""
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

    def shows(self) -> int | None:
        """Of how many prompts its summary holds the models' replies, at most; None: it evaluates none."""
        return None

    def samples(self) -> SamplingConfig | None:
        """How it samples from each language model that it loads; None: not at all."""
        return None

    def samplings(self) -> tuple[SamplingConfig, ...]:
        """All the ways in which it samples, those of its searches too."""
        own = (self.samples(), *(search.sampling for search in self.searches().values()))
        return tuple(sampling for sampling in own if sampling is not None)

    def compares(self) -> tuple[str, str] | None:
        """The policy and the reference whose log-probabilities it compares, by the names of their checkpoints."""
        return None

    def converses(self) -> Iterator[str]:
        """The models that it asks in several turns, so that they need a chat template."""
        yield from ()

    def searches(self) -> Mapping[str, SearchConfig]:
        """The searches at test time that it has, by name."""
        return {}

    def asked_alike(self) -> Iterator[str]:
        """The checkpoints whose KL from one another it measures, so that all need a chat template."""
        yield from ()

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
    whole_lr: ClassVar[float] = 1e-5  # a usual rate where the whole model is trained; adapters want ten times that

    model: str = Field("base", description="stage whose checkpoint this starts from, a folder, or 'base'")
    optim: OptimConfig = OptimConfig()
    batch_tokens: int = Field(8192, ge=16, description="tokens in one forward pass (packed, no padding)")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: Checkpointing = Field(
        False,
        description="true: keep one tensor a layer for the backward pass and compute the rest again; selective: keep "
        "the results of matrix products and attention too, and compute only the cheap rest again; offload: as true, "
        "with what is kept in the CPU's memory (for a GPU)",
    )
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
    can_keep: ClassVar[bool] = True

    keep: Keep = Field(
        0,
        description="checkpoints on the way, called NAME@PERCENT: how many, evenly spaced, or a list of per cents of "
        "the run. To write the one as the other runs the stage again",
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
        description="annotate or critique stages, 'people' (people's votes in the store), or a file; several in a "
        "list; default: data.preferences",
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
        yield from source_references("preferences", self.preferences, "votes", "pairs")

    @property
    def from_pairs(self) -> bool:
        """Whether ``data.preferences`` is what it learns from where it names nothing."""
        return True

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return (*(("preferences",) if self.from_pairs else ()), *ROWS, *super().reads(data))

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        return {"preferences": self.sources}

    def from_store(self, voted: Collection[str]) -> StoreRead:
        asked: set[Voter] = {"people"} if PEOPLE in self.sources else set()
        if not set(self.sources).isdisjoint(voted):
            asked |= set(VOTERS) if self.voters == "all" else {self.voters}
        return StoreRead(frozenset(asked))
