"""`membench reproduce`: what a published table needs, the runs of it that are missing, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from membench.config.declare import shared
from membench.config.errors import UserError
from membench.config.options import ExecutionOptions, ReproduceOptions
from membench.config.run import Run
from membench.config.settings import Settings
from membench.reproduce import comparison, needs, steps
from membench.reproduce.comparison import Record, Result
from membench.reproduce.measured import time_said
from membench.reproduce.needs import Need
from membench.reproduce.recipes import Recipe, find
from membench.runs import processes
from membench.runs.compare import INTERRUPTED, apart, make_missing, prepare_apart
from membench.runs.prepare import find_device
from membench.runs.run_folder import Folder
from membench.runs.worker import Send
from reports import formats
from reports.table import size_text

_WAYS = "--dry-run says what it needs, --scale tiny tries it on a CPU"
_TINY = "Scale tiny: a tiny model and a few steps show that everything works; no figure of ours can be compared."


@dataclass(frozen=True)
class Machine:
    """Where runs are made: the device, its memory (None on a CPU), and what card it is."""

    device: str
    total_bytes: int | None
    card: str = ""


def reproduce(name: str, options: ReproduceOptions) -> int:
    """Carry it out; returns the exit code: 0 only if every run that was made is ok.

    Raises:
        UserError: no such table, or this machine can't do it.
    """
    recipe = find(name, options.scale)
    if options.jobs and options.jobs > 1:
        raise UserError(f"--jobs {options.jobs}: a table's times are measured, so its runs are made one at a time")
    processes.start_server()
    machine = None if options.dry_run else _machine(name, options)
    folder = Path(options.out) / (name if options.scale == "paper" else f"{name}-{options.scale}")
    wanted = needs.of(recipe, {**shared(ExecutionOptions, options), "out": str(folder)})
    if options.scale == "paper":
        print(f"Reproducing {name}: planning {len(wanted)} runs", flush=True)
        wanted = needs.planned(recipe, wanted)
        print(formats.plain([([], [needs.table(recipe, wanted)], [])]), flush=True)
    else:
        print(f"{len(wanted)} runs of a few steps of a tiny model: any CPU, about a minute, no downloads.", flush=True)
    if machine is None:
        return 0
    made = results(name, recipe, wanted, machine)
    if made is None:
        print(f"\nInterrupted: what is finished is kept in {folder}. The same command makes the rest.")
        return INTERRUPTED
    remarks = [_TINY] if options.scale == "tiny" else []
    print("\n" + comparison.render(name, recipe, made, remarks))
    print(f"\nRecords: {folder} (membench report {folder} shows all that was measured)")
    return 1 if any(one.record and one.record["status"] != "ok" for one in made) else 0


def _machine(name: str, options: ReproduceOptions) -> Machine:
    machine: Machine = apart(describe, options.device)
    if options.scale == "paper" and machine.total_bytes is None:
        raise UserError(f"{name} needs a GPU, and {_without(options)}: {_WAYS}")
    return machine


def _without(options: ReproduceOptions) -> str:
    return "this machine has none" if options.device == "auto" else f"--device {options.device} is none"


def describe(device: str, send: Send) -> Machine:
    """The machine; in another process, as one that looks at a GPU takes memory there."""
    found = find_device(device)
    if found.type != "cuda":
        return Machine(str(found), None)
    return Machine(str(found), torch.cuda.mem_get_info(found)[1], torch.cuda.get_device_name(found))


def results(name: str, recipe: Recipe, wanted: Sequence[Need], machine: Machine) -> list[Result] | None:
    """The runs with their records, or without where they don't fit; None if interrupted.

    Raises:
        UserError: none fits, or a download fails.
    """
    fitting = [need for need in wanted if _fits(need, machine)]
    if not fitting:
        least = min(need.plan["estimated_total_bytes"] for need in wanted if need.plan)
        room = machine.total_bytes or 0
        raise UserError(
            f"{name} needs a GPU with at least {size_text(least)}, and {machine.device} has {size_text(room)} "
            f"({size_text(least - room)} missing): {_WAYS}"
        )
    try:
        records = _learn(recipe, fitting, machine) if recipe.learns else steps.make([need.settings for need in fitting])
    except KeyboardInterrupt:
        return None
    found = dict(zip(map(id, fitting), records, strict=True))
    return [Result(need, found.get(id(need))) for need in wanted]


def _fits(need: Need, machine: Machine) -> bool:
    if machine.total_bytes is None or need.plan is None:
        return True
    return need.plan["estimated_total_bytes"] <= machine.total_bytes


def _learn(recipe: Recipe, wanted: Sequence[Need], machine: Machine) -> list[Record]:
    """The records of comparisons, one for each part; all are prepared first, which downloads what they need."""
    if machine.total_bytes is not None:
        print(f"\n{time_said(recipe, wanted, machine.card)}", flush=True)
    parts = [list(group) for _, group in groupby(wanted, key=lambda need: need.part.name)]
    settings = [replace(part[0].settings, optimizers=tuple(need.method for need in part)) for part in parts]
    prepared = [_prepared(recipe, one) for one in settings]
    folder = Folder(Path(settings[0].out))
    records: list[Record] = []
    with folder.locked():
        for part, one, runs in zip(parts, settings, prepared, strict=True):
            made = {record["method"]: record for record in make_missing(one, runs, folder)}
            records += [made[need.method] for need in part]
    return records


def _prepared(recipe: Recipe, settings: Settings) -> list[Run]:
    try:
        return prepare_apart(settings)
    except UserError as error:
        raise UserError(f"{error} ({_WAYS}, without downloads)" if recipe.downloads else str(error)) from error
