"""Hand-made records for the tests of reports: one good run, and whatever of it a test wants otherwise."""

import copy
from typing import Any

MIB = 1 << 20

_RUN: dict[str, Any] = {
    "schema": 1,
    "run_id": "",
    "status": "ok",
    "error": None,
    "task": "superglue/rte",
    "method": "adamw",
    "model": "config:roberta-tiny",
    "seed": 0,
    "hyperparameters": {"lr": 1e-3, "betas": [0.9, 0.999]},
    "training": {
        "steps": 100,
        "batch_size": 16,
        "sequence_length": 64,
        "gradient_accumulation_steps": 1,
        "dtype": "float32",
        "autocast": None,
        "schedule": "linear",
        "warmup_fraction": 0.1,
        "max_grad_norm": None,
        "gradient_checkpointing": False,
        "data": "demo",
        "weights": "random",
        "profile": "demo",
        "evaluate_every": None,
    },
    "parameters": 1_000_000,
    "trainable_parameters": 1_000_000,
    "trained_fraction": 1.0,
    "block_coverage": None,
    "metrics": {"accuracy": 0.5},
    "headline": "accuracy",
    "higher_is_better": True,
    "history": [{"step": 1, "tokens": 900, "seconds": 0.02, "loss": 0.7, "learning_rate": 1e-4, "metrics": None}],
    "memory": {
        "peak_allocated_bytes": 100 * MIB,
        "at_peak": {
            "weights_bytes": 20 * MIB,
            "gradients_bytes": 20 * MIB,
            "optimizer_state_bytes": 40 * MIB,
            "activations_bytes": 15 * MIB,
            "temporaries_bytes": 5 * MIB,
        },
        "maximum": {
            "weights_bytes": 20 * MIB,
            "gradients_bytes": 20 * MIB,
            "optimizer_state_bytes": 40 * MIB,
            "activations_bytes": 30 * MIB,
            "temporaries_bytes": 6 * MIB,
        },
        "peak_reserved_bytes": None,
        "process_peak_bytes": 600 * MIB,
    },
    "time": {
        "train_seconds": 10.0,
        "evaluation_seconds": 1.0,
        "tokens_per_second": 9000.0,
        "forward_seconds": 0.020,
        "backward_seconds": 0.040,
        "update_seconds": 0.010,
    },
    "environment": {"device": "cpu", "threads": 2, "torch": "2.13.0"},
}


def make_record(**changes: Any) -> dict[str, Any]:
    """A valid record; `changes` replace top-level fields, or what lies deeper as memory__peak_reserved_bytes=1."""
    record = copy.deepcopy(_RUN)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = record
        for parent in parents:
            place = place[parent]
        place[last] = value
    task, method, seed = str(record["task"]).replace("/", "-"), record["method"], record["seed"]
    record["run_id"] = changes.get("run_id", f"{task}--{method}--model--s{seed}--0123456789")
    return record


def make_failure(status: str = "out_of_memory", error: str = "Out of memory.", **changes: Any) -> dict[str, Any]:
    """A run that ended before anything was measured."""
    nothing = dict.fromkeys(("metrics", "memory", "time", "trained_fraction", "trainable_parameters", "parameters"))
    return make_record(status=status, error=error, **{"history": [], **nothing, **changes})
