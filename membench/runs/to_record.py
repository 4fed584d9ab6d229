"""A record from a run and its outcome."""

import json
from datetime import UTC, datetime
from typing import Any

from membench.config.run import Run
from membench.runs.processes import Outcome
from reports import record, schema


def assemble(run: Run, outcome: Outcome) -> dict[str, Any]:
    """The record of a run, as in its file; what couldn't be measured is null."""
    measured = outcome.value or {"status": outcome.status, "error": outcome.error}
    if outcome.status == "refused":  # by a method or task, before the run or during it
        measured = {"status": "failed", "error": f"{record.REFUSAL}{outcome.error}"}
    made = _assemble(run, measured)
    try:
        record.check(made, run.run_id)
    except ValueError as error:  # a user's own task or method returned what a record can't hold
        made = _assemble(run, {"status": "failed", "error": str(error)})
    return json.loads(json.dumps(made))


def _assemble(run: Run, measured: dict[str, Any]) -> dict[str, Any]:
    made = {
        **schema.unmeasured(),
        "schema": schema.VERSION,
        "run_id": run.run_id,
        "task": run.task,
        "method": run.method,
        "model": run.training.model,
        "seed": run.seed,
        "hyperparameters": run.hyperparameters,
        "training": run.training.record,
        **measured,
        "environment": {
            **run.environment,
            **measured.get("environment", {}),  # of another machine than the one where it was prepared
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    return {**made, **{section: _complete(made[section], section) for section in ("memory", "time")}}


def _complete(measured: dict[str, Any] | None, section: str) -> dict[str, Any] | None:
    """A section that was only partly measured, with null for the rest."""
    return None if measured is None else {**dict.fromkeys(schema.below(section)), **measured}
