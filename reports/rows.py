"""The figures of each table, raw: one dict a row, with units in the names. This is what csv and json hold."""

import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from reports import floors
from reports.floors import Floor
from reports.parts import PARTS
from reports.record import Record, has_true_times, how_it_ended, tokens_per_second, undue_waiting
from reports.schema import STATUSES
from reports.setups import Key, Setup, machine, peak_bytes, score
from reports.statistics import Sight, paired_ratio, point, sight, summarise, tied_with_best
from reports.table import Row

AVERAGE = "average"  # stands for a task in the rows of quality


def memory(setup: Setup) -> list[Row]:
    """Each method's hungriest run; its ratio is to the reference's run of the same task and seed."""
    return _even([_memory_row(setup, label) for label in setup.rows])


def _memory_row(setup: Setup, label: str) -> Row:
    runs = setup.finished(label)
    row = {"method": label, **counts(setup, label)}
    if not runs:
        return row
    key = max(sorted(runs), key=lambda key: peak_bytes(runs[key]))
    memory = runs[key]["memory"]
    same = setup.finished(setup.reference).get(key) if setup.reference else None
    return {
        **row,
        "task": key[0],
        "seed": key[1],
        "peak_allocated_bytes": memory["peak_allocated_bytes"],
        **{part.field: part.of(memory["at_peak"]) for part in PARTS},
        "peak_ratio": memory["peak_allocated_bytes"] / peak_bytes(same) if same else None,
        "peak_reserved_bytes": memory["peak_reserved_bytes"],
        "process_peak_bytes": memory["process_peak_bytes"],
        **{name: memory.get(name) for name in ("peak_phase", "peak_selection", "peak_module")},
    }


SPEEDS = ("tokens_per_second", "tokens_per_second_ratio", "forward_seconds", "backward_seconds", "update_seconds")


def throughput(setup: Setup) -> list[Row]:
    """Tokens a second over all of a method's runs; medians of a step, averaged over them; ratios by pairs.

    Of the runs that had their device alone; null without any.
    """
    return _even([_throughput_row(setup, label) for label in setup.rows])


