"""Plans again what sessions on a GPU measured: `python -m benchmarks.on_gpu.replan` writes it into their JSONs.

A session's own plans are those of the code that it ran; what changed since is measured by the same figures.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from benchmarks.on_gpu.journal import Journal
from benchmarks.on_gpu.page import RESULTS
from benchmarks.on_gpu.plans import given_to
from benchmarks.on_gpu.tables import Record, finished
from membench.planning.blueprint import Blueprint
from membench.planning.method import plan_method
from membench.planning.planner import method_values
from membench.planning.workload import Workload

KEYS = ("peak_allocated_bytes", "peak_reserved_bytes")
PACKAGES = ("torch", "transformers")
CHANGED = ("blockllm",)  # they keep less since they were measured, so their figures stay beside the plans of that time


def main() -> None:
    """Plan again, and write."""
    for path in sorted(RESULTS.glob("*.json")):
        journal = Journal(path, json.loads(path.read_text(encoding="utf-8"))["minutes"], resume=True)
        journal.document["replanned"] = replanned(journal.document)
        journal.save()


def replanned(document: Record) -> Record:
    """Today's plans of a session, by workload and method, and the libraries that they are of."""
    plans = {
        f"{workload}/{method}": planned_now(document, workload, method)
        for workload in document["workloads"]
        for method, part in finished(document, f"methods/{workload}/").items()
        if part["planned"] is not None and method not in CHANGED
    }
    return {"versions": {name: version(name) for name in PACKAGES}, "plans": plans}


def planned_now(document: Record, workload: str, method: str) -> dict[str, Any]:
    """The `KEYS` of the plan of what was measured."""
    blueprint = Blueprint(Workload(**document["workloads"][workload]))
    given = document["parts"][f"methods/{workload}/{method}"]["planned"]["given"]
    row = plan_method(blueprint, method, method_values(blueprint, method, given_to(method, given))).row
    return {key: row[key] for key in KEYS}


if __name__ == "__main__":
    main()
