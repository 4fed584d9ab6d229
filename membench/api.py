"""membench from Python: what plan, explore, compare, report and check do, as functions that return data.

A mistake raises `UserError`, a `ValueError` whose message is one sentence. Runs and plans are made in separate
processes, which import membench and nothing from the calling script or notebook: `if __name__ == "__main__"` isn't
needed, on platforms that fork and on those that spawn.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, fields
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from membench.config.errors import UserError, told_in_a_sentence

if TYPE_CHECKING:
    import pandas
    import torch
    from torch import Tensor, nn

    from reports.regressions.check import Check

    Batch = Mapping[str, Tensor]

Record = dict[str, Any]
Names = str | type | Iterable[str | type]  # a class, of a method or a task, stands for its name
Hyperparameters = Mapping[str | type, Mapping[str, Any]]  # by method; those under "*" go to every method that has them


# ---- plan


@dataclass(frozen=True)
class PlanRow:
    """What one method needs.

    Attributes:
        method: its name.
        hyperparameters: all those it was planned with.
        peak_allocated_bytes: the most that tensors take at once; `at_peak` has its parts.
        at_peak: bytes of each part (weights_bytes, ...) at the moment of the peak; they add up to it.
        maximum: bytes of each part, each at its own maximum; they don't add up.
        peak_reserved_bytes: an estimate of what PyTorch's allocator reserves for it on a GPU.
        estimated_total_bytes: including the process's CUDA context; a card must have this much free.
        peak_phase: forward, backward, update or switch.
        peak_module: the module that holds most at the peak.
        peak_selection: what is being trained at the peak; None for a method without a choice.
        trained_weights: how many weights are being trained at the peak.
        components: bytes by component of the model, and within each by part.
        smallest_card: the first of the listed cards, by memory, that it fits on; None if there is none.
        fits, left_bytes: does it fit into the budget, and what is left (missing, if negative); None without a budget.
        limits: the largest batch, sequence and model that fit; None without a budget, and of a model whose steps depend
            on values, of which real ones are made.
        advice: if it doesn't fit, the changes with which it does, as planned: "options" in words, "workload", "values",
            "without" (what they rule out), "estimated_total_bytes", "left_bytes"; None if it fits, or none was found.
        gpus_needed: the fewest of 1, 2, 4, ... 64 on which it fits, with the budget on each; None if there is none,
            without a budget, and where nothing is sharded.
        formula, formula_bytes: the paper's formula, which leaves out activations, and its value; None if it has none.
    """

    method: str
    hyperparameters: dict[str, Any]
    peak_allocated_bytes: int
    at_peak: dict[str, int]
    maximum: dict[str, int]
    peak_reserved_bytes: int
    estimated_total_bytes: int
    peak_phase: str
    peak_module: str
    peak_selection: str | None
    trained_weights: int
    components: dict[str, dict[str, int]]
    smallest_card: str | None
    fits: bool | None
    left_bytes: int | None
    limits: dict[str, Any] | None
    advice: dict[str, Any] | None
    gpus_needed: int | None
    formula: str | None
    formula_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """What methods need on a model. Prints as the tables of `membench plan`, in a notebook as HTML.

    Attributes:
        rows: by method.
        refused: methods that can't be planned on this model, and why.
        document: everything, as `membench plan --format json` prints it.
    """

    rows: dict[str, PlanRow]
    refused: dict[str, str]
    document: dict[str, Any]

    def __str__(self) -> str:
        from reports import plans

        return plans.render(self.document, "table")

    def _repr_html_(self) -> str:
        from reports import plans

        return plans.render(self.document, "html")


@told_in_a_sentence
def plan(
    model: str,
    optimizers: Names = "all",
    *,
    budget: str | int | None = None,
    hyperparameters: Hyperparameters | None = None,
    **workload: Any,
) -> Plan:
    """How much memory each method needs to train `model`, on tensors without values: no GPU, no weights.

    Args:
        model: a built-in configuration ("llama3-8b"), a folder or file with a config.json, or a hub id.
        optimizers: names of methods, or classes, or "all".
        budget: memory of a GPU, "24GiB" or bytes, or its name ("rtx4090"): the rows then say what fits.
        hyperparameters: by method; those under "*" go to every method that has them.
        workload: any option of `membench plan` that describes the training step, by name: `batch_size` (1),
            `sequence_length` (512, or what the model takes), `dtype` ("bfloat16"), `gradient_checkpointing` (False),
            `gpus` (1; batch and budget are of each), `strategy` ("fsdp2"), `attention`, `trust_remote_code`; see
            `membench.config.options.WorkloadOptions`.

    Raises:
        UserError: a value is wrong, or the only method can't be planned on this model.
    """
    import optimizers as registry
    from membench.config.declare import hold_to_bounds, typed
    from membench.config.options import WorkloadOptions
    from membench.planning.blueprint import within_positions
    from membench.planning.planner import plan as make
    from membench.planning.workload import Workload

    asked = Workload(**typed(WorkloadOptions, {"model": model, **_options(WorkloadOptions, "plan", workload)}))
    hold_to_bounds(asked)
    if "sequence_length" not in workload:
        asked = within_positions(asked)
    methods = registry.expand(_names("optimizers", optimizers))
    document = make(asked, methods, _by_method(hyperparameters), budget_bytes=_size(budget))
    names = [field.name for field in fields(PlanRow)]
    rows = {row["method"]: PlanRow(**{name: row[name] for name in names}) for row in document["rows"]}
    return Plan(rows, document["refused"], document)


def _names(option: str, given: Names) -> list[str]:
    """Names of methods, tasks or models, at least one: from a list, or a string with commas; a class by its name."""
    several = given.split(",") if isinstance(given, str) else given if isinstance(given, Iterable) else [given]
    names = [_name_of(option, one) for one in several]
    found = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not found:
        raise UserError(f"{option} is empty: give at least one")
    return found


def _name_of(option: str, given: Any) -> str:
    """Of a class: its name as a registered method, or `package.module:Class`, by which a run's process finds it."""
    from optimizers import registry

    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    if not isinstance(given, type):
        raise UserError(f"{option}: give names, not {given!r}")
    if given.__module__ == "__main__" or given.__qualname__ != given.__name__:
        raise UserError(
            f"{option}: runs are made in processes of their own, which don't import this script or notebook: put "
            f"{given.__name__} into a file, at its top level, and import it from there"
        )
    return registry.name_of(given) or f"{given.__module__}:{given.__name__}"


