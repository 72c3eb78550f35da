"""What figures can be measured of a finished run besides those in its summaries (``measure:`` in a study)."""

from __future__ import annotations

from typing import Any

from keel.recipe.recipe import Recipe
from keel.run import RunDir

FEATURES = ("score", "reward")


def replies(run: RunDir, recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What the run's evaluation says of each model's replies, prompt by prompt: the judge's ``score``, the ``reward``,
    and its flags (``correct``, ...), each over the prompts that have it. The evaluation keeps as many prompts as
    ``eval.show`` says: set it to at least as many as there are.
    """
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for number, sample in enumerate(run.summary().get("samples", ())):
        group = f"{number} {sample['prompt']}"
        for model, reply in sample["replies"].items():
            said = {name: reply[name] for name in FEATURES} | reply["flags"]
            for name, value in said.items():
                if value is not None:
                    table.setdefault(model, {}).setdefault(name, {})[group] = [float(value), 1.0]
    return {
        model: {
            name: {"value": sum(v for v, _ in rows.values()) / len(rows), "rows": rows} for name, rows in named.items()
        }
        for model, named in table.items()
    }
