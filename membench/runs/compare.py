"""`membench compare`: make the missing runs, each in its own process, and print the tables of all runs."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membench.config.assignments import unused_hyperparameters
from membench.config.errors import UserError
from membench.config.fan_out import crowded
from membench.config.profiles import note
from membench.config.run import Run
from membench.config.settings import Settings
from membench.runs import executors, processes, trackers, worker
from membench.runs.executors import Executor, Local
from membench.runs.model_folder import Models
from membench.runs.processes import Outcome
from membench.runs.progress import Display, create_display, waiting
from membench.runs.run_folder import Folder
from membench.runs.to_record import assemble
from reports.names import printable
from reports.record import REFUSAL

Record = dict[str, Any]
Work = Callable[..., dict[str, Any]]  # what a run's process calls; see `worker.execute`

_UNPREPARED = "the comparison can't be prepared"
INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended


def compare(settings: Settings, on_command_line: Mapping[str, Mapping[str, Any]] | None = None) -> int:
    """Carry out a comparison; returns the exit code: 0 only if every run is ok.

    `on_command_line`: the hyper-parameters of these settings that are said if no run uses them.

    Raises:
        UserError: a setting can't work, or the output folder is in use.
    """
    try:
        with waiting("importing torch and transformers, checking the settings", quiet=settings.quiet):
            processes.start_server(crowded(settings, settings.processes))
            runs = prepare_apart(settings)
    except KeyboardInterrupt:
        print("\nInterrupted before the first run.")
        return INTERRUPTED
    for sentence in unused_hyperparameters(on_command_line or {}, dict.fromkeys(run.method for run in runs)):
        print(sentence, flush=True)
    if settings.dry_run:
        print_notes(runs)
        print(describe(runs))
        print_preview(settings, runs[0], len(runs))
        return 0
    folder = Folder(Path(settings.out))
    with folder.locked():
        return _compare(settings, runs, folder)


def make_records(settings: Settings) -> list[Record]:
    """The records of a comparison, made if they are missing; what `membench.compare` returns.

    Raises:
        UserError: a setting can't work, or the output folder is in use.
    """
    processes.start_server(crowded(settings, settings.processes))
    runs = prepare_apart(settings)
    folder = Folder(Path(settings.out))
    with folder.locked():
        return make_missing(settings, runs, folder)


def _compare(settings: Settings, runs: Sequence[Run], folder: Folder) -> int:
    try:
        records = make_missing(settings, runs, folder)
    except KeyboardInterrupt:
        models = _models(settings, folder)
        finished = len(_with_models(_kept(settings, runs, folder), models))  # one may be written but not yet counted
        print(f"\nInterrupted: {finished} of {len(runs)} runs are finished and kept in {folder.path}.")
        print("The same command makes the others.")
        return INTERRUPTED
    return _conclude(settings, records, folder)


def make_missing(settings: Settings, runs: Sequence[Run], folder: Folder, work: Work = worker.execute) -> list[Record]:
    """The records of `runs`, in order; `work` makes those that are missing. The folder must be locked."""
    models = _models(settings, folder)
    records = _found(settings, runs, folder, models)
    missing = [run for run in runs if run.run_id not in records]
    if models is not None:
        models.check(run.run_id for run in missing)
    print_notes(missing)
    if settings.begun_with and missing:
        begun = sum(folder.checkpoint(run.begun_as or "").exists() for run in missing)
        print(f"{begun} of {len(missing)} runs go on from where {settings.begun_with} processes came to", flush=True)
    executor = executors.create(settings)
    if missing and executor.remark:
        print(executor.remark, flush=True)
    display = trackers.create(create_display(missing, len(runs), quiet=settings.quiet), settings)
    with display:
        workplace = Workplace(folder, models, settings.checkpoint_every, executor, work)
        records |= {record["run_id"]: record for record in workplace.make(missing, display)}
    unsaved = len(records) - len(_with_models(records, models))
    if unsaved:  # of a command that was detached
        print(f"{unsaved} of {len(runs)} runs were begun without --save: the same command makes them again with it")
    return [records[run.run_id] for run in runs]


def _models(settings: Settings, folder: Folder) -> Models | None:
    """Where the models are saved, if they are to be."""
    return Models(Path(settings.save), folder.path) if settings.save else None


def print_preview(settings: Settings, run: Run, count: int) -> None:
    """What would be handed to a cluster for `count` runs like this one, if it can be read."""
    handed = executors.create(settings).preview(run, count)
    if handed:
        print("\n" + handed)


def _found(settings: Settings, runs: Sequence[Run], folder: Folder, models: Models | None) -> dict[str, Record]:
    """The records of the runs that needn't be made; a run is repeated if its model is wanted and missing."""
    kept = _kept(settings, runs, folder)
    if kept:
        print(f"{len(kept)} of {len(runs)} runs are already in {folder.path}", flush=True)
    records = _with_models(kept, models)
    if models is not None and len(records) < len(kept):
        unsaved = len(kept) - len(records)
        print(f"{unsaved} of these have no model in {models.path} and are made again to save it", flush=True)
    for record in records.values():
        folder.clear(record)  # the command that made it may have been killed before it did
    return records


def _kept(settings: Settings, runs: Sequence[Run], folder: Folder) -> dict[str, Record]:
    found = {run.run_id: folder.finished(run.run_id, retry=settings.retry) for run in runs}
    return {run_id: record for run_id, record in found.items() if record is not None}


