"""The Hugging Face Trainer with a membench method as its optimizer.

    MethodTrainer(model, args, train_dataset=..., method="badam", method_kwargs={"switch_every": 50})

builds the method on the trainer's own model when that is ready; `optimizers=(BAdam(model, lr=1e-5), None)` takes one
that is already built. It also works as a mix-in, for a trainer that makes its own model:

    class BAdamSFT(MethodTrainer, SFTTrainer):
        pass

    BAdamSFT("path/of/a/model", method="badam", train_dataset=...)

It calls `optimizer.backward(loss)` or `optimizer.ask(closure)`, refuses arguments that would silently do nothing, and
saves models that `from_pretrained` can read. Most methods also work in a stock Trainer; those that update inside the
backward pass (`in_backward`), must see the loss (`needs_loss`: BlockLLM, clipped LOMO) or ask for losses
(`asks_losses`: MeZO) need this one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import optimizers
from membench.training.hf_processes import TrainerOnProcesses
from optimizers import MemoryEfficientOptimizer

UNMERGED = "unmerged.pt"  # beside a checkpoint's merged model: the weights with their adapters, to resume from
# The training arguments of an optimizer, and the hyper-parameters that they are.
HYPERPARAMETERS = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
# Heads with a label a row: many leave out the number of items that a Trainer gives them to divide by, and it would add
# up the losses of micro-batches and processes (github.com/huggingface/transformers/issues/47688). Their mean is right.
_OF_ROWS = ("ForSequenceClassification", "ForMultipleChoice")


class MethodTrainer(TrainerOnProcesses):
    """A `Trainer` that lets the method compute the gradients.

    Args:
        As for `Trainer`, and one of these three:
        method: name of a method, to build on the trainer's model.
        optimizer_cls_and_kwargs: its class and hyper-parameters.
        optimizers: the method, already built on `model`, and a scheduler or None.
        method_kwargs: hyper-parameters of `method`; by default learning rate, weight decay and seed are the training
            arguments', and so are betas and eps that aren't at these arguments' own defaults.

    Attributes:
        method: the method, once built; call its `finish()` to get the plain model.

    Raises:
        TypeError: no method is given, or more than one.
        ValueError: a hyper-parameter is refused, or the arguments ask for something the method can't do: a
            hyper-parameter that it doesn't have, or was built without; fp16 loss scaling; gradient accumulation or
            clipping by the trainer with a method that updates inside the backward pass; clipping with one without
            gradients.
    """

    def __init__(
        self,
        *args: Any,
        method: str | None = None,
        method_kwargs: dict[str, Any] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        self._build: tuple[type[MemoryEfficientOptimizer], dict[str, Any]] | None = None
        if method is not None:
            optimizers.resolve(method, **(method_kwargs or {}))
            self._build = optimizers.get(method), optimizers.split(method)[1] | (method_kwargs or {})
        elif method_kwargs:
            raise TypeError(f"method_kwargs={method_kwargs} needs the name of a method: method='badam'")
        if optimizer_cls_and_kwargs is not None:
            if self._build is not None:
                raise TypeError("give method or optimizer_cls_and_kwargs, not both")
            if not issubclass(optimizer_cls_and_kwargs[0], MemoryEfficientOptimizer):
                _refuse(optimizer_cls_and_kwargs[0])
            self._build = optimizer_cls_and_kwargs  # type: ignore[assignment]
        super().__init__(*args, **kwargs)
        if type(self.model).__name__.endswith(_OF_ROWS):
            self.model_accepts_loss_kwargs = False
        if self.optimizer is not None:
            if self._build is not None:
                raise TypeError("give a method by its name or class, or as optimizers=(method, scheduler), not both")
            self._use(self.optimizer)
            assert self.method is not None
            _check_built(self.method, self.args)
        elif self._build is None:
            _refuse(type(None))

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; backward passes go through the method."""
        super().create_accelerator_and_postprocess()
        self.accelerator.backward = self._backward

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the method on the trainer's model (which FSDP has wrapped by now)."""
        if self.method is not None:  # training begins again, perhaps after a step that ran out of memory
            self.method.zero_grad()
        if self.optimizer is None and self._build is not None:
            cls, given = self._build
            build: Any = cls
            self.optimizer = build(self.model if model is None else model, **_from_arguments(cls, self.args) | given)
            self._use(self.optimizer)
        return super().create_optimizer(model)

    def _use(self, method: torch.optim.Optimizer | None) -> None:
        if not isinstance(method, MemoryEfficientOptimizer):
            _refuse(type(method))
        check_arguments(method, self.args)
        self.method = method

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As in `Trainer`; a method that asks for losses takes as many for this micro-batch as it wants."""
        assert self.method is not None  # training began, so create_optimizer was called
        if not self.method.asks_losses:
            return super().training_step(model, inputs, num_items_in_batch)
        prepared = self._prepare_inputs(inputs)

        def share() -> torch.Tensor:
            with self.compute_loss_context_manager():
                own = copy.copy(prepared)  # it may take the labels out
                loss: Any = self.compute_loss(model, own, num_items_in_batch=num_items_in_batch)
            whole = self._is_of_whole_batch(num_items_in_batch)
            return loss if whole else loss / self.current_gradient_accumulation_steps

        return self.method.ask(share)

    def _is_of_whole_batch(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Does `compute_loss` divide by the items of all micro-batches? Decided as in `Trainer.training_step`."""
        decided: bool | None = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.17 has no such attribute
        if decided is not None:
            return decided
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None

    def _backward(self, loss: torch.Tensor, **_: Any) -> None:
        assert self.method is not None  # training began, so create_optimizer was called
        self.method.backward(loss)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model for `from_pretrained`, adapters merged; a checkpoint also unmerged, to resume from."""
        super().save_model(output_dir, _internal_call)
        is_checkpoint = _internal_call and output_dir is not None  # what is pushed to the hub has no folder of its own
        if is_checkpoint and self._has_adapters() and self.args.should_save and not self.is_fsdp_enabled:
            torch.save(self._model.state_dict(), Path(str(output_dir), UNMERGED))

    @property
    def _model(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _has_adapters(self) -> bool:
        return self.method is not None and self.method.adds_parameters

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # whose checkpoints have the model as it is in training
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint, UNMERGED)
        if path.exists() and self.optimizer is None:
            self.create_optimizer()  # inserts the adapters, to which the weights belong
        into = self._model if model is None else model
        if not self._has_adapters():
            if _has_other_names(resume_from_checkpoint, into):
                return _load_converted(resume_from_checkpoint, into)
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not path.exists():
            raise ValueError(f"{resume_from_checkpoint} has no {UNMERGED}: it isn't a checkpoint of this method")
        into.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _load_best_model(self) -> None:
        best: Any = self.state.best_model_checkpoint
        if self._has_adapters() or not self.is_fsdp_enabled and _has_other_names(best, self._model):
            self._load_from_checkpoint(best)
        else:
            super()._load_best_model()


def _has_other_names(folder: str, model: nn.Module) -> bool:
    """Does a saved model have tensors that `model` hasn't? transformers saves some models (with fused experts, of texts
    and images) as they were published, and a Trainer that resumes silently leaves out what has another name."""
    index, file = Path(folder, SAFE_WEIGHTS_INDEX_NAME), Path(folder, SAFE_WEIGHTS_NAME)
    names: set[str] = set()
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"])
    elif file.exists():
        with safe_open(file, "pt") as saved:
            names = set(saved.keys())
    return isinstance(model, PreTrainedModel) and not names <= model.state_dict().keys()


def _load_converted(folder: str, model: Any) -> None:
    """Give `model` the values that `from_pretrained` reads, in a dtype that holds those of all its weights."""
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in model.parameters()))
    model.load_state_dict(type(model).from_pretrained(folder, config=model.config, dtype=dtype).state_dict())


def _refuse(cls: type) -> NoReturn:
    raise TypeError(
        "MethodTrainer needs a membench method: method='badam', or optimizers=(method, scheduler or None), "
        f"not {cls.__name__}; for a stock optimizer use transformers.Trainer"
    )


def _from_arguments(cls: type[MemoryEfficientOptimizer], args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that are also hyper-parameters of the method.

    Betas and eps at the arguments' own defaults are nobody's choice, so that the method's defaults stand.

    Raises:
        ValueError: an argument was set that the method doesn't have.
    """
    known = inspect.signature(cls).parameters
    changed = _changed(args)
    # without betas eps isn't Adam's: MeZO's is how far it moves the weights
    has = {key: ours in known and (ours != "eps" or "betas" in known) for key, ours in HYPERPARAMETERS.items()}
    for key in changed:
        if not has[key]:
            raise ValueError(
                f"{cls.__name__} doesn't have {_called(key)}, so {key}={changed[key]} would do nothing: leave it out"
            )
    given: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "seed": args.seed}
    if "adam_epsilon" in changed:
        given["eps"] = args.adam_epsilon
    if changed.keys() & {"adam_beta1", "adam_beta2"}:
        own = known["betas"].default
        own = own if isinstance(own, tuple | list) else (args.adam_beta1, args.adam_beta2)
        given["betas"] = (changed.get("adam_beta1", own[0]), changed.get("adam_beta2", own[1]), *own[2:])
    return {key: value for key, value in given.items() if key in known}


