"""The tables as a reader sees them: headings with units, figures rounded, and notes that say how to read them."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from reports import differences
from reports import rows as raw
from reports.floors import BEFORE
from reports.names import counted
from reports.parts import Part, round_parts, shown
from reports.record import Record, had_device_alone, has_true_times, undue_waiting
from reports.rows import AVERAGE
from reports.setups import REFERENCE, Setup
from reports.statistics import SIGNIFICANCE, TEST, Sight, sight_words
from reports.table import MIB, NOTHING, Row, Table, lay_out, score_text

LONGEST_ERROR = 64  # letters

TIED = f"* the best, or not significantly different from it ({TEST}, p ≥ {SIGNIFICANCE})."
_FLOOR, _EXAMPLES = "floor", "examples"  # further rows of quality
_FLOOR_NOTE = "floor: guessing, or the model before training if that is better{}."
_FLOOR_WIDTH = "; ± how far chance alone takes a score (95%)"
_FLOOR_ALONE = ", of several methods with one seed any of theirs"
_FLOOR_WIDTHS = _FLOOR_WIDTH + ", on average of the methods, of which each is held to its own"
_EXAMPLES_NOTE = "examples: in the validation set; ± half the width of the best score's 95% interval."
_PARTIAL = "[a/b] averaged over a of b tasks only: not to be compared with a complete average."
_SEEDLESS = (
    "(0) averaged over tasks of different seeds, as no seed has all: not to be compared with the others' averages."
)
_PEAK = "peak: of the run that needs most; / {0}: against {0} on the same task and seed."
_PARTS = "parts: what there is at the moment of the peak; they add up to it."
_SPEED = "tokens/s: all tokens over all training time; / {0}: geometric mean over pairs of task and seed."
_STEP = "ms: the median of a run's steps, averaged over runs."
_SHARED = "Speeds of runs that may have shared a device with others are left out: they tell nothing."
_CHANGED = (
    "Speeds of runs that went on on other processes, on another device or beside other runs are left out: "
    "they tell nothing of all their steps."
)
_NO_TASK = "Peaks of rows that have no run on the tasks that others need most on compare with no others: {}."
_FEWER = "Where runs are missing, or their speeds left out, only ratios of speeds compare, not tokens/s and ms."


def _number(name: str, pattern: str = "{:.2f}", scale: float = 1) -> Callable[[Row], str]:
    return lambda row: NOTHING if row.get(name) is None else pattern.format(row[name] * scale)


def _word(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name) or NOTHING)


def _mib(tenths: int) -> str:
    return f"{tenths / 10:,.1f}"


def _bytes(name: str) -> Callable[[Row], str]:
    return lambda row: NOTHING if row.get(name) is None else _mib(round_parts([row[name] * 10], MIB)[0])


def _or_why(show: Callable[[Row], str]) -> Callable[[Row], str]:
    """A figure, or in its place why it isn't there."""
    return lambda row: show(row) if row["runs_ok"] else ended(row)


def ended(row: Row) -> str:
    bad = [status for status in ("out_of_memory", "diverged", "failed", "refused") if row[f"runs_{status}"]]
    return " / ".join(status.replace("_", " ") for status in bad) or "not run"


def _runs(row: Row) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in raw.endings(row).items() if count)


def _share(row: Row) -> str:
    """Runs that count, of those there could be: only said of a row that lacks some."""
    return NOTHING if raw.is_complete(row) else f"{row['runs_ok']} of {sum(raw.endings(row).values())}"


def _short(task: str) -> str:
    return task.split("/", 1)[-1]


def summary(setup: Setup, *, compact: bool) -> Table:
    rows = raw.summary(setup)
    single = len(setup.tasks) == 1
    score = f"{_short(setup.tasks[0])} {rows[0]['score_metric'] or ''}".strip() if single else AVERAGE
    columns = [
        ("method", _word("method")),
        ("peak MiB", _or_why(_bytes("peak_allocated_bytes"))),
        (f"/ {setup.reference}", _number("peak_ratio")),
        ("tokens/s", _number("tokens_per_second", "{:,.0f}")),
        (f"/ {setup.reference}", _number("tokens_per_second_ratio")),
        (score, lambda row: _score(_scored(row), setup)),
        ("trained", _number("trained_fraction", "{:.1f}%", 100)),
        *([("blocks", _coverage)] if _partly(rows) else []),
        ("runs", _runs),
    ]
    notes = [*_peak_notes(rows, setup), *_notes_of(_SPEED, "tokens_per_second_ratio", rows, setup)]
    notes += _fewer_notes(rows, setup) + _score_notes([_scored(row) for row in rows], setup)
    return lay_out("Summary", rows, columns, {"method", score, "runs"}, notes)


