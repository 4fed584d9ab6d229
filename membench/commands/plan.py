"""`membench plan`: what each method needs on a model, and what fits, without a GPU and without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import typer

from membench.commands.options import takes
from membench.config.assignments import unused_hyperparameters
from membench.config.declare import declared, hold_to_bounds, like, option, shared, typed
from membench.config.errors import UserError
from membench.config.options import RunOptions, WorkloadOptions
from membench.memory.garbage import collected_by_hand


@dataclass(frozen=True)
class PlanOptions(WorkloadOptions):
    """The options of `membench plan`."""

    optimizers: tuple[str, ...] = like(
        RunOptions, "optimizers", default=("all",), help="all (the default), or badam,lora,package.module:Class."
    )
    hyperparameters: dict[str, dict[str, Any]] = like(RunOptions, "hyperparameters")
    budget: str | None = option(
        None, "Memory of the GPU, such as 24GiB, or its name (rtx4090, a100-80g, h100): show what fits, and advise."
    )
    format: Literal["table", "json", "markdown"] = option("table", "table (the default), json or markdown.")
    why: str | None = option(None, "Break down this method's peak by component and module.", metavar="METHOD")
    against: str | None = option(None, "Show a published table beside its plan; 'list' names them all.", metavar="NAME")
    export: Literal["trainer", "trl", "llamafactory", "axolotl"] | None = option(
        None, "Print the configuration of the method that leaves most room: trainer, trl, llamafactory or axolotl."
    )
    verify: bool = option(False, "Also run real steps on the GPU, and print what they used.")


@takes(PlanOptions)
def plan(**given: Any) -> None:
    """Say how much memory each method needs on a model, part by part, and what fits into a budget.

    Runs the methods' own code on tensors without values: no GPU, no weights and no download beyond a configuration.
    """
    options = PlanOptions(**typed(PlanOptions, given))
    hold_to_bounds(options)
    _check_used(set(given))
    print(answer(options, fit_length="sequence_length" not in given))


# What an option makes of the others: "against" has the settings of its table, the others print a text of their own.
_UNUSED = {
    "against": {*declared(PlanOptions)} - {"against", "format"},
    "why": {"format", "export"},
    "export": {"format", "verify"},
}


def _check_used(given: set[str]) -> None:
    """Raises UserError if an option would be passed over because of another."""
    known = declared(PlanOptions)
    for name, unused in _UNUSED.items():
        if name in given and (both := given & unused):
            flags = ", ".join(one.flag for one in known.values() if one.name in both)
            raise UserError(f"{known[name].flag} doesn't use {flags}: leave out one or the other")


def answer(options: PlanOptions, *, fit_length: bool = False) -> str:
    """The text to print; with `fit_length`, of shorter sequences where the model doesn't take as long ones.

    Raises:
        UserError: a value is wrong, or a method or a model can't be planned.
    """
    try:
        with collected_by_hand():
            return _answer(options, fit_length)
    except ValueError as error:
        raise UserError(str(error)) from error


def _answer(options: PlanOptions, fit_length: bool) -> str:
    from reports import plans

    budget = _budget(options.budget)
    if options.against is not None:
        from membench.planning.against import compare

        return compare(options.against, options.format)
    if not options.model:
        raise UserError("give --model: a built-in configuration (llama3-8b), a config.json, a folder or a hub id")
    from membench.commands.progress import counting
    from membench.planning.blueprint import within_positions
    from membench.planning.planner import plan as make
    from membench.planning.workload import Workload

    workload = Workload(**shared(WorkloadOptions, options))
    if fit_length:
        workload = within_positions(workload)
    methods, given = _methods(options), options.hyperparameters
    if options.verify:
        if options.gpus > 1:
            raise UserError("--verify runs real steps in a single process: leave it out, or leave --gpus out")
        from membench.planning.verify import check_gpu

        check_gpu()
    with counting(len(methods), "plans") as tell:
        document = make(workload, methods, given, budget_bytes=budget, report=tell)
    for sentence in unused_hyperparameters(given, methods):
        typer.echo(sentence, err=True)
    if options.export is not None:
        from membench.planning.export import export

        return export(document, options.export)
    text = plans.why(document, options.why) if options.why else plans.render(document, options.format)
    if not options.verify:
        return text
    from membench.planning.verify import report

    return f"{text}\n\n{report(workload, methods, given, document)}"


def _budget(text: str | None) -> int | None:
    from membench.planning.cards import budget_bytes

    try:
        return None if text is None else budget_bytes(text)
    except ValueError as error:
        raise UserError(f"--budget {error}") from error


def _methods(options: PlanOptions) -> list[str]:
    """The names of the methods; with --why, only that one."""
    import optimizers

    named = optimizers.expand(options.optimizers)
    if not options.why:
        return named
    if options.optimizers != declared(PlanOptions)["optimizers"].default and options.why not in named:
        raise UserError(f"--why {options.why} isn't among --optimizers {','.join(options.optimizers)}: leave these out")
    return [options.why]
