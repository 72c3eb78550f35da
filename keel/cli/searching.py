"""Searches at test time in the terminal: a recipe's own, for one prompt, their steps shown with their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from keel.cli.finished import loading, recipe_of
from keel.data.chat import Chat
from keel.model.checkpoint import frozen, load_policy
from keel.precision import pick_precision
from keel.recipe.recipe import Recipe, Stage
from keel.recipe.search import SearchConfig
from keel.recipe.sections import SamplingConfig, Source
from keel.run import RunDir, Silent, resolve_device
from keel.search.paths import Found
from keel.search.run import search
from keel.stages.context import StageContext
from keel.stages.search import make_tools
from keel.types import Message, Prompt, UserError


def named_searches(recipe: Recipe) -> dict[str, tuple[Stage, SearchConfig]]:
    """The searches of a recipe, with their stages, by what they are called: in an evaluation by its name there, in a
    stage that has one by the stage's."""
    return {name: (stage, config) for stage in recipe.stages for name, config in stage.searches().items()}


def find_search(run: str, name: str) -> tuple[Recipe, Stage, SearchConfig]:
    recipe = recipe_of(Path(run))
    if recipe is None:
        raise UserError(f"{run}: not a run directory (no manifest.json), so it has no search {name!r}")
    known = named_searches(recipe)
    if name not in known:
        there = f"there are {', '.join(known)}" if known else "its recipe has none (search, of eval and sample)"
        raise UserError(f"{run}: no search is called {name!r}; {there}")
    return recipe, *known[name]


class SearchTalker:
    """A model that answers conversations by a search of its run's recipe."""

    def __init__(self, run: str, name: str, source: Source, sampling: SamplingConfig, device: str) -> None:
        """Raises UserError for a search that the recipe does not have, or that ``sampling`` leaves nothing to."""
        recipe, stage, self.config = find_search(run, name)
        self.sampling = self.config.sampling or sampling
        try:
            self.config.check_sampling(self.sampling, "--temperature: sampling")
        except ValueError as error:
            raise UserError(str(error)) from error
        self.device = resolve_device(device)
        precision = pick_precision("auto", self.device)
        directory = RunDir(Path(run))
        context = StageContext(recipe, directory, directory.stage(stage.name), Silent(), self.device)
        with loading():
            model, tokenizer = load_policy(source, device=self.device, products=precision)
            frozen(model)
            self.chat = Chat(tokenizer)
            self._tools = make_tools(self.config, model, self.chat, self.sampling, context, precision)
        self._seed = stage.seed_of(recipe.seed) if self.config.seed is None else self.config.seed

    def find(self, messages: Sequence[Message]) -> Found:
        """Raises UserError when the conversation does not fit."""
        prompt = Prompt("the conversation", tuple(messages))
        return search(self.config, self._tools, [prompt], self.sampling, self._seed, Silent())[0]


def shown(found: Found) -> Iterator[str]:
    """What was found, a line each: every finished reply with its score and its steps' scores, what it cost, the
    answer. The reply that answers is marked."""
    answer = found.answer
    for number, path in enumerate(found.paths, 1):
        mark = "*" if answer is not None and path.ids == answer.ids else " "
        yield f"{mark} {number}" + ("" if path.score is None else f"  {path.score:.3f}")
        scores = path.scores or (None,) * len(path.steps)
        for step, score in zip(path.steps, scores, strict=True):
            yield f"    {'     ' if score is None else f'{score:.3f}'}  {step.strip()}"
    more = f", {found.unfinished} unfinished" if found.unfinished else ""
    yield f"{len(found.paths)} finished{more}; {found.generated} tokens generated, {found.scored} scored"
