"""From settings to runs: every value resolved and checked, every run named, before any of them starts."""

import gc
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import optimizers
import tasks
from membench.config import launcher
from membench.config.defaults import check_targets, hyperparameters
from membench.config.errors import UserError, about_file, explain, log_traceback, own_code
from membench.config.fan_out import sharing
from membench.config.run import Run, Training
from membench.config.settings import Settings
from membench.config.units import steps_of
from membench.runs import environment
from membench.training.activations import check_pieces
from membench.training.build import build_model, build_optimizer, create_task
from membench.training.loop import check_method
from membench.training.own_code import digests
from reports import record
from tasks.models.damage import is_out_of_memory, reason_of
from tasks.models.source import PREFIX, Source, longest_input

REFERENCE = "adamw"
_PIECE, _HELD = 32, 0.99  # of a sequence, in tokens; of the texts that it holds whole


def prepare(settings: Settings) -> list[Run]:
    """All runs of a comparison: task by task, seed by seed, the reference first, so that ratios compare neighbours.

    Builds each method once, on the first task's model: what a constructor refuses is refused before anything runs.

    Raises:
        UserError: a name, a hyper-parameter or a combination can't work.
    """
    try:
        return _prepare(settings)
    except Exception as error:
        sentence = _sentence(error, settings)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def _sentence(error: Exception, settings: Settings) -> str | None:
    """What to say of what users can mend, in their own methods and tasks, too; None of a fault of ours."""
    if isinstance(error, OSError):
        return about_file(error)
    if isinstance(error, ValueError):
        return str(error)
    if is_out_of_memory(error):
        return f"this machine hasn't enough memory to build {settings.model}: {reason_of(error)}"
    return explain(error) if own_code(error) else None


def _prepare(settings: Settings) -> list[Run]:
    methods = _methods(settings)
    check_targets(methods, settings.hyperparameters)
    device, threads = _devices(settings)[0], settings.threads or torch.get_num_threads()
    if settings.offload_activations and device.type == "cpu":
        raise UserError("--offload-activations: on a CPU they are already in host memory: leave it out")
    beside = sharing(settings)
    surroundings = environment.describe(device, threads) | ({"jobs": beside} if beside > 1 else {})
    _check_gpus(settings, device)
    names = dict.fromkeys(name for pattern in settings.task for name in tasks.expand(pattern, data=settings.data))
    settings = _fitted(settings, list(names))
    check_pieces(settings, of_pairs="dpo" in names)
    works = _works(settings, list(names), device, threads)
    code = {(work.name, method): digests(work.name, method) for work in works for method in methods}
    runs = [
        _run(settings, work, method, seed, surroundings, code[work.name, method])
        for work in works
        for seed in dict.fromkeys(settings.seeds)
        for method in methods
    ]
    first = next(work for work in works if work.task is not None)
    bench = _Bench(save=settings.save is not None, steps={work.training.steps for work in works})
    refused = _refused(settings, first, [run for run in runs if run.task == first.name][: len(methods)], bench)
    return [
        replace(
            run,
            refused=run.refused or refused.get(run.method),
            coverage=bench.coverage.get((run.method, run.training.steps), ""),
        )
        for run in runs
    ]


def _check_gpus(settings: Settings, device: torch.device) -> None:
    """Raises UserError unless there is one for each process, on this machine if they are started here."""
    elsewhere = settings.executor != "local" or launcher.place() is not None
    count = torch.cuda.device_count()
    if device.type == "cuda" and not elsewhere and count < settings.processes:
        raise UserError(f"--processes {settings.processes}: this machine has {count} GPUs, and each process needs one")


def _fitted(settings: Settings, names: Sequence[str]) -> Settings:
    """With sequences that the model takes and that hold nearly all texts, where no length was given."""
    if not settings.fit_length:
        return settings
    longest = settings.sequence_length
    with suppress(ValueError):  # what can't be built so, or is no model of transformers: the task will say it
        longest = min(longest, longest_input(settings.model, settings.trust_remote_code) or longest)
    fitted = replace(settings, sequence_length=longest, fit_length=False)
    lengths = [length for name in names if (length := _length_of(fitted, name)) is not None]
    return replace(fitted, sequence_length=min(longest, max(lengths, default=longest)))