def _notes_of(note: str, name: str, rows: list[Row], setup: Setup) -> list[str]:
    """A note on a ratio to the reference, and on what it is a ratio of; none where no row has it."""
    return [note.format(setup.reference)] * any(row.get(name) is not None for row in rows)


def _peak_notes(rows: list[Row], setup: Setup) -> list[str]:
    """What peaks are of, and which are of a less hungry task than those of other rows."""
    hungriest = {row["task"] for row in raw.memory(setup) if row.get("task")}
    said = []
    for label in setup.rows:
        have = {task for task, _ in setup.finished(label)}
        if have and (lacking := sorted(hungriest - have)):
            said.append(f"{label} ({', '.join(map(_short, lacking))})")
    unlike = [_NO_TASK.format("; ".join(said))] if said else []
    return [*_notes_of(_PEAK, "peak_ratio", rows, setup), *unlike]


def _fewer_notes(rows: list[Row], setup: Setup) -> list[str]:
    """Where a row has speeds of fewer runs than there are: tasks differ in speed."""
    known = [row for row in rows if row["tokens_per_second"] is not None]
    timed = [len(raw.rates(setup.finished(row["method"]))) for row in known]
    return [_FEWER] * any(count < len(setup.tasks) * len(setup.seeds) for count in timed)


def _partly(rows: list[Row]) -> bool:
    """Whether a method didn't come to all of its blocks."""
    return any((row["block_coverage"] or 1) < 1 for row in rows)


def _coverage(row: Row) -> str:
    """Whole percents, but neither 0 nor 100 of what is close to it: one block of 240 that wasn't visited counts."""
    share = row["block_coverage"]
    if share is None:
        return NOTHING
    return f"{share:.0%}" if f"{share:.0%}" not in ("0%", "100%") or share in (0, 1) else f"{share:.1%}"


def _scored(row: Row) -> Row:
    """A row of the summary as if it were one of quality."""
    return {name.removeprefix("score_"): value for name, value in row.items()}


def memory(setup: Setup, *, compact: bool) -> Table:
    rows = raw.memory(setup)
    parts = shown(row for row in rows if row["runs_ok"])
    tasks = {row["task"] for row in rows if row.get("task")}
    columns = [
        ("method", _word("method")),
        ("peak", _or_why(_bytes("peak_allocated_bytes"))),
        (f"/ {setup.reference}", _number("peak_ratio")),
        *((part.word, _part(part, parts)) for part in parts),
        ("reserved", _bytes("peak_reserved_bytes")),
        ("phase", _word("peak_phase")),
        ("task", lambda row: _short(row.get("task") or NOTHING) if len(tasks) > 1 else NOTHING),
        ("ok runs", _share),
    ]
    notes = [*_peak_notes(rows, setup), _PARTS]
    where = f" on {_short(*tasks)}" if len(tasks) == 1 and len(setup.tasks) > 1 else ""
    return lay_out(f"Memory at the peak{where}, MiB", rows, columns, {"method", "phase", "task"}, notes)


def _part(part: Part, parts: list[Part]) -> Callable[[Row], str]:
    """One of the parts, rounded together with the others so that they add up to the peak as printed, too."""

    def show(row: Row) -> str:
        if row.get("peak_allocated_bytes") is None:
            return NOTHING
        return _mib(round_parts([one.of(row) * 10 for one in parts], MIB)[parts.index(part)])

    return show


def throughput(setup: Setup, *, compact: bool) -> Table:
    rows = raw.throughput(setup)
    columns = [
        ("method", _word("method")),
        ("tokens/s", _or_why(_number("tokens_per_second", "{:,.0f}"))),
        (f"/ {setup.reference}", _number("tokens_per_second_ratio")),
        *((f"{phase} ms", _number(f"{phase}_seconds", "{:,.1f}", 1000)) for phase in ("forward", "backward", "update")),
        ("ok runs", _share),
    ]
    notes = [*_notes_of(_SPEED, "tokens_per_second_ratio", rows, setup), _STEP]
    notes += _fewer_notes(rows, setup)
    return lay_out("Throughput", rows, columns, {"method"}, notes)