def _by_method(given: Hyperparameters | None) -> dict[str, Mapping[str, Any]]:
    for values in (given or {}, *(given.values() if isinstance(given, Mapping) else ())):
        if not isinstance(values, Mapping):
            raise UserError(f"hyperparameters are given by method, as {{'badam': {{'switch_every': 50}}}}: not {given}")
    named = (given or {}).items()
    return {_name_of("hyperparameters", name): values for name, values in named}


def _size(budget: str | float | None) -> int | None:
    """Bytes."""
    from membench.config.values import convert
    from membench.planning.cards import budget_bytes

    if budget is None or isinstance(budget, str):
        return None if budget is None else budget_bytes(budget)
    try:
        size = convert(budget, float)
    except TypeError:
        size = 0.0
    if not 1 <= size < float("inf"):
        raise UserError(f"budget={budget!r}: give bytes, or a text such as 24GiB")
    return int(size)


@told_in_a_sentence
def explore(
    models: str | Sequence[str] = "all",
    optimizers: Names = "all",
    *,
    out: str | Path = "fit.html",
    dtypes: str | Sequence[str] | None = None,
    hyperparameters: Hyperparameters | None = None,
) -> Path:
    """Plan methods on models at every batch and sequence, and write a page to choose in: what fits on which card.

    Args:
        models: as for `plan`, or "all" built-in ones.
        optimizers: names of methods, or classes, or "all".
        out: the page.
        dtypes: of the weights; by default "bfloat16", and "float32" for models below a billion weights.
        hyperparameters: by method; those under "*" go to every method that has them.

    Returns:
        Where the page is.

    Raises:
        UserError: a value is wrong, or the page can't be written.
    """
    from membench.commands.explore import ExploreOptions, write
    from membench.config.declare import hold_to_bounds, typed

    given = {"models": _names("models", models), "optimizers": _names("optimizers", optimizers), "out": str(out)}
    given |= {"dtypes": _names("dtypes", dtypes)} if dtypes else {}
    options = ExploreOptions(**typed(ExploreOptions, {**given, "hyperparameters": _by_method(hyperparameters)}))
    hold_to_bounds(options)
    return write(options)


# ---- compare


