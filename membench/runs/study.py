"""`membench study`: methods x tasks x models x seeds, after tuning each method with the same number of trials.

Everything is a run of a comparison in the study's folder, with trials in `tuning/` below it: what exists isn't made
again. All tasks get their trials and first seed before any gets its second, so that there is a full table early.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from membench.config.assignments import unused_hyperparameters
from membench.config.errors import UserError
from membench.config.fan_out import crowded
from membench.config.run import Run
from membench.config.settings import Settings
from membench.config.study_file import Study, Values, beyond
from membench.runs import executors, trackers
from membench.runs.compare import INTERRUPTED, Record, Workplace, prepare_apart, print_notes, print_preview
from membench.runs.executors import Executor
from membench.runs.forecast import Kind, forecast
from membench.runs.progress import create_display, waiting
from membench.runs.run_folder import Folder
from reports.names import counted, printable
from reports.record import how_it_ended


class _Trial(NamedTuple):
    """A run of tuning, and the values that it tries."""

    run: Run
    values: Values


@dataclass
class _Cell:
    """One task with one model: its methods' runs, once their hyper-parameters are chosen."""

    settings: Settings
    task: str
    methods: list[str]  # this shard's
    samples: list[Run] = field(default_factory=list)  # one of each method, before anything is tuned
    trials: list[_Trial] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)

    @property
    def can_be_made(self) -> bool:
        """Whether there is a task; one that can't be built is a result, as long as another of the study can."""
        return any(run.refused is None for run in self.samples)

    def of(self, runs: Iterable[Run]) -> list[Run]:
        """Those of `runs` that are this cell's."""
        return [run for run in runs if run.task == self.task and run.method in self.methods]


@dataclass
class _Workshop:
    """Where records are read and written."""

    folder: Folder
    tuning: Folder
    settings: Settings  # of any model: where and how runs are made
    executor: Executor
    beside: Callable[[], int]
    trials: list[Record] = field(default_factory=list)
    finals: list[Record] = field(default_factory=list)

    def carry_out(self, runs: list[Run], folder: Folder) -> list[Record]:
        """The records of `runs`, in order; made if they are missing."""
        records = {run.run_id: folder.finished(run.run_id, retry=self.settings.retry) for run in runs}
        for record in filter(None, records.values()):
            folder.clear(record)  # as a command that was killed hasn't
        missing = [run for run in runs if records[run.run_id] is None]
        display = trackers.create(create_display(missing, len(runs), quiet=self.settings.quiet), self.settings)
        with display:
            workplace = Workplace(folder, None, self.settings.checkpoint_every, self.executor, beside=self.beside)
            records |= {record["run_id"]: record for record in workplace.make(missing, display)}
        return [record for record in records.values() if record is not None]

    def try_out(self, runs: list[Run]) -> None:
        """Make trials. One that failed, such as by being killed, is made once more: without it, other values may be
        chosen, and the runs made with them would stay among those of the values that are chosen when it is there.
        """
        made = {record["run_id"]: record for record in self.carry_out(runs, self.tuning)}
        failed = [run for run in runs if how_it_ended(made[run.run_id]) == "failed"]
        if failed:
            print(f"{counted(len(failed), 'trial')} failed: once more, since the choice depends on it", flush=True)
            made |= {record["run_id"]: record for record in self.carry_out(failed, self.tuning)}
        self.trials += made.values()


def study(plan: Study, shard: tuple[int, int] = (1, 1)) -> int:
    """Carry out a study, or a shard of it; returns the exit code: 0 only if every run that counts is ok.

    Raises:
        UserError: a setting can't work, or the folder is in use.
    """
    from membench.runs import processes

    first = plan.settings[0]
    folder = Folder(Path(first.out))
    tuning = Folder(folder.path / "tuning")
    executor = executors.create(first)
    part = "" if shard == (1, 1) else f"-{shard[0]}-of-{shard[1]}"
    try:
        with waiting("importing torch and transformers, checking the settings", quiet=first.quiet):
            processes.start_server(crowded(first, first.processes))
            prepared = list(_in_settings(plan))
            cells = list(_cells(plan, prepared, shard))
            _prepare_trials(plan, cells)
        methods = dict.fromkeys(run.method for _, runs in prepared for run in runs)
        for sentence in unused_hyperparameters(plan.fixed, methods, "in the study's file"):
            print(sentence, flush=True)
        if first.dry_run:
            _preview(plan, cells)
            return 0
        if executor.remark:
            print(executor.remark, flush=True)
        place = _place(first, cells)
        workshop = _Workshop(folder, tuning, first, executor, lambda: folder.runs_beside(part, place) if place else 0)
        with folder.locked(part, place, first.jobs or 1):
            _carry_out(plan, cells, workshop)
            _note_budgets(plan, workshop)
    except KeyboardInterrupt:
        print(f"\nInterrupted: what is finished is kept in {folder.path}. The same command continues from there.")
        return INTERRUPTED
    if part:
        print(
            f"Shard {shard[0]} of {shard[1]} is done. When all are, the same command without --shard prints the tables."
        )
    else:
        print("\n" + _report(workshop))
    return 1 if any(record["status"] != "ok" for record in workshop.finals) else 0


