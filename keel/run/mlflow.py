"""MLflow, when a recipe names an experiment. The only file that imports it."""

from __future__ import annotations

import os
import time

from keel.run.metrics import Figures, LoggedRun
from keel.types import UserError

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
except ImportError as error:
    raise UserError(
        "logging.mlflow_experiment is set but mlflow is not installed: pip install 'keel-rlhf[mlflow]', or unset it"
    ) from error

TAG = "keel.stage"  # of a run: which stage, made for what
# A server that does not answer is given up for the run soon, not after MLflow's minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


class MlflowSink:
    """One MLflow run a stage. A resumed stage goes on in it, and figures that stand there already are left as they
    are."""

    def __init__(self, experiment: str, run: LoggedRun) -> None:
        os.environ.update(PATIENCE | {name: own for name in PATIENCE if (own := os.environ.get(name))})
        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if found is None else found.experiment_id
        runs = self._client.search_runs([place], f"tags.`{TAG}` = '{run.identity}'", max_results=1)
        made = runs[0] if runs else self._client.create_run(place, run_name=run.name, tags={TAG: run.identity})
        self._id = made.info.run_id
        self._last: dict[str, int] = {
            name: max(one.step for one in self._client.get_metric_history(self._id, name)) for name in made.data.metrics
        }
        if runs:
            self._client.update_run(self._id, status="RUNNING")

    def write(self, step: int, figures: Figures) -> None:
        now = int(time.time() * 1000)
        new = [Metric(n, value, now, step) for n, value in figures.items() if step > self._last.get(n, -1)]
        if new:
            self._client.log_batch(self._id, metrics=new)

    def close(self) -> None:
        self._client.set_terminated(self._id)
