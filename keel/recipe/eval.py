"""Settings of an evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from keel.recipe.benchmarks import TasksConfig
from keel.recipe.checkpoints import kept_name, stage_of
from keel.recipe.declared import ROWS, ModelUse, Reference, Scoring, StoreRead, cards_of, prompt_pool, terms
from keel.recipe.judge_card import JudgeCard
from keel.recipe.judges import JudgeRef, MixedRef, PythonRef, Rewards
from keel.recipe.search import SearchConfig
from keel.recipe.sections import DataConfig, SamplingConfig, Strict
from keel.recipe.stage import StageBase, Surroundings
from keel.recipe.verify import VerifyRef


class FrontierConfig(Strict):
    """Policies compared at equal KL: the judge's score against sqrt(KL), and its value at some nats."""

    models: list[str] | dict[str, list[str]] = Field(
        description="stages and checkpoints (NAME@PERCENT), each stage with all that it kept; or several runs of one "
        "method, its seeds say, under the method's name"
    )
    at: list[Annotated[float, Field(gt=0)]] = Field(
        [2.0, 5.0, 10.0], min_length=1, description="nats a reply at which methods are compared"
    )
    against: str | None = Field(None, description="what the KL is measured from; default: baseline")
    per_prompt: int = Field(2, ge=1, description="replies of each checkpoint to each prompt, at temperature 1")

    @model_validator(mode="after")
    def _names_some(self) -> FrontierConfig:
        if not self.methods or not all(self.methods.values()):
            raise ValueError("models is empty, or a method of it is; name stages or checkpoints")
        twice = next((nats for nats in self.at if self.at.count(nats) > 1), None)
        if twice is not None:
            raise ValueError(f"at names {twice:g} nats twice; leave one out")
        return self

    @property
    def methods(self) -> dict[str, list[str]]:
        """The names by method. Without methods each stage is one."""
        if isinstance(self.models, dict):
            return self.models
        found: dict[str, list[str]] = {}
        for name in self.models:
            found.setdefault(stage_of(name)[0], []).append(name)
        return found

    def named(self) -> Iterator[tuple[str, str]]:
        """(dotted name of the field, name) of each model."""
        if isinstance(self.models, list):
            yield from ((f"models.{i}", name) for i, name in enumerate(self.models))
        else:
            for method, names in self.models.items():
                yield from ((f"models.{method}.{i}", name) for i, name in enumerate(names))

    def runs(self, stages: Sequence[StageBase]) -> dict[str, dict[str, list[str]]]:
        """By method and by run of it: its checkpoints in the order of training. A stage that is named brings all that
        it kept and its end; what else is named (a folder, ``base``) is a run of one checkpoint."""
        known = {stage.name: stage for stage in stages}
        found: dict[str, dict[str, list[str]]] = {}
        for method, names in self.methods.items():
            runs = found.setdefault(method, {})
            for run in dict.fromkeys(stage_of(name)[0] if stage_of(name)[0] in known else name for name in names):
                runs[run] = _along(known[run], names) if run in known else [run]
        return found


def _along(stage: StageBase, names: Collection[str]) -> list[str]:
    kept = [kept_name(stage.name, percent) for percent in stage.kept()]
    return [name for name in (*kept, stage.name) if stage.name in names or name in names]


class EvalSearch(SearchConfig):
    """A search in an evaluation, which counts its right answers."""

    model: str | None = Field(None, description="whose replies are searched; default: the baseline's")


