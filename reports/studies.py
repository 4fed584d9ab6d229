"""What a study tells beside its tables: how much tuning mattered, and which method to use, in words off the records."""

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from reports import formats, rows
from reports.at_memory import CONTEXT, choice_notes, rankings
from reports.names import counted
from reports.rankings import Ranking
from reports.record import Record
from reports.setups import Setup, created, differing, group, row_label, score, varied_hyperparameters
from reports.statistics import SAME_POINTS
from reports.table import NOTHING, Column, Row, Table, budget_mib, lay_out, mib, score_text

NO_LIMIT = 1 << 62  # bytes
_RESERVED = "; MiB as the GPU's allocator reserved them, more than the tables' peak"


def best(trials: Sequence[Record]) -> int:
    """The index of the trial with the best headline, of equals the first; 0 if none ended well: its runs will tell."""
    able = [index for index, trial in enumerate(trials) if trial["status"] == "ok"]
    if not able:
        return 0
    sign = 1 if trials[able[0]]["higher_is_better"] else -1
    return max(able, key=lambda index: sign * score(trials[index]))


def sections(finals: list[Record], trials: list[Record]) -> list[formats.Section]:
    """How sensitive each method was to what was tuned, and a recommendation for each of the study's budgets."""
    tuned = [sensitivity_section(trials, finals)] if trials else []
    return [*tuned, (["Recommendation"], [], recommend(finals, budgets_of(finals)))]


def document(finals: list[Record], trials: list[Record]) -> dict[str, Any]:
    """The same as JSON."""
    return {"tuning": sensitivity(trials, finals), "recommendation": recommend(finals, budgets_of(finals))}


def budgets_of(finals: list[Record]) -> list[int]:
    """The budgets of memory (bytes) that the latest of these runs that are a study's were made for; none: no limit.

    Runs of a comparison in the study's folder have no say: its records don't tell of budgets at all.
    """
    told = [run for run in finals if run["environment"].get("memory_budgets") is not None]
    latest = max(told, key=created, default=None)
    return latest["environment"]["memory_budgets"] if latest else []


# Tuning


def sensitivity_section(trials: list[Record], finals: Sequence[Record]) -> formats.Section:
    """What was tried, what was chosen, and what the choice was worth."""
    made = sensitivity(trials, finals)
    return [_stated_budget(trials, made)], [_sensitivity_table(made)], _sensitivity_notes(made)


def sensitivity(trials: Iterable[Record], finals: Sequence[Record] = ()) -> list[Row]:
    """A row for each task, model and method: what was tried, what was chosen, and what the choice was worth.

    Of equally good trials the one was chosen whose values the `finals` have: a folder doesn't keep the order of trials,
    of which the study took the first. Trials of different trainings or seeds, as a folder has them whose study was
    changed, are rows of their own: nothing was chosen from all of them.
    """
    trials = list(trials)
    setups = group(trials)
    told: dict[int, str] = {}  # by trial, what tells its training from others'
    for setup in setups:
        words = ", ".join(differing(setup, [other for other in setups if _alike(setup, other)]))
        told |= {id(trial): words for runs in setup.rows.values() for trial in runs.values()}
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for trial in trials:
        seeds.setdefault((trial["task"], trial["model"], told.get(id(trial), "")), set()).add(trial["seed"])
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for trial in trials:
        if id(trial) in told:
            several = len(seeds[trial["task"], trial["model"], told[id(trial)]]) > 1
            training = ", ".join(filter(None, [told[id(trial)], f"seed={trial['seed']}" if several else ""]))
            groups.setdefault((trial["task"], trial["model"], trial["method"], training), []).append(trial)
    return [_sensitivity_row(key, found, finals) for key, found in groups.items()]


def _alike(setup: Setup, other: Setup) -> bool:
    """Whether they have tasks and the model in common, so that what else they differ in tells them apart."""
    return setup.conditions["model"] == other.conditions["model"] and bool({*setup.tasks} & {*other.tasks})


