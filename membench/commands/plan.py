"""`membench plan`: what each method needs on a model, and what fits, without a GPU and without weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from membench.config.errors import UserError
from membench.config.values import suggestion

DTYPES = ("bfloat16", "float32", "float16")


@dataclass(frozen=True)
class Options:
    """What was given on the command line; see `plan` for what it means."""

    model: str | None
    optimizers: str
    batch_size: int
    sequence_length: int
    dtype: str
    checkpointing: bool
    attention: str | None
    budget: str | None
    format: str
    why: str | None
    against: str | None
    verify: bool
    set_: list[str] | None
    trust_remote_code: bool


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


def plan(
    model: Annotated[
        str | None, _option("--model", help="A built-in configuration (llama3-8b), a config.json, a folder, a hub id.")
    ] = None,
    optimizers: Annotated[
        str, _option("--optimizers", help="all (the default), or badam,lora,package.module:Class.")
    ] = "all",
    batch_size: Annotated[int, _option("--batch-size", help="Sequences a step; 1 by default.")] = 1,
    sequence_length: Annotated[int, _option("--sequence-length", help="Tokens a sequence; 512 by default.")] = 512,
    dtype: Annotated[
        str, _option("--dtype", help="Of the weights: bfloat16 (the default), float32, float16.")
    ] = "bfloat16",
    checkpointing: Annotated[
        bool, _option("--checkpointing/--no-checkpointing", help="Gradient checkpointing, of every layer.")
    ] = False,
    attention: Annotated[
        str | None, _option("--attention", help="sdpa or eager; by default the model's own choice.")
    ] = None,
    budget: Annotated[
        str | None, _option("--budget", help="Memory of the GPU, such as 24GiB: what fits into it?")
    ] = None,
    format: Annotated[str, _option("--format", help="table (the default), json or markdown.")] = "table",
    why: Annotated[
        str | None, _option("--why", metavar="METHOD", help="That method's peak by component and module.")
    ] = None,
    against: Annotated[
        str | None, _option("--against", metavar="NAME", help="A published table beside its plan; list names them all.")
    ] = None,
    verify: Annotated[
        bool, _option("--verify", help="Run real steps on the GPU, and print what they took beside it.")
    ] = False,
    set_: Annotated[
        list[str] | None, _option("--set", metavar="METHOD.KEY=VALUE", help="Hyper-parameter; KEY=VALUE: of all.")
    ] = None,
    trust_remote_code: Annotated[
        bool, _option("--trust-remote-code", help="Run code that comes with a model of the hub.")
    ] = False,
) -> None:
    """Say how much memory each method needs on a model, part by part, and what fits into a budget.

    Runs the methods' own code on tensors without values: no GPU, no weights and no download beyond a configuration.
    """
    print(answer(Options(**locals())))


def answer(options: Options) -> str:
    """The text to print.

    Raises:
        UserError: a value is wrong, or a method or a model can't be planned.
    """
    try:
        return _answer(options)
    except ValueError as error:
        raise UserError(str(error)) from error


def _answer(options: Options) -> str:
    from membench.config.settings import parse_assignments
    from reports import plans

    _check(options, plans.FORMATS)
    budget, given = _budget(options.budget), parse_assignments(options.set_ or [])
    if options.against is not None:
        from membench.planning.against import compare

        return compare(options.against, options.format)
    if options.model is None:
        raise UserError(
            "give --model: a built-in configuration (llama3-8b), a config.json, a folder or an id of the hub"
        )
    from membench.planning.planner import plan as make
    from membench.planning.workload import Workload

    workload = Workload(
        options.model,
        options.batch_size,
        options.sequence_length,
        options.dtype,
        options.checkpointing,
        options.attention,
        trust_remote_code=options.trust_remote_code,
    )
    methods = _methods(options)
    document = make(workload, methods, given, budget_bytes=budget)
    text = plans.why(document, options.why) if options.why else plans.render(document, options.format)
    if not options.verify:
        return text
    from membench.planning.verify import report

    return f"{text}\n\n{report(workload, methods, given, document)}"


def _check(options: Options, formats: tuple[str, ...]) -> None:
    for name, value, known in (("format", options.format, formats), ("dtype", options.dtype, DTYPES)):
        if value not in known:
            raise UserError(f"--{name} {value}: there is no such {name}. {suggestion(value, known)}")
    for name, count in (("batch-size", options.batch_size), ("sequence-length", options.sequence_length)):
        if count < 1:
            raise UserError(f"--{name} must be at least 1, not {count}")


def _budget(text: str | None) -> int | None:
    from membench.config.units import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise UserError(f"--budget {error}") from error


def _methods(options: Options) -> list[str]:
    """Names of the methods; with --why, that one alone."""
    import optimizers

    if options.why:
        return [options.why]
    if options.optimizers == "all":
        return optimizers.available()
    return list(dict.fromkeys(name.strip() for name in options.optimizers.split(",") if name.strip()))
