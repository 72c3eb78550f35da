"""lm-eval's tasks (EleutherAI's harness). The only file that imports it.

It loads each checkpoint by itself, as ``lm_eval --model hf`` would, so that the figures are the harness's own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.recipe.benchmarks import TasksConfig
from keel.recipe.sections import Source
from keel.run import read_json, restore_rng, rng_state, write_json
from keel.types import Reporter, UserError

KEPT = "tasks.json"  # in the stage's folder: what is measured, a model each, as it comes


def require() -> None:
    """UserError where lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks needs the package lm-eval; pip install 'keel-rlhf[lm-eval]', or leave tasks out")


def check_tasks(config: TasksConfig) -> Any:
    """lm-eval's manager of tasks. UserError for a name that it does not know, and a folder that is not there."""
    require()
    if config.folder is not None and not Path(config.folder).is_dir():
        raise UserError(f"tasks.folder: {config.folder} is no folder; name the one with your task files")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.folder)
    if unknown := [name for name in config.names if not manager.match_tasks([name])]:
        where = f" or {config.folder}" if config.folder else ""
        raise UserError(f"tasks.names: lm-eval{where} has no {', '.join(unknown)}; lm_eval ls tasks lists what it has")
    return manager


def measure_tasks(
    config: TasksConfig, models: Mapping[str, Source], device: str, seed: int, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """``models``: by model and task its ``metrics`` (name -> [value, standard error or None]), ``samples``, ``shots``;
    ``lm_eval``: the harness's version; ``limit`` where not all was asked. What was measured before a kill is kept in
    ``folder``. UserError for what the harness cannot do."""
    manager = check_tasks(config)
    kept: dict[str, Any] = read_json(folder / KEPT) if (folder / KEPT).is_file() else {}
    reporter.start("tasks", len(models))
    for name, source in models.items():
        if name not in kept:
            random = rng_state()  # which the harness seeds anew
            try:
                kept[name] = _measured(config, manager, name, source, device, seed)
            finally:
                restore_rng(random)
            write_json(folder / KEPT, kept)
        reporter.advance(1)
    version = importlib.metadata.version("lm_eval")
    return {"models": {name: kept[name] for name in models}, "lm_eval": version, "limit": config.limit}


def _measured(
    config: TasksConfig, manager: Any, name: str, source: Source, device: str, seed: int
) -> dict[str, dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        model = HFLM(
            pretrained=source.path,
            revision=source.revision or "main",
            trust_remote_code=source.trust_remote_code,
            dtype="float32" if device == "cpu" else "auto",
            device=device,
            batch_size=config.batch_size,
        )
        found = simple_evaluate(
            model=model,
            tasks=list(manager.match_tasks(config.names)),
            task_manager=manager,
            num_fewshot=config.shots,
            limit=config.limit,
            apply_chat_template=config.chat,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # of the harness, a task's own code, or a data set that cannot be had
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"tasks: lm-eval stops at {name} ({type(error).__name__}: {said}); mend that, or leave the task out"
        ) from error
    assert found is not None, "it gives results to the first process, which this is"
    samples, shots = found.get("n-samples", {}), found.get("n-shot", {})
    return {
        task: {
            "metrics": _metrics(figures),
            "samples": samples.get(task, {}).get("effective"),
            "shots": shots.get(task),
        }
        for task, figures in found["results"].items()
    }


def _metrics(figures: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """From ``acc,none`` and ``acc_stderr,none``; a filter that is one stays in the name."""
    found: dict[str, list[float | None]] = {}
    for key, value in figures.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or _number(value) is None:
            continue
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        found[name] = [_number(value), _number(figures.get(f"{metric}_stderr,{filtered}"))]
    return found


def _number(value: Any) -> float | None:
    """The harness writes N/A where it has none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