class EvalStage(StageBase):
    help: ClassVar[str] = "compare models on held-out prompts"
    compares_models: ClassVar[bool] = True
    later: ClassVar[frozenset[str]] = frozenset(
        {"frontier", "revisions", "card", "search", "pass_rate_samples", "reward_bench", "tasks"}
    )

    kind: Literal["eval"] = "eval"
    models: list[str] = Field(min_length=1)
    baseline: str = "sft"
    judge: JudgeRef | None = Field(None, description="default: the recipe's reward stage")
    reward: str | None = Field(None, description="reward stage or folder whose mean score is reported")
    rewards: Rewards = Field(
        default_factory=list, description="several of them, whose weighted sum is reported beside each one's mean"
    )
    prompts: str | None = Field(None, description="default: data.heldout_prompts")
    sampling: SamplingConfig = SamplingConfig()
    bootstrap: int = Field(2000, ge=100)
    show: int = Field(10, ge=0, description="prompts shown side by side in the report")
    frontier: FrontierConfig | None = Field(None, description="policies compared at equal KL; default: none")
    revisions: str | None = Field(
        None, description="a critique stage: what the judge finds in its replies is counted by revision; default: none"
    )
    card: JudgeCard | None = Field(
        None,
        description="the judge is held against people's votes in the store or a gold score: the bounds that it must "
        "keep; default: it is not",
    )

    search: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], EvalSearch] = Field(
        default_factory=dict, description="searches at test time, by a name of yours, each counted by right answers"
    )
    reward_bench: str | None = Field(
        None,
        description="a file of RewardBench 2's rows: the recipe's reward models before this stage are scored on it, or "
        "reward alone where that is named; default: they are not",
    )
    tasks: TasksConfig | None = Field(None, description="lm-eval's tasks, asked of every model; default: none")
    pass_rate_samples: int = Field(
        8,
        ge=1,
        description="with search: the baseline's replies a prompt by which prompts are divided into an easy, a middle "
        "and a hard third",
    )

    @model_validator(mode="after")
    def _card_can_be(self) -> EvalStage:
        if self.card is not None and self.card.max_ece is not None:
            raise ValueError("card.max_ece: an evaluation's judge gives scores, no probabilities; leave it out")
        gold = self.card is not None and isinstance(self.card.against, PythonRef)
        if gold and set(self.models) <= {self.baseline}:
            raise ValueError("card: its pairs are a model's reply and the baseline's, and models has no other; add one")
        return self

    @property
    def against(self) -> str:
        """What the frontier's KL is measured from."""
        return self.baseline if self.frontier is None else self.frontier.against or self.baseline

    def scored_by(self) -> Iterator[tuple[str, Scoring]]:
        yield from terms("rewards", self.rewards)
        if self.card is not None and isinstance(self.card.against, PythonRef):
            yield "card.against", self.card.against
        for name, search in self.search.items():
            yield from search.scored_by(f"search.{name}")
        if isinstance(self.judge, MixedRef):
            yield from terms("judge.rewards", self.judge.rewards)
        elif self.judge is not None:
            yield "judge", self.judge

    def cards(self) -> Iterator[tuple[str, str]]:
        yield from cards_of("rewards", self.rewards)

    def references(self) -> Iterator[Reference]:
        for i, model in enumerate(self.models):
            yield Reference(f"models.{i}", model, ("policy",))
        yield Reference("baseline", self.baseline, ("policy",))
        if self.frontier is not None:
            for place, name in self.frontier.named():
                yield Reference(f"frontier.{place}", name, ("policy",))
            yield Reference("frontier.against", self.against, ("policy",))
        if self.revisions is not None:
            yield Reference("revisions", self.revisions, ("pairs",))
        if self.reward is not None:
            yield Reference("reward", self.reward, ("reward model",))
        for name, search in self.search.items():
            if search.model is not None:
                yield Reference(f"search.{name}.model", search.model, ("policy",))
        yield from super().references()

    def from_store(self, voted: Collection[str]) -> StoreRead:
        people = self.card is not None and self.card.against == "people"
        return StoreRead(frozenset({"people"}) if people else frozenset())

    def also_uses(self, before: Sequence[StageBase]) -> Iterator[str]:
        rewards = [stage.name for stage in before if "reward model" in stage.makes]
        # the recipe's own is taken, or a gold judge says which of several is best
        default = self.judge is None or (self.reward is None and not self.rewards)
        if default or self.reward_bench is not None or (len(rewards) > 1 and isinstance(self.judge, PythonRef)):
            yield from rewards
        # alarms and the guardrail read learning curves
        yield from (s.name for s in before if s.learns_from == "rewards" and s.name in self.models)

    def reads(self, data: DataConfig) -> tuple[str, ...]:
        return (*prompt_pool(data), "base_text", "facts", *ROWS)

    def files(self) -> Mapping[str, str | tuple[str, ...]]:
        folder = None if self.tasks is None else self.tasks.folder
        named = {"prompts": self.prompts, "reward_bench": self.reward_bench, "tasks.folder": folder}
        return {field: name for field, name in named.items() if name is not None}

    def benchmarks(self) -> TasksConfig | None:
        return self.tasks

    def loads(self) -> Iterator[ModelUse]:
        drawn = [name for _, name in self.frontier.named()] if self.frontier is not None else []
        searched = [search.model or self.baseline for search in self.search.values()]
        for name in (*self.models, self.baseline, *drawn, self.against, *searched):
            yield ModelUse(name)

    def bench_models(self, before: Sequence[StageBase]) -> list[str]:
        """The reward models that ``reward_bench`` scores."""
        if self.reward is not None:
            return [self.reward]
        return [stage.name for stage in before if "reward model" in stage.makes]

    def shows(self) -> int:
        return self.show

    def searches(self) -> Mapping[str, SearchConfig]:
        return self.search

    def converses(self) -> Iterator[str]:
        yield from (search.model or self.baseline for search in self.search.values() if search.how == "revise")

    def samples(self) -> SamplingConfig:
        return self.sampling

    def check_in(self, recipe: Surroundings) -> None:
        super().check_in(recipe)
        before = recipe.stages[: [stage.name for stage in recipe.stages].index(self.name)]
        if self.reward_bench is not None and not self.bench_models(before):
            raise ValueError(
                f"{self.name}.reward_bench scores reward models, and there is none before this stage; name one with "
                f"{self.name}.reward"
            )
        made = [stage.name for stage in recipe.stages if "pairs" in stage.makes]
        if self.revisions is not None and self.revisions not in made:
            there = f"name one of {', '.join(made)}" if made else "add one, or leave revisions out"
            raise ValueError(f"{self.name}.revisions: {self.revisions!r} is no critique stage; {there}")

    @model_validator(mode="after")
    def _counts_what_a_judge_finds(self) -> EvalStage:
        if self.revisions is not None and not isinstance(self.judge, PythonRef):
            raise ValueError(
                "revisions counts the judge's flags, which a Python judge alone gives; set judge: {kind: python, "
                "ref: ...} or leave revisions out"
            )
        return self

    @model_validator(mode="after")
    def _search_is_counted(self) -> EvalStage:
        if self.search and not isinstance(self.judge, PythonRef | VerifyRef):
            raise ValueError(
                "search counts right answers, and scores say nothing of that; set judge to what knows the answers, "
                "{kind: python, ref: ...} or {kind: verify, ...}, or leave search out"
            )
        for name, search in self.search.items():
            if search.sampling is None:
                search.check_sampling(self.sampling, f"search.{name}: sampling")
        return self

    @model_validator(mode="after")
    def _one_proxy(self) -> EvalStage:
        if self.reward is not None and self.rewards:
            raise ValueError("reward names one model and rewards several with their weights; leave one of them out")
        return self

    @model_validator(mode="after")
    def _baseline_is_the_beginning(self) -> EvalStage:
        if self.frontier is not None and self.against in [name for _, name in self.frontier.named()]:
            raise ValueError(
                f"frontier.models names {self.against}, from which the KL is measured: it is where every curve begins; "
                "leave it out"
            )
        stage, percent = stage_of(self.against)
        if self.frontier is not None and stage in {stage_of(name)[0] for _, name in self.frontier.named()}:
            way = f"a checkpoint on the way of {stage}" if percent else "the end of a run whose way is drawn"
            raise ValueError(
                f"frontier.against is {self.against}, {way}, where no curve of it begins; name the model that "
                "training started from, or leave it out"
            )
        return self

    def asked_alike(self) -> Iterator[str]:
        if self.frontier is not None:
            yield self.against
            yield from (name for _, name in self.frontier.named())