def _length_of(settings: Settings, name: str) -> int | None:
    """Tokens that hold nearly all of a task's texts, in whole pieces of 32; None of one that can't be made."""
    try:
        task = create_task(Training.of(settings, steps=1, weights="?"), name, seed=0)
    except (ValueError, OSError):  # of few data, none may be left that fill a long sequence
        half = settings.sequence_length // 2
        return _length_of(replace(settings, sequence_length=half), name) if half >= _PIECE else None
    if not isinstance(task, tasks.HasLengths):
        return settings.sequence_length
    lengths = sorted(task.lengths())
    return _PIECE * math.ceil(lengths[math.ceil(_HELD * len(lengths)) - 1] / _PIECE)


@dataclass(frozen=True)
class _Work:
    """What the runs of one task have in common."""

    name: str
    training: Training
    device: torch.device
    threads: int
    task: tasks.Task | None  # None: it can't be built
    width: int | None = None  # the model's hidden size, where its configuration says it
    refused: str | None = None

    def identity(self, processes: int) -> dict[str, Any]:
        """What goes into the id of a run on so many processes."""
        provenance = {} if self.task is None else self.task.provenance
        return {
            "training": self.training.on(processes).identity,
            "data": _identity(provenance, self.training.data),
            "model_revision": provenance.get("model_revision"),
            "tokenizer": provenance.get("tokenizer"),
            "device": self.device.type,
            "threads": self.threads,
        }

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {} if self.task is None else self.task.provenance


def _works(settings: Settings, names: Sequence[str], device: torch.device, threads: int) -> list[_Work]:
    """The tasks; one that can't be built is a result, as long as another can.

    Raises:
        ValueError, OSError: none can be built.
    """
    works = []
    error: Exception | None = None
    for name in names:
        try:
            works.append(_work(settings, name, device, threads))
        except (ValueError, OSError) as refusal:
            error = error or refusal
            weights = "random" if settings.model.startswith(PREFIX) else "pretrained"
            training = Training.of(settings, steps=settings.steps or 0, weights=weights)
            works.append(_Work(name, training, device, threads, None, refused=str(refusal)))
    if error is not None and all(work.task is None for work in works):
        raise error
    return works


def _work(settings: Settings, name: str, device: torch.device, threads: int) -> _Work:
    task = create_task(Training.of(settings, steps=1, weights="?"), name, seed=0)
    weights = "random" if task.from_scratch else "pretrained"
    training = Training.of(settings, steps=_steps(settings, task), weights=weights)
    assert task.provenance is not None and task.head is not None  # this loads the model, which may fail
    return _Work(name, training, device, threads, task, _width(settings))


def _width(settings: Settings) -> int | None:
    with suppress(ValueError, OSError):  # no model of transformers: a user's own
        return Source(settings.model, settings.trust_remote_code).width
    return None


def _methods(settings: Settings) -> list[str]:
    methods = optimizers.expand([REFERENCE, *settings.optimizers] if settings.reference else settings.optimizers)
    for method in methods:
        optimizers.get(method)
    return sorted(methods, key=lambda method: method != REFERENCE)


def _devices(settings: Settings) -> list[torch.device]:
    """Where runs are made: on another machine, what it must have."""
    if settings.executor != "local" and settings.device == "cuda":
        return [torch.device("cuda")]
    return [find_device(name) for name in settings.devices or (settings.device,)]


