"""Keep the backward pass short under gradient checkpointing.

A method that freezes the lower layers saves the backward pass through them. Training frameworks undo this: to make
re-entrant checkpointing work, they let the embeddings' output require gradients
(`PreTrainedModel.enable_input_require_grads`) after the optimizer is built. So that is turned off before each forward.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


def keep_backward_short(model: nn.Module) -> RemovableHandle:
    """Before each forward pass of `model`: no gradients for its inputs, and no re-entrant checkpointing.

    Raises (in the forward pass):
        ValueError: a layer uses re-entrant checkpointing, which loses the gradients of a layer whose input requires
            none.
    """
    return model.register_forward_pre_hook(_before_forward)


def _before_forward(model: nn.Module, args: tuple[Any, ...]) -> None:
    for module in model.modules():
        _drop_input_gradients(module)
        attributes = module.__dict__
        if attributes.get("gradient_checkpointing") and _is_reentrant(attributes.get("_gradient_checkpointing_func")):
            raise ValueError(
                "re-entrant gradient checkpointing loses the gradients of a layer whose input requires none: "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


def _drop_input_gradients(module: nn.Module) -> None:
    # by name, since transformers forgets the handles of the first call when called a second time
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, types.FunctionType) and hook.__name__ == "make_inputs_require_grads":
            del module._forward_hooks[key]


def _is_reentrant(checkpoint: object) -> bool:
    return isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant", False)