def _sensitivity_row(key: tuple[str, str, str, str], trials: list[Record], finals: Sequence[Record]) -> Row:
    names = varied_hyperparameters(trials)[key[2]]

    def values(run: Record) -> list[Any]:
        return [run["hyperparameters"].get(name) for name in names]

    used = [values(run) for run in finals if (run["task"], run["model"], run["method"]) == key[:3]]
    trials = sorted(trials, key=lambda trial: values(trial) not in used)
    chosen = trials[best(trials)]
    scores = [score(trial) for trial in trials if trial["status"] == "ok"]
    higher = chosen["higher_is_better"] is not False
    return {
        **dict(zip(("task", "model", "method", "training"), key, strict=True)),
        "trials": len(trials),
        "ended_badly": len(trials) - len(scores),
        "chosen": {name: chosen["hyperparameters"].get(name) for name in names},
        "label": row_label(chosen, names).removeprefix(key[2]).strip(),
        "best": (max if higher else min)(scores, default=None),
        "median": statistics.median(scores) if scores else None,
        "worst": (min if higher else max)(scores, default=None),
        "at_edge": [name for name in names if _at_edge(name, chosen, trials)],
    }


def _at_edge(name: str, chosen: Record, trials: list[Record]) -> bool:
    """Whether the smallest or the largest of three or more numbers was best, and none between as good: a better one may
    lie beyond.
    """
    tried = [trial["hyperparameters"].get(name) for trial in trials]
    values = {json.dumps(value): value for value in tried}.values()
    if len(values) < 3 or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return False
    edges = (min(values), max(values))
    as_good = [trial for trial in trials if trial["status"] == "ok" and score(trial) == score(chosen)]
    return all(trial["hyperparameters"].get(name) in edges for trial in (chosen, *as_good))


def _stated_budget(trials: list[Record], made: list[Row]) -> str:
    number = counted(" or ".join(map(str, sorted({row["trials"] for row in made}))), "trial")
    seeds = ", ".join(map(str, sorted({trial["seed"] for trial in trials})))
    return f"Tuning: {number} of each method on each task, on validation data, on a seed of its own ({seeds})"


def _sensitivity_table(made: list[Row]) -> Table:
    def score(name: str) -> Any:
        return lambda row: NOTHING if row[name] is None else score_text(row[name])

    models = {row["model"] for row in made}
    columns: list[Column] = [
        ("task", lambda row: row["task"]),
        ("model", lambda row: row["model"] if len(models) > 1 else NOTHING),
        ("method", lambda row: row["method"]),
        ("training", lambda row: row["training"] or NOTHING),
        ("chosen", lambda row: row["label"] or NOTHING),
        ("best", score("best")),
        ("median", score("median")),
        ("worst", score("worst")),
        ("ended badly", lambda row: str(row["ended_badly"] or NOTHING)),
        ("at the edge", lambda row: ", ".join(row["at_edge"]) or NOTHING),
    ]
    words = {"task", "model", "method", "training", "chosen", "at the edge"}
    return lay_out("How much tuning mattered", made, columns, words)


def _sensitivity_notes(made: list[Row]) -> list[str]:
    notes = ["best, median, worst: of the trials' scores; where they lie close, the choice matters little."]
    if any(row["at_edge"] for row in made):
        notes.append("at the edge: the smallest or largest value tried was the best; a better one may lie beyond.")
    return notes


# The recommendation


def recommend(finals: list[Record], budgets: Sequence[int]) -> list[str]:
    """A paragraph for each budget and ranking: what to use, what is as good or may be, what is out, and why."""
    return [
        _sentence(ranking, budget, finals) for budget in budgets or (NO_LIMIT,) for ranking in rankings(finals, budget)
    ]


def _sentence(ranking: Ranking, budget: int, finals: list[Record]) -> str:
    fit = [row for row in ranking.rows if row["rank"]]
    able = [row for row in fit if row["above_floor"] is not False]
    limit = "Without a limit of memory" if budget == NO_LIMIT else f"For {budget_mib(budget)} MiB"
    measured = _RESERVED if any(row["needs_reserved"] for row in ranking.rows) else ""
    measured += f"; of a card a process takes {CONTEXT}" if measured and budget != NO_LIMIT else ""
    where = f"{limit} ({ranking.heading[0]}{measured})"
    out = [_out(row) for row in ranking.rows if not row["rank"]]
    left = [f"Out: {', '.join(out)}."] if out else []
    excluded = "".join(f" {sentence}" for sentence in [*left, *choice_notes(ranking.rows)])
    if not fit:
        return f"{where}: nothing {_lacking(ranking.rows)}.{excluded}"
    floor = rows.floor_of(fit[0])
    if not able:
        scored = "; ".join(map(_whole, fit))
        who = "no method" if all(row["fits"] for row in ranking.rows if row["mean"] is not None) else "none that fits"
        return f"{where}: {who} is {floor.beaten} ({floor.words}). What fits: {scored}.{excluded}"
    below = [_whole(row) for row in fit if row not in able]
    excluded = (f" Not {floor.beaten} ({floor.words}): {'; '.join(below)}." if below else "") + excluded
    equal = [row for row in able if row["equivalent_to_best"]]
    take = min(equal, key=lambda row: row["needs_bytes"])
    said = f"{where}: {_in_full(take)}, because {_because(take, equal, able, ranking.rows)}{_speed(take, finals)}."
    return said + _caution(take) + _others(take, equal, able) + excluded


