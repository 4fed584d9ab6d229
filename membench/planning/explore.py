"""Plans of many methods on many models, at every batch and sequence: what the page of `membench explore` shows."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import product
from typing import Any

import torch

from membench.config.errors import explain
from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.planning.blueprint import Blueprint
from membench.planning.cards import CARDS
from membench.planning.extrapolate import NotAlikeError
from membench.planning.method import Plan, plan_method
from membench.planning.planner import NO_FORK, cores, method_values
from membench.planning.replay import Places, Replay, places_of
from membench.planning.spread import BATCHES, LEAST, Learner, Point, Spread
from membench.planning.summits import Mountains, Summit, surplus_bytes, value_at
from membench.planning.workload import Workload
from reports.parts import PARTS

Given = Mapping[str, Mapping[str, Any]]
Row = dict[str, Any]

LARGEST_BATCH, LONGEST = 64, 16_384  # of the page
START = 176  # tokens where plans are made: a number that no width of a model is, so that sizes tell allocations apart
PLANNED_BATCHES = (1, 2, 4, 8, 16)
PLANNED_SEQUENCES = (128, 256, 512, 1024, 2048, 4096, 8192)
CHECKED = 3  # of each method: sizes at which the plan's traces are replayed, to see that the peak is right
MOST_PLANNED = 5  # sequences, the longest ones, of which the allocator is simulated
_TURNING = {"max_position_embeddings", "rope_parameters", "rope_theta", "rms_norm_eps", "initializer_range"}
BEYOND = 2  # times the largest card: there, too
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


def explore(
    wanted: Sequence[Setting],
    methods: Sequence[str],
    given: Given,
    *,
    report: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """The data of the page, as one JSON document.

    Args:
        wanted: the tables.
        methods: names of `optimizers`.
        given: hyper-parameters that differ from fine-tuning's defaults, by method ("*": all methods that have them).
        report: called with the name of each table that is made.

    Raises:
        ValueError: an unknown model, method or hyper-parameter.
    """
    models = list(dict.fromkeys(setting.model for setting in wanted))
    described = describe(models)
    planned_as = {model["name"]: model["planned_as"] for model in described}
    needed = dict.fromkeys(Setting(planned_as[one.model], one.dtype, one.checkpointing) for one in wanted)
    for setting in needed:
        for method in methods:
            method_values(Blueprint(Workload(setting.model)), method, given)  # refused before any of it is made
    return page_data(described, list(_carry_out(list(needed), methods, given, report)))


def page_data(models: list[dict[str, Any]], settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The document of models and tables, without parts that nothing has any bytes of."""
    summits = [one for table in settings for row in table["rows"] for one in row["single"] + row["several"]]
    kept = [
        number for number, part in enumerate(PARTS) if not part.later or any(one["parts"][number] for one in summits)
    ]
    for one in summits:
        one["parts"] = [one["parts"][number] for number in kept]
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "made": datetime.now(UTC).date().isoformat(),
        "context_bytes": CUDA_CONTEXT_BYTES,
        "parts": [{"word": PARTS[number].word, "colour": PARTS[number].colour} for number in kept],
        "cards": [{"name": card.name, "bytes": card.usable_bytes, "source": card.source} for card in CARDS],
        "batches": PLANNED_BATCHES,
        "least_sequence": LEAST,
        "largest_batch": LARGEST_BATCH,
        "models": models,
        "settings": settings,
    }


def describe(models: Sequence[str]) -> list[dict[str, Any]]:
    """What the page says of models, the smallest first; those of one shape are planned as the one of most positions."""
    blueprints = {model: Blueprint(Workload(model, sequence_length=1)) for model in models}
    longest = {model: blueprint.longest_sequence or LONGEST for model, blueprint in blueprints.items()}
    first: dict[str, str] = {}
    for model in sorted(models, key=lambda model: -longest[model]):
        first.setdefault(_shape(blueprints[model]), model)
    return [
        {
            "name": model,
            "planned_as": first[_shape(blueprint)],
            "parameters": blueprint.parameters,
            "attention": blueprint.attention,
            "attention_dropout": blueprint.attention_dropout,
            "longest": min(longest[model], LONGEST),
            "positions": blueprint.longest_sequence,
        }
        for model, blueprint in sorted(blueprints.items(), key=lambda item: item[1].parameters)
    ]


