"""The quality that each method reaches within a budget of memory."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from reports import floors, rows, text
from reports.floors import Floor
from reports.rankings import Ranking, headline, render
from reports.record import Record, how_it_ended
from reports.setups import Setup, differing, group, heading, score
from reports.statistics import equivalent, summarise
from reports.table import NOTHING, Column, Row, Table, budget_mib, lay_out, mib, score_text

# of a set-up: what must be the same for qualities to compare
_POOLED = ("family", "model", "weights", "data", "version")

CONTEXT = "half a GiB or more for its CUDA context, which isn't counted here"


@dataclass(frozen=True)
class _Contender:
    """A method in one configuration: what it needs, and what it reaches (a value for each complete seed)."""

    method: str
    configuration: str
    needs_bytes: int | None
    scores: list[float]
    tasks: int
    ended: str
    counts: Row  # of runs, by how they ended
    runs: list[Record]  # that are ok

    def mean(self) -> float:
        return statistics.fmean(self.scores)

    def order(self, higher: bool) -> tuple[float, int]:
        """The best first; of as good ones that which needs less."""
        return -self.mean() if higher else self.mean(), self.needs_bytes or 0


def at_memory(records: list[Record], budget_bytes: int, format: str = "plain") -> str:
    """Rank methods by what they reach within a budget, each in its best configuration that fits.

    Whatever differs between the runs of a method but the model, the data and what is scored (batch size,
    hyper-parameters) is a configuration. What a run needs is what the GPU's allocator reserved or, without one, its
    peak; of runs on a GPU and on a CPU the peak, since the one says nothing beside the other.

    Raises:
        ValueError: there are no records.
    """
    return render(rankings(records, budget_bytes), "at_memory", format)


def rankings(records: list[Record], budget_bytes: int) -> list[Ranking]:
    """A ranking for each model, data and what is scored; see `at_memory`."""
    if not records:
        raise ValueError("There are no records to rank.")
    pools: list[list[Setup]] = []
    for setup in group(records):
        pool = next((pool for pool in pools if all(_scored_alike(setup, other) for other in pool)), None)
        if pool is None:
            pools.append([setup])
        else:
            pool.append(setup)
    return [ranking for pool in pools for ranking in _pool(pool, budget_bytes, pools)]


def _alike(setup: Setup, other: Setup) -> bool:
    return all(setup.conditions[name] == other.conditions[name] for name in _POOLED)


def _scored_alike(setup: Setup, other: Setup) -> bool:
    """Whether their scores are on the same examples, as far as is known.

    A task's options say what is scored, and how. A perplexity is of text in pieces of the sequence length; of other
    tasks some examples may be too long for one.
    """
    if not _alike(setup, other) or setup.conditions["options"] != other.conditions["options"]:
        return False
    for task in {*setup.tasks} & {*other.tasks}:
        counts = {floors.examples_of(rows.on_task(one, task)) for one in (setup, other)} - {None}
        lengths = {one.conditions["sequence_length"] for one in (setup, other)}
        if len(counts) > 1 or (len(lengths) > 1 and headline([setup, other], task)[0] == "perplexity"):
            return False
    return True


def _pool(setups: list[Setup], budget: int, pools: list[list[Setup]]) -> list[Ranking]:
    """One ranking by the average over tasks, or one a task where there is no average."""
    tasks = sorted({task for setup in setups for task in setup.tasks})
    headlines = {task: headline(setups, task) for task in tasks}
    if rows.have_average(setups, tasks):
        return [_ranking(setups, tasks, rows.AVERAGE, True, budget, pools)]
    return [_ranking(setups, [task], metric, higher, budget, pools) for task, (metric, higher) in headlines.items()]


def _ranking(
    setups: list[Setup], tasks: list[str], metric: str, higher: bool, budget: int, pools: list[list[Setup]]
) -> Ranking:
    contenders: dict[str, list[_Contender]] = {}
    mixed = _on_several_devices(setups)
    needs_of = _peak_bytes if mixed else _reserved_bytes
    for setup in setups:
        for label in setup.rows:
            contender = _contender(setup, label, tasks, setups, needs_of)
            contenders.setdefault(contender.method, []).append(contender)
    chosen = [_choose(several, len(tasks), higher, budget) for several in contenders.values()]
    ranked = [c for c in chosen if _fits(c, budget) and c.tasks == len(tasks)]
    ranked.sort(key=lambda c: c.order(higher))
    floor = _floor(setups, tasks)
    own = {c.method: floors.of_row(floor, c.runs) for c in ranked} if len(tasks) == 1 else {}
    found = rows.compared({c.method: c.scores for c in ranked}, floor, own)
    others = sorted((c for c in chosen if c not in ranked), key=lambda c: c.needs_bytes or float("inf"))
    able = [c for c in ranked if found[c.method]["above_floor"] is not False]
    equal = _equal(able, higher)
    task = tasks[0] if len(tasks) == 1 else rows.AVERAGE
    shared = {"task": task, "metric": metric, "higher_is_better": higher, **rows.floor_fields(floor)}
    made = [
        {
            **_row(c, ranked, budget),
            "configurations": len(contenders[c.method]),
            "needs_reserved": not mixed and any(run["memory"]["peak_reserved_bytes"] for run in c.runs),
            **shared,
            **found.get(c.method, rows.ALONE),
            "equivalent_to_best": c.method in equal,
        }
        for c in [*ranked, *others]
    ]
    head = _heading(setups, tasks, pools)
    title = f"{_title(tasks)} within {budget_mib(budget)} MiB, by {metric}{'' if higher else ' (less is better)'}"
    return Ranking(head, _table(title, made, len(tasks), floor), made, _notes(made, mixed))


def _equal(able: list[_Contender], higher: bool) -> set[str]:
    """The best one, which comes first, and those that are shown to be as good."""
    tested = sum(len(c.scores) > 1 for c in able)
    return {
        c.method
        for c in able
        if c is able[0] or equivalent(c.scores, able[0].scores, higher_is_better=higher, rows=tested)
    }


def _heading(setups: list[Setup], tasks: list[str], pools: list[list[Setup]]) -> list[str]:
    """Of one set-up both lines; of any what its scores are on, where that tells it from other rankings."""
    first, how = heading(setups[0], tasks)
    others = [pool for pool in pools if _alike(pool[0], setups[0]) and {*pool[0].tasks} & {*tasks}]
    own, of_others = _scored_on(setups, tasks), [_scored_on(pool, tasks) for pool in others]
    told = [words for name, words in own.items() if any(other[name] != words for other in of_others)]
    return [" - ".join([first, *told]), *([how] if len(setups) == 1 else [])]


def _scored_on(setups: list[Setup], tasks: list[str]) -> dict[str, str]:
    """The examples in words; of several set-ups what they have in common."""
    lengths = {setup.conditions["sequence_length"] for setup in setups}
    counts = {floors.examples_of(rows.on_task(setup, task)) for setup in setups for task in tasks} - {None}
    return {
        "options": setups[0].conditions["options"] or "no options",
        "length": f"sequences of {lengths.pop()} tokens" if len(lengths) == 1 else "sequences of several lengths",
        "examples": f"{counts.pop()} examples" if len(counts) == 1 else "examples of several numbers",
    }


def _floor(setups: list[Setup], tasks: list[str]) -> Floor:
    of_tasks = [floors.of([run for setup in setups for run in rows.on_task(setup, task)]) for task in tasks]
    return of_tasks[0] if len(tasks) == 1 else floors.average(of_tasks)


def _title(tasks: list[str]) -> str:
    return tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks"


def _on_several_devices(setups: list[Setup]) -> bool:
    return len({str(setup.conditions["device"]).partition(":")[0] for setup in setups}) > 1


def _reserved_bytes(run: Record) -> int:
    return max(run["memory"]["peak_reserved_bytes"] or 0, _peak_bytes(run))


def _peak_bytes(run: Record) -> int:
    return int(run["memory"]["peak_allocated_bytes"])


def _contender(
    setup: Setup, label: str, tasks: list[str], setups: list[Setup], needs_of: Callable[[Record], int]
) -> _Contender:
    runs = {key: run for key, run in setup.finished(label).items() if key[0] in tasks}
    have = {task for task, _ in runs}
    seeds = sorted({seed for _, seed in runs if all((task, seed) in runs for task in have)})
    scores = [statistics.fmean(score(runs[task, seed]) for task in sorted(have)) for seed in seeds]
    method = next(iter(setup.rows[label].values()))["method"]
    words = [label.removeprefix(method).strip(), *differing(setup, setups)]
    endings = {how_it_ended(run) for run in setup.rows[label].values() if run["task"] in tasks} - {"ok"}
    unfinished = "not run on every task" if len(have) < len(tasks) else "no seed has every task"
    return _Contender(
        method,
        ", ".join(filter(None, words)),
        max(map(needs_of, runs.values()), default=None),
        scores,
        len(have) if scores else 0,
        " / ".join(sorted(endings)).replace("_", " ") or unfinished,
        rows.counts(setup, label, tasks),
        list(runs.values()),
    )


def _fits(contender: _Contender, budget: int) -> bool:
    return contender.needs_bytes is not None and contender.needs_bytes <= budget


def _choose(made: list[_Contender], tasks: int, higher: bool, budget: int) -> _Contender:
    """A method's best configuration that fits and has every task; if none does, the one that needs least."""
    able = [contender for contender in made if _fits(contender, budget) and contender.tasks == tasks]
    if able:
        return min(able, key=lambda contender: contender.order(higher))
    return min(made, key=lambda contender: (-contender.tasks, contender.needs_bytes or float("inf")))


