"""SuperGLUE (Wang et al., 2019, arXiv 1905.00537): eight tasks, one row of `ROWS` each.

AX-b and AX-g have no training data: RTE's model is also scored on them, if the source has their files.
"""

from collections.abc import Sequence
from typing import Any

from tasks import metrics
from tasks.models.arguments import TaskArguments
from tasks.models.classifier import Example
from tasks.superglue import data as superglue_data
from tasks.superglue.examples import ENTAILED, Choice, ax_g, boolq, copa, entailment, multirc, record, wic, wsc
from tasks.superglue.task import Benchmark, Predictions, SuperGlueTask

NAME = "superglue"


def _labels(predictions: Predictions, of: Sequence[Example]) -> dict[str, list]:
    return {"predictions": list(predictions), "references": [example.label for example in of]}


def _grouped_labels(predictions: Predictions, of: Sequence[Example]) -> dict[str, list]:
    return _labels(predictions, of) | {"groups": [example.group for example in of]}


def _choices(predictions: Predictions, of: Sequence[Choice]) -> dict[str, list]:
    return {"predictions": list(predictions), "references": [choice.right[0] for choice in of]}


def _texts(predictions: Predictions, of: Sequence[Choice]) -> dict[str, list]:
    chosen = [choice.candidates[index] for index, choice in zip(predictions, of, strict=True)]
    return {"predictions": chosen, "references": [list(choice.answers) for choice in of]}


AX_B = entailment(*ENTAILED, first="sentence1", second="sentence2")
DIAGNOSTICS = (
    Benchmark("AX-b", AX_B, metrics.Matthews, _labels, prefix="ax_b_"),
    Benchmark("AX-g", ax_g, metrics.Winogender, _grouped_labels, prefix="ax_g_"),
)
NLI = ("entailment", "contradiction", "neutral")
ROWS = {
    "boolq": Benchmark("BoolQ", boolq, metrics.Accuracy, _labels),
    "cb": Benchmark("CB", entailment(*NLI), metrics.CommitmentBank, _labels, headline="score", names=NLI),
    "copa": Benchmark("COPA", copa, metrics.Accuracy, _choices, names=None),
    "multirc": Benchmark("MultiRC", multirc, metrics.MultiRC, _grouped_labels, headline="score"),
    "record": Benchmark("ReCoRD", record, metrics.ReCoRD, _texts, headline="score", names=None),
    "rte": Benchmark("RTE", entailment(*ENTAILED), metrics.Accuracy, _labels, names=ENTAILED, diagnostics=DIAGNOSTICS),
    "wic": Benchmark("WiC", wic, metrics.Accuracy, _labels),
    "wsc": Benchmark("WSC", wsc, metrics.Accuracy, _labels),
}


def names() -> tuple[str, ...]:
    """The eight tasks, in the benchmark's own order."""
    return tuple(ROWS)


def available_in(data: str) -> tuple[str, ...]:
    """The tasks that a source has. Raises ValueError for an unknown source."""
    folders = superglue_data.available_in(data)
    return tuple(name for name, row in ROWS.items() if row.folder in folders)


def create(name: str, **given: Any) -> SuperGlueTask:
    """Build one of `names()`; see `tasks.create`."""
    return SuperGlueTask(f"{NAME}/{name}", ROWS[name], TaskArguments(**given))