def _changed(args: TrainingArguments) -> dict[str, Any]:
    """The arguments of an optimizer that aren't at the defaults of their class."""
    default = {field.name: field.default for field in dataclasses.fields(args)}
    return {key: getattr(args, key) for key in HYPERPARAMETERS if getattr(args, key) != default[key]}


def _called(key: str) -> str:
    return f"Adam's {HYPERPARAMETERS[key]}" if key.startswith("adam_") else HYPERPARAMETERS[key]


def _check_built(method: MemoryEfficientOptimizer, args: TrainingArguments) -> None:
    """Refuse arguments other than what `method` was built with, which they can't change.

    Raises:
        ValueError: names the argument, its value and the way out.
    """
    name, has = type(method).__name__, method.defaults
    adam = dict(zip(("adam_beta1", "adam_beta2"), has.get("betas", ()), strict=False))
    adam |= {"adam_epsilon": has["eps"]} if adam and "eps" in has else {}
    own = {"learning_rate": has.get("lr"), "weight_decay": has.get("weight_decay"), **adam}
    for key, value in _changed(args).items():
        if own.get(key) != value:
            built = f"with {_called(key)}={own[key]}" if own.get(key) is not None else f"without {_called(key)}"
            raise ValueError(
                f"{name} is built {built}, so {key}={value} would do nothing: leave it out, or give the method by its "
                "name (method=...), not built"
            )