def _place(settings: Settings, cells: list[_Cell]) -> str:
    """What runs here share with those of other shards on this machine; nothing if they are made elsewhere."""
    if settings.executor != "local" or not cells:
        return ""
    names = ",".join(settings.devices or (cells[0].samples[0].device,))
    return names if names == "cpu" else f"{names} of {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"


def _in_settings(plan: Study) -> Iterator[tuple[Settings, list[Run]]]:
    """The settings of the study, and with each the runs that tune its methods."""
    for settings in plan.settings:
        runs = prepare_apart(replace(settings, seeds=(plan.tuning_seed,)))
        yield replace(settings, sequence_length=runs[0].training.sequence_length, fit_length=False), runs


def _cells(plan: Study, prepared: list[tuple[Settings, list[Run]]], shard: tuple[int, int]) -> Iterator[_Cell]:
    """Cells with the methods of a shard: all runs of a method on one task and model are in the same shard."""
    number = 0
    tuned: set[str] = set()  # the tables with grids that are used
    for settings, runs in prepared:
        by_task: dict[str, list[Run]] = {}
        tuned |= {plan.grid_name(run.method) for run in runs}
        for run in runs:
            by_task.setdefault(run.task, [])
            if number % shard[1] == shard[0] - 1:
                by_task[run.task].append(run)
            number += 1
            if plan.budget:
                plan.trials(run.method)
        yield from (_Cell(settings, task, [r.method for r in mine], mine) for task, mine in by_task.items() if mine)
    for name in plan.grids:
        if name not in tuned:
            whose = f"[{name}] has a tune" if name else "[tune] has values to try"
            raise UserError(f"{whose} that no method of the study takes: leave it out, or add the method to optimizers")


def _carry_out(plan: Study, cells: list[_Cell], workshop: _Workshop) -> None:
    seeds = plan.settings[0].seeds
    chosen = _tune(plan, cells, workshop) if plan.budget else [dict[str, Values]() for _ in cells]
    for cell, values in zip(cells, chosen, strict=True):
        tasks = [cell.task] if cell.can_be_made else cell.settings.task  # of none that can be built there is no run
        cell.runs = cell.of(_prepared(cell.settings, tasks, seeds, values))
        print_notes(cell.runs)
    runs = [run for seed in seeds for cell in cells for run in cell.runs if run.seed == seed]
    print(f"{len(runs)} runs, of seeds {', '.join(map(str, seeds))}", flush=True)
    workshop.finals += workshop.carry_out(runs, workshop.folder)


def _tune(plan: Study, cells: list[_Cell], workshop: _Workshop) -> list[dict[str, Values]]:
    """For each cell, the values with which each method scores best on the tuning seed."""
    missing = [trial.run for cell in cells for trial in cell.trials]
    print(f"tuning on seed {plan.tuning_seed}: {len(missing)} runs", flush=True)
    while missing:
        workshop.try_out([run for run in missing if run.refused is None])
        missing = [run for cell in cells for method in cell.methods for run in _extend(plan, cell, method, workshop)]
    return [{method: _chosen(cell, method, workshop.trials) for method in cell.methods} for cell in cells]


def _chosen(cell: _Cell, method: str, trials: list[Record]) -> Values:
    """The values of a method's best trial; the first where none was made: its runs will tell why."""
    from reports.studies import best

    made = {trial["run_id"]: trial for trial in trials}
    mine = [trial for trial in cell.trials if trial.run.method == method]
    done = [trial for trial in mine if trial.run.run_id in made]
    return done[best([made[trial.run.run_id] for trial in done])].values if done else mine[0].values if mine else {}


def _typed(trial: _Trial) -> Values:
    """A trial's values, in which a rate written as 1 is a number with a fraction, as in its run: a step beyond isn't
    rounded."""
    return {key: trial.run.hyperparameters.get(key, value) for key, value in trial.values.items()}


def _extend(plan: Study, cell: _Cell, method: str, workshop: _Workshop) -> list[Run]:
    """One more trial, where the budget has one left and the best is at the edge of what was tried."""
    tried = [_typed(trial) for trial in cell.trials if trial.run.method == method]
    further = beyond(tried, _chosen(cell, method, workshop.trials)) if len(tried) < plan.budget else None
    if further is None:
        return []
    try:
        runs = [run for run in _tuned(plan, cell.settings, [cell.task], {method: further}) if run.method == method]
    except UserError as error:  # a value that no method takes, such as a rate above 1
        print(f"{cell.task}  {method}: no trial beyond the edge: {error}", flush=True)
        return []
    cell.trials += [_Trial(run, further) for run in runs]
    return [run for run in runs if run.refused is None]