def quality(setup: Setup, *, compact: bool) -> Table:
    """Tasks or methods go down the page, whichever are more, so that the width stays within a page's."""
    rows = raw.quality(setup)
    cells = {(row["task"], row["method"]): row for row in rows}
    tasks = list(dict.fromkeys(task for task, _ in cells))
    seeds = f"mean ± std (n) over {len(setup.seeds)} seeds" if len(setup.seeds) > 1 else f"seed {setup.seeds[0]}"
    notes = _before_notes(rows) + _score_notes(rows, setup) + _floor_notes(rows) + spoilt_notes(setup)
    down = len(setup.tasks) > len(setup.rows)
    tight = compact and len(tasks) > 4 and not down
    lines = {label: [_score(cells[task, label], setup, tight=tight) for task in tasks] for label in setup.rows}
    lines |= _yardsticks([[row for row in rows if row["task"] == task] for task in tasks], tight=tight)
    if down:
        metrics = [_metric(cells[task, next(iter(setup.rows))]) for task in tasks]
        headers = ["task", "metric", *lines]
        body = [list(line) for line in zip(map(_short, tasks), metrics, *lines.values(), strict=True)]
    else:
        headers = ["method", *map(_short, tasks)]
        body = [[label, *line] for label, line in lines.items()]
        notes = [_metrics(rows), *notes]
        seeds = seeds.replace(" (n)", "") if tight else seeds
    return Table(f"Quality, {seeds}", headers, body, set(headers), notes)


def _yardsticks(by_task: list[list[Row]], *, tight: bool) -> dict[str, list[str]]:
    """What scores are to be held against, as further rows: guessing, and how few examples there are."""
    floors = [_plus_minus(rows[0]["floor"], rows[0]["floor_half_width"], tight=tight) for rows in by_task]
    examples = [_examples(rows, tight=tight) for rows in by_task]
    lines = {_FLOOR: floors, _EXAMPLES: examples}
    return {label: line for label, line in lines.items() if any(cell != NOTHING for cell in line)}


def _examples(rows: list[Row], *, tight: bool) -> str:
    """`277 (± 0.047)`: half of the interval that they leave the best score."""
    count, known = rows[0]["validation_examples"], [row for row in rows if row["half_width"] is not None]
    if not known:
        return NOTHING if count is None else f"{count:,}"
    best = (max if rows[0]["higher_is_better"] else min)(known, key=lambda row: row["mean"])
    width = score_text(best["half_width"], best["mean"], thousands=",")
    return " ".join(filter(None, [count and f"{count:,}", f"±{_bare(width)}" if tight else f"(± {width})"]))


def _plus_minus(value: float | None, deviation: float | None, *, tight: bool) -> str:
    if value is None:
        return NOTHING
    numbers = [score_text(one, value, thousands=",") for one in (value, deviation) if one is not None]
    return "±".join(map(_bare, numbers)) if tight else " ± ".join(numbers)


def _bare(number: str) -> str:
    """`.812` of `0.812`."""
    return number.replace("0.", ".", 1) if number.lstrip("-").startswith("0.") else number


def average_words(setup: Setup) -> str:
    """What an average over tasks is."""
    return f"the unweighted mean of the headline metrics of {len(setup.tasks)} tasks, for each seed that has all"


def _metric(row: Row) -> str:
    if row["task"] == AVERAGE:
        return ""
    return f"{row['metric'] or NOTHING}{'' if row['higher_is_better'] else ', less is better'}"


def _metrics(rows: list[Row]) -> str:
    tasks: dict[str, list[str]] = {}
    for row in rows:
        if row["task"] != AVERAGE and _short(row["task"]) not in tasks.setdefault(_metric(row), []):
            tasks[_metric(row)].append(_short(row["task"]))
    if len(tasks) == 1:
        return f"Scores: {next(iter(tasks))}."
    return "Scores: " + "; ".join(f"{metric} of {', '.join(names)}" for metric, names in tasks.items()) + "."


def _score(row: Row, setup: Setup, *, tight: bool = False) -> str:
    """`0.812 ± 0.013 (3)*`, of a single run without a deviation; tight: `.812±.013*`, with n only where it is less."""
    if row.get("mean") is None:
        return NOTHING if row["runs_ok"] else ended(row)
    n, text = row["n"], _plus_minus(row["mean"], row["standard_deviation"], tight=tight)
    text += "" if tight and n == len(setup.seeds) else f" ({n})" if n > 1 or len(setup.seeds) > 1 else ""
    return text + ("*" if row["tied_with_best"] else "") + _lack(row, setup)


