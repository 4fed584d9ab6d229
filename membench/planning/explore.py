"""Plans of many methods on many models, at every batch and sequence: what the page of `membench explore` shows."""

from __future__ import annotations

import gc
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from membench.config.defaults import check_targets
from membench.memory.allocator import CUDA_CONTEXT_BYTES
from membench.planning.blueprint import Blueprint
from membench.planning.cards import CARDS
from membench.planning.planner import NO_FORK, Given, cores, method_values
from membench.planning.spread import LEAST
from membench.planning.table import LARGEST_BATCH, LONGEST, OFFERED_BATCHES, Setting, plan_setting
from membench.planning.workload import Workload
from reports.parts import PARTS

_TURNING = {"max_position_embeddings", "rope_parameters", "rope_theta", "rms_norm_eps", "initializer_range"}


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
    check_targets(methods, given)
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
        "cards": [
            {"name": card.name, "bytes": card.usable_bytes, "source": card.source, "bfloat16": card.bfloat16}
            for card in CARDS
        ],
        "batches": OFFERED_BATCHES,
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
            deepest = sorted(wanted, key=lambda setting: -Blueprint(Workload(setting.model, sequence_length=1)).depth)
            made = {one: pool.submit(plan_setting, one, methods, given) for one in deepest}  # the slow ones first
            for setting in wanted:
                table = made[setting].result()
                again = any(NO_FORK in why for why in table["refused"].values())
                yield plan_setting(setting, methods, given) if again else table
                report(setting.words)
    finally:
        gc.unfreeze()
