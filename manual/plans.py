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
    "lisa:train_embeddings=false",
    "adamw8bit:in_backward=true",
)  # that need much less
TABLES = ("badam-table-12", "badam-table-2", "unsloth-llama3.1-8b")
_KEPT = ("method", "estimated_total_bytes", "peak_allocated_bytes")


def make() -> None:
    """Plan everything again."""
    import membench

    for model in MODELS:
        documents = [membench.plan(model, methods, **WORKLOAD).document for methods in ("all", VARIANTS)]
        keep(model, documents)
    for name in TABLES:
        rows = against.figures(published.load(name))
        _write(HERE / f"against-{name}.json", {"name": name, "rows": rows})


def keep(model: str, documents: list[dict[str, Any]]) -> None:
    """Write what the pages need of the plans of a model."""
    rows = [{key: row[key] for key in _KEPT} for document in documents for row in document["rows"]]
    _write(HERE / f"{model}.json", {"model": model, **WORKLOAD, "rows": rows})


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    """A file of `plans/`."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
