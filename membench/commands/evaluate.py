"""`membench evaluate`: saved models on public benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from membench.config.errors import UserError


def _option(*names: str, help: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


def evaluate(
    folder: Annotated[Path, typer.Argument(help="A model that --save wrote, or the folder of all of them.")],
    tasks: Annotated[str, _option("--tasks", help="Such as gsm8k,mmlu,hellaswag, or the harness's own names.")],
    device: Annotated[str, _option("--device", help="auto (the default), cpu, cuda, cuda:1.")] = "auto",
    limit: Annotated[int | None, _option("--limit", help="Documents of each task; all by default.")] = None,
    batch_size: Annotated[int, _option("--batch-size", help="Sequences; 8 by default.")] = 8,
    fewshot: Annotated[
        int | None, _option("--fewshot", help="Examples in the prompt; by default what each task says.")
    ] = None,
    chat_template: Annotated[
        bool, _option("--chat-template", help="Ask as in a chat, by the tokenizer's template.")
    ] = False,
    run_code: Annotated[
        bool, _option("--run-code", help="Run code that the model wrote, on this machine: for humaneval and mbpp.")
    ] = False,
    include: Annotated[
        str | None, _option("--include", help="Folder of your own tasks in the harness's format.")
    ] = None,
) -> None:
    """Score saved models by EleutherAI's lm-evaluation-harness, and add the scores to their records.

    Known by short names: mmlu, mmlu-pro, agieval, arc, boolq, openbookqa, piqa, siqa, hellaswag, winogrande, gsm8k,
    math, ifeval, humaneval, mbpp. Needs the extra membench[eval], and the hub for the benchmarks' data.
    """
    from membench.commands import harness

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    if not names:
        raise UserError("--tasks names nothing")
    request = harness.Request(names, device, limit, batch_size, fewshot, chat_template, run_code, include)
    models = harness.find_models(folder)
    harness.check(models, request)
    manager = harness.index(request)
    known = harness.resolve(request.tasks, manager.all_tasks)
    found = {}
    for model in models:
        found[model] = harness.evaluate(model, known, request, manager)
        if harness.add_to_record(model, found[model]) is None:
            typer.echo(f"{model}: there is no record beside it, so its scores are only printed", err=True)
    print(table(found))


def table(found: dict[Path, dict[str, Any]]) -> str:
    """One line for each score of each model."""
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
