"""The plans that pages quote: made on tensors without values, kept as JSON in `plans/`, minutes each."""

import json
from pathlib import Path
from typing import Any

from membench.planning import against
from reports import published

HERE = Path(__file__).resolve().parent / "plans"
MODELS = ("qwen2.5-7b", "llama3-8b", "llama3.2-1b")
WORKLOAD = {"batch_size": 1, "sequence_length": 2048, "checkpointing": True}
VARIANTS = (
    "galore:in_backward=true",
    "galore:in_backward=true:weights=8bit",
    "lisa:train_embeddings=false",
    "adamw8bit:in_backward=true",
    "badam:states=8bit",
)  # that need less
OPTIONS: dict[str, tuple[list[str], dict[str, int]]] = {
    "--loss-chunks 8": (["badam", "lora"], {"loss_chunks": 8}),
    "--loss-chunks 8 --batch-size 4": (["qlora"], {"loss_chunks": 8, "batch_size": 4}),
}
TABLES = ("badam-table-12", "badam-table-2", "unsloth-llama3.1-8b")
_KEPT = ("method", "estimated_total_bytes", "peak_allocated_bytes")


def make() -> None:
    """Plan everything again."""
    import membench

    for model in MODELS:
        documents = [membench.plan(model, methods, **WORKLOAD).document for methods in ("all", VARIANTS)]
        rows = [row for document in documents for row in document["rows"]]
        keep(model, rows + with_options(model))
    for name in TABLES:
        rows = against.figures(published.load(name))
        _write(HERE / f"against-{name}.json", {"name": name, "rows": rows})


def with_options(model: str) -> list[dict[str, Any]]:
    """Rows of methods with an option of the command, which their names say."""
    import membench

    return [
        {**row, "method": f"{row['method']} {option}"}
        for option, (methods, changed) in OPTIONS.items()
        for row in membench.plan(model, methods, **{**WORKLOAD, **changed}).document["rows"]
    ]


def keep(model: str, rows: list[dict[str, Any]]) -> None:
    """Write what the pages need of the plans of a model."""
    kept = [{key: row[key] for key in _KEPT} for row in rows]
    _write(HERE / f"{model}.json", {"model": model, **WORKLOAD, "rows": kept})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    """A file of `plans/`."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
