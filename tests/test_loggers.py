"""Loggers beside metrics.jsonl: one that fails never stops a run, and a resumed stage goes on in its own run."""

from __future__ import annotations

import json
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from keel.check.machine import loggers
from keel.recipe.recipe import Recipe
from keel.recipe.sections import LoggingConfig
from keel.run import RunDir
from keel.run.metrics import MetricsLog, without_secrets
from keel.types import UserError


class Failing:
    """A sink that fails at one of its calls."""

    def __init__(self, at: str) -> None:
        self.at, self.rows = at, 0
        if at == "open":
            raise ConnectionError("https://ann:s3cret@log.example.org/api?token=abc is down\nand more")

    def write(self, step: int, figures: Any) -> None:
        self.rows += 1
        if self.at == "write":
            raise RuntimeError("quota")

    def close(self) -> None:
        if self.at == "close":
            raise OSError("gone")


@pytest.mark.parametrize("at", ["open", "write", "close"])
def test_a_logger_that_fails_costs_one_line_and_not_the_run(tmp_path: Path, at: str) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", sinks={"MyLogger": lambda step: Failing(at)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            log.write(step, {"loss": 1.0})
        log.close()
        log.resume(3)
        log.write(3, {"loss": 1.0})
        log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "m.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    lines = [str(one.message) for one in said]
    assert len(lines) == 1
    assert lines[0].startswith("MyLogger gets no more figures")
    assert "the run goes on" in lines[0]
    assert "s3cret" not in lines[0]
    assert "abc" not in lines[0]


def test_what_addresses_hide() -> None:
    said = "https://ann:pw@h.org/x?token=t1 and postgresql://bo@db/x, plain@mail"
    assert without_secrets(said) == "https://***@h.org/x and postgresql://***@db/x, plain@mail"


@pytest.mark.parametrize("field", ["wandb_project", "trackio_project", "mlflow_experiment"])
def test_a_missing_package_is_found_before_anything_is_computed(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    tree = {"name": "r", "model": {"path": "x"}, "stages": [{"kind": "sft", "name": "sft"}], "logging": {field: "p"}}
    (found,) = loggers(Recipe.model_validate(tree))
    assert found.level == "error"
    assert field in str(found)
    assert "pip install" in str(found)


# ------------------------------------------------------------------------------------------- with stand-ins for both


class FakeTrackio(types.ModuleType):
    """What `keel.run.trackio` calls of trackio: runs by project and name, which log appends to."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: dict[tuple[str, str], list[int]] = {}

    def init(self, project: str, name: str, resume: str, **settings: bool) -> Any:
        assert resume == "allow"
        assert not any(settings.values())
        rows = self.runs.setdefault((project, name), [])
        return types.SimpleNamespace(
            _next_step=max(rows, default=-1) + 1, log=lambda row, step: rows.append(step), finish=lambda: None
        )


class FakeMlflow:
    """What `keel.run.mlflow` calls of an MLflow server."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return name

    def _run(self, tag: str) -> Any:
        metrics = {name: 0.0 for _, name, _ in self.runs[tag]["rows"]}
        return types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=tag), data=types.SimpleNamespace(metrics=metrics)
        )

    def search_runs(self, places: list[str], query: str, max_results: int) -> list[Any]:
        tag = query.split("'")[1]
        return [self._run(tag)] if tag in self.runs else []

    def create_run(self, place: str, run_name: str, tags: dict[str, str]) -> Any:
        (tag,) = tags.values()
        self.runs[tag] = {"rows": [], "status": "RUNNING", "name": run_name}
        return self._run(tag)

    def get_metric_history(self, run: str, name: str) -> list[Any]:
        return [types.SimpleNamespace(step=step) for step, key, _ in self.runs[run]["rows"] if key == name]

    def update_run(self, run: str, status: str) -> None:
        self.runs[run]["status"] = status

    def log_batch(self, run: str, metrics: list[tuple[str, float, int, int]]) -> None:
        self.runs[run]["rows"] += [(step, name, value) for name, value, _, step in metrics]

    def set_terminated(self, run: str) -> None:
        self.runs[run]["status"] = "FINISHED"


def test_a_resumed_stage_goes_on_in_its_run_and_other_settings_begin_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio, server = FakeTrackio(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    mlflow.MlflowClient = lambda: server  # type: ignore[attr-defined]
    entities.Metric = lambda *row: row  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    for name in ("keel.run.trackio", "keel.run.mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    logging = LoggingConfig(tensorboard=False, trackio_project="p", mlflow_experiment="e")

    def work(fingerprint: str, first: int, last: int) -> None:
        stage = RunDir(tmp_path / "run", logging).stage("sft")
        stage.begin(fingerprint)
        if first:
            stage.metrics.resume(first)
        for step in range(first, last):
            stage.metrics.write(step, {"loss": float(step)})
        stage.metrics.close()

    work("f", 0, 4)  # killed after its last state at 2
    work("f", 2, 6)
    work("g", 0, 2)
    assert sorted(trackio.runs.values()) == [[0, 1], [0, 1, 2, 3, 4, 5]]
    assert all(project == "p" and name.startswith("run/sft ") for project, name in trackio.runs)
    logged = [run["rows"] for run in server.runs.values()]
    assert logged == [[(s, "loss", float(s)) for s in range(6)], [(s, "loss", float(s)) for s in range(2)]]
    assert {run["status"] for run in server.runs.values()} == {"FINISHED"}
    for name in ("keel.run.trackio", "keel.run.mlflow"):
        sys.modules.pop(name, None)


def test_the_real_ones_where_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlite3

    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    logging = LoggingConfig(tensorboard=False, trackio_project="p")
    for first, last in ((0, 3), (2, 5)):
        stage = RunDir(tmp_path / "run", logging).stage("sft")
        stage.begin("f")
        stage.metrics.resume(first)
        for step in range(first, last):
            stage.metrics.write(step, {"loss": float(step)})
        stage.metrics.close()
    rows = sqlite3.connect(tmp_path / "trackio" / "p.db").execute("select step, metrics from metrics").fetchall()
    assert [(step, json.loads(row)) for step, row in rows] == [(s, {"loss": float(s)}) for s in range(5)]


def test_each_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for field, package in (("trackio_project", "trackio"), ("mlflow_experiment", "mlflow")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"keel.run.{package}", raising=False)
        stage = RunDir(tmp_path, LoggingConfig(tensorboard=False, **{field: "p"})).stage("sft")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"keel-rlhf\\[{package}\\]"):
            stage.metrics.write(0, {"loss": 1.0})
