"""A record from a run and what became of it."""

from datetime import UTC, datetime
from typing import Any

from membench.config.run import Run
from membench.runs.processes import Outcome
from reports import record

_UNKNOWN: dict[str, Any] = {
    "parameters": None,
    "trainable_parameters": None,
    "trained_fraction": None,
    "block_coverage": None,
    "metrics": None,
    "initial_metrics": None,
    "headline": None,
    "higher_is_better": None,
    "history": [],
    "memory": None,
    "time": None,
}


def assemble(run: Run, outcome: Outcome) -> dict[str, Any]:
    """The record of a run; what couldn't be measured is null."""
    measured = outcome.value or {"status": outcome.status, "error": outcome.error}
    made = _assemble(run, measured)
    try:
        record.check(made, run.run_id)
    except ValueError as error:  # a task or a method of the user's own gave what no record can hold
        return _assemble(run, {"status": "failed", "error": str(error)})
    return made


def _assemble(run: Run, measured: dict[str, Any]) -> dict[str, Any]:
    measured = {**_UNKNOWN, "hyperparameters": run.hyperparameters, **measured}
    measured["memory"] = _complete(measured["memory"], "memory")
    measured["time"] = _complete(measured["time"], "time")
    return {
        "schema": record.VERSION,
        "run_id": run.run_id,
        "task": run.task,
        "method": run.method,
        "model": run.training.model,
        "seed": run.seed,
        "training": run.training.record,
        "environment": {**run.environment, "created": datetime.now(UTC).isoformat(timespec="seconds")},
        **measured,
    }


def _complete(measured: dict[str, Any] | None, section: str) -> dict[str, Any] | None:
    """A section that was only partly measured, with null for the rest."""
    if measured is None:
        return None
    paths = [field.path.split(".") for field in record.SCHEMA if field.null != record.OPTIONAL]
    return {**{path[1]: None for path in paths if len(path) == 2 and path[0] == section}, **measured}
