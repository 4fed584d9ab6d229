"""What a run will take, before it is made: bytes from its plan, seconds from a few of its steps."""

import math
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

import tasks
from membench.config.options import WorkloadOptions
from membench.config.run import Run, Training
from membench.planning.blueprint import Blueprint
from membench.planning.method import plan_method
from membench.planning.workload import PACKED, Workload
from membench.training import tracking
from membench.training.build import build_model, build_optimizer, create_task, from_scratch, use_device
from membench.training.clock import Clock
from membench.training.loop import Loop, largest_micro_batches
from optimizers.shared.blocks import matching
from tasks import HasReference, Task

STEPS = 3  # the first prepares much; the others are timed
LONGEST_EVALUATION = 60.0  # seconds, after which an evaluation is stopped


def rehearse(run: Run, *, evaluates: bool, tried: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Plan a run; if it fits the device, make its first steps, and an evaluation if asked to.

    Of several hyper-parameters that are `tried` instead of its own it has those that need most, such as the largest
    rank. The process can't be used for much else afterwards.

    Returns:
        planned_bytes: at the peak, on a GPU with what context and allocator add, as far as there is room; None of what
            can't be planned.
        room_bytes: of the device.
        step_seconds: median of the steps; None if it doesn't fit, or needs several processes.
        evaluation_seconds: of all validation examples, at most `LONGEST_EVALUATION`; None if there was none.
        other_seconds: of the whole run, for what a reference says before training and for tracked norms, of which one
            is made; each at most `LONGEST_EVALUATION`.
    """
    use_device(run)
    task = create_task(run.training, run.task, run.seed)
    room = room_bytes(torch.device(run.device))
    runs = [replace(run, hyperparameters=dict(values)) for values in tried] or [run]
    plans = [planned_bytes(one, task, room) for one in runs]
    planned = max(plans, key=lambda size: size or 0)
    run = runs[plans.index(planned)]
    found: dict[str, Any] = {"planned_bytes": planned, "room_bytes": room}
    if (planned is not None and planned > room) or run.training.processes > 1:
        return {**found, "step_seconds": None, "evaluation_seconds": None, "other_seconds": None}
    loop = _first_steps(run, task)
    seconds = loop.clock.medians()
    found["step_seconds"] = sum(spent for spent in seconds.values() if spent is not None)
    found["other_seconds"] = _other_seconds(loop, run.training)  # before an evaluation, which finishes the model
    return {**found, "evaluation_seconds": _evaluation_seconds(loop) if evaluates else None}


def planned_bytes(run: Run, task: Task, room: int) -> int | None:
    """What the run needs at its peak, on batches like the task's largest; None of a step that plans don't know."""
    family = run.task.partition("/")[0]
    if family not in tasks.FAMILIES or run.training.autocast:  # a task of the user's own, or casts that no plan has
        return None
    largest = largest_micro_batches(task, run.training, torch.device("cpu"))[0]
    batch = largest["input_ids"]
    of_pairs = family == "dpo"
    sequences = batch[..., 0].numel() // (2 if of_pairs else 1)  # each answer to a question is one
    shape: dict[str, Any] = {
        "batch_size": math.ceil(sequences / run.training.processes) * run.training.gradient_accumulation_steps,
        "sequence_length": batch.shape[-1],
        "task": "dpo" if of_pairs else None,
        **({"loss": PACKED} if "position_ids" in largest else {}),
        "device": run.device.partition(":")[0],
    }
    asked = {field.name for field in fields(WorkloadOptions)} & {field.name for field in fields(run.training)}
    known = {name: getattr(run.training, name) for name in asked} | {"gpus": run.training.processes}
    try:
        blueprint = Blueprint(Workload(**{**known, **shape}))
        if blueprint.is_causal != (tasks.kind(task) != "classification"):  # such as a language model with a classifier
            return None
        values = run.hyperparameters
        if values.get("always_train"):
            values = {**values, "always_train": _always_trained(values["always_train"], blueprint)}
        if run.training.weights == "random":
            values = from_scratch(run.method, values, blueprint.skeleton)
        made = plan_method(blueprint, run.method, values)
    except ValueError:  # a model or method of the user's own; the rehearsal will say what is wrong with it
        return None
    if run.device == "cpu":
        return int(made.row["peak_allocated_bytes"])
    return min(made.total_bytes, room) if made.fits_in(room) else made.total_bytes


def _always_trained(patterns: Sequence[str], blueprint: Blueprint) -> tuple[str, ...]:
    """The patterns for the planned model, whose head may have another name than the run's."""
    head = blueprint.head
    return tuple(dict.fromkeys([*head, *(one for one in patterns if not head or _is_there(one, blueprint.skeleton))]))


def _is_there(pattern: str, model: nn.Module) -> bool:
    try:
        return bool(matching(model, [pattern]))
    except ValueError:
        return False


def room_bytes(device: torch.device) -> int:
    """The memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _first_steps(run: Run, task: Task) -> Loop:
    short = replace(run.training, steps=STEPS, evaluate_before=False, evaluate_every=None, track=None)
    model = build_model(run, task)
    loop = Loop(model, build_optimizer(run, model), task, short, seed=run.seed, device=torch.device(run.device))
    loop.run()
    return loop


class _Enough(Exception):
    """It has evaluated for long enough."""


def _other_seconds(loop: Loop, training: Training) -> float:
    """A reference is asked again, of the whole training."""
    loop.training, seconds = training, 0.0
    if isinstance(loop.task, HasReference):
        seconds += _seconds(loop.device, partial(loop.ask_reference, loop.task))
    loop.begin_to_track()
    if loop.gradient_norm is not None:
        seconds += tracking.points(training) * _seconds(loop.device, loop.gradient_norm)
    return seconds


def _evaluation_seconds(loop: Loop) -> float:
    return _seconds(loop.device, partial(loop.evaluate, loop.optimizer.finish()))


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Of `work`, at most `LONGEST_EVALUATION`."""
    clock = Clock(device)
    try:
        with _at_most(LONGEST_EVALUATION), clock.phase("forward"):
            work()
    except _Enough:
        return LONGEST_EVALUATION
    return clock.end_step()


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Enough

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