def check_arguments(method: MemoryEfficientOptimizer, args: TrainingArguments) -> None:
    """Refuse arguments of a Trainer that `method` can't honour.

    Raises:
        ValueError: names the argument, its value and the way out.
    """
    name = type(method).__name__
    default = args.optim in ("adamw_torch", "adamw_torch_fused")  # by torch's version; not adamw_torch_8bit
    if not default or args.optim_args or args.optim_target_modules:
        given = {key: getattr(args, key) for key in ("optim", "optim_args", "optim_target_modules")}
        said = ", ".join(f"{key}={getattr(value, 'value', value)}" for key, value in given.items() if value)
        raise ValueError(f"{name} takes the optimizer's place, so {said} would do nothing: leave it out")
    if args.mixed_precision == "fp16":  # by fp16=True, or by accelerate's configuration
        raise ValueError(f"{name} computes its own gradients, which fp16 loss scaling can't reach: use bf16=True")
    if method.asks_losses and args.max_grad_norm:
        raise ValueError(f"{name} has no gradients, so max_grad_norm={args.max_grad_norm} can't work: set it to 0")
    if not method.in_backward:
        return
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"{name} updates inside the backward pass, so gradient_accumulation_steps must be 1, "
            f"not {args.gradient_accumulation_steps}: use a larger per_device_train_batch_size"
        )
    if args.auto_find_batch_size:
        raise ValueError(
            f"{name} updates inside the backward pass, so a step that runs out of memory is half done, and "
            "auto_find_batch_size can't make it again with fewer rows: set per_device_train_batch_size"
        )
    if args.max_grad_norm:
        raise ValueError(
            f"{name} updates inside the backward pass, where max_grad_norm={args.max_grad_norm} can't reach the "
            "gradients: set max_grad_norm=0 (LOMO clips by itself: clip_norm)"
        )
