"""One method on one model at one depth: training steps on fake tensors, metered."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import distributed, nn

import optimizers
from membench.memory.breakdown import find_peaks
from membench.memory.components import classify
from membench.memory.meter import MemoryMeter
from membench.memory.trace import OPTIMIZER, Trace
from membench.planning.blueprint import Blueprint
from membench.planning.fake import QuickFakeTensorMode
from membench.planning.kernels import fake_tensors
from membench.planning.layers import ends, kinds
from membench.planning.metered import FakeMeter
from membench.planning.passes import RepeatedLoss, hooks_of
from membench.planning.pretended import pretended
from membench.planning.workload import Batch, loss_function
from membench.training import parallel
from membench.training.metering import selections_of, train_selection
from membench.training.seeding import random_state_kept
from optimizers import MemoryEfficientOptimizer
from optimizers.shared.blocks import find_layers
from tasks.models.modes import all_layers_running


class TooLargeError(Exception):
    """More is needed than was asked about."""


@dataclass
class Simulation:
    """What the meter saw.

    Attributes:
        depth: layers of the model.
        trace: all allocations.
        layers: names of the lists of layers.
        component: of each module, by name.
        trained: number of weights that were trained, by selection.
        leaves_state: does a switch leave state behind for what is no longer trained?
        of_gradients: allocations made from gradients as they are accumulated (on fake tensors).
    """

    depth: int
    trace: Trace
    layers: list[str]
    component: dict[str, str]
    trained: dict[str | None, int] = field(default_factory=dict)
    leaves_state: bool = False
    of_gradients: set[int] = field(default_factory=set)


@contextmanager
def _same_values(device: torch.device) -> Iterator[None]:
    """Draw the same weights and batches each time, on which it depends which experts get tokens."""
    with random_state_kept(device):
        torch.manual_seed(0)
        yield


def simulate(
    blueprint: Blueprint,
    method: str,
    values: Mapping[str, Any],
    depth: int,
    *,
    whole_cycle: bool = False,
    steps: int = 2,
    most_bytes: int | None = None,
    device: str | None = None,
) -> Simulation:
    """Train on the worst selections, or on the ends of a cycle: in between, memory rises or falls layer by layer.

    Args:
        blueprint: of the model.
        method: a name in `optimizers`.
        values: its hyper-parameters.
        depth: layers of the model.
        whole_cycle: go through all blocks; otherwise skip those between the first and last layers of a kind.
        steps: on each selection; state that the first one creates is there in the second.
        most_bytes: stop before a step if the peak is more by then.
        device: train a real model with random weights there, instead of fake tensors; with the ranks of this
            process's group, if it has one.

    Raises:
        TooLargeError: the peak is more than `most_bytes`.
    """
    gc.collect()
    gc.freeze()  # what is there by now isn't garbage, and the meter collects before each step
    together = device is not None and distributed.is_initialized()
    ranks = nullcontext() if together else pretended(blueprint.workload.gpus)
    values_apart = nullcontext() if device is None else _same_values(torch.device(device))
    with values_apart, ranks, fake_tensors(blueprint.workload.device) if device is None else nullcontext() as fake:
        with nullcontext() if device is None else torch.device(device):
            model = blueprint.build(depth)
        hooks = hooks_of(model)
        build = partial(optimizers.create, method, **_in_order(method, values))
        optimizer = parallel.place(model, method, blueprint.workload.strategy, build)
        selections = _selections(optimizer)
        first = next(selections)  # before the meter, which counts a switch
        meter = MemoryMeter(model, optimizer) if fake is None else FakeMeter(model, optimizer, fake)
        simulation = Simulation(depth, meter.trace, _lists_of_layers(model), classify(model))
        knows_worst = chooses(type(optimizer))
        ending = ends(kinds(model))
        workload = blueprint.workload
        loss = loss_function(workload)
        replicas = workload.shards < workload.gpus  # which send gradients from within the backward pass

        def batches(step: int) -> list[Batch]:
            if most_bytes is not None and max((peak for peak, _ in find_peaks(meter.trace)[0]), default=0) > most_bytes:
                raise TooLargeError
            return _micro_batches(blueprint, device)

        if isinstance(meter, FakeMeter) and workload.gradient_accumulation_steps == 1 and not replicas:
            loss = RepeatedLoss(loss, meter, blueprint, hooks)
        with all_layers_running(model), meter:
            for turn in chain([first], selections):
                if turn and not knows_worst:
                    simulation.leaves_state |= any(not p.requires_grad for p in optimizer.state)
                if whole_cycle or _is_an_end(optimizer.selection, simulation.layers, ending):
                    simulation.trained[optimizer.selection] = sum(p.numel() for p in optimizer.trainable)
                    train_selection(meter, loss, batches, turn, steps=steps)
        if isinstance(meter, FakeMeter):
            simulation.of_gradients = meter.of_gradients
    return simulation


def _in_order(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters with blocks one after another: by chance they would come otherwise at each depth."""
    order = signature(optimizers.get(method)).parameters.get("order")
    by_chance = order is not None and values.get("order", order.default) == "random"
    return {**values, "order": "ascending"} if by_chance else {**values}


def trained_weights(blueprint: Blueprint, method: str, values: Mapping[str, Any], depth: int) -> list[int]:
    """How many weights are trained on each selection, without any step."""
    with QuickFakeTensorMode():
        optimizer = optimizers.create(method, blueprint.build(depth), **values)
        return [sum(p.numel() for p in optimizer.trainable) for _ in _selections(optimizer)]


def _micro_batches(blueprint: Blueprint, device: str | None) -> list[Batch]:
    return [blueprint.batch(device) for _ in range(blueprint.workload.gradient_accumulation_steps)]


def _lists_of_layers(model: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in find_layers(model)})


def _selections(optimizer: MemoryEfficientOptimizer) -> Iterator[int]:
    """The selections to go through: the worst cases if the method knows them, or all."""
    return selections_of(optimizer, 1 if chooses(type(optimizer)) else None)


def chooses(method: type[MemoryEfficientOptimizer]) -> bool:
    """Does a method choose what it trains, so that it knows its worst cases?"""
    return method.worst_case is not MemoryEfficientOptimizer.worst_case


def _is_an_end(selection: str | None, layers: list[str], ending: set[str]) -> bool:
    """Does a selection have the first or last layer of its kind, or name no layer?"""
    named = {match[0] for match in layer_pattern(layers).finditer(selection or "")}
    return not named or bool(named & ending)


def made_between_passes(trace: Trace, index: int) -> bool:
    """Is an allocation of the backward phase the method's own? Its size depends on the model, but not on the batch."""
    return trace.phases[index] == "backward" and trace.modules[index] == OPTIMIZER


def layer_pattern(layers: Sequence[str]) -> re.Pattern[str]:
    """Matches layers in a text: group 1 is the list's name, group 2 the layer's number."""
    names = "|".join(map(re.escape, layers)) or "(?!)"
    return re.compile(rf"(?<![\w.])({names})\.(\d+)(?![\w])")
