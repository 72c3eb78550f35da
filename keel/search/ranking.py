"""What scores the replies of a search: a scorer of steps, of which an aggregate is made, or one of whole replies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from keel.recipe.steps import Aggregate
from keel.reward.process import aggregated
from keel.search.paths import Costs, Path
from keel.stats import sigmoid
from keel.types import Prompt, Scorer, StepScorer, UserError


class Ranker(Protocol):
    def score(self, prompts: Sequence[Prompt], paths: Sequence[Path], costs: Costs) -> list[Path]:
        """The paths with their scores. ``prompts``: of all places. What the scorer was handed is added to ``costs``."""
        ...

    def weight(self, path: Path) -> float:
        """What the vote of a scored path counts for, at least 0."""
        ...


@dataclass(frozen=True)
class StepRanker:
    """By the steps that have ended, or all of a finished reply's: a number in [0, 1], which is its vote too."""

    scorer: StepScorer
    aggregate: Aggregate

    def score(self, prompts: Sequence[Prompt], paths: Sequence[Path], costs: Costs) -> list[Path]:
        """Raises UserError where the scorer gives another number of scores than steps, or one outside [0, 1]."""
        asked = [path for path in paths if path.text.strip()]
        replies = [path.steps for path in asked]
        found = self.scorer.score_steps([prompts[path.place] for path in asked], replies) if asked else []
        if len(found) != len(asked):
            raise UserError(f"the scorer of steps gave scores for {len(found)} replies of {len(asked)}")
        costs.read(asked)
        answers = iter(found)
        scored = []
        for path in paths:
            scores, prompt = next(answers) if path.text.strip() else (), prompts[path.place]
            if path.text.strip() and len(scores) != len(path.steps):
                raise UserError(
                    f"prompt {prompt.id!r}: the scorer gave {len(scores)} scores for {len(path.steps)} steps; it must "
                    "give one a step"
                )
            wrong = next((score for score in scores if not 0 <= score <= 1), None)
            if wrong is not None:
                raise UserError(f"prompt {prompt.id!r}: a step's score is {wrong}, and must lie between 0 and 1")
            scored.append(replace(path, scores=tuple(scores), score=aggregated(scores, self.aggregate)))
        return scored

    def weight(self, path: Path) -> float:
        assert path.score is not None
        return path.score


@dataclass(frozen=True)
class ReplyRanker:
    """By one number a finished reply, of any size. Its vote counts for the number's logistic function: the probability
    that the reply beats an average one, where it is a Bradley-Terry reward."""

    scorer: Scorer

    def score(self, prompts: Sequence[Prompt], paths: Sequence[Path], costs: Costs) -> list[Path]:
        if not paths:
            return []
        assert all(path.state == "finished" for path in paths), "it scores whole replies"
        replies = [path.reply(None) for path in paths]
        found = self.scorer.score([prompts[path.place] for path in paths], replies).total_N.tolist()
        costs.read(paths)
        return [replace(path, score=score) for path, score in zip(paths, found, strict=True)]

    def weight(self, path: Path) -> float:
        assert path.score is not None
        return sigmoid(path.score)
