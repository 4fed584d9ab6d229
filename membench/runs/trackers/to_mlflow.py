"""MLflow: a run of the experiment `membench`, in OUT/mlflow.db unless MLFLOW_TRACKING_URI names another store."""

import os
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from membench.config.run import Run
from membench.runs.trackers import PROJECT, settings_of

_TAG = "membench.run_id"
_AT_ONCE = 1000  # metrics, which a store takes


class _Log:
    def __init__(self, client: MlflowClient, number: str):
        self._client, self._number, self._last = client, number, 0

    def log(self, step: int, values: dict[str, float]) -> None:
        self._last, now = step, int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _AT_ONCE):
            self._client.log_batch(self._number, metrics[start : start + _AT_ONCE])

    def end(self, record: dict[str, Any], values: dict[str, float]) -> None:
        self.log(self._last, values)
        self._client.log_dict(self._number, record, "record.json")
        self._client.set_terminated(self._number, "FINISHED" if record["status"] == "ok" else "FAILED")

    def interrupt(self) -> None:
        self._client.set_terminated(self._number, "KILLED")


def begin(run: Run, out: Path) -> _Log:
    """Replaces what an earlier attempt has logged."""
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{out.absolute() / 'mlflow.db'}")
    experiment = _experiment(client, out)
    for earlier in client.search_runs([experiment], f"tags.`{_TAG}` = '{run.run_id}'"):
        client.delete_run(earlier.info.run_id)
    number = client.create_run(experiment, run_name=run.run_id, tags={_TAG: run.run_id}).info.run_id
    client.log_batch(number, params=[Param(name, str(value)) for name, value in settings_of(run).items()])
    return _Log(client, number)


def _experiment(client: MlflowClient, out: Path) -> str:
    known = client.get_experiment_by_name(PROJECT)
    if known is not None:
        return known.experiment_id
    ours = None if os.environ.get("MLFLOW_TRACKING_URI") else (out.absolute() / "mlflow-artifacts").as_uri()
    return client.create_experiment(PROJECT, artifact_location=ours)
