"""One table of the page to explore: what each method needs on a model, at every batch and sequence."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from membench.config.errors import explain
from membench.planning.blueprint import Blueprint
from membench.planning.extrapolate import NotAlikeError
from membench.planning.method import plan_method
from membench.planning.planner import Given, method_values
from membench.planning.spread import BATCHES, LEAST, Learner, Point, Spread
from membench.planning.summits import Mountains, Summit, peak_bytes, value_at
from membench.planning.surplus import PLANNED_SEQUENCES, Surplus
from membench.planning.workload import Workload
from reports.parts import FIELDS

Row = dict[str, Any]

LARGEST_BATCH, LONGEST = 64, 16_384  # of the page
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
    planned = [tokens for tokens in PLANNED_SEQUENCES if tokens <= longest]
    rows: list[Row] = []
    given_of, refused = {}, {}
    for method, options in _named(methods):
        name = " ".join([method, *(f"{key}={str(value).lower()}" for key, value in options.items())])
        values = {**method_values(blueprint, method, given), **options}
        given_of[name] = method, values
        try:
            row = _row(blueprint, method, values, (start, longest // 2 + 1, longest), planned)
            rows.append({"method": name, **row})
        except NotAlikeError as error:
            refused[name] = f"what it needs follows no rule that a page can hold ({error})"
        except ValueError as error:
            refused[name] = str(error)
        except Exception as error:  # from whatever code comes with a model or method: the other rows continue
            refused[name] = explain(error)
    if rows:
        row = random.Random(setting.words).choice(rows)
        _hold_to_a_plan(row, blueprint, *given_of[row["method"]], longest)
    return {
        "model": setting.model,
        "dtype": setting.dtype,
        "checkpointing": setting.checkpointing,
        "sequences": planned,
        "rows": rows,
        "refused": refused,
    }


def _named(methods: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in methods:
        yield method, {}
        yield from ((name, options) for name, options in VARIANTS if name == method)


def _row(
    blueprint: Blueprint, method: str, values: Mapping[str, Any], sequences: Sequence[int], planned: Sequence[int]
) -> Row:
    """Raises NotAlikeError and ValueError."""
    plan = plan_method(blueprint, method, values)
    learner, lengths = Learner(plan, blueprint, values, sequences), _lengths(sequences[-1])
    several = learner.spread(BATCHES)
    more = _summits(method, several, [Point(*at) for at in product(_batches(), lengths)])
    try:
        single = learner.spread((1,))
    except NotAlikeError:  # more than a few copies differ: a batch of one has a plan of its own
        blueprint = blueprint.with_workload(batch_size=1)
        plan = plan_method(blueprint, method, values)
        single = Learner(plan, blueprint, values, sequences).spread((1,))
    one = _summits(method, single, [Point(1, tokens) for tokens in lengths])
    surplus = Surplus((single, one), (several, more), planned, sequences[-1])
    return {
        "single": [_packed(summit) for summit in one],
        "several": [_packed(summit) for summit in more],
        "surplus": surplus.table,
        "between": surplus.between(method),
    }


def _hold_to_a_plan(row: Row, blueprint: Blueprint, method: str, values: Mapping[str, Any], longest: int) -> None:
    draw = random.Random(blueprint.source.name)
    point = Point(draw.randint(1, 8), draw.randint(LEAST, longest))
    there = blueprint.with_workload(batch_size=point.batch, sequence_length=point.sequence)
    planned, found = plan_method(there, method, values).row["at_peak"], peak_parts(row, point)
    if found != [planned[field] for field in FIELDS]:
        raise RuntimeError(f"{row['method']} at {point.batch} x {point.sequence} tokens: {found}, planned {planned}")


def peak_parts(row: Row, point: Point) -> list[int]:
    """Bytes of each part at the peak, as a page reads them from a row."""
    summits = row["single" if point.batch == 1 else "several"]
    found = [[int(value_at(part, point)) // one.get("over", 1) for part in one["parts"]] for one in summits]
    return max(found, key=sum)  # the first of them


def _summits(method: str, spread: Spread, points: Sequence[Point]) -> list[Summit]:
    """The moments that are the peak at some of `points`; at a few others the plan's trace is replayed.

    Raises:
        NotAlikeError: another moment is the peak there.
    """
    found, draw = Mountains(spread).summits(points), random.Random(method)
    most = max(points)
    for _ in range(CHECKED):
        point = Point(draw.randint(spread.batches[0], most.batch), draw.randint(LEAST, most.sequence))
        if spread.replay.peak_bytes(spread.at(point)) != peak_bytes(found, point):
            raise NotAlikeError(f"at {point.batch} x {point.sequence} tokens another moment is the peak")
    return found


def _lengths(longest: int) -> list[int]:
    """Sequences at which the peak is looked for."""
    steps = 64
    return sorted({round(LEAST * (longest / LEAST) ** (step / steps)) for step in range(steps + 1)})


def _batches() -> list[int]:
    return [2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, LARGEST_BATCH]


def _packed(summit: Summit) -> dict[str, Any]:
    """Coefficients as whole numbers, over a common denominator if they aren't."""
    over = math.lcm(*(c.denominator for part in summit.parts for c in part))
    parts = [_trimmed([int(c * over) for c in part]) for part in summit.parts]
    return {"phase": summit.phase, "parts": parts, **({"over": over} if over > 1 else {})}


def _trimmed(coefficients: list[int]) -> list[int]:
    while coefficients and not coefficients[-1]:
        coefficients.pop()
    return coefficients