def _prepare_trials(plan: Study, cells: list[_Cell]) -> None:
    """The runs of tuning; prepared before anything is run, so that a value that a method refuses is told at once."""
    for settings in {id(cell.settings): cell.settings for cell in cells}.values():
        mine = [cell for cell in cells if cell.settings is settings and cell.can_be_made]
        values = {method: plan.trials(method) for cell in mine for method in cell.methods} if plan.budget else {}
        for number in range(max(map(len, values.values()), default=0)):
            chosen = {method: tried[number] for method, tried in values.items() if number < len(tried)}
            runs = _tuned(plan, settings, [cell.task for cell in mine], chosen)
            for cell in mine:
                cell.trials += [_Trial(run, chosen[run.method]) for run in cell.of(runs) if run.method in chosen]
    for cell in cells:
        _check_tunable(cell)


def _check_tunable(cell: _Cell) -> None:
    """Raises UserError for what can be run and not tuned, as where the data to choose on lack a task: its values would
    be those that come first, as if they were the best."""
    able = {run.method for run in cell.samples if run.refused is None}
    for run in (trial.run for trial in cell.trials):
        if run.refused is not None and run.method in able:
            raise UserError(f"no trial of {run.method} on {run.task} can be made: {run.refused}")


def _tuned(plan: Study, settings: Settings, tasks: Iterable[str], chosen: dict[str, Values]) -> list[Run]:
    """The runs of a trial: on the tuning seed, and on data of its own where there are some."""
    return _prepared(replace(settings, data=plan.tuning_data or settings.data), tasks, (plan.tuning_seed,), chosen)


def _prepared(settings: Settings, tasks: Iterable[str], seeds: Iterable[int], chosen: dict[str, Values]) -> list[Run]:
    """The runs of a model on some tasks with hyper-parameters by method, which override the file's."""
    fixed = settings.hyperparameters
    values = {**fixed, **{method: {**fixed.get(method, {}), **given} for method, given in chosen.items()}}
    return prepare_apart(replace(settings, task=tuple(tasks), seeds=tuple(seeds), hyperparameters=values))


def _note_budgets(plan: Study, workshop: _Workshop) -> None:
    """In the records, from which the recommendation is made."""
    budgets = list(plan.memory_bytes)
    for record in workshop.finals:
        if record["environment"].get("memory_budgets") != budgets:
            record["environment"]["memory_budgets"] = budgets
            workshop.folder.write(record)


def _report(workshop: _Workshop) -> str:
    from reports import tables

    return tables.render(workshop.finals, trials=workshop.trials)


def _preview(plan: Study, cells: list[_Cell]) -> None:
    """Print what --dry-run does: every job, and what each will take."""
    for cell in cells:
        print_notes(cell.samples)
    print(describe(plan, cells))
    if not cells:
        return
    first = plan.settings[0]
    print_preview(first, cells[0].samples[0], sum(len(cell.methods) for cell in cells) * len(first.seeds))
    kinds = [kind for cell in cells for kind in _kinds(plan, cell)]
    if first.executor == "local" and kinds:  # a cluster makes its runs elsewhere
        with waiting("planning, and making the first steps of each method", quiet=first.quiet):
            takes = forecast(kinds)
        print(f"\n{takes}")


def describe(plan: Study, cells: list[_Cell]) -> str:
    """Every job of the study, or of a shard; of a method that is refused, why, as its records will say."""
    seeds = plan.settings[0].seeds
    lines, trials, more = [], 0, 0
    samples = [(cell, run) for cell in cells for run in cell.samples]
    for cell, run in samples:
        lines.append(f"{cell.task}  {cell.settings.model}  {run.method}  seeds {', '.join(map(str, seeds))}")
        if run.refused is not None:
            lines.append(f"    can't: {run.refused}")
            continue
        tried = plan.trials(run.method) if plan.budget else []
        lines += [f"    try {_values(values)}" for values in tried]
        trials, more = trials + len(tried), more + plan.budget - len(tried)
    beyond_them = f", and at most {more} more where the best is at a grid's edge" if more else ""
    heading = f"{trials + len(samples) * len(seeds)} runs, {trials} of them to tune{beyond_them}:"
    return "\n".join(map(printable, [heading, *lines]))


def _kinds(plan: Study, cell: _Cell) -> Iterator[Kind]:
    """A cell's runs by method, trials among them, and how many trials there may be beyond a grid's edge.

    Trials on data of their own are apart: these may have other steps, lengths and examples to be scored on.
    """
    seeds = len(plan.settings[0].seeds)
    for run in cell.samples:
        if run.refused is not None:
            continue
        trials = len(plan.trials(run.method)) if plan.budget else 0
        more = plan.budget - trials
        mine = [trial.run for trial in cell.trials if trial.run.method == run.method]
        tried = _apart(mine)
        if plan.tuning_data and mine:
            yield Kind(run, seeds, tried=tried)
            yield Kind(mine[0], trials, more, tried, trials=True)
        else:
            yield Kind(run, seeds + trials, more, tried)


def _apart(trials: Iterable[Run]) -> tuple[Values, ...]:
    """The hyper-parameters of trials that may need more or less than others': of those that differ in rates, one."""
    needs = {
        str([(name, value) for name, value in run.hyperparameters.items() if not name.endswith("lr")]): run
        for run in trials
    }
    return tuple(run.hyperparameters for run in needs.values())


def _values(values: Values) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())
