"""From settings to runs: every value resolved and checked, every run with its name, before any of them starts."""

import math
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

import optimizers
import tasks
from membench.config.assignments import ALL_METHODS
from membench.config.defaults import hyperparameters
from membench.config.errors import UserError
from membench.config.run import Run, Training
from membench.config.settings import Settings
from membench.runs import environment
from membench.training.build import build_model, build_optimizer, create_task
from membench.training.loop import check_combination
from reports import record

REFERENCE = "adamw"


def prepare(settings: Settings) -> list[Run]:
    """All runs of a comparison: task by task, seed by seed, the reference first, so that ratios are of neighbours.

    Builds each method once, on the first task's model: what a constructor refuses is refused before anything runs.

    Raises:
        UserError: a name, a hyper-parameter or a combination that can't work, in one sentence.
    """
    try:
        return _prepare(settings)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _prepare(settings: Settings) -> list[Run]:
    methods = _methods(settings)
    _check_targets(settings, methods)
    device, threads = find_device(settings.device), settings.threads or torch.get_num_threads()
    if settings.offload_activations and device.type == "cpu":
        raise UserError("--offload-activations: on a CPU they are in the host's memory already: leave it out")
    surroundings = environment.describe(device, threads)
    names = dict.fromkeys(name for pattern in settings.task for name in tasks.expand(pattern, data=settings.data))
    runs: list[Run] = []
    for name in names:
        work = _work(settings, name, device, threads)
        for seed in dict.fromkeys(settings.seeds):
            runs += [_run(settings, work, method, seed, surroundings) for method in methods]
    _check_constructors(runs[: len(methods)], save=settings.save is not None)
    return runs


@dataclass(frozen=True)
class _Work:
    """What the runs of one task have in common."""

    name: str
    task: tasks.Task
    kind: tasks.Kind
    training: Training
    device: torch.device
    threads: int

    @property
    def identity(self) -> dict[str, Any]:
        """What is hashed of it."""
        provenance = self.task.provenance
        return {
            "training": self.training.identity,
            "data": _identity(provenance, self.training.data),
            "model_revision": provenance["model_revision"],
            "tokenizer": provenance["tokenizer"],
            "device": self.device.type,
            "threads": self.threads,
        }


def _work(settings: Settings, name: str, device: torch.device, threads: int) -> _Work:
    task = create_task(Training.of(settings, steps=1, weights="?"), name, seed=0)
    weights = "random" if task.from_scratch else "pretrained"
    training = Training.of(settings, steps=_steps(settings, task), weights=weights)
    return _Work(name, task, tasks.kind(task), training, device, threads)


def _methods(settings: Settings) -> list[str]:
    named = [name for given in settings.optimizers for name in (optimizers.available() if given == "all" else [given])]
    methods = list(dict.fromkeys([REFERENCE, *named] if settings.reference else named))
    for method in methods:
        optimizers.get(method)
    return sorted(methods, key=lambda method: method != REFERENCE)


def _check_targets(settings: Settings, methods: Iterable[str]) -> None:
    """Hyper-parameters must go somewhere, also those of methods that aren't compared now."""
    for method, given in settings.hyperparameters.items():
        if method != ALL_METHODS:
            optimizers.resolve(method, **given)
    for key in settings.hyperparameters.get(ALL_METHODS, {}):
        if not any(key in optimizers.resolve(method) for method in methods):
            raise UserError(f"--set {key}: none of {', '.join(methods)} has a hyper-parameter of that name")


def find_device(name: str) -> torch.device:
    """The device of that name, or with "auto" the one that this machine has. Raises UserError if it hasn't it."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: no such kind of device; use auto, cpu, cuda or cuda:0") from error
    available = torch.accelerator.current_accelerator(check_available=True)
    if device.type not in ("cpu", available.type if available else "cpu"):
        raise UserError(f"--device {name}: this machine has {available or 'no accelerator'}; use --device auto or cpu")
    return device


def _steps(settings: Settings, task: tasks.Task) -> int:
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is None:
        raise UserError("say how long to train: --steps or --epochs")
    return max(1, math.ceil(settings.epochs * task.train_size / settings.batch_size))


def _run(settings: Settings, work: _Work, method: str, seed: int, surroundings: dict[str, Any]) -> Run:
    values = hyperparameters(
        method,
        settings.hyperparameters,
        learning_rate=settings.learning_rate,
        seed=seed,
        from_scratch=work.task.from_scratch,
        head=work.task.head,
        kind=work.kind,
    )
    configuration = {"hyperparameters": values, **work.identity}
    return Run(
        run_id=record.run_id(work.name, method, settings.model, seed, configuration),
        task=work.name,
        method=method,
        seed=seed,
        hyperparameters=values,
        training=work.training,
        device=str(work.device),
        threads=work.threads,
        environment={**surroundings, **work.task.provenance},
    )


def _identity(provenance: Mapping[str, Any], source: str) -> list[str | None]:
    """The data themselves where their hash is known, wherever they lie; else the source and its revision."""
    if provenance["data_sha256"] is not None:
        return [provenance["data_sha256"]]
    return [source, provenance["data_revision"]]


def _check_constructors(runs: Iterable[Run], *, save: bool) -> None:
    """Builds every method on one model. What fails in any other way than by a refusal is a result of its run."""
    task = model = None
    for run in runs:
        task = task or create_task(run.training, run.task, run.seed)
        model = model or build_model(run, task)
        if save and not isinstance(model, PreTrainedModel):
            raise UserError(f"--save: {type(model).__name__} is no model of transformers, which knows how to save it")
        try:
            optimizer = build_optimizer(run, model)
            check_combination(optimizer, run.training.gradient_accumulation_steps, run.training.max_grad_norm)
            model = optimizer.finish()
        except (ValueError, TypeError) as error:
            raise UserError(f"{run.method}: {error}") from error
        except Exception:
            traceback.print_exc()
            model = None
