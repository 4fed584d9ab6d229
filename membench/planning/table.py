"""One table of the page to explore: what each method needs on a model, at every batch and sequence."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from membench.config.errors import explain
from membench.planning.blueprint import Blueprint
from membench.planning.extrapolate import NotAlikeError
from membench.planning.method import plan_method
from membench.planning.planner import Given, method_values
from membench.planning.spread import BATCHES, LEAST, Learner, Point, Spread
from membench.planning.summits import Mountains, Summit, peak_bytes, value_at
from membench.planning.traces import Traces, Unpacked, trimmed
from membench.planning.workload import Workload
from reports.parts import FIELDS

Row = dict[str, Any]

OFFERED_BATCHES = (1, 2, 4, 8, 16, 32, 64)
OFFERED_SEQUENCES = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
LARGEST_BATCH, LONGEST = OFFERED_BATCHES[-1], OFFERED_SEQUENCES[-1]  # any size up to these may be typed
FIRST = 1024  # tokens, or the most that are offered: what is shown at first, even without a script
START = 176  # tokens where plans are made: a number that no width of a model is, so that sizes tell allocations apart
CHECKED = 3  # of each method: sizes at which the plan's trace is replayed, to see that the peak is right
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (  # options with which a method needs much less
    ("galore", {"in_backward": True}),
    ("lisa", {"train_embeddings": False}),
)


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    model: str
    dtype: str
    checkpointing: bool

    @property
    def words(self) -> str:
        return f"{self.model}, {self.dtype}{', checkpointing' if self.checkpointing else ''}"


def plan_setting(setting: Setting, methods: Sequence[str], given: Given) -> dict[str, Any]:
    """The table of a setting: what each method needs, at every batch and sequence.

    Raises:
        ValueError: an unknown model, method or hyper-parameter.
        RuntimeError: a plan, at a size drawn by chance, says something else than the table.
    """
    workload = Workload(
        setting.model,
        batch_size=BATCHES[0],
        sequence_length=START,
        dtype=setting.dtype,  # type: ignore[arg-type]
        checkpointing=setting.checkpointing,
    )
    blueprint = Blueprint(workload)
    longest = min(blueprint.longest_sequence or LONGEST, LONGEST)
    start = min(START, longest // 2)
    blueprint = blueprint.with_workload(sequence_length=start)
    offered = [tokens for tokens in OFFERED_SEQUENCES if tokens <= longest] or [longest]
    rows: list[Row] = []
    traces = Traces()
    given_of, refused = {}, {}
    for method, options in _named(methods):
        name = " ".join([method, *(f"{key}={str(value).lower()}" for key, value in options.items())])
        values = {**method_values(blueprint, method, given), **options}
        given_of[name] = method, values
        try:
            row = _row(blueprint, method, values, (start, longest // 2 + 1, longest), traces)
            rows.append({"method": name, **row})
        except NotAlikeError as error:
            refused[name] = f"what it needs follows no rule that a page can hold ({error})"
        except ValueError as error:
            refused[name] = str(error)
        except Exception as error:  # from whatever code comes with a model or method: the other rows continue
            refused[name] = explain(error)
    packed = traces.packed()
    unpacked, first = Unpacked(packed), Point(1, min(FIRST, offered[-1]))
    for row in rows:
        row["reserved"] = unpacked.reserved_bytes(row["traces"], first)
    if rows:
        row = random.Random(setting.words).choice(rows)
        _hold_to_a_plan(row, unpacked, blueprint, *given_of[row["method"]], longest)
    return {
        "model": setting.model,
        "dtype": setting.dtype,
        "checkpointing": setting.checkpointing,
        "sequences": offered,
        "first": first.sequence,
        "rows": rows,
        "traces": packed,
        "refused": refused,
    }


def _named(methods: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in methods:
        yield method, {}
        yield from ((name, options) for name, options in VARIANTS if name == method)


def _row(blueprint: Blueprint, method: str, values: Mapping[str, Any], sequences: Sequence[int], traces: Traces) -> Row:
    """Notes the method's traces, too. Raises NotAlikeError and ValueError."""
    plan = plan_method(blueprint, method, values)
    learner, longest = Learner(plan, blueprint, values, sequences), sequences[-1]
    several = learner.spread(BATCHES)
    more = _summits(method, several, Point(LARGEST_BATCH, longest))
    try:
        single = learner.spread((1,))
    except NotAlikeError:  # more than a few copies differ: a batch of one has a plan of its own
        blueprint = blueprint.with_workload(batch_size=1)
        plan = plan_method(blueprint, method, values)
        single = Learner(plan, blueprint, values, sequences).spread((1,))
    one = _summits(method, single, Point(1, longest))
    return {
        "single": [_packed(summit) for summit in one],
        "several": [_packed(summit) for summit in more],
        "traces": traces.add(single, several),
    }


def _hold_to_a_plan(
    row: Row, unpacked: Unpacked, blueprint: Blueprint, method: str, values: Mapping[str, Any], longest: int
) -> None:
    draw = random.Random(blueprint.source.name)
    point = Point(draw.randint(1, 8), draw.randint(LEAST, longest))
    there = blueprint.with_workload(batch_size=point.batch, sequence_length=point.sequence)
    planned = plan_method(there, method, values).row
    expected = [*(planned["at_peak"][field] for field in FIELDS), planned["peak_reserved_bytes"]]
    found = [*peak_parts(row, point), unpacked.reserved_bytes(row["traces"], point)]
    if found != expected:
        raise RuntimeError(f"{row['method']} at {point.batch} x {point.sequence} tokens: {found}, planned {expected}")


def peak_parts(row: Row, point: Point) -> list[int]:
    """Bytes of each part at the peak, as a page reads them from a row."""
    summits = row["single" if point.batch == 1 else "several"]
    found = [[value_at(part, point) for part in one["parts"]] for one in summits]
    return max(found, key=sum)  # the first of them


def _summits(method: str, spread: Spread, most: Point) -> list[Summit]:
    """The moments that are the peak at some size up to `most`; at a few sizes the plan's trace is replayed.

    Raises:
        NotAlikeError: another moment is the peak there.
    """
    least = Point(spread.batches[0], min(LEAST, most.sequence))
    found, draw = Mountains(spread).summits(least, most), random.Random(method)
    for _ in range(CHECKED):
        point = Point(draw.randint(least.batch, most.batch), draw.randint(least.sequence, most.sequence))
        if spread.replay.peak_bytes(spread.at(point)) != peak_bytes(found, point):
            raise NotAlikeError(f"at {point.batch} x {point.sequence} tokens another moment is the peak")
    return found


def _packed(summit: Summit) -> dict[str, Any]:
    return {"phase": summit.phase, "parts": list(map(trimmed, summit.parts))}
