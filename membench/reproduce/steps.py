"""Timed and metered training steps on random tokens, of a model with random weights: nothing is downloaded.

The model is built where it trains, as `membench plan --verify` does, so a card needs no more memory than the method
does; loop, clock and meter are those of a comparison, as is the record.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import optimizers
from membench.config.declare import declared
from membench.config.errors import UserError, explain, log_traceback
from membench.config.options import TrainingOptions, WorkloadOptions
from membench.config.run import Run, Training
from membench.config.settings import Settings
from membench.planning.blueprint import Blueprint
from membench.planning.planner import method_values
from membench.planning.workload import Batch, Workload, model_loss
from membench.runs import environment
from membench.runs.compare import Record, apart, make_missing
from membench.runs.prepare import find_device
from membench.runs.run_folder import Folder
from membench.runs.worker import Send, throttled
from membench.training.build import use_device
from membench.training.execute import times
from membench.training.loop import Diverged, Loop, loss_function, micro_batches
from membench.training.metering import meter_cycle
from reports import record
from tasks.models.damage import is_out_of_memory

TASK = "random-tokens"


class RandomTokens:
    """What the loop needs of a task: batches that are a function of (seed, step), and the model's own loss."""

    def __init__(self, blueprint: Blueprint, seed: int):
        self.blueprint, self.seed = blueprint, seed

    def batch(self, step: int) -> Batch:
        """Random tokens, and as labels the same or, of a classifier, two classes."""
        generator = torch.Generator().manual_seed(self.seed * 2**31 + step)
        batch = self.blueprint.batch("cpu", generator)
        if not self.blueprint.is_causal:
            batch["labels"].random_(2, generator=generator)
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss as transformers computes it."""
        return model_loss(model, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Random tokens have no score."""
        return {}


def workload_of(settings: TrainingOptions, sequences: int = 1) -> Workload:
    """A training step on a micro-batch, for the planner; `sequences` of an example."""
    known = declared(WorkloadOptions).keys() & declared(TrainingOptions).keys()
    size = settings.batch_size // settings.gradient_accumulation_steps
    given = {name: getattr(settings, name) for name in known}
    return Workload(**{**given, "batch_size": size * sequences, "gradient_accumulation_steps": 1})


def on_random_tokens(settings: Settings) -> Settings:
    """The same training without its task: it isn't evaluated either."""
    return replace(
        settings,
        task=(TASK,),
        data="random tokens",
        options={},
        tokenizer=None,
        evaluate_before=False,
        evaluate_every=None,
    )


def make(all_settings: Sequence[Settings]) -> list[Record]:
    """The records of steps with each of these settings, in order; made if they are missing in their folder.

    Raises:
        UserError: the machine has no such device, a method refuses a value, or the folder is in use.
    """
    runs = apart(prepare, all_settings)
    folder = Folder(Path(all_settings[0].out))
    with folder.locked():
        return make_missing(all_settings[0], runs, folder, measure)


def prepare(all_settings: Sequence[Settings], send: Send) -> list[Run]:
    """The runs of steps with each of these settings, which name one method each.

    Raises:
        UserError: the machine has no such device, or a method refuses a value.
    """
    device = find_device(all_settings[0].device)
    threads = all_settings[0].threads or torch.get_num_threads()
    surroundings = environment.describe(device, threads)
    try:
        return [_run(settings, device, threads, surroundings) for settings in all_settings]
    except ValueError as error:
        raise UserError(str(error)) from error


def _run(settings: Settings, device: torch.device, threads: int, surroundings: dict[str, Any]) -> Run:
    assert settings.steps is not None
    (method,) = settings.optimizers
    training = Training.of(settings, steps=settings.steps, weights="random")
    values = method_values(Blueprint(workload_of(settings)), method, settings.hyperparameters)
    machine = {"device": device.type, "threads": threads}
    configuration = {"hyperparameters": values, "training": training.identity, **machine}
    return Run(
        run_id=record.run_id(TASK, method, settings.model, seed=0, configuration=configuration),
        task=TASK,
        method=method,
        seed=0,
        hyperparameters=values,
        training=training,
        device=str(device),
        threads=threads,
        environment=surroundings,
    )


def measure(run: Run, checkpoint_path: Path, checkpoint_every: int, save_to: Path | None, send: Send) -> dict[str, Any]:
    """The measured part of the record: times of the steps, then memory on a fresh model; see `execute.execute`.

    So few steps need no checkpoint, and of random weights nothing is saved.
    """
    use_device(run)
    measured: dict[str, Any] = {"status": "ok", "error": None, "headline": "loss", "higher_is_better": False}
    try:
        _train(run, measured, throttled(run, send))
        gc.collect()  # or a card that just holds one model would have to hold two
        send("message", "metering memory")
        measured["memory"] |= _meter(run)
    except Diverged as error:
        measured |= {"status": "diverged", "error": str(error)}
    except Exception as error:
        log_traceback()
        status = "out_of_memory" if is_out_of_memory(error) else "failed"
        measured |= {"status": status, "error": explain(error)}
    return measured


def _train(run: Run, measured: dict[str, Any], report: Callable[[int, float], None]) -> None:
    task, model, optimizer = _build(run)
    device = torch.device(run.device)
    measured["parameters"] = task.blueprint.parameters
    measured["trainable_parameters"] = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    loop = Loop(model, optimizer, task, run.training, seed=run.seed, device=device)
    loop.run(report=report)
    history = loop.progress.history
    measured |= {"history": history, "time": times(loop), "memory": loop.peaks()}
    measured |= {"block_coverage": optimizer.block_coverage, "metrics": {"loss": history[-1]["loss"]}}


def _meter(run: Run) -> dict[str, Any]:
    task, model, optimizer = _build(run)
    device = torch.device(run.device)
    batches = micro_batches(task, 0, run.training, device)
    report = meter_cycle(model, optimizer, loss_function(task, run.training, device), lambda step: batches)
    return {key: value for key, value in report.items() if key != "modules"}


def _build(run: Run) -> tuple[RandomTokens, nn.Module, optimizers.MemoryEfficientOptimizer]:
    """The model, on the run's device from the first, and its method with the values given, as for fine-tuning."""
    blueprint = Blueprint(workload_of(run.training))
    torch.manual_seed(run.seed)
    with torch.device(run.device):
        model = blueprint.build(blueprint.depth)
    return RandomTokens(blueprint, run.seed), model, optimizers.create(run.method, model, **run.hyperparameters)