@told_in_a_sentence
def compare(
    optimizers: Names = ("badam", "blockllm"),
    task: Names = "superglue",
    *,
    hyperparameters: Hyperparameters | None = None,
    out: str | Path = "runs",
    quiet: bool = False,
    **settings: Any,
) -> list[Record]:
    """Train the same model on the same data with each method, and measure it; returns the runs' records.

    Makes only the runs missing in `out`: the same call again returns the same records at once. In a script that
    torchrun has started, all of its processes call it, make each run together, and get the records.

    Args:
        optimizers: names of methods, or classes, or "all"; adamw is added unless `reference=False`.
        task: names of tasks, or of a family for all of its tasks; or a class of your own.
        hyperparameters: by method, as {"badam": {"switch_every": 50}}; those under "*" go to every method that has
            them.
        out: folder for the records.
        quiet: print nothing.
        settings: any option of `membench compare`, by name: `steps=50`, `model="config:roberta-tiny"`,
            `seeds=(0, 1, 2)`, `options={"packing": True}`; see `membench.config.settings.Settings`.

    Returns:
        The records, as in the JSON files, ordered by task, seed and method. A run that failed, diverged or ran out of
        memory is a record too: see its "status".

    Raises:
        UserError: a value is wrong, or another process is using `out`.
        KeyboardInterrupt: finished runs are kept.
    """
    from membench.config.settings import Settings, resolve
    from membench.runs.compare import make_records
    from membench.runs.launched import together

    given: dict[str, Any] = {"optimizers": _names("optimizers", optimizers), "task": _names("task", task)}
    given |= {"hyperparameters": _by_method(hyperparameters), "out": out, "quiet": quiet}
    asked = resolve({**given, **_options(Settings, "compare", settings)})
    with redirect_stdout(StringIO()) if quiet else nullcontext():
        return together(lambda: make_records(asked))