def _even(rows: list[Row]) -> list[Row]:
    """The same fields in every row: null where a method has no figure."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def _throughput_row(setup: Setup, label: str) -> Row:
    runs = _alone(setup.finished(label))
    row = {"method": label, **counts(setup, label), **dict.fromkeys(SPEEDS)}
    if not runs:
        return row
    times = [run["time"] for run in runs.values()]
    reference = setup.finished(setup.reference) if setup.reference else {}
    return {
        **row,
        "tokens_per_second": tokens_per_second(runs.values()),
        "tokens_per_second_ratio": paired_ratio(rates(runs), rates(reference)),
        **{phase: statistics.fmean(time[phase] for time in times) for phase in SPEEDS[2:]},
    }


def _alone(runs: dict[Key, Record]) -> dict[Key, Record]:
    return {key: run for key, run in runs.items() if has_true_times(run)}


def rates(runs: dict[Key, Record]) -> dict[tuple[Key, str | None], float]:
    """Of runs that had their device alone. Speeds compare only on one machine, so it is a part of the key."""
    return {(key, machine(run)): run["time"]["tokens_per_second"] for key, run in _alone(runs).items()}


def was_slowed(setup: Setup, label: str) -> bool:
    """Whether a run of a row waited so long for processors that its times, and ratios to them, are too long."""
    return any(undue_waiting(run) for run in _alone(setup.finished(label)).values())


def counts(setup: Setup, label: str, tasks: list[str] | None = None) -> Row:
    """How many runs of a row (on these tasks) ended how; not_run are those that other rows have."""
    among, runs = tasks or setup.tasks, setup.rows[label]
    statuses = [how_it_ended(runs[task, seed]) for task in among for seed in setup.seeds if (task, seed) in runs]
    ended = {f"runs_{status}": statuses.count(status) for status in (*STATUSES, "refused")}
    return {**ended, "runs_not_run": len(among) * len(setup.seeds) - len(statuses)}


def endings(row: Row) -> dict[str, int]:
    """The counts that a row has from `counts`, by how its runs ended."""
    return {name.removeprefix("runs_"): count for name, count in row.items() if name.startswith("runs_")}


def is_complete(row: Row) -> bool:
    """Are all runs ok that the row could have?"""
    return row["runs_ok"] == sum(endings(row).values())


_ENDED = {"diverged": "diverged", "out_of_memory": "ran out of memory", "failed": "failed", "not_run": "missing"}


def caveats(row: Row) -> list[str]:
    """What must be said of a row of scores wherever it is called the best."""
    ended = endings(row)
    runs = sum(ended.values())
    bad = [f"{ended[name]} of {runs} runs {word}" for name, word in _ENDED.items() if ended[name]]
    return ["one seed"] * (row["n"] == 1) + bad


@lru_cache(maxsize=4)
def quality(setup: Setup) -> list[Row]:
    """Each method's headline on each task over the seeds, then the average over the tasks.

    The average is one of complete seeds: the mean over the tasks for each seed that has them all, then mean and
    deviation over these seeds. A method that lacks a task is averaged over those it has, which `tasks` tells, and ranks
    nowhere; so does one whose tasks are of different seeds, of which `n` is 0. Of some tasks there is no average: see
    `have_average`. What isn't above the floor is neither the best nor tied with it.
    """
    rows = [row for task in setup.tasks for row in _task_rows(setup, task)]
    if have_average([setup], setup.tasks):
        rows += _averages(setup, rows)
    return rows


def have_average(setups: Sequence[Setup], tasks: Sequence[str]) -> bool:
    """Whether there are several tasks, on all of which more is better, and on one scale: of others the one with the
    largest scores would decide alone.
    """
    headlines = [_headline(setup, task) for setup in setups for task in setup.tasks if task in tasks]
    scores = [[score(run) for setup in setups for run in on_task(setup, task)] for task in tasks]
    scales = {point(of_task) for of_task in scores if of_task}
    return len(tasks) > 1 and all(higher for _, higher in headlines) and len(scales) < 2


def _task_rows(setup: Setup, task: str) -> list[Row]:
    runs, scores = on_task(setup, task), {label: _scores(setup, label, task) for label in setup.rows}
    metric, higher = _headline(setup, task)
    floor, before = floors.of(runs), floors.before_training(runs)
    own = {label: floors.of_row(floor, _finished(setup, label, task)) for label in setup.rows}
    found = compared({label: values for label, values in scores.items() if values}, floor, own)
    what = {"task": task, "tasks": 1, "metric": metric, "higher_is_better": higher, "before_training": before}
    return [
        {
            "method": label,
            **what,
            **_sample(values),
            "half_width": floors.half_width(statistics.fmean(values), runs, _finished(setup, label, task))
            if values
            else None,
            **floor_fields(floor),
            **found.get(label, ALONE),
            **counts(setup, label, [task]),
        }
        for label, values in scores.items()
    ]


def spoilt(setup: Setup) -> list[Row]:
    """Rows of which some runs ended worse than what takes no learning, and others didn't: their mean is of neither.

    Only where less is better: such a score, a perplexity, has no worst value.
    """
    found = []
    for task in setup.tasks:
        metric, higher = _headline(setup, task)
        floor = floors.of(on_task(setup, task))
        for label in () if higher else setup.rows:
            runs = _finished(setup, label, task)
            own = floors.of_row(floor, runs)
            scores = {run["seed"]: score(run) for run in runs if own.missed_by(score(run))}
            if 0 < len(scores) < len(runs):
                what = {"method": label, "task": task, "metric": metric, "runs": len(runs), "than": own.what}
                found.append({**what, "scores": scores})
    return found


# what `compared` says of a row that isn't
ALONE: Row = {"above_floor": None, "tied_with_best": False, **dict.fromkeys(f"seen_{name}" for name in Sight._fields)}


def compared(scores: dict[str, list[float]], floor: Floor, own: Mapping[str, Floor]) -> dict[str, Row]:
    """What rows are against their `own` floor, or the task's, and against the best above it; what seeds see of ties."""
    means = {label: statistics.fmean(values) for label, values in scores.items()}
    above = {label: own.get(label, floor).beaten_by(mean) for label, mean in means.items()}
    able = {label: values for label, values in scores.items() if above[label] is not False}
    tied = tied_with_best(able, higher_is_better=floor.higher)
    best = (max if floor.higher else min)(able, key=lambda label: means[label], default=None)
    tested = sum(len(values) > 1 for values in able.values())
    found = {}
    for label, values in scores.items():
        seen = sight(values, scores[best], tested) if best and label in tied - {best} else None
        fields = {f"seen_{name}": value for name, value in seen._asdict().items()} if seen else {}
        found[label] = {**ALONE, "above_floor": above[label], "tied_with_best": label in tied, **fields}
    return found


