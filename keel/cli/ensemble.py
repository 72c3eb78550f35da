"""A run's reward models as an ensemble, for the labelling app: loaded when they are asked and let go of after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keel.recipe.recipe import kinds_making
from keel.recipe.sections import ModelConfig
from keel.run import RunDir
from keel.types import Completion, Prompt


class RunEnsemble:
    """`keel.web.service.sources.Ensemble`: every reward stage that the run has finished, as it is now."""

    def __init__(self, run: str | Path) -> None:
        self._run = RunDir(run)

    def names(self) -> list[str]:
        kinds = kinds_making("reward model")
        names = [str(stage["name"]) for stage in self._recipe().get("stages", []) if stage["kind"] in kinds]
        return [name for name in names if self._run.stage(name).done]

    def _recipe(self) -> dict[str, Any]:
        return self._run.manifest.read().get("recipe") or {}

    def gains(self, pairs: Sequence[tuple[Prompt, Completion, Completion]]) -> list[float]:
        from keel.cli.finished import loading
        from keel.feedback.uncertainty import disagreement
        from keel.model.checkpoint import load_scalar
        from keel.precision import pick_precision
        from keel.reward.ensemble import Candidate
        from keel.reward.scorer import frozen_scorer
        from keel.run import resolve_device

        device = resolve_device("auto")
        precision = pick_precision("auto", device)
        scorers, fitted = [], []
        model = ModelConfig.model_validate(self._recipe()["model"])
        for name in self.names():
            with loading():
                reward_model = load_scalar(model.source(self._run.stage(name).path), device=device, products=precision)
            scorers.append(frozen_scorer(reward_model, precision))
            fitted.append(self._run.stage(name).summary().get("temperature") or 1.0)
        return disagreement(scorers, fitted, [Candidate(*pair) for pair in pairs])