def _shape(blueprint: Blueprint) -> str:
    """The same for models that differ only in how their rotary positions turn, which takes no memory."""
    values = blueprint.source.config.to_dict()
    if "rope_parameters" in values:
        values = {name: value for name, value in values.items() if name not in _TURNING}
    return json.dumps(values, sort_keys=True, default=str)


def _carry_out(
    wanted: Sequence[Setting], methods: Sequence[str], given: Given, report: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The tables in order, made on all cores; all methods of a table in one process, which knows its shapes then."""
    try:
        workers = min(len(wanted), cores())
        if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
            for setting in wanted:
                yield plan_setting(setting, methods, given)
                report(setting.words)
            return
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, fork, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            made = [pool.submit(plan_setting, setting, methods, given) for setting in wanted]
            for setting, one in zip(wanted, made, strict=True):
                table = one.result()
                again = any(NO_FORK in why for why in table["refused"].values())
                yield plan_setting(setting, methods, given) if again else table
                report(setting.words)
    finally:
        gc.unfreeze()


def plan_setting(setting: Setting, methods: Sequence[str], given: Given) -> dict[str, Any]:
    """The table of a setting: what each method needs, at every batch and sequence.

    Raises:
        ValueError: an unknown model, method or hyper-parameter.
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
    planned = [tokens for tokens in PLANNED_SEQUENCES if tokens <= longest][-MOST_PLANNED:]
    rows, refused = [], {}
    for method, options in _named(methods):
        gc.collect()
        gc.freeze()  # what is known by now isn't garbage, and the meter collects before each step
        name = " ".join([method, *(f"{key}={str(value).lower()}" for key, value in options.items())])
        values = {**method_values(blueprint, method, given), **options}
        try:
            rows.append(
                {"method": name, **_row(blueprint, method, values, (start, longest // 2 + 1, longest), planned)}
            )
        except NotAlikeError as error:
            refused[name] = f"what it needs follows no rule that a page can hold ({error})"
        except ValueError as error:
            refused[name] = str(error)
        except Exception as error:  # from whatever code comes with a model or method: the other rows continue
            refused[name] = explain(error)
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
    learner, places, lengths = Learner(plan, blueprint, values, sequences), places_of(plan), _lengths(sequences[-1])
    several = learner.spread(BATCHES)
    more = _summits(plan, places, several, [Point(*at) for at in product(_batches(), lengths)])
    try:
        single = learner.spread((1,))
    except NotAlikeError:  # more than a few copies differ: a batch of one has a plan of its own
        blueprint = blueprint.with_workload(batch_size=1)
        plan = plan_method(blueprint, method, values)
        single, places = Learner(plan, blueprint, values, sequences).spread((1,)), places_of(plan)
    one = _summits(plan, places, single, [Point(1, tokens) for tokens in lengths])
    return {
        "single": [_packed(summit) for summit in one],
        "several": [_packed(summit) for summit in more],
        "surplus": [
            [_surplus(Point(batch, tokens), *((single, one) if batch == 1 else (several, more))) for tokens in planned]
            for batch in PLANNED_BATCHES
        ],
    }


def _summits(plan: Plan, places: Sequence[Places], spread: Spread, points: Sequence[Point]) -> list[Summit]:
    """The moments that are the peak at some of `points`; at a few others the plan's traces are replayed.

    Raises:
        NotAlikeError: another moment is the peak there.
    """
    found = Mountains(spread, places, plan.depth).summits(points)
    replay, draw = Replay(plan, places), random.Random(plan.method)
    most = max(points)
    for _ in range(CHECKED):
        point = Point(draw.randint(spread.batches[0], most.batch), draw.randint(LEAST, most.sequence))
        if replay.peak_bytes(spread.at(point)) != peak_bytes(found, point):
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


def peak_bytes(summits: Sequence[Summit], point: Point) -> int:
    return max(int(sum(value_at(part, point) for part in summit.parts)) for summit in summits)


def _surplus(point: Point, spread: Spread, summits: Sequence[Summit]) -> int | None:
    """What the allocator reserves beyond the peak; None where the peak alone is beyond all cards."""
    beyond = peak_bytes(summits, point) > BEYOND * CARDS[-1].usable_bytes
    return None if beyond else surplus_bytes(spread, point)
