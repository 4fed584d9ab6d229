"""Gradient checkpointing: each layer is computed again in the backward pass, instead of keeping its activations."""

from torch import nn
from transformers import PreTrainedModel

SETTINGS = {"use_reentrant": False}


def checkpoint_layers(model: nn.Module) -> None:
    """Turn it on.

    Raises:
        ValueError: the model doesn't support it.
    """
    if not isinstance(model, PreTrainedModel) or not model.supports_gradient_checkpointing:
        raise ValueError(f"--checkpointing: {type(model).__name__} doesn't support gradient checkpointing")
    if "activation_checkpointing_enable" in dir(model):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=SETTINGS)
    else:  # its name in transformers 5.17
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=SETTINGS)
