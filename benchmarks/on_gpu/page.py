"""The docs page about sessions on a GPU: `python -m benchmarks.on_gpu.page` writes it from their JSONs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.on_gpu import tables
from benchmarks.on_gpu.tables import Record, finished, gib
from reports.formats import Section, markdown
from reports.table import NOTHING

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"
HEAD = """<!-- Generated from benchmarks/results/*.json by `python -m benchmarks.on_gpu.page`; edit neither. -->

# On a GPU
"""
NONE = """
No session on a GPU has been recorded yet. `python benchmarks/gpu.py --out benchmarks/results/NAME.json` makes one in
nine minutes, on an 80 GB card, with random weights and no downloads; `python -m benchmarks.on_gpu.page` then writes
this page.
"""
INTRODUCTION = """
What `membench plan` predicts, compared with what the same training steps requested from PyTorch's allocator, and how
long they take: real architectures with random weights, random tokens, bf16. Made by `python benchmarks/gpu.py`.
"""
LIMITS = """
## What this doesn't show

- Quality, since the weights are random; or published times, since the card, the libraries and the attention differ.
- A whole run: times are medians of a few steps, one method after another, not repeated on another day or at another
  temperature of the card. Compare only ratios within a table.
- Padding: one token of a batch is masked, so that attention gets a mask, as the plans assume.
- Accumulation, clipping, data loading, evaluation, several GPUs.
- What a library takes from the driver rather than from the allocator: it is in no peak.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(documents(RESULTS)), encoding="utf-8")


def documents(folder: Path) -> dict[str, Record]:
    """The sessions by the name of their file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def render(sessions: dict[str, Record]) -> str:
    """The page's text."""
    if not sessions:
        return HEAD + NONE
    chapters = "\n\n".join(markdown(list(sections(name, document))) for name, document in sessions.items())
    return f"{HEAD}{INTRODUCTION}\n{chapters}\n{LIMITS}"


def sections(name: str, document: Record) -> Iterator[Section]:
    """The sections of a session: its conditions, each workload, then the rest."""
    yield [f"{name}: {conditions(document)}", *ceilings(document)], [], []
    for workload, setup in document["workloads"].items():
        measured = finished(document, f"methods/{workload}/")
        made = [tables.memory(document, workload), tables.times(document, workload), *tables.blocks(measured)]
        yield [title(setup)], [table for table in made if table.cells], []
    rest = [make(document) for make in (tables.race, tables.meter, tables.largest, tables.missing, tables.promises)]
    yield ["Races, the meter, the largest batch, and what is missing"], [table for table in rest if table.cells], []


def conditions(document: Record) -> str:
    """The card and the libraries on one line."""
    seen = document["parts"]["conditions"]
    driver = seen["nvidia_smi"].get("driver_version", NOTHING)
    versions = ", ".join(f"{package} {number}" for package, number in seen["versions"].items())
    return f"{seen['device']}, driver {driver}, {versions}, {seen['created'][:10]}, commit {seen['commit'] or NOTHING}"


def ceilings(document: Record) -> list[str]:
    """What the card can do, in a sentence."""
    seen = document["parts"].get("ceilings", {})
    if seen.get("status") != "ok":
        return []
    return [
        f"A bf16 product of 8192 x 8192 matrices ran at {seen['tflops']:.0f} TFLOP/s, a copy at "
        f"{seen['copy_gb_per_second']:.0f} GB/s. Outside the allocator the process held "
        f"{gib(seen['outside_bytes'])} GiB; inside it, libraries held {gib(seen['workspace_bytes'])} GiB."
    ]


def title(setup: Record) -> str:
    """A workload in words."""
    layers = "each layer checkpointed" if setup["checkpointing"] else "no checkpointing"
    return f"{setup['model']}, {setup['batch_size']} x {setup['sequence_length']} tokens, {setup['dtype']}, {layers}"


if __name__ == "__main__":
    main()
