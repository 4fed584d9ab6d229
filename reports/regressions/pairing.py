"""Which record is compared with which: the same task, method, model and seed, and the same training."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from reports.record import Record
from reports.schema import training
from reports.setups import created, row_label, varied_hyperparameters

Pair = tuple[Record, Record]  # baseline, candidate


class RowKey(NamedTuple):
    """A row of a check; `method` is named with its hyper-parameters where it ran with several."""

    task: str
    method: str
    model: str


@dataclass
class PairedRow:
    """All seeds of one row."""

    pairs: dict[int, Pair] = field(default_factory=dict)
    refused: dict[int, list[str]] = field(default_factory=dict)  # differences that forbid a comparison
    missing: dict[int, Record] = field(default_factory=dict)  # in the baseline only
    new: dict[int, Record] = field(default_factory=dict)  # in the candidate only


def place(pair: Pair) -> str:
    """What a run has in common with those that it is a ratio to."""
    run = pair[1]
    return json.dumps([run["task"], run["model"], run["seed"], _made(run)], sort_keys=True)


_KNOWN_LATE = ("steps", "headline", "higher_is_better", "validation_examples")  # null where a run didn't get so far
_PROVENANCE = ("data_sha256", "data_revision", "model_revision", "tokenizer", "device")  # of the environment
_SURROUNDINGS = (*_PROVENANCE, "threads")  # by which a folder has several runs of one training
_LONGEST_VALUE = 20  # letters, in the name of a row: of a hash the end tells


def pair(baseline: Iterable[Record], candidate: Iterable[Record]) -> dict[RowKey, PairedRow]:
    """All rows of both sides, in the order of task, model and method."""
    before, after = _by_key(baseline), _by_key(candidate)
    names = [varied_hyperparameters([run for runs in side.values() for run in runs]) for side in (before, after)]
    varied = dict.fromkeys(name for side in (before, after) for name in _varied(side))
    rows: dict[RowKey, PairedRow] = {}

    def row(run: Record) -> PairedRow:
        several = {name: None for side in names for name in side.get(run["method"], [])}
        made = _made(run)
        words = [row_label(run, list(several)), *(f"{name}={_brief(made.get(name))}" for name in varied)]
        return rows.setdefault(RowKey(run["task"], " ".join(words), run["model"]), PairedRow())

    for old, new in _matches(before, after):
        if old is None:
            row(new).new[new["seed"]] = new
        elif new is None:
            row(old).missing[old["seed"]] = old
        elif found := differences(old, new):
            row(new).refused[new["seed"]] = found
        else:
            row(new).pairs[new["seed"]] = (old, new)
    return dict(sorted(rows.items()))


_Key = tuple[str, str, int, str]  # task, method, seed, model


def _by_key(records: Iterable[Record]) -> dict[_Key, list[Record]]:
    """Records by what pairs them; of several runs of one configuration the last one made."""
    keys: dict[_Key, list[Record]] = {}
    for run in sorted(records, key=created, reverse=True):
        newer = keys.setdefault((run["task"], run["method"], run["seed"], run["model"]), [])
        if not any(_made_alike(run, other) for other in newer):
            newer.append(run)
    return keys


def left_out(records: Iterable[Record]) -> int:
    """How many records aren't looked at, since there is a newer one of the same configuration."""
    records = list(records)
    return len(records) - sum(map(len, _by_key(records).values()))


def _made(run: Record) -> dict[str, Any]:
    """All that may tell runs of one key apart, but hyper-parameters."""
    return {**{name: run["environment"].get(name) for name in _SURROUNDINGS}, **training(run)}


def _made_alike(run: Record, other: Record) -> bool:
    """Whether two runs of one key are of one configuration, as far as both know where and from what they were made."""
    one, two = run["environment"], other["environment"]
    return (
        run["hyperparameters"] == other["hyperparameters"]
        and training(run) == training(other)
        and all(one.get(name) == two.get(name) or None in (one.get(name), two.get(name)) for name in _SURROUNDINGS)
    )


def _varied(side: dict[_Key, list[Record]]) -> list[str]:
    """What tells apart runs that one side has of one key."""
    several = [[_made(run) for run in runs] for runs in side.values() if len(runs) > 1]
    return [name for made in several for name in made[0] if any(one.get(name) != made[0][name] for one in made)]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"…{text[1 - _LONGEST_VALUE :]}"


def _matches(before: dict[_Key, list[Record]], after: dict[_Key, list[Record]]) -> Iterator[tuple[Any, Any]]:
    """Pairs of records, with None for a side that has none."""
    lonely: dict[tuple[str, str, int], tuple[list[Record], list[Record]]] = {}
    for key in {**before, **after}:
        old, new = list(before.get(key, [])), list(after.get(key, []))
        yield from _same_configuration(old, new)
        if len(before.get(key, [])) == len(after.get(key, [])) == len(old) == 1:
            yield old.pop(), new.pop()
        ends = lonely.setdefault(key[:3], ([], []))
        ends[0].extend(old)
        ends[1].extend(new)
    for old, new in lonely.values():
        if len(old) == len(new) == 1 and old[0]["model"] != new[0]["model"]:
            yield old.pop(), new.pop()  # to be refused: the same run, but of another model
        yield from ((run, None) for run in old)
        yield from ((None, run) for run in new)


def _same_configuration(old: list[Record], new: list[Record]) -> Iterator[Pair]:
    """Takes out of both lists what differs in nothing that was set; first what was made on as many threads, too."""
    for is_same in (_made_alike, lambda run, other: run["hyperparameters"] == other["hyperparameters"]):
        for run in list(old):
            for other in new:
                if is_same(run, other) and not differences(run, other):
                    old.remove(run)
                    new.remove(other)
                    yield run, other
                    break


def differences(old: Record, new: Record) -> list[str]:
    """What forbids comparing two runs, each as `steps: 100 -> 200`. What one of them doesn't know is no difference."""
    places = [(training(old), training(new)), (old["environment"], new["environment"]), (old, new)]
    same_data = old["environment"].get("data_sha256") and _equal(*places[1], "data_sha256")
    names = [name for name in places[0][0] if not (name == "data" and same_data)]
    provenance = [name for name in _PROVENANCE if not (name == "data_revision" and same_data)]
    counted = ["parameters"] if old["parameters"] and new["parameters"] else []  # a count of 0 is unknown
    fields = (names, provenance, ["model", *counted, "headline", "higher_is_better", "validation_examples"])
    return [
        f"{name}: {_show(one[name])} -> {_show(other[name])}"
        for (one, other), group in zip(places, fields, strict=True)
        for name in group
        if not _equal(one, other, name)
    ]


def _equal(one: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    if name not in one or name not in other:
        return True
    unknown = name in (*_PROVENANCE, *_KNOWN_LATE) and None in (one[name], other[name])
    return unknown or one[name] == other[name]


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def changed_hyperparameters(old: Record, new: Record) -> list[str]:
    """Hyper-parameters that differ: the runs compare, but a reader wants to know."""
    one, other = old["hyperparameters"], new["hyperparameters"]
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name}: {_show(one.get(name))} -> {_show(other.get(name))}" for name in names]
