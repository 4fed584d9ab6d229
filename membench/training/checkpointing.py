"""Gradient checkpointing: layers are recomputed in the backward pass instead of keeping their activations."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

SETTINGS = {"use_reentrant": False}


def checkpoint_layers(model: nn.Module, every: int = 1) -> None:
    """Turn it on in every `every`-th layer, starting with the first.

    Raises:
        ValueError: the model doesn't support it.
    """
    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise ValueError(f"--checkpointing: {type(model).__name__} doesn't support gradient checkpointing")
    if "activation_checkpointing_enable" in dir(model):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=SETTINGS)
    else:  # its name in transformers 5.17
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=SETTINGS)
    if every > 1:
        _leave_out_layers(model, every)


def _leave_out_layers(model: nn.Module, every: int) -> None:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"--checkpointing-every {every}: {type(model).__name__} checkpoints all its layers or none")
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0