def _options(owner: type, function: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `owner` by the names of their fields; a record's name for an option works, too."""
    from membench.config.declare import declared
    from reports.names import suggestion

    names = {name: name for name in declared(owner)}
    names |= {one.option.record_as: name for name, one in declared(owner).items() if one.option.record_as}
    for name in given:
        if name not in names:
            raise UserError(f"{function} has no option {name!r}. {suggestion(name, names)}")
        if name != names[name] and names[name] in given:
            raise UserError(f"{name} and {names[name]} are the same option: give one")
    return {names[name]: value for name, value in given.items()}


# ---- records


@told_in_a_sentence
def load_records(place: str | Path) -> list[Record]:
    """The records in a folder (or in one file).

    Raises:
        UserError: there are none, or a file isn't a record (the message names it).
    """
    return _records(place)


def _records(given: str | Path | Iterable[Record]) -> list[Record]:
    """Records given directly (one, or any number), which are checked, or as the folder that holds them."""
    from reports import record

    if not isinstance(given, str | Path):
        records: list[Record] = [dict(given)] if isinstance(given, Mapping) else list(given)
        for number, one in enumerate(records):
            record.check(one, f"record {number}")
        return records
    found = record.read(Path(given))
    if found.problems:
        raise UserError(" ".join(found.problems))
    if not found.records:
        raise UserError(f"{given}: there are no records")
    return found.records


@told_in_a_sentence
def report(records: str | Path | Sequence[Record], *, format: str | None = None) -> None:
    """Show the tables of records: as HTML in a notebook, printed elsewhere.

    Args:
        records: from `compare` or `load_records`, or a folder.
        format: "plain", "markdown", "csv", "json" or "latex", to print; by default what suits the environment.

    Raises:
        UserError: there are no records, or no such format.
    """
    from reports import tables

    given = _records(records)
    if format is None and _in_notebook():
        from IPython.display import HTML, display  # type: ignore[import-not-found]

        display(HTML(tables.render(given, "html")))
    else:
        print(tables.render(given, format or "plain"))


def _in_notebook() -> bool:
    """Is this a notebook? IPython in a terminal has no kernel."""
    import sys

    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


@told_in_a_sentence
def to_frame(records: str | Path | Sequence[Record]) -> pandas.DataFrame:
    """Records as a pandas DataFrame: a row per run, a column per field, such as "memory.peak_allocated_bytes".

    The history isn't a single value, so it is left out: use `pandas.DataFrame(record["history"])` for a run's.
    """
    import pandas

    flat = [{key: value for key, value in one.items() if key != "history"} for one in _records(records)]
    return pandas.json_normalize(flat, sep=".")


@told_in_a_sentence
def check(
    baseline: str | Path | Sequence[Record],
    candidate: str | Path | Sequence[Record],
    *,
    thresholds: str | Path | None = None,
    only: str | Sequence[str] | None = None,
) -> Check:
    """Is a candidate worse than its baseline? The same as `membench check`, whose help explains the verdicts.

    Args:
        baseline, candidate: folders of records, or records.
        thresholds: a TOML file of tolerances; see `membench check --print-thresholds`.
        only: some of "memory", "saving", "quality" and "throughput"; all by default.

    Returns:
        A `Check`: `regressions` (findings that fail it; empty if it's fine), all `findings`, and `code`, the command's
        exit code.

    Raises:
        UserError: there are no records in `baseline` or `candidate`, or a threshold or a name is wrong.
    """
    from reports.record import Found
    from reports.regressions import thresholds as limits
    from reports.regressions.check import ALWAYS, METRICS
    from reports.regressions.check import check as judge

    known = [metric for metric in METRICS if metric != ALWAYS]
    chosen = known if only is None else _names("only", only)
    for name in chosen:
        if name not in known:
            raise UserError(f"only={name!r}: the checks are {', '.join(known)}")
    before, after = (Found(_records(records), []) for records in (baseline, candidate))
    return judge(before, after, limits.load(Path(thresholds) if thresholds else None), chosen)


# ---- memory of any model


@dataclass(frozen=True)
class MemoryUsage:
    """What training steps hold in memory, exact to the byte, without an allocator's rounding.

    Attributes:
        peak_allocated_bytes: the most that was held at once; `at_peak` has its parts.
        at_peak: bytes of each part (weights_bytes, gradients_bytes, ...) at that moment; they add up to the peak.
        maximum: bytes of each part, each at its own maximum; they don't add up.
        estimated_reserved_bytes: what PyTorch's allocator would reserve for it on a GPU.
        peak_phase: forward, backward, update or switch.
        peak_module: the module that holds most at the peak.
        peak_selection: what was being trained at the peak; None for an optimizer without a choice.
        components: bytes by component of the model, and within each by part.
        modules: bytes by module, and within each by part, without what its children hold.
    """

    peak_allocated_bytes: int
    at_peak: dict[str, int]
    maximum: dict[str, int]
    estimated_reserved_bytes: int
    peak_phase: str
    peak_module: str
    peak_selection: str | None
    components: dict[str, dict[str, int]]
    modules: dict[str, dict[str, int]]

    def __str__(self) -> str:
        sizes = {part.removesuffix("_bytes").replace("_", " "): size for part, size in self.at_peak.items() if size}
        held = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in sizes.items())
        return f"{self.peak_allocated_bytes / 2**20:,.1f} MiB at the peak, in the {self.peak_phase} phase: {held}"


def measure_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    max_grad_norm: float | None = None,
) -> MemoryUsage:
    """The memory of training `model` with `optimizer`, measured on real steps on the model's own device.

    Each of `batches` is a step. They are used at least twice, so that what the first update creates exists in a later
    step, and for every block of a method that trains blocks in turn. This trains the model: pass one that you don't
    need afterwards.

    Args:
        model: any module.
        optimizer: any torch optimizer of its parameters, or a method of `optimizers`.
        loss_fn: `loss_fn(model, batch)` returns the loss, a scalar.
        batches: whatever `loss_fn` takes, on the model's device; tensors in dicts, lists and tuples are counted for the
            duration of their step.
        max_grad_norm: clip the gradients' norm to this before each update.

    Raises:
        ValueError: there are no batches, the model has no parameters, or none that the optimizer trains.
    """
    from membench.training.metering import meter_cycle

    steps = list(batches)
    if not steps:
        raise UserError("batches is empty: give at least one")
    own = set(model.parameters())
    if own and not any(p in own for group in optimizer.param_groups for p in group["params"]):
        raise UserError("the optimizer trains no parameter of this model: build it on the model that you measure")
    found = meter_cycle(
        model,
        optimizer,
        loss_fn,
        lambda step: [steps[step % len(steps)]],
        max_grad_norm=max_grad_norm,
        steps_per_selection=max(2, len(steps)),
    )
    return MemoryUsage(**{field.name: found[field.name] for field in fields(MemoryUsage)})