def _lack(row: Row, setup: Setup) -> str:
    partial = row.get("metric") == AVERAGE and row["tasks"] < len(setup.tasks)
    return f" [{row['tasks']}/{len(setup.tasks)}]" if partial else ""


def _before_notes(rows: list[Row]) -> list[str]:
    scores = {row["task"]: row for row in rows if row.get("before_training") is not None}
    before = [
        f"{_short(task)} {row['metric']} {score_text(row['before_training'], thousands=',')}"
        for task, row in scores.items()
    ]
    return [f"Before training: {', '.join(before)}."] if before else []


def _score_notes(rows: list[Row], setup: Setup) -> list[str]:
    tied = any(row.get("tied_with_best") for row in rows)
    partial = any(row.get("mean") is not None and _lack(row, setup) for row in rows)
    seedless = any(row.get("mean") is not None and not row["n"] for row in rows)
    return [TIED] * tied + sight_notes(rows) + [_PARTIAL] * partial + [_SEEDLESS] * seedless


def sight_notes(rows: list[Row]) -> list[str]:
    """What ties may hide: `Ties: 2 seeds can't see less than 0.25 on cb; 6 would see 0.05.`"""
    blind: dict[str, Sight] = {}
    for row in rows:
        seen = raw.sight_of(row)
        if seen and seen.least > blind.get(row["task"], seen._replace(least=0)).least:
            blind[row["task"]] = seen
    alike: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for task, seen in blind.items():
        alike.setdefault((seen.seeds, seen.more), []).append(task)
    return [f"Ties: {sight_words({_on(task): blind[task] for task in tasks})}." for tasks in alike.values()]


def _on(task: str) -> str:
    return "on average" if task == AVERAGE else f"on {_short(task)}"


def _floor_notes(rows: list[Row]) -> list[str]:
    several = len({row["method"] for row in rows}) > 1
    paired = several and any(row["floor_is"] == BEFORE and row["metric"] == "perplexity" for row in rows)
    wide = any(row["floor_half_width"] is not None for row in rows)
    alone = Counter(row["task"] for row in rows if row["n"] == 1 and row["higher_is_better"])
    width = (_FLOOR_WIDTHS if paired else _FLOOR_WIDTH) if wide else ""
    width += _FLOOR_ALONE if wide and max(alone.values(), default=0) > 1 else ""
    notes = [_FLOOR_NOTE.format(width)] * any(row["floor"] is not None for row in rows)
    notes += [_EXAMPLES_NOTE] * any(row["half_width"] is not None for row in rows)
    return notes + not_above_floor(rows)


def not_above_floor(rows: list[Row]) -> list[str]:
    """`No method is above chance on rte (0.527 ± 0.059, 277 examples).`; of some that are scored, which they are."""
    by_task: dict[str, list[Row]] = {}
    scored = Counter(row["task"] for row in rows if row["mean"] is not None)
    for row in rows:
        if row["above_floor"] is not None:
            by_task.setdefault(row["task"], []).append(row)
    alike: dict[tuple[str, str], list[str]] = {}
    for task, some in by_task.items():
        floor, below = raw.floor_of(some[0]), [row["method"] for row in some if not row["above_floor"]]
        if below:
            names = "" if len(below) == scored[task] else ", ".join(below)
            alike.setdefault((floor.beaten, names), []).append(f"{_on(task)} ({floor.words})")
    return [_not_above(beaten, names, places) for (beaten, names), places in alike.items()]


def spoilt_notes(setup: Setup) -> list[str]:
    """`lomo on instruct: 1 of 2 runs ended worse than before training (seed 1: 2,797.57).`"""
    notes = []
    for row in raw.spoilt(setup):
        scores = ", ".join(f"seed {seed}: {score_text(one, thousands=',')}" for seed, one in row["scores"].items())
        runs = f"{len(row['scores'])} of {row['runs']} runs"
        notes.append(f"{row['method']} {_on(row['task'])}: {runs} ended worse than {row['than']} ({scores}).")
    return notes


def _not_above(beaten: str, names: str, places: list[str]) -> str:
    where = ", ".join(places)
    return f"Not {beaten} {where}: {names}." if names else f"No method is {beaten} {where}."