def find_device(name: str) -> torch.device:
    """The device with that name, or with "auto" this machine's. Raises UserError if the machine has no such device."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: unknown kind of device; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        return torch.device("cpu")  # which torch also calls cpu:0, cpu:1, ...
    available = torch.accelerator.current_accelerator(check_available=True)
    if available is None or device.type != available.type:
        raise UserError(f"--device {name}: this machine has {available or 'no accelerator'}; use --device auto or cpu")
    count = torch.accelerator.device_count()
    index = int(name.partition(":")[2] or 0)  # torch takes "cuda:256" for "cuda:0"
    if index >= count:
        raise UserError(f"--device {name}: this machine has {count}, numbered from 0")
    return device


def _steps(settings: Settings, task: tasks.Task) -> int:
    if settings.steps is not None:
        return settings.steps
    if settings.epochs is None:
        raise UserError("say how long to train: --steps or --epochs")
    return max(1, steps_of(settings.epochs, task.train_size, settings.batch_size))


def _run(
    settings: Settings, work: _Work, method: str, seed: int, surroundings: dict[str, Any], code: dict[str, str]
) -> Run:
    values = _values(settings, work, method, seed)

    def run_id(processes: int) -> str:
        configuration = {"hyperparameters": values, **work.identity(processes), **code}
        return record.run_id(work.name, method, settings.model, seed, configuration)

    return Run(
        run_id=run_id(settings.processes),
        begun_as=run_id(settings.begun_with) if settings.begun_with else None,
        task=work.name,
        method=method,
        seed=seed,
        hyperparameters=values,
        training=work.training.on(settings.processes),
        device=str(work.device),
        threads=work.threads,
        environment={**surroundings, **work.provenance, **code},
        refused=work.refused,
    )


def _values(settings: Settings, work: _Work, method: str, seed: int) -> dict[str, Any]:
    if work.task is None:
        return optimizers.resolve(method, **settings.hyperparameters.get(method, {}))
    return hyperparameters(
        method,
        settings.hyperparameters,
        learning_rate=settings.learning_rate,
        seed=seed,
        from_scratch=work.task.from_scratch,
        head=work.task.head,
        kind=tasks.kind(work.task),
        width=work.width,
    )


def _identity(provenance: Mapping[str, Any], source: str) -> list[str | None]:
    """The data's hash, wherever they are stored, if it is known; else the source and its revision."""
    if provenance.get("data_sha256") is not None:
        return [provenance["data_sha256"]]
    return [source, provenance.get("data_revision")]


def _refused(settings: Settings, work: _Work, runs: Iterable[Run], bench: "_Bench") -> dict[str, str]:
    """Methods that can't work with the model of a task, and why; each is built once.

    Raises:
        UserError: a given value is to blame, or none of the requested methods is left.
    """
    refused: dict[str, str] = {}
    plain = replace(settings, hyperparameters={}, learning_rate=None)
    for run in runs:
        why = bench.refusal(run)
        if why is not None:
            by_default = replace(run, hyperparameters=_values(plain, work, run.method, run.seed))
            if bench.refusal(by_default) is None:
                raise UserError(f"{run.method}: {why}")
            refused[run.method] = why
    asked = _methods(replace(settings, reference=False))
    if all(method in refused for method in asked):
        raise UserError(f"{asked[0]}: {refused[asked[0]]}")
    return refused


def _here(run: Run) -> Run:
    """The run on a device of this machine, which needn't be one like that on which it will be made."""
    kind = torch.device(run.device).type
    elsewhere = kind != "cpu" and torch.accelerator.current_accelerator(check_available=True) is None
    return replace(run, device="cpu") if elsewhere else run


class _Bench:
    """A model to try methods on, rebuilt if one may have changed it.

    `coverage` is what each method that was tried says of the blocks that it doesn't come to in so many steps.
    """

    def __init__(self, *, save: bool, steps: Iterable[int]):
        self._save, self._steps = save, steps
        self.coverage: dict[tuple[str, int], str] = {}
        self._task: tasks.Task | None = None
        self._model: nn.Module | None = None

    def refusal(self, run: Run) -> str | None:
        """Why a method can't train its task's model. Any other kind of failure becomes a result of its run."""
        task = self._task = self._task or create_task(run.training, run.task, run.seed)
        if self._model is None:
            gc.collect()  # a method that was refused and its model refer to each other, and take memory of the card
        model, self._model = self._model or build_model(_here(run), task), None
        if self._save and not isinstance(model, PreTrainedModel):
            raise UserError(
                f"--save: {type(model).__name__} isn't a transformers model, so it can't be saved: leave out --save"
            )
        try:
            optimizer = build_optimizer(run, model)
            check_method(optimizer, run.training)
            covered = {steps: optimizer.coverage_after(steps) for steps in self._steps}
            self.coverage |= {(run.method, steps): one.words(steps) for steps, one in covered.items() if one}
            self._model = optimizer.finish()
        except (ValueError, TypeError) as error:
            return str(error)
        except Exception:
            log_traceback()
        return None