def sight_of(row: Row) -> Sight | None:
    """What the seeds of a tied row can see."""
    values = [row[f"seen_{name}"] for name in Sight._fields]
    return None if values[1] is None else Sight(*values)


def floor_of(row: Row) -> Floor:
    """The floor that a row of quality has."""
    names = ("floor", "floor_half_width", "validation_examples", "higher_is_better", "floor_is")
    return Floor(*(row[name] for name in names))


def floor_fields(floor: Floor) -> Row:
    """What a row says of the floor; see `floor_of`."""
    return {
        "validation_examples": floor.examples,
        "floor": floor.score,
        "floor_half_width": floor.half_width,
        "floor_is": None if floor.score is None else floor.what,
    }


def _scores(setup: Setup, label: str, task: str) -> list[float]:
    return [score(run) for run in _finished(setup, label, task)]


def _finished(setup: Setup, label: str, task: str) -> list[Record]:
    """A row's runs on a task that are ok, in the order of the seeds."""
    runs = setup.finished(label)
    return [runs[task, seed] for seed in setup.seeds if (task, seed) in runs]


def on_task(setup: Setup, task: str) -> list[Record]:
    """All runs on a task that are ok."""
    return [run for label in setup.rows for (name, _), run in setup.finished(label).items() if name == task]


def _headline(setup: Setup, task: str) -> tuple[str | None, bool]:
    """A task's metric and whether more of it is better; None and true if no run got as far as to know."""
    keys = [(task, seed) for seed in setup.seeds]
    runs = [runs[key] for runs in setup.rows.values() for key in keys if key in runs and runs[key]["headline"]]
    return (runs[0]["headline"], runs[0]["higher_is_better"] is not False) if runs else (None, True)


def _sample(scores: list[float]) -> Row:
    mean, deviation, n = summarise(scores) if scores else (None, None, 0)
    return {"mean": mean, "standard_deviation": deviation, "n": n}


def _averages(setup: Setup, of_tasks: list[Row]) -> list[Row]:
    averages = {label: _average(setup, label) for label in setup.rows}
    floor = floors.average([floors.of(on_task(setup, task)) for task in setup.tasks])
    seedless = {label for label in setup.rows if not _whole_seeds(setup, label)}
    complete = {label: scores for label, (scores, tasks) in averages.items() if tasks == len(setup.tasks)}
    found = compared({label: scores for label, scores in complete.items() if label not in seedless}, floor, {})
    what = {"task": AVERAGE, "metric": AVERAGE, "higher_is_better": True, "before_training": None}
    return [
        {
            "method": label,
            **what,
            "tasks": tasks,
            **_sample(scores),
            **({"n": 0} if label in seedless else {}),
            "half_width": floors.average_width([row["half_width"] for row in of_tasks if row["method"] == label]),
            **floor_fields(floor),
            **found.get(label, ALONE),
            **counts(setup, label),
        }
        for label, (scores, tasks) in averages.items()
    ]