def benchmarks(setup: Setup, *, compact: bool) -> Table | None:
    rows = raw.benchmarks(setup)
    columns = [
        ("method", _word("method")),
        ("trained on", lambda row: _short(row["task"])),
        ("benchmark", _word("benchmark")),
        ("metric", _word("metric")),
        ("score", _benchmark_score),
        ("shots", _number("fewshot", "{}")),
        ("documents", lambda row: "all" if row["limit"] is None else str(row["limit"])),
        ("asked", lambda row: "as in a chat" if row["chat_template"] else NOTHING),
    ]
    return (
        lay_out(
            "Benchmarks after training", rows, columns, {"method", "trained on", "benchmark", "metric", "asked"}, []
        )
        if rows
        else None
    )


def _benchmark_score(row: Row) -> str:
    deviation = "" if row["standard_deviation"] is None else f" ± {row['standard_deviation']:.3f} ({row['n']})"
    return f"{row['mean']:.3f}{deviation}"


def unfinished(setup: Setup, *, compact: bool) -> Table | None:
    rows = _alike(raw.unfinished(setup))
    columns = [
        ("method", _word("method")),
        ("task", lambda row: _all_of(row["tasks"], setup)),
        ("seeds", lambda row: ", ".join(map(str, row["seeds"]))),
        ("ended", lambda row: row["status"].replace("_", " ")),
        ("error", lambda row: _cut(row["error"]) if compact else row["error"]),
    ]
    headers = {name for name, _ in columns}
    return lay_out("Runs that are not ok", rows, columns, headers, []) if rows else None


def _alike(rows: list[Row]) -> list[Row]:
    """One row for the tasks on which a method ended alike."""
    merged: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row["method"], row["status"], row["error"], str(row["seeds"]))
        merged.setdefault(key, {**row, "tasks": []})["tasks"].append(row["task"])
    return list(merged.values())


def _all_of(tasks: list[str], setup: Setup) -> str:
    whole = len(tasks) > 2 and len(tasks) == len(setup.tasks)
    return f"all {len(tasks)}" if whole else ", ".join(map(_short, tasks))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 3].rstrip() + "..."


def _coverage_notes(setup: Setup) -> list[str]:
    """Which methods of blocks didn't come to all of them, though a smaller `switch_every` would have."""
    said = []
    for row in raw.summary(setup):
        runs = [run for run in setup.finished(row["method"]).values() if "switch_every" in run["hyperparameters"]]
        if runs and (row["block_coverage"] or 1) < 1:
            every = " or ".join(sorted({str(run["hyperparameters"]["switch_every"] or "none") for run in runs}))
            said.append(f"{row['method']} {_coverage(row)} with switch_every {every}")
    steps = setup.conditions["steps"]
    when = counted(steps, "step")
    return [f"Blocks that were visited in {when}: {'; '.join(said)}. What wasn't is untrained."] if said else []


def time_notes(rows: Mapping[str, Collection[Record]]) -> list[str]:
    """Which times of these runs, by row, are left out, and which of those that are shown are too long."""
    runs = [run for of_method in rows.values() for run in of_method]
    shared = [_SHARED] if not all(map(had_device_alone, runs)) else []
    changed = [_CHANGED] if any(run.get("made_by") for run in runs) else []
    return shared + changed + _waiting_notes(rows)


def _waiting_notes(rows: Mapping[str, Collection[Record]]) -> list[str]:
    said = []
    for label, of_method in rows.items():
        runs = [run for run in of_method if has_true_times(run)]
        if shares := [share for run in runs if (share := undue_waiting(run))]:
            said.append(
                f"{label} ({len(shares)} of {counted(len(runs), 'run')}) for up to {max(shares):.0%} of its time"
            )
    return [f"Slowed by waiting for processors: {'; '.join(said)}."] if said else []


def remarks(setup: Setup) -> list[str]:
    """What holds for all of a set-up's tables."""
    missing = [f"No run of {REFERENCE} to compare with: no ratios."] if setup.reference is None else []
    old = (
        [f"Older runs of the same method, task and seed are left out: {setup.superseded}."] if setup.superseded else []
    )
    several = f"Runs are from {len(setup.machines)} machines ({'; '.join(setup.machines)}): speeds compare on one only."
    of_times = time_notes({label: of_method.values() for label, of_method in setup.rows.items()})
    old += differences.in_code(setup)
    return missing + old + _coverage_notes(setup) + ([several] if len(setup.machines) > 1 else []) + of_times