def _because(take: Row, equal: list[Row], able: list[Row], made: list[Row]) -> str:
    reached = f"{_score_words(take)} {take['metric']} in {_mib(take)}"
    if len(able) == 1:
        return f"nothing else {_lacking(made) or 'was run'}: {reached}"
    if len(equal) > 1:
        within = f"{SAME_POINTS:g} points" if take["higher_is_better"] else f"{SAME_POINTS:g}%"
        return f"of {len(equal)} shown to score within {within} of the best it needs least memory: {reached}"
    as_high = sum(row["mean"] == take["mean"] for row in able)
    if as_high > 1:
        return f"of {as_high} with the best score it needs least memory: {reached}"
    return f"it scores best: {reached}"


def _lacking(made: Iterable[Row]) -> str:
    """What none of these rows does that could be recommended: `fits and finished its runs`."""
    return " and ".join(dict.fromkeys(words for row in made if (words := _lacks(row))))


def _lacks(row: Row) -> str:
    if row["needs_bytes"] is not None and not row["fits"]:
        return "fits"
    if not row["rank"]:
        return "finished its runs"
    return f"is {rows.floor_of(row).beaten}" if row["above_floor"] is False else ""


def _caution(take: Row) -> str:
    """What a reader must know of the method that is recommended: one seed, runs that diverged."""
    return f" Note on {take['method']}: {take['remark']}." if take["remark"] else ""


def _others(take: Row, equal: list[Row], able: list[Row]) -> str:
    """The other methods that fit, by what can be said of them against the best one."""
    best, groups = able[0], dict[str, list[Row]]()
    for row in able:
        if row is not take:
            groups.setdefault(_relation(row, best, equal), []).append(row)
    return "".join(f" {name}: {'; '.join(map(_whole, rows))}." for name, rows in groups.items())


def _relation(row: Row, best: Row, equal: list[Row]) -> str:
    if row in equal:
        return "As good"
    if min(row["n"], best["n"]) < 2:
        return "Not comparable, of one seed" if row["n"] < 2 else f"Not comparable, {best['method']} having one seed"
    if not row["tied_with_best"]:
        return "Behind"
    seeds = sorted({row["n"], best["n"]})
    return f"{' and '.join(map(str, seeds))} seeds can't tell it from {best['method']}"


def _whole(row: Row) -> str:
    remark = row["remark"].removeprefix("one seed").removeprefix("; ")  # which its group says
    sight = rows.sight_of(row)
    return ", ".join(filter(None, [_named(row), _mib(row), remark])) + (f" ({sight.words})" if sight else "")


def _named(row: Row) -> str:
    return f"{_in_full(row)} {_score_words(row)}"


def _in_full(row: Row) -> str:
    """A method with the configuration that was chosen of several: without it nobody could use what is recommended."""
    return row["method"] + (f" ({row['configuration']})" if row["configuration"] else "")


def _out(row: Row) -> str:
    return f"{row['method']} ({'; '.join(filter(None, [row['configuration'], row['remark']]))})"


def _score_words(row: Row) -> str:
    mean, deviation = row["mean"], row["standard_deviation"]
    return score_text(mean) + (f" ± {score_text(deviation, mean)} ({row['n']})" if deviation is not None else "")


def _mib(row: Row) -> str:
    return f"{mib(row['needs_bytes'])} MiB"


def _speed(take: Row, finals: list[Record]) -> str:
    """Its speed against the reference's on the tasks of the ranking, where there is one set-up to read it off."""
    setups = group([run for run in finals if take["task"] in (rows.AVERAGE, run["task"])])
    if len(setups) != 1 or not setups[0].reference or setups[0].reference == take["method"]:
        return ""
    found = [row for row in rows.throughput(setups[0]) if row["method"] == take["method"]]
    ratio = found[0]["tokens_per_second_ratio"] if found else None
    if not ratio:
        return ""
    labels = (take["method"], setups[0].reference)
    slowed = " and ".join(label for label in labels if rows.was_slowed(setups[0], label))
    doubt = f" (not to be relied on: other work slowed {slowed})" if slowed else ""
    return f", at {ratio:.2f} times the speed of {setups[0].reference}{doubt}"