def _row(made: _Contender, ranked: list[_Contender], budget: int) -> Row:
    mean, deviation, n = summarise(made.scores) if made.scores else (None, None, 0)
    caveats = rows.caveats({**made.counts, "n": n})
    return {
        "rank": [c.mean() for c in ranked].index(made.mean()) + 1 if made in ranked else None,
        "method": made.method,
        "configuration": made.configuration,
        "fits": _fits(made, budget),
        "needs_bytes": made.needs_bytes,
        "left_bytes": None if made.needs_bytes is None else budget - made.needs_bytes,
        "mean": mean,
        "standard_deviation": deviation,
        "n": n,
        "tasks": made.tasks,
        "remark": "; ".join(caveats) if made in ranked else _why_not(made, budget),
    }


def _why_not(made: _Contender, budget: int) -> str:
    if made.needs_bytes is None:
        return made.ended
    if made.needs_bytes > budget:
        return f"{mib(made.needs_bytes - budget)} MiB missing"
    return made.ended


def _table(title: str, made: list[Row], tasks: int, floor: Floor) -> Table:
    columns: list[Column] = [
        ("rank", lambda row: str(row["rank"] or NOTHING)),
        ("method", lambda row: row["method"]),
        ("configuration", lambda row: row["configuration"] or NOTHING),
        ("score", lambda row: _shown(row) if row["tasks"] == tasks else NOTHING),
        ("needs MiB", lambda row: NOTHING if row["needs_bytes"] is None else mib(row["needs_bytes"])),
        ("left MiB", lambda row: mib(row["left_bytes"]) if row["fits"] else NOTHING),
        ("remarks", _remarks),
    ]
    table = lay_out(title, made, columns, {"method", "configuration", "score", "remarks"})
    if floor.score is not None:
        said = {"method": "floor", "score": floor.score_words, "remarks": floor.what}
        table.cells.append([said.get(header, NOTHING) for header in table.headers])
    return table