def _with_models(records: dict[str, Record], models: Models | None) -> dict[str, Record]:
    """The records whose model is saved, if it is wanted and there is one."""
    return {
        run_id: record
        for run_id, record in records.items()
        if models is None or record["status"] != "ok" or models.has(run_id)
    }


def print_notes(runs: Sequence[Run]) -> None:
    """The tasks' notes on their data and models (rows left out, a new head), each once; then the methods'."""
    for task, notes in dict.fromkeys((run.task, run.environment.get("notes")) for run in runs):
        if notes:
            print(f"{task}: {printable(notes)}", flush=True)
    for method, coverage in dict.fromkeys((run.method, run.coverage) for run in runs if not run.refused):
        if coverage:
            print(f"{method} {coverage}", flush=True)


@dataclass(frozen=True)
class Workplace:
    """Where and how runs are made: their folder, that of their models if these are kept, and what carries them out."""

    folder: Folder
    models: Models | None = None
    checkpoint_every: int = 0
    executor: Executor = Local()
    work: Work = worker.execute  # what measures a run, in its process
    beside: Callable[[], int] = lambda: 0  # how many runs others make on the same device now

    def make(self, runs: Sequence[Run], display: Display) -> Iterator[Record]:
        """Each run in its own process, with its record (and model) on the disk; yields the records as runs end.

        First come those that are refused.
        """
        for run in [run for run in runs if run.refused is not None]:
            display.begin(run)
            record = self._keep(run, Outcome("refused", error=run.refused))
            display.end(run, record, 0.0)
            yield record
        calls = (self._call(run, display) for run in runs if run.refused is None)
        for call, outcome in self.executor.call_all(calls):
            call.begin()  # if it ended before it began
            record = self._keep(call.run, outcome, max(call.beside, self.beside()))
            display.end(call.run, record, time.monotonic() - call.start)
            yield record

    def _keep(self, run: Run, outcome: Outcome, beside: int = 0) -> Record:
        """Make the record of a run and write it; should its model not be kept, there is still what to make it from."""
        record = assemble(run, outcome)
        if beside:
            record["environment"]["jobs"] = record["environment"].get("jobs", 1) + beside
        self.folder.write(record)
        if self.models:
            self.models.end(record)
        self.folder.clear(record, run.begun_as)
        return record

    def _call(self, run: Run, display: Display) -> "_Making":
        def show(message: Any) -> None:
            if isinstance(message, str):
                display.stage(run, message)
            elif isinstance(message, dict):
                display.entry(run, message)
            else:
                display.step(run, *message)

        save_to = self.models.draft(run.run_id) if self.models else None
        arguments = run, self.folder.checkpoint(run.begun_as or run.run_id), self.checkpoint_every, save_to
        log = self.folder.log(run.run_id)
        made = _Making(self.work, arguments, log, show, run=run, display=display, count=self.beside)
        made.on_start = made.begin
        return made


@dataclass(kw_only=True)
class _Making(processes.Call):
    run: Run
    display: Display
    count: Callable[[], int]
    start: float = 0.0  # of time.monotonic; 0: it waits
    beside: int = 0  # runs that others made when it began

    def begin(self) -> None:
        """It has begun: show it; a run on a cluster may say so again."""
        if not self.start:
            self.start, self.beside = time.monotonic(), self.count()
            self.display.begin(self.run)


def prepare_apart(settings: Settings) -> list[Run]:
    """See `runs.prepare`; in another process, so that this one stays light."""
    return apart(worker.prepare, settings)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments, send)` returns in another process.

    Raises:
        UserError: it refuses, or its process dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        outcome: Outcome = processes.call(function, *arguments, log=log)
        told = log.read_text(errors="replace") if log.exists() else ""
        if outcome.status == "refused" or outcome.died:
            error = UserError(outcome.error if outcome.status == "refused" else f"{_UNPREPARED}: {outcome.error}")
            error.add_note(told)  # which --traceback shows
            raise error
        if outcome.status != "ok":
            raise RuntimeError(f"{_UNPREPARED}: {outcome.error}\n{told}")
    return outcome.value


def _conclude(settings: Settings, records: Sequence[Record], folder: Folder) -> int:
    from reports import tables

    print("\n" + tables.render(list(records)))
    print("\n" + note(settings.task, settings.profile, settings.model, settings.data))
    bad = [record for record in records if record["status"] != "ok"]
    for record in bad:
        if folder.log(record["run_id"]).exists():
            print(f"log of {record['task']} {record['method']} seed {record['seed']}: {folder.log(record['run_id'])}")
    return 1 if bad else 0


def describe(runs: Sequence[Run]) -> str:
    """What --dry-run prints: every run with its values, and what all runs share."""
    lines = [f"{len(runs)} runs:"]
    for run in runs:
        lines.append(f"{run.task}  {run.method}  seed {run.seed}  {run.training.steps} steps")
        lines.append(f"    {_values(run.hyperparameters)}")
        lines += [f"    {REFUSAL}{run.refused}"] if run.refused else []
    training = runs[0].training
    shared = {key: value for key, value in training.record.items() if key != "steps"}
    lines.append(f"all: model={training.model}, {_values(shared)}, device={runs[0].device}")
    return "\n".join(map(printable, lines))


def _values(values: Mapping[str, Any]) -> str:
    texts = {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in values.items()}
    return ", ".join(f"{key}={text}" for key, text in texts.items())
