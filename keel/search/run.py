"""Prompts in, what a search found for each out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from keel.data.chat import Chat
from keel.model.modules import context_length
from keel.precision import Precision
from keel.recipe.search import SearchConfig
from keel.recipe.sections import SamplingConfig
from keel.recipe.steps import Steps
from keel.rollout.collect import CHUNK, stop_token_ids
from keel.rollout.sampler import Sampler, make_sampler
from keel.search.growing import Grower, step_ends
from keel.search.paths import Costs, Found, Path
from keel.search.picking import Ballot
from keel.search.ranking import Ranker
from keel.search.revising import Revising
from keel.search.sampled import Pool, draw
from keel.search.tree import TreeSearch
from keel.types import Prompt, Reporter, UserError, place_of


@dataclass(frozen=True)
class Tools:
    """What a search works with: a model's chat and sampler (`Grower`), what scores and how votes are counted, where
    the search has need of them."""

    chat: Chat
    sampler: Sampler
    stops: frozenset[int]
    context: int | None
    steps: Steps
    ranker: Ranker | None = None
    ballot: Ballot | None = None

    @staticmethod
    def of(
        config: SearchConfig,
        model: nn.Module,
        chat: Chat,
        sampling: SamplingConfig,
        steps: Steps,
        ranker: Ranker | None,
        ballot: Ballot | None,
        precision: Precision,
    ) -> Tools:
        """Raises UserError for a ``sampling.stop`` that is no single token."""
        stops = stop_token_ids(chat, sampling)
        ends = sorted(step_ends(chat.tokenizer, steps) - set(stops)) if config.in_steps else []
        sampler = make_sampler(model, sampling.backend, (*stops, *ends), precision)
        return Tools(chat, sampler, frozenset(stops), context_length(model), steps, ranker, ballot)


def search(
    config: SearchConfig, tools: Tools, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, report: Reporter
) -> list[Found]:
    """What is found for each prompt, in their order. It depends on the seed and on the prompt's place among the others,
    not on what they are. Raises UserError for a prompt that does not fit the model."""
    grower = make_grower(tools, prompts)
    results: list[Found] = []
    for places in _parts(len(prompts), config, report):
        try:
            found = _part(config, tools, grower, prompts, places, sampling, seed)
        except UserError as error:
            raise UserError(f"{error} (of those searched from {prompts[places[0]].id} on)") from error
        results += found
        report.advance(len(places), tokens=sum(one.generated for one in found))
    return results


def pool(
    config: SearchConfig, tools: Tools, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, report: Reporter
) -> list[list[Path]]:
    """The whole replies that a search by them chooses from; several searches may choose from the same."""
    grower = make_grower(tools, prompts)
    groups: list[list[Path]] = []
    for places in _parts(len(prompts), config, report):
        groups += draw(grower, places, config.paths, sampling, seed)
        report.advance(len(places))
    return groups


def make_grower(tools: Tools, prompts: Sequence[Prompt]) -> Grower:
    encoded = tools.chat.encode_prompts([p.messages for p in prompts], [place_of(p) for p in prompts])
    return Grower(
        tools.chat,
        tools.sampler,
        tools.stops,
        tools.steps,
        dict(enumerate(encoded)),
        tools.context,
        Costs.of(len(prompts)),
    )


def _parts(count: int, config: SearchConfig, report: Reporter) -> Sequence[Sequence[int]]:
    """Places in parts of bounded size: what is drawn does not depend on where they end."""
    report.start("searching", count)
    size = max(1, CHUNK // config.paths)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _part(
    config: SearchConfig,
    tools: Tools,
    grower: Grower,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    sampling: SamplingConfig,
    seed: int,
) -> list[Found]:
    if config.sampled:
        groups = draw(grower, places, config.paths, sampling, seed)
        return Pool.of(groups, prompts, tools.ranker).found(config, tools.ballot, 0, config.paths)
    if not config.in_steps:
        return Revising(grower, tools.ranker, prompts, sampling, seed).run(places)
    assert tools.ranker is not None, "the settings say so"
    return TreeSearch(config, grower, tools.ranker, tools.ballot, prompts, sampling, seed).run(places)