def _remarks(row: Row) -> str:
    unlearned = f"not {rows.floor_of(row).beaten}" if row["above_floor"] is False else ""
    return "; ".join(filter(None, [unlearned, row["remark"]])) or NOTHING


def _shown(row: Row) -> str:
    text = score_text(row["mean"])
    if row["standard_deviation"] is not None:
        text += f" ± {score_text(row['standard_deviation'], row['mean'])} ({row['n']})"
    return text + ("*" if row["tied_with_best"] else "")


def _notes(made: list[Row], mixed: bool) -> list[str]:
    what = "the peak" if mixed else "what the GPU's allocator reserved or, without one, the peak"
    notes = [f"needs: the hungriest run; {what}."]
    if any(row["needs_reserved"] for row in made):
        notes.append(f"Of a card, a process takes {CONTEXT}.")
    if any(row["tied_with_best"] for row in made):
        notes.append(text.TIED)
    notes += text.sight_notes(made) + text.not_above_floor(made)
    return notes + choice_notes(made)


def choice_notes(made: list[Row]) -> list[str]:
    """That methods are in the best of their configurations, by the very scores that they are ranked by."""
    several = [f"{row['configurations']} of {row['method']}" for row in made if row["configurations"] > 1]
    if not several:
        return []
    return [
        f"Of several configurations ({', '.join(several)}) the best that fits; "
        "the more there are, the more the best one owes to chance."
    ]