def _average(setup: Setup, label: str) -> tuple[list[float], int]:
    """The averages over the tasks that a row has, one for each complete seed, and the number of these tasks."""
    tasks = {task for task, _ in setup.finished(label)}
    runs, complete = setup.finished(label), _whole_seeds(setup, label)
    if not complete:  # no seed has them all: the mean of what each task has, of no seed
        means = [statistics.fmean(_scores(setup, label, task)) for task in tasks]
        return ([statistics.fmean(means)] if means else []), len(tasks)

    return [statistics.fmean(score(runs[task, seed]) for task in tasks) for seed in complete], len(tasks)


def _whole_seeds(setup: Setup, label: str) -> list[int]:
    """The seeds of a row with all of its tasks."""
    runs = setup.finished(label)
    tasks = {task for task, _ in runs}
    return sorted({seed for _, seed in runs if all((task, seed) in runs for task in tasks)})


def summary(setup: Setup) -> list[Row]:
    """One row a method: what it needs, how fast it is, how well it learns, how much of the model it trained."""
    summarised = setup.tasks[0] if len(setup.tasks) == 1 else AVERAGE
    scores = {row["method"]: row for row in quality(setup) if row["task"] == summarised}
    rows = zip(setup.rows, memory(setup), throughput(setup), strict=True)
    return [_summary_row(setup, label, peak, speed, scores.get(label, {})) for label, peak, speed in rows]


def _summary_row(setup: Setup, label: str, peak: Row, speed: Row, score: Row) -> Row:
    return {
        "method": label,
        **{name: peak.get(name) for name in ("peak_allocated_bytes", "peak_ratio")},
        **{name: speed.get(name) for name in ("tokens_per_second", "tokens_per_second_ratio")},
        **{f"score_{name}": score.get(name) for name in ("mean", "standard_deviation", "n", "tied_with_best")},
        "score_above_floor": score.get("above_floor"),
        "score_task": score.get("task"),
        **{f"score_seen_{name}": score.get(f"seen_{name}") for name in Sight._fields},
        "score_metric": score.get("metric"),
        "score_tasks": score.get("tasks"),
        "trained_fraction": mean_known(setup, label, "trained_fraction"),
        "block_coverage": mean_known(setup, label, "block_coverage"),
        **counts(setup, label),
    }


def mean_known(setup: Setup, label: str, name: str) -> float | None:
    """The mean of a field over a row's finished runs, those left out that don't know it; None if none does."""
    values = [run[name] for run in setup.finished(label).values() if run[name] is not None]
    return statistics.fmean(values) if values else None


def benchmarks(setup: Setup) -> list[Row]:
    """Scores on public benchmarks after training, over the seeds; no rows where no model was evaluated."""
    scores: dict[tuple[Any, ...], list[float]] = {}
    asked = ("fewshot", "limit", "chat_template")
    for label in setup.rows:
        for (task, _), run in setup.finished(label).items():
            for name, entry in (run.get("benchmarks") or {}).items():
                for metric, value in entry["scores"].items():
                    key = (label, task, name, metric, *(entry[one] for one in asked))
                    scores.setdefault(key, []).append(value)
    names = ("method", "task", "benchmark", "metric", *asked, "mean", "standard_deviation", "n")
    return [dict(zip(names, (*key, *summarise(values)), strict=True)) for key, values in scores.items()]


def unfinished(setup: Setup) -> list[Row]:
    """The runs that are not ok: one row for those of a method and a task that ended alike, with all of their seeds."""
    rows: dict[tuple[str, ...], Row] = {}
    for label, runs in setup.rows.items():
        for (task, seed), run in sorted(runs.items()):
            if run["status"] != "ok":
                key = (label, task, how_it_ended(run), _gist(run["error"]))
                row = dict(zip(("method", "task", "status", "error"), key, strict=True))
                rows.setdefault(key, {**row, "seeds": []})["seeds"].append(seed)
    return list(rows.values())


def _gist(error: str) -> str:
    """The first line of an error; of a traceback the last, which is the one that says something."""
    lines = [line for line in error.splitlines() if line.strip()] or [""]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return "".join(letter if letter.isprintable() else " " for letter in line).strip()
