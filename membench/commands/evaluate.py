"""`membench evaluate`: saved models on public benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from membench.commands.options import takes
from membench.config.declare import hold_to_bounds, typed
from membench.config.errors import UserError
from membench.config.options import EvaluationOptions


@takes(EvaluationOptions)
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A model saved by --save, or the folder of all of them.")],
    **given: Any,
) -> None:
    """Score saved models with EleutherAI's lm-evaluation-harness, and add the scores to their records.

    Short names: mmlu, mmlu-pro, agieval, arc, boolq, openbookqa, piqa, siqa, hellaswag, winogrande, gsm8k, math,
    ifeval, humaneval, mbpp. Needs the extra membench[eval], and the hub for the benchmarks' data.
    """
    from membench.commands import harness

    request = EvaluationOptions(**typed(EvaluationOptions, given))
    hold_to_bounds(request)
    models = harness.find_models(folder)
    harness.check_request(models, request)
    manager = harness.index(request)
    known = harness.resolve(request.tasks, manager.all_tasks)
    found: dict[Path, dict[str, Any]] = {}
    silent: list[str] = []
    try:
        for model in models:
            results = harness.evaluate(model, known, request, manager)
            found[model] = {name: entry for name, entry in results.items() if entry["scores"]}
            silent = [name for name in results if name not in found[model]]
            fuller = harness.add_to_record(model, found[model])
            if fuller is None:
                typer.echo(f"{model}: it has no record beside it, so its scores are only printed", err=True)
            elif fuller:
                typer.echo(f"{model}: its record keeps its scores of {', '.join(fuller)} on more documents", err=True)
    finally:  # scores of hours are told even if another model's can't be had, or a record can't be written
        if found:
            print(table(found))
    if silent:
        raise UserError(
            f"--tasks {', '.join(silent)}: the harness gives no score; it passes over metrics unknown to it"
        )


def table(found: dict[Path, dict[str, Any]]) -> str:
    """One line per score of each model."""
    from tabulate import tabulate

    rows = []
    for model, benchmarks in found.items():
        for name, entry in benchmarks.items():
            for metric, score in entry["scores"].items():
                error = entry["standard_errors"].get(metric)
                shots, limit = entry["fewshot"], entry["limit"]
                rows.append(
                    [model.name, name, metric, f"{score:.4f}", "" if error is None else f"± {error:.4f}", shots, limit]
                )
    headers = ["model", "benchmark", "metric", "score", "", "shots", "limit"]
    return tabulate(rows, headers, disable_numparse=True, missingval="-", colalign=["left"] * 3 + ["right"] * 4)
