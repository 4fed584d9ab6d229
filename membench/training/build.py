"""A run's model and optimizer, the same for training, metering and checking."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

import optimizers
import tasks
from membench.config.defaults import trained_from_scratch
from membench.config.errors import UserError
from membench.config.run import Run, Training
from membench.training.activations import set_up_activations
from membench.training.own_code import digests
from membench.training.seeding import seed_generators

_NAMED_AFTER = {
    "data_sha256": "its data",
    "data_revision": "its data",
    "model_revision": "its model",
    "tokenizer": "its tokenizer",
    "task_code": "the code of its task",
    "method_code": "the code of its method",
}


def use_device(run: Run) -> None:
    """Let this process compute with the run's threads, and on its card wherever code says only "cuda".

    A kernel written in Triton, which some models have, fails on tensors of another card than the current one.
    """
    torch.set_num_threads(run.threads)
    device = torch.device(run.device)
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device)


def create_task(training: Training, name: str, seed: int) -> tasks.Task:
    """The task `name`, with batches of the size of a micro-batch in `training`."""
    given = {field.name: getattr(training, field.name) for field in fields(tasks.TaskArguments) if field.name != "seed"}
    given |= {"batch_size": training.micro_batch_size, "seed": seed}
    seed_generators(seed)
    return tasks.create(name, options=training.options, **given)


def check_unchanged(run: Run, task: tasks.Task) -> None:
    """Check that a run is made of what it was named after, perhaps hours or a queue ago.

    Raises:
        UserError: its data, model or tokenizer, or the code of its task or method, was changed since.
    """
    now = {**(task.identity if isinstance(task, tasks.HasIdentity) else {}), **digests(run.task, run.method)}
    then = run.environment
    changed = [what for name, what in _NAMED_AFTER.items() if name in now and name in then and now[name] != then[name]]
    if changed:
        raise UserError(
            f"{' and '.join(dict.fromkeys(changed))} changed since this run was prepared: the same command makes it "
            "with what is there now"
        )


def build_model(run: Run, task: tasks.Task) -> nn.Module:
    """A fresh model on the run's device, in training mode, always with the same weights.

    Raises:
        ValueError: the model doesn't support the training's options for activations.
    """
    torch.manual_seed(run.seed)
    model = task.build_model().to(torch.device(run.device))
    set_up_activations(model, run.training)
    return model.train()


def method_values(run: Run, model: nn.Module) -> dict[str, Any]:
    """The run's hyper-parameters; with random weights, embeddings and norms are always trained."""
    if run.training.weights == "random":
        return from_scratch(run.method, run.hyperparameters, model)
    return dict(run.hyperparameters)


def from_scratch(method: str, values: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Hyper-parameters with which a method trains a model of random weights: embeddings and norms always."""
    names = trained_from_scratch(method, model)
    if not names:
        return dict(values)
    return {**values, "always_train": tuple(dict.fromkeys([*values["always_train"], *names]))}


def build_optimizer(run: Run, model: nn.Module) -> optimizers.MemoryEfficientOptimizer:
    """The run's method on `model`."""
    return optimizers.create(run.method, model, **method_values(run, model))
