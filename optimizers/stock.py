"""Any `torch.optim.Optimizer` as a method: torch's own, or a package's, by its path `package.module:Class`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from optimizers.base import MemoryEfficientOptimizer
from optimizers.shared.arithmetic import adamw_update, expected_adam_state
from optimizers.shared.matrices import layer_matrices, with_rate_of_the_rest
from optimizers.shared.ranks import REPLICAS
from optimizers.shared.sharded import is_sharded

ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8}  # for what an optimizer of matrices doesn't take


class StockMethod(MemoryEfficientOptimizer):
    """An unmodified optimizer, on the groups that every method has: one with weight decay, one without.

    One that takes only matrices (`torch.optim.Muon`) gets those of the layers; AdamW trains the rest, at `adamw_lr`.
    Trains everything, updates after the backward pass, keeps what the optimizer keeps.

    Args:
        model: the model to train.
        keywords: for the optimizer's own constructor.

    Raises:
        ValueError: the optimizer refuses a value, or needs a closure.
    """

    trains = "everything"
    keeps = "what the optimizer keeps"
    optimizer: type[torch.optim.Optimizer]  # set by a subclass, see `wrap`
    only_matrices = False

    def __init__(self, model: nn.Module, *, adamw_lr: float = 1e-3, **keywords: Any):
        if "closure" in _required(self.optimizer.step):
            raise ValueError(
                f"{self.optimizer.__name__} needs a closure in each step, which no training loop here passes"
            )
        self._adamw_lr, self._keywords = adamw_lr, keywords
        self._matrices = set(layer_matrices(model, experts=False)) if self.only_matrices else set()
        if self.only_matrices and not self._matrices:
            raise ValueError(f"{self.optimizer.__name__} trains matrices in layers, and this model has none")
        super().__init__(model, self._made([_matrix()], keywords).defaults)
        self._inner = self._made([dict(group) for group in self._own_groups()], keywords)
        self.state.update(self._inner.state)  # what its constructor keeps

    def _made(self, params: list[Any], keywords: dict[str, Any]) -> torch.optim.Optimizer:
        try:
            return self.optimizer(params, **keywords)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"{self.optimizer.__name__}: {error}") from error

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer creates by itself or in a step on a meta tensor like `p`; anything if that step fails."""
        if self.only_matrices and p not in self._matrices:
            return expected_adam_state(p, master_weights=False)
        example = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"))
        example.grad = torch.empty_like(example)
        try:
            inner = self._made([example], self._keywords)
            if saved.keys() != inner.state[example].keys():
                inner.step()
        except Exception:  # third-party code, which may look at values
            return saved
        return dict(inner.state[example])

    def group_parameters(self, model: nn.Module, defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """As for every method; for an optimizer of matrices the layers' first, then the others at AdamW's rate."""
        groups = super().group_parameters(model, defaults)
        return with_rate_of_the_rest(groups, self._matrices, self._adamw_lr) if self.only_matrices else groups

    def _own_groups(self) -> list[dict[str, Any]]:
        """The groups that the optimizer trains."""
        if not self.only_matrices:
            return self.param_groups
        return [group for group in self.param_groups if group["params"][0] in self._matrices]

    def _update_all(self) -> None:
        """The optimizer's own step, on this method's groups and state: loading a state replaces both.

        Raises:
            ValueError: the model is sharded, and the optimizer does with a tensor what torch can't do with its shards.
        """
        own = self._own_groups()
        self._inner.param_groups, self._inner.state = own, self.state
        try:
            self._inner.step()
        except (DataDependentOutputException, DynamicOutputShapeException):  # in a plan: it isn't for the shards
            raise
        except (RuntimeError, NotImplementedError) as error:
            if not any(map(is_sharded, self._group_of)):
                raise
            raise ValueError(
                f"{type(self).__name__} can't update the shards of a tensor ({str(error).partition('. ')[0]}): "
                f"{REPLICAS}"
            ) from error
        for group in self.param_groups:
            if not any(group is one for one in own):
                self.update(*_with_gradients(group), group)

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW, for what the optimizer doesn't take."""
        if params:
            states = [self.state[p] for p in params]
            adamw_update(states, params, grads, {**group, **ADAMW}, master_weights=False)


@functools.cache
def wrap(path: str, optimizer: Any) -> type[MemoryEfficientOptimizer]:
    """A method class for an optimizer; its keywords and their defaults are the optimizer's own.

    Args:
        path: the name by which users know it.
        optimizer: a subclass of `torch.optim.Optimizer`.
    """
    only_matrices = _takes_only_matrices(optimizer)
    parameters = list(inspect.signature(optimizer).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    kept = [p.replace(kind=keyword) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if only_matrices:
        kept.append(inspect.Parameter("adamw_lr", keyword, default=1e-3, annotation=float))
    model = inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=nn.Module)
    said = {
        "optimizer": optimizer,
        "only_matrices": only_matrices,
        "summary": f"{path}, unmodified" + (", on the matrices of the layers; AdamW on the rest" * only_matrices),
        "paper": f"see {path.partition(':')[0].partition('.')[0]}'s documentation",
        "__doc__": StockMethod.__doc__,
        "__module__": optimizer.__module__,
        "__signature__": inspect.Signature([model, *kept]),
    }
    return type(optimizer.__name__, (StockMethod,), said)


def _matrix() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2, 2))


def _takes_only_matrices(optimizer: Callable[..., Any]) -> bool:
    with_rate = functools.partial(optimizer, lr=1e-3) if "lr" in _required(optimizer) else optimizer
    return _accepts(with_rate, _matrix()) and not _accepts(with_rate, nn.Parameter(torch.zeros(2)))


def _accepts(optimizer: Callable[..., Any], p: nn.Parameter) -> bool:
    try:
        optimizer([p])
    except (ValueError, TypeError, AssertionError):
        return False
    return True


def _required(function: Callable[..., Any]) -> set[str]:
    return {name for name, p in inspect.signature(function).parameters.items() if p.default is inspect.Parameter.empty}


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]
