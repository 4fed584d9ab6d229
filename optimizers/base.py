"""The interface of every method: a `torch.optim.Optimizer` that is built from the model.

Four rules hold for each of them, and `optimizers.contract` checks them:

1. What requires gradients when `super().__init__` runs is what the method may ever train; `param_groups` never change.
2. Every tensor that a method keeps lives in `self.state[param]`.
3. Everything else that it must remember is JSON, in `extra_state`.
4. A hyper-parameter that a scheduler may change is read from the group at the moment of use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

LOW_PRECISION = (torch.bfloat16, torch.float16)


class MemoryEfficientOptimizer(torch.optim.Optimizer):
    """A method of training: which parameters it trains, how it updates them, what it keeps.

    A subclass implements `update` and, if it chooses what to train, `after_step`, `advance` and the two `extra_state`
    methods. The training loop is the same for all: `backward(loss)`, `step()`, `scheduler.step()`, `zero_grad()`.

    Args:
        model: the model to train. What doesn't require gradients now is never touched.
        defaults: hyper-parameters of the groups (`lr`, `weight_decay`, ...).
        may_train: the parameters that the method may ever train (default: all that require gradients); the others are
            frozen until `finish()`.
        in_backward: run `update` inside the backward pass, one parameter at a time, and free each gradient at once;
            `step()` then only counts. Excludes gradient accumulation, clipping by the loop and fp16 loss scaling.
        fp32_gradients: give low-precision parameters fp32 gradients (torch's `param.grad_dtype`).

    Raises:
        ValueError: a hyper-parameter is out of range, or nothing is left to train.
    """

    summary: ClassVar[str] = ""  # one line: what it does
    paper: ClassVar[str] = ""  # where it comes from
    trains: ClassVar[str] = ""  # what it trains
    keeps: ClassVar[str] = ""  # bytes that it keeps, as a formula
    excludes: ClassVar[str] = ""  # what it can't be combined with
    example: ClassVar[dict[str, Any]] = {}  # hyper-parameters that suit a tiny model; the contract's checks use them
    # keywords that came after records were made with the method: at their defaults, which must then never change, a run
    # is the one it was without them, so neither its id nor its record has them
    added_later: ClassVar[tuple[str, ...]] = ()

    in_backward: bool = False
    # the loop must call `backward(loss)`: a bare `loss.backward()` raises, at once or in `step()`
    needs_loss: bool = False

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        *,
        may_train: Iterable[nn.Parameter] | None = None,
        in_backward: bool = False,
        fp32_gradients: bool = False,
    ):
        check_hyperparameters(defaults)
        self.model = model
        self.in_backward = in_backward
        self._requires_grad = {p: p.requires_grad for p in model.parameters()}
        if may_train is not None:
            chosen = set(may_train)
            for p in self._requires_grad:
                p.requires_grad_(p.requires_grad and p in chosen)
        super().__init__(self.group_parameters(model, defaults), defaults)
        self._hooks: list[Any] = []
        self._group_of = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        self._updated: set[nn.Parameter] = set()
        self._finished = False
        if fp32_gradients:
            self._set_gradient_dtype(torch.float32)
        if in_backward:
            self._hooks += [p.register_post_accumulate_grad_hook(_updating(self)) for p in self._group_of]

    def group_parameters(self, model: nn.Module, defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """The param groups: tensors of two or more dimensions get weight decay, the others (biases, norms) don't."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"{type(self).__name__} has nothing to train: no parameter requires gradients")
        decayed = [(name, p) for name, p in named if p.dim() >= 2]
        others = [(name, p) for name, p in named if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]  # torch refuses an empty one beside named parameters

    # ---- what a method implements

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Update one group's `params` in place from `grads`: lists of tensors, in pairs of equal shape."""
        raise NotImplementedError

    def before_update(self) -> None:
        """All gradients are there and nothing is updated yet (never called when `in_backward`)."""

    def after_step(self) -> None:
        """A step is complete: is it time for the next block?"""

    def advance(self) -> None:
        """Select the next block now."""

    def worst_case(self) -> None:
        """Make the selection with the largest memory peak, where a selection depends on values."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, a scalar."""
        loss.backward()

    def extra_state(self) -> dict[str, Any]:
        """What must be remembered besides tensors, as JSON."""
        return {}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    def finish(self) -> nn.Module:
        """End the training: remove all hooks, restore `requires_grad`, and give back a plain model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for p, requires_grad in self._requires_grad.items():
            p.requires_grad_(requires_grad)
            p.grad = None
        self._set_gradient_dtype(None)
        self._finished = True
        return self.model

    # ---- what it gets for free

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that are trained now."""
        return [p for p in self._group_of if p.requires_grad]

    @property
    def cycle_length(self) -> int:
        """How many calls of `advance` go once through everything that is trained in turns."""
        return 1

    @property
    def selection(self) -> str | None:
        """What is trained now, in words; None for a method without a choice."""
        return None

    @property
    def block_coverage(self) -> float | None:
        """Share of the blocks that were trained at least once; None for a method without blocks."""
        return None

    def state_bytes(self) -> int:
        """Bytes of all that is kept in `self.state`, each storage counted once."""
        storages = [t.untyped_storage() for state in self.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update what is trained now.

        Raises:
            RuntimeError: the training was ended by `finish()`.
        """
        if self._finished:
            raise RuntimeError(f"{type(self).__name__}.step() after finish(): build a new optimizer to train on")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.in_backward:
            self._update_all()
        self._updated.clear()
        self.after_step()
        return loss

    def _update_all(self) -> None:
        self.before_update()
        for group in self.param_groups:
            pairs = [(p, p.grad) for p in group["params"] if p.requires_grad and p.grad is not None]
            if pairs:
                self.update([p for p, _ in pairs], [grad for _, grad in pairs], group)

    @torch.no_grad()
    def _update_now(self, p: nn.Parameter) -> None:
        """The hook of `in_backward`: update one parameter and free its gradient."""
        self._check_not_updated(p)
        assert p.grad is not None  # a hook that torch calls after accumulating it
        self.update([p], [p.grad], self.param_groups[self._group_of[p]])
        self._updated.add(p)
        p.grad = None

    def _check_not_updated(self, p: nn.Parameter) -> None:
        if p in self._updated:
            raise RuntimeError(
                f"{type(self).__name__} updates inside the backward pass, so gradients can't be accumulated over "
                "several backward passes: call step() after each, or use in_backward=False where the method has it"
            )

    def _set_gradient_dtype(self, dtype: torch.dtype | None) -> None:
        """Gradients of low-precision parameters in `dtype`; None for the parameter's own."""
        for p in self._group_of:
            if p.dtype in LOW_PRECISION and p.is_leaf:
                p.grad_dtype = dtype or p.dtype

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and `extra`: the method's name and its JSON."""
        return {**super().state_dict(), "extra": {"method": type(self).__name__, **self.extra_state()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, to the last bit: tensors keep the dtype that they were saved in.

        Raises:
            ValueError: it was saved by another method, or for a model with other parameters.
        """
        saved_by = state_dict.get("extra", {}).get("method")
        if saved_by != type(self).__name__:
            raise ValueError(f"this state was saved by {saved_by or 'another optimizer'}, not by {type(self).__name__}")
        names = [group["param_names"] for group in self.param_groups]
        if [group.get("param_names") for group in state_dict["param_groups"]] != names:
            raise ValueError("this state belongs to a model with other parameters: their names differ")
        # torch casts floating-point state to the parameter's dtype, so the tensors are put in place after it.
        super().load_state_dict({**state_dict, "state": {}})
        params = list(self._group_of)
        for index, saved in state_dict["state"].items():
            self.state[params[index]] = {key: _copy(value, params[index].device) for key, value in saved.items()}
        self.load_extra_state(state_dict["extra"])


def _updating(optimizer: MemoryEfficientOptimizer) -> Callable[[nn.Parameter], None]:
    """The hook of `in_backward`. It must not keep the optimizer alive: a hook on a tensor is out of the reach of the
    garbage collector, so the model, which the optimizer knows, would never be freed."""
    known = weakref.ref(optimizer)

    def update(p: nn.Parameter) -> None:
        alive = known()
        if alive is not None:
            alive._update_now(p)

    return update


def _copy(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, copy=True) if torch.is_tensor(value) else value


def check_hyperparameters(given: dict[str, Any]) -> None:
    """Refuse a value that is out of its range.

    Raises:
        ValueError: names the hyper-parameter, its value and what it must be.
    """
    betas = given.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers of at least 0 and below 1, not {betas}")
    for name in ("lr", "weight_decay", "eps"):
        values = given.get(name, 0.0)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, not {value}")


def check_count(name: str, value: int | None, *, optional: bool = False) -> None:
    """Refuse a count (of steps, blocks, ranks) that isn't a positive whole number.

    Raises:
        ValueError: names the hyper-parameter and its value.
    """
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def check_positive(name: str, value: float | None, *, optional: bool = False) -> None:
    """Refuse a quantity (a threshold, a scale) that isn't a finite number above 0.

    Raises:
        ValueError: names the hyper-parameter and its value.
    """
    if optional and value is None:
        return
    if value is None or not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, not {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that isn't one of `choices`.

    Raises:
        ValueError: names the hyper-parameter, its value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def has_values(t: Tensor) -> bool:
    """False for fake and meta tensors: a choice that depends on values then takes the worst case in bytes."""
    return not isinstance(t, FakeTensor) and not t.is_meta
