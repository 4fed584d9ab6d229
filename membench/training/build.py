"""A run's model and optimizer, the same for training, metering and checking."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

import optimizers
import tasks
from membench.config.defaults import trained_from_scratch
from membench.config.run import Run, Training
from membench.training.activations import set_up_activations
from membench.training.seeding import seed_generators


def create_task(training: Training, name: str, seed: int) -> tasks.Task:
    """The task `name`, with batches of the size of a micro-batch in `training`."""
    given = {field.name: getattr(training, field.name) for field in fields(tasks.TaskArguments) if field.name != "seed"}
    given |= {"batch_size": training.micro_batch_size, "seed": seed}
    seed_generators(seed)
    return tasks.create(name, options=training.options, **given)


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
