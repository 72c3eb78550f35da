"""Which episodes a rollout has: prompts in shuffled epochs, each with a group of completions, sampled and scored; and
prompts whose completions all score the same, replaced by others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from keel.precision import autocast
from keel.recipe.online import OnlineBase
from keel.rollout.episodes import EpisodeSampler
from keel.rollout.tokens import stream_key
from keel.train.context import TrainContext
from keel.train.schedule import EpochSchedule
from keel.train.trace_figures import trace_figures
from keel.types import Episode, Scorer, Scores


@dataclass(frozen=True)
class Drawn:
    """Episodes, those of a prompt one after the other, with their scores. ``figures``: what is logged of the drawing
    itself."""

    episodes: list[Episode]
    scores: Scores
    figures: Mapping[str, float] = field(default_factory=dict)

    def groups(self, size: int) -> Iterator[Drawn]:
        """Each prompt's, by itself."""
        for begin in range(0, len(self.episodes), size):
            part, scores = slice(begin, begin + size), self.scores
            parts = {name: part_N[part] for name, part_N in scores.parts.items()}
            traces = scores.traces[part]
            found = Scores(scores.reply_N[part], scores.steps[part], parts, scores.step_baseline, traces)
            yield Drawn(self.episodes[part], found)

    @staticmethod
    def together(groups: Sequence[Drawn], figures: Mapping[str, float]) -> Drawn:
        """Groups in a row. A scorer may know steps of some and not of others."""
        scores = [group.scores for group in groups]
        steps = [s.steps or ((),) * len(group.episodes) for s, group in zip(scores, groups, strict=True)]
        return Drawn(
            [episode for group in groups for episode in group.episodes],
            Scores(
                torch.cat([s.reply_N for s in scores]),
                tuple(of_reply for of_group in steps for of_reply in of_group) if any(s.steps for s in scores) else (),
                {name: torch.cat([s.parts[name] for s in scores]) for name in scores[0].parts},
                next((s.step_baseline for s in scores if s.steps), "steps"),
                tuple(trace for s in scores for trace in s.traces),
            ),
            figures,
        )


class Draws:
    """A rollout's episodes as a pure function of the iteration, the seed and the weights."""

    def __init__(self, source: EpisodeSampler, scorer: Scorer, config: OnlineBase, context: TrainContext) -> None:
        self.source, self.scorer, self.config, self.context = source, scorer, config, context
        self.prompts = config.rollout_batch // config.group_size  # of a rollout
        self.count = math.ceil(config.episodes / config.rollout_batch)
        known = len(source.prompts)
        self.schedule = EpochSchedule(known, self.prompts, self.count * self.prompts / known, context.seed)

    def rollout(self, iteration: int) -> Drawn:
        drawn = self.of(self.schedule.batch(iteration), self.seed(iteration))
        return replace(drawn, figures=self.trace_figures(drawn))

    def trace_figures(self, drawn: Drawn) -> dict[str, float]:
        """The figures of the replies' steps, over prompts as they come and not those that were chosen for training."""
        return trace_figures([e.prompt.id for e in drawn.episodes], drawn.scores.traces, self.config.group_size)

    def seed(self, iteration: int) -> int:
        return self.context.seed * 1_000_003 + iteration

    def of(self, prompts: Sequence[int], seed: int) -> Drawn:
        """A group of completions of each of the prompts."""
        # A group's requests lie side by side: the embedded sampler prefills a prompt once for all of them.
        chosen = [i for i in prompts for _ in range(self.config.group_size)]
        episodes = self.source.sample(chosen, seed)
        with autocast(self.context.device, self.context.precision):
            scores = self.scorer.score([e.prompt for e in episodes], [e.completion for e in episodes])
        return Drawn(episodes, scores)


class Refilled(Draws):
    """Rollouts in which prompts whose group teaches nothing gave way to the next ones (Yu et al. 2025, "DAPO", section
    3.2, "dynamic sampling"), ``tries`` times at most: what is still without a signal then stays as it is.

    How many prompts a rollout takes depends on what was sampled, so ``drawn``, the number of all prompts so far, is a
    part of a run's state: with it a resumed run goes on with the same ones. So are ``short`` and ``left``: how many
    rollouts the bound left without a signal in some places, and in how many places.
    """

    def __init__(self, draws: Draws, without_signal: Callable[[Drawn], Sequence[bool]], tries: int) -> None:
        super().__init__(draws.source, draws.scorer, draws.config, draws.context)
        self.without_signal, self.tries = without_signal, tries
        self.drawn = self.short = self.left = 0
        self.stream = EpochSchedule(len(draws.source.prompts), self.prompts, math.inf, draws.context.seed)

    def rollout(self, iteration: int) -> Drawn:
        size, before = self.config.group_size, self.drawn
        first = self._next(self.prompts, self.seed(iteration))
        groups, still = list(first.groups(size)), list(self.without_signal(first))
        wasted = sum(still)
        for again in range(1, self.tries + 1):
            empty = [place for place, nothing in enumerate(still) if nothing]
            if not empty:
                break
            more = self._next(len(empty), stream_key(self.seed(iteration), -again))
            found = self.without_signal(more)
            wasted += sum(found)
            for place, group, nothing in zip(empty, more.groups(size), found, strict=True):
                groups[place], still[place] = group, nothing
        self._count(sum(still))
        figures = {
            "episodes": float(self.drawn * size),
            "frac_reward_zero_std": wasted / (self.drawn - before),
            "rollout/prompts_drawn": (self.drawn - before) / self.prompts,
            "rollout/unfilled": sum(still) / self.prompts,
            "rollout/short": float(self.short),
            "rollout/left": float(self.left),
            "objective/scores_drawn": float(first.scores.total_N.float().mean()),
            **self.trace_figures(first),
        }
        return Drawn.together(groups, figures)

    def _next(self, count: int, seed: int) -> Drawn:
        prompts = self.stream.stretch(self.drawn, count)
        self.drawn += count
        return self.of(prompts, seed)

    def _count(self, left: int) -> None:
        """Counts the places of a rollout that were left; the first time a line says so."""
        if not left:
            return
        self.short += 1
        self.left += left
        if self.short == 1:
            self.context.reporter.note(
                f"{self.config.name}: after max_resamples = {self.tries} tries {left} of a rollout's {self.prompts} "
                "groups still have equal scores and teach nothing; take prompts that are neither too easy nor too "
                "hard, or a finer reward (rollout/short and rollout/left count on)"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn, "short": self.short, "left": self.left}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = int(state["drawn"])
        self.short, self.left = int(state.get("short", 0)), int(state.get("left", 0))  # an earlier Keel's has neither
