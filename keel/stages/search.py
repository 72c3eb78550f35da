"""Searches at test time for the stages that have them: what a recipe's settings name, made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from keel.data.chat import Chat
from keel.eval.search import Marks, Searched, figures, pass_rates, powers_below
from keel.model.checkpoint import frozen, load_policy, load_tokenizer
from keel.precision import Precision
from keel.recipe.eval import EvalSearch, EvalStage
from keel.recipe.judges import RewardModelRef, source_name
from keel.recipe.search import SearchConfig
from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Aggregate, Steps
from keel.reward.verify import read_answer, same
from keel.rollout.collect import stop_token_ids
from keel.rollout.tokens import stream_key
from keel.search.paths import Path
from keel.search.picking import Ballot
from keel.search.ranking import Ranker, ReplyRanker, StepRanker
from keel.search.run import Tools, pool, search
from keel.search.sampled import Pool
from keel.stages.context import StageContext
from keel.stages.scoring import reward_model_scorer, step_scorer
from keel.types import Prompt, Reporter, UserError

APART = -(1 << 32)  # of a seed: the baseline's samples that say how hard prompts are, which no search draws


def make_ranker(config: SearchConfig, context: StageContext, precision: Precision) -> tuple[Ranker | None, Steps]:
    """What scores for a search, and where its steps end: a checkpoint's own, where the settings leave them open.
    Raises UserError for a checkpoint that was trained to judge other steps."""
    ref = config.scorer
    if isinstance(ref, RewardModelRef):
        return ReplyRanker(reward_model_scorer(ref.model, context, precision, thinking=ref.thinking)), Steps()
    if ref is None:
        return None, Steps()
    scorer = step_scorer(ref, context, precision)
    aggregate: Aggregate = getattr(scorer, "aggregate", "min") if config.aggregate is None else config.aggregate
    trained: Steps | None = getattr(scorer, "steps", None)
    if None not in (config.steps, trained) and config.steps != trained:
        raise UserError(
            f"stage {context.stage_dir.name}: its search cuts replies otherwise than {source_name(ref)} was trained to "
            "judge them; leave the search's steps out"
        )
    return StepRanker(scorer, aggregate), config.steps or trained or Steps()


def make_ballot(config: SearchConfig) -> Ballot | None:
    """How the votes of a search are counted, where it has any."""
    if not config.votes:
        return None

    def answer_of(text: str) -> str | None:
        said = text if config.thinking is None else config.thinking.split(text)[1]
        return None if said is None else read_answer(said, config.read)

    return Ballot(answer_of, same)


def make_tools(
    config: SearchConfig, model: nn.Module, chat: Chat, sampling: SamplingConfig, context: StageContext,
    precision: Precision,
) -> Tools:  # fmt: skip
    ranker, steps = make_ranker(config, context, precision)
    return Tools.of(config, model, chat, sampling, steps, ranker, make_ballot(config), precision)


# ------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Searching:
    """An evaluation's searches. ``marks``: made before anything is sampled, since a judge may not fit."""

    stage: EvalStage
    context: StageContext
    prompts: Sequence[Prompt]
    marks: Marks
    precision: Precision

    def check(self) -> None:
        """Raises UserError for what a search names and cannot have, before anything is sampled: stop texts that its
        model's tokenizer has no token for, a scorer that cannot be read or was trained to judge other steps."""
        stage, scorers = self.stage, set()
        for config in stage.search.values():
            source = self.context.source(config.model or stage.baseline)
            stop_token_ids(Chat(load_tokenizer(source)), config.sampling or stage.sampling)
            used = f"{config.scorer} {config.steps}"
            if used not in scorers:
                make_ranker(config, self.context, self.precision)
                scorers.add(used)

    def summary(self) -> dict[str, Any]:
        """Runs all of them, each model's in one go."""
        stage, seed = self.stage, self.context.recipe.seed
        done: dict[str, Searched] = {}
        rates: list[float] = []
        wanted = {name: config.model or stage.baseline for name, config in stage.search.items()}
        for model_name in dict.fromkeys([stage.baseline, *wanted.values()]):
            source = self.context.source(model_name)
            model, tokenizer = load_policy(source, device=self.context.device, products=self.precision)
            frozen(model)
            of_model = _OfModel(self, model_name, model, Chat(tokenizer))
            if model_name == stage.baseline:
                # Of the baseline's own samples, by a seed of their own: else luck would sort prompts and be measured.
                apart = SearchConfig(how="majority", n=stage.pass_rate_samples)
                drawn = stage.sampling if stage.sampling.temperature > 0 else stage.sampling.at_one()
                rates = pass_rates(of_model.pool(apart, drawn, stream_key(seed, APART)), self.marks)
            done |= of_model.searched({name: stage.search[name] for name, of in wanted.items() if of == model_name})
        ordered = [done[name] for name in stage.search]
        return figures(ordered, self.marks, rates, stage.pass_rate_samples)


@dataclass(frozen=True)
class _OfModel:
    """The searches that go through one model's replies."""

    of: Searching
    name: str
    model: nn.Module
    chat: Chat

    def searched(self, configs: dict[str, EvalSearch]) -> dict[str, Searched]:
        pools: dict[str, list[list[Path]]] = {}
        sampled = {name: config for name, config in configs.items() if config.sampled}
        for config in sorted(sampled.values(), key=lambda config: -config.paths):  # the largest serves the others
            pools[self._key(config)] = pools.get(self._key(config)) or self.pool(config, *self._drawn(config))
        return {
            name: self._of_pool(name, config, pools[self._key(config)]) if config.sampled else self._of(name, config)
            for name, config in configs.items()
        }

    def pool(self, config: SearchConfig, sampling: SamplingConfig, seed: int) -> list[list[Path]]:
        tools = Tools.of(config, self.model, self.chat, sampling, Steps(), None, None, self.of.precision)
        return pool(config, tools, self.of.prompts, sampling, seed, self._reporter)

    def _drawn(self, config: SearchConfig) -> tuple[SamplingConfig, int]:
        seed = self.of.context.recipe.seed if config.seed is None else config.seed
        return config.sampling or self.of.stage.sampling, seed

    def _key(self, config: SearchConfig) -> str:
        """The same for searches that choose from the same samples."""
        sampling, seed = self._drawn(config)
        return f"{seed} {sampling.model_dump_json()}"

    def _of_pool(self, name: str, config: EvalSearch, groups: list[list[Path]]) -> Searched:
        ranker, steps = make_ranker(config, self.of.context, self.of.precision)
        ballot, n = make_ballot(config), config.paths
        cut = [[path.in_steps(steps) for path in group] for group in groups]
        own = Pool.of([group[:n] for group in cut], self.of.prompts, ranker)
        smaller = {
            size: [own.found(config, ballot, first, size) for first in range(0, n - size + 1, size)]
            for size in powers_below(n)
        }
        found = own.found(config, ballot, 0, n)
        return Searched(name, config.how, self.name, n, found, groups, smaller)

    def _of(self, name: str, config: EvalSearch) -> Searched:
        sampling, seed = self._drawn(config)
        tools = make_tools(config, self.model, self.chat, sampling, self.of.context, self.of.precision)
        found = search(config, tools, self.of.prompts, sampling, seed, self._reporter)
        return Searched(name, config.how, self.name, config.paths, found)

    @property
    def _reporter(self) -> Reporter:
        return self.of.context.reporter
