"""What the page says of a set-up: notices, winners, tables with marks, captions."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reports import differences, studies, text
from reports import winners as best
from reports.figures import CHARTS, Gallery
from reports.figures.curves import STRETCHES, curves_of
from reports.figures.style import shortened
from reports.figures.svg import Plot
from reports.record import Record, has_true_times
from reports.rows import AVERAGE, is_complete
from reports.rows import quality as quality_rows
from reports.rows import summary as summary_rows
from reports.setups import Setup
from reports.table import NOTHING, Row, Table, mib, score_text

LONGEST_VALUE = 20  # letters, of a hyper-parameter with a column of its own
LONGEST_LISTED = 60
_ENVIRONMENT = ("cpu", "device", "device_name", "threads", "platform", "python", "membench", "commit", "dirty")


@dataclass
class Cell:
    """A table's cell: its text, whether that is words, and whether it is the best or not different from it."""

    text: str
    words: bool = False
    mark: str | None = None
    whole: str | None = None  # where the text is cut


@dataclass
class View:
    """A table as the page shows it."""

    title: str
    headers: list[Cell]
    rows: list[list[Cell]]
    notes: list[str]


def overview(records: list[Record], setups: list[Setup]) -> list[tuple[str, str]]:
    """What the page is about, as names and values."""
    statuses = [record["status"] for record in records]
    counts = {status.replace("_", " "): statuses.count(status) for status in dict.fromkeys(statuses)}
    dates = sorted(
        str(record["environment"]["created"])[:10] for record in records if record["environment"].get("created")
    )
    tasks = {record["task"] for record in records}
    return [
        ("Runs", ", ".join(f"{count} {status}" for status, count in counts.items())),
        ("Methods", str(len({record["method"] for record in records}))),
        ("Tasks", str(len(tasks)) if len(tasks) > 1 else next(iter(tasks))),
        ("Set-ups", str(len(setups))),
        *([("Made", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}")] if dates else []),
    ]


def advice(records: list[Record]) -> list[str]:
    """Which method to use, for each budget of memory."""
    return studies.recommend(records, studies.budgets_of(records))


def tuning(trials: Sequence[Record], finals: Sequence[Record]) -> dict[str, Any] | None:
    """What was tuned, and how much that mattered; None where nothing was."""
    if not trials:
        return None
    heading, tables, notes = studies.sensitivity_section(list(trials), finals)
    view = _view(tables[0])
    return {"heading": heading[0], "table": View(view.title, view.headers, view.rows, notes)}


def of(setup: Setup) -> dict[str, Any]:
    """Everything but the plots."""
    bad = text.unfinished(setup, compact=False)
    return {
        "notices": [*_unlearned(setup), *text.spoilt_notes(setup), *differences.between_rows(setup)],
        "remarks": text.remarks(setup),
        "cards": _cards(setup),
        "summary": _summary(setup),
        "memory": _view(text.memory(setup, compact=False)),
        "throughput": _view(text.throughput(setup, compact=False)),
        "quality": _quality(setup),
        "losses": _losses(setup),
        "unfinished": _view(bad) if bad else None,
        "configuration": _configuration(setup),
        "shared": _shared(setup),
        "environment": _environment(setup),
    }


def _unlearned(setup: Setup) -> list[str]:
    """Which methods can't be called the best in anything, and why."""
    return text.not_above_floor(quality_rows(setup))


def _view(table: Table) -> View:
    headers = [Cell(header, header in table.left) for header in table.headers]
    rows = [[Cell(cell, head.words) for cell, head in zip(row, headers, strict=True)] for row in table.cells]
    return View(table.title, headers, rows, [note for note in table.notes if not note.startswith("*")])


def _cards(setup: Setup) -> list[dict[str, Any]]:
    """The winner of each column, what it reached, and who may be as good."""
    rows = {row["method"]: row for row in summary_rows(setup)}
    titles = {"memory": "Least memory", "speed": "Fastest", "score": f"Best {_score_name(setup)}"}
    alike = {"memory": f"Within {best.SAME_MEMORY:.0%} of it", "speed": "Not significantly slower"}
    return [
        {
            "title": titles[name],
            "who": shortened(winner.best),
            "figure": _figure(name, rows[winner.best], setup),
            "tied": _doubt(winner, alike.get(name, "Not significantly different")),
        }
        for name, winner in best.winners(setup).items()
    ]


def _score_name(setup: Setup) -> str:
    if len(setup.tasks) > 1:
        return f"average over {len(setup.tasks)} tasks"
    return next((row["score_metric"] for row in summary_rows(setup) if row["score_metric"]), "score")


def _figure(name: str, row: Row, setup: Setup) -> str:
    if name == "score":
        mean, deviation = row["score_mean"], row["score_standard_deviation"]
        spread = "" if deviation is None else f" ± {score_text(deviation, mean)} ({row['score_n']} seeds)"
        return f"{score_text(mean)}{spread}"
    if name == "memory":
        value, ratio = f"{mib(row['peak_allocated_bytes'])} MiB", row["peak_ratio"]
    else:
        value, ratio = f"{row['tokens_per_second']:,.0f} tokens/s", row["tokens_per_second_ratio"]
    return value if ratio is None else f"{value}, {ratio:.2f} × {setup.reference}"


def _doubt(winner: best.Winner, alike: str) -> str:
    said = [f"{alike}: {', '.join(winner.others)}"] if winner.others else []
    said += [winner.blind.words] if winner.blind else []
    if "one seed" in winner.caveats:
        said += ["One seed: it may be chance"] * bool(winner.untested)
    elif winner.untested:
        said.append(f"Of one seed, so not compared: {', '.join(winner.untested)}")
    return ". ".join(said + [caveat for caveat in winner.caveats if caveat != "one seed"])


def _summary(setup: Setup) -> View:
    table = text.summary(setup, compact=False)
    view, found = _view(table), best.winners(setup)
    columns = {"peak MiB": "memory", "tokens/s": "speed"}
    for label, cells in zip(setup.rows, view.rows, strict=True):
        for header, cell in zip(view.headers, cells, strict=True):
            name = columns.get(header.text) or (
                "score" if header.words and header.text not in ("method", "runs") else ""
            )
            cell.mark = found[name].mark(label) if name in found else None
            cell.text = _unstarred(cell.text) if name == "score" else cell.text
    view.notes += [best.HOW[name] for name in found]
    if not all(map(is_complete, summary_rows(setup))):
        view.notes.append("A row that lacks runs is the best neither in memory nor in speed, which depend on the task.")
    if AVERAGE in table.headers:
        view.notes.append(
            f"average: {text.average_words(setup)}."
            if _has_average(setup)
            else "No average, since less is better on some tasks, or their scores are of different scales."
        )
    return view


def _has_average(setup: Setup) -> bool:
    return any(row["score_metric"] == AVERAGE for row in summary_rows(setup))


def _unstarred(cell: str) -> str:
    """A score without the sign that tables in plain text mark a tie with."""
    return re.sub(r"\*(?=$| \[)", "", cell)


def _quality(setup: Setup) -> View:
    """Scores with the winner of each task marked; tasks or methods go down, as in the table of the terminal."""
    view, found, labels = _view(text.quality(setup, compact=True)), best.scores(setup), list(setup.rows)
    down = view.headers[0].text == "task"
    first = 2 if down else 1
    tasks = [*setup.tasks, AVERAGE]
    for i, cells in enumerate(view.rows):
        for j, cell in enumerate(cells[first:]):
            if (j if down else i) >= len(labels):  # what scores are held against
                continue
            task, label = (tasks[i], labels[j]) if down else (tasks[j], labels[i])
            cell.text = _unstarred(cell.text)
            cell.mark = found[task].mark(label) if task in found else None
    view.notes += [best.HOW["score"]] if found else []
    return view


def _losses(setup: Setup) -> View:
    """What the curves end with, and how long they took."""
    headers = [Cell("method", True), *(Cell(task.split("/", 1)[-1]) for task in setup.tasks)]
    rows = [[Cell(label, True), *(Cell(_loss(setup, label, task)) for task in setup.tasks)] for label in setup.rows]
    return View(
        "Training loss at the end, seconds of training",
        headers,
        rows,
        [f"loss: mean of the last 1/{STRETCHES} of the steps, and over seeds."],
    )


def _loss(setup: Setup, label: str, task: str) -> str:
    curves = curves_of(setup, label, task)
    if not curves:
        return NOTHING
    seconds = [run["time"]["train_seconds"] for (name, _), run in setup.finished(label).items() if name == task]
    spent = statistics.fmean(seconds) if seconds else curves[0].seconds[-1]
    ended = f", {curves[0].ended}" if curves[0].ended else ""
    took = f", {spent:,.1f} s" if all(map(has_true_times, setup.rows[label].values())) else ""
    return f"{curves[0].losses[-1]:.3f}{took}{ended}"


def _configuration(setup: Setup) -> View:
    """Hyper-parameters that differ between rows; long ones and those of one row only share the last column."""
    table = differences.hyperparameters(setup)
    differing = [name for name, rows in table.items() if len(rows) > 1 and name in _differing(table)]
    common = [name for name in differing if max(len(_any(values)) for values in table[name].values()) <= LONGEST_VALUE]
    apart = [name for name, rows in table.items() if name not in common and (len(rows) == 1 or name in differing)]
    headers = [Cell("method", True), *(Cell(name) for name in common), Cell("others", True)]
    rows = []
    for label in setup.rows:
        own = [(name, _any(table[name][label])) for name in apart if label in table[name]]
        shared = [Cell(_any(table[name].get(label, [NOTHING]))) for name in common]
        rows.append([Cell(label, True), *shared, _listed(own)])
    return View("Hyper-parameters that differ", headers, rows, [])


def _listed(values: list[tuple[str, str]]) -> Cell:
    """Names and values, of which long ones are cut."""
    whole = ", ".join(f"{name}={value}" for name, value in values)
    cut = ", ".join(f"{name}={shortened(value, LONGEST_LISTED)}" for name, value in values)
    return Cell(cut or NOTHING, True, whole=None if cut == whole else whole)


def _differing(table: dict[str, dict[str, list[str]]]) -> set[str]:
    return {name for name, rows in table.items() if len({tuple(values) for values in rows.values()}) > 1}


def _any(values: list[str]) -> str:
    return " or ".join(values)


def _shared(setup: Setup) -> str | None:
    """Hyper-parameters with one value wherever they occur in more than one row."""
    table = differences.hyperparameters(setup)
    same = [name for name, rows in table.items() if len(rows) > 1 and name not in _differing(table)]
    words = [f"{name}={_any(next(iter(table[name].values())))}" for name in same]
    return f"The same in all rows that have it: {', '.join(words)}." if words else None


def _environment(setup: Setup) -> View:
    """Everything that records say of where they were made: one value, or several with the number of runs of each."""
    runs = [run for found in setup.rows.values() for run in found.values()]
    values: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, value in _flat(run["environment"]).items():
            count = values.setdefault(name, {})
            count[value] = count.get(value, 0) + 1
    order = [name for name in _ENVIRONMENT if name in values]
    order += sorted(name for name in values if name not in _ENVIRONMENT and name != "created")
    rows = [[Cell(name.replace("_", " "), True), Cell(_counted(values[name], len(runs)), True)] for name in order]
    return View("Environment", [Cell("what", True), Cell("value", True)], rows, [])


def _flat(environment: dict[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in environment.items():
        inner = value if isinstance(value, dict) else {name: value}
        flat |= {key: str(item) for key, item in inner.items() if item is not None}
    return flat


def _counted(values: dict[str, int], runs: int, longest: int = 4) -> str:
    if len(values) == 1 and sum(values.values()) == runs:
        return next(iter(values))
    shown = [f"{value} ({count} of {runs} runs)" for value, count in list(values.items())[:longest]]
    more = len(values) - longest
    return "; ".join(shown) + (f"; and {more} other values" if more > 0 else "")


@dataclass
class Grid:
    """A chart's plots of all tasks. `folded`: behind its title, or open there; None: it is not to be folded."""

    title: str
    caption: str
    plots: list[Plot]
    folded: bool | None


@dataclass
class Wall:
    """The plots of a section of the page: those of the whole set-up with their captions, and grids by task."""

    whole: list[tuple[Plot, str]]
    grids: list[Grid]
    key: Plot | None


def walls(setup: Setup, gallery: Gallery) -> dict[str, Wall]:
    """Where the plots hang."""
    found: dict[str, Wall] = {}
    for chart in CHARTS:
        wall, plots = found.setdefault(chart.section, Wall([], [], None)), gallery[chart.name]
        if chart.whole:
            wall.whole += [(plot, chart.caption(setup)) for plot in plots]
        elif plots:
            folded = bool(gallery[chart.behind]) if chart.behind else None
            wall.grids.append(Grid(chart.title, chart.caption(setup), plots, folded))
            wall.key = wall.key or chart.draw_key(setup)
    return found
