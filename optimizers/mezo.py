"""MeZO: fine-tuning with forward passes alone (Malladi et al., NeurIPS 2023, arXiv 2305.17333)."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from optimizers.base import MemoryEfficientOptimizer, check_count, check_positive
from optimizers.registry import register
from optimizers.shared.arithmetic import decayed
from optimizers.shared.ranks import check_shards, mean_loss
from optimizers.shared.sharded import has_values, is_sharded

# functions of a tensor that ask for a shape, a dtype, a device, not for values; of its attributes, all but these
DESCRIBING = {"__set__", "__hash__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "element_size"}
DESCRIBING |= {"stride", "storage_offset", "is_contiguous", "is_floating_point", "is_complex", "get_device"}
READING_ATTRIBUTES = {"data", "T", "mT", "H", "mH"}


@register("mezo")
class MeZO(MemoryEfficientOptimizer):
    """MeZO (Algorithm 1): two losses, at w + eps z and w - eps z, give the slope along a random direction z.

    s = (L(w + eps z) - L(w - eps z)) / (2 eps); w -= lr s z, with z ~ N(0, 1) for each weight, regenerated from a seed
    whenever it is needed. `samples` directions are averaged (n-SPSA, the paper's Definition 1). Both losses are
    computed in evaluation mode, as the authors do.

    The authors' code adds eps z to all weights and subtracts it again, which doesn't restore the same weights in
    floating point. Here each module runs on a moved copy of its weights, and of others' that it reads, which lives no
    longer than that; nothing but the update ever changes a weight. Weights that the loss doesn't depend on stay as
    they are.

    Both losses also see the same random numbers of torch (a mask, noise, a time step): otherwise their difference would
    be that of the draws, divided by 2 eps. The batch must be the closure's own, the same at each call.

    Trains everything. Keeps nothing: no gradients, no states, and only the activations that a forward pass needs at
    any moment.

    Args:
        model: the model to train.
        lr: learning rate; like SGD's, and smaller the more weights there are.
        weight_decay: decoupled; for tensors of two or more dimensions, biases excepted.
        eps: how far weights are moved, in units of z.
        samples: directions per step, each with two forward passes.
        seed: for the directions.

    Raises:
        ValueError: a value is out of range, or a part of the model is TorchScript.
        RuntimeError: in `backward(loss)`, or `step()` without losses: call `step(closure)`, or `ask(closure)` before;
            in a closure that calls `backward()`.
    """

    summary = "slopes along random directions, from losses alone: no backward pass"
    paper = "Malladi, Gao, Nichani, Damian, Lee, Chen & Arora, NeurIPS 2023, arXiv 2305.17333"
    trains = "everything"
    keeps = "nothing, not even gradients or the activations of more than one layer"
    excludes = "backward(loss): use ask(closure); clipping, fp16 scaling"
    example = {"lr": 5e-3}
    asks_losses = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        eps: float = 1e-3,
        samples: int = 1,
        seed: int = 0,
    ):
        check_positive("eps", eps)
        check_count("samples", samples)
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise ValueError(
                "MeZO moves the weights of each module as it runs, which TorchScript doesn't show: build it on the "
                "model that was traced or scripted"
            )
        self.eps, self.samples, self.seed, self.steps = eps, samples, seed, 0
        self._slopes: list[Tensor] = []  # along each direction of the coming step; empty between steps
        super().__init__(model, {"lr": lr, "weight_decay": weight_decay})
        self._number = {p: number for number, p in enumerate(self._group_of)}
        self._passed: set[nn.Parameter] = set()  # that the losses depend on

    @property
    def why_not_sharded(self) -> str:
        return "moves each module's weights as it runs, which a sharded model replaces"

    @torch._disable_dynamo
    def ask(self, closure: Callable[[], Tensor]) -> Tensor:
        """Measure the slopes of the loss that `closure` computes; those of several calls before a step add up."""
        if any(is_sharded(p) for p in self.model.parameters()):
            check_shards(self)
        with torch.no_grad(), _evaluating(self.model), _uncompiled():
            pairs = [self._both_sides(closure, sample) for sample in range(self.samples)]
        slopes = [(above - below) / (2 * self.eps) for above, below in pairs]
        self._slopes = [a + b for a, b in zip(self._slopes, slopes, strict=True)] if self._slopes else slopes
        return torch.stack([loss for pair in pairs for loss in pair]).mean()

    def backward(self, loss: Tensor) -> None:
        """Refused: a single loss teaches nothing."""
        raise RuntimeError("MeZO asks for losses itself: call ask(closure) instead of backward(loss)")

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update all weights from the losses obtained by `ask`, or those that `closure` computes."""
        loss = None if closure is None else self.ask(closure)
        super().step()
        return loss

    def drop_step(self) -> None:
        self._slopes, self._passed = [], set()

    def _update_all(self) -> None:
        if not self._slopes:
            raise RuntimeError(
                "MeZO asks for losses itself: call step(closure), or use membench.MethodTrainer for a stock Trainer"
            )
        # an expert may have had tokens on one replica only
        passed = self.on_any_replica([p in self._passed for p in self._group_of])
        self._passed = {p for p, read in zip(self._group_of, passed, strict=True) if read}
        if not self._passed:
            raise RuntimeError(
                "no weight was read in the passes that MeZO asked for: the closure must run the model that it was "
                "built from, and compute its loss anew at each call"
            )
        for group in self.param_groups:
            for p in group["params"]:
                if p in self._passed:
                    self._move(p, group)
        self.drop_step()

    def _move(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        for sample, slope in enumerate(self._slopes):
            z, rate = self._direction(p, sample), slope * (group["lr"] / self.samples)
            for weights, place in decayed(p, {**group, "weight_decay": 0.0} if sample else group):
                weights.addcmul_(z[place], rate.to(weights), value=-1)

    def after_step(self) -> None:
        self.steps += 1

    def extra_state(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        self.steps = extra["steps"]

    def _both_sides(self, closure: Callable[[], Tensor], sample: int) -> tuple[Tensor, Tensor]:
        with self._rewinding():
            above = self._loss_at(self.eps, closure, sample)
        return above, self._loss_at(-self.eps, closure, sample)

    def _loss_at(self, distance: float, closure: Callable[[], Tensor], sample: int) -> Tensor:
        torch.clear_autocast_cache()  # it may hold casts of the weights elsewhere
        with self._moved(distance, sample):
            return mean_loss(self, _loss_of(closure).detach())

    def _rewinding(self) -> AbstractContextManager[Any]:
        """After this context torch's generators are as they were before."""
        devices = {p.device.index for p in self._group_of if p.is_cuda and has_values(p)}
        return torch.random.fork_rng(sorted(devices))

    def _direction(self, p: nn.Parameter, sample: int) -> Tensor:
        """z for one parameter: a function of seed, step, sample and parameter."""
        key = f"{self.seed}/{self.steps}/{sample}/{self._number[p]}"
        generator = torch.Generator(p.device).manual_seed(random.Random(key).getrandbits(63))
        return torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)

    @contextmanager
    def _moved(self, distance: float, sample: int) -> Iterator[None]:
        """Within this context every weight is moved by `distance` z while a module that has or reads it runs."""
        away: list[dict[nn.Parameter, Tensor]] = [{}]  # original weights, by the module that runs with moved ones

        def leave(p: Any) -> None:
            with torch._C.DisableTorchFunction():  # what is done here is no reading of a weight
                if p in self._number and p.requires_grad and not any(p in others for others in away):
                    away[-1][p] = p.data
                    z = self._direction(p, sample)
                    p.data = torch.add(p.data, z, alpha=distance, out=z)
                    self._passed.add(p)

        def enter(module: nn.Module, args: Any) -> None:
            away.append({})
            for p in module.parameters(recurse=False):
                leave(p)

        def come_back(*_: Any) -> None:
            for p, home in away.pop().items():
                p.data = home

        with ExitStack() as at_the_end:
            at_the_end.callback(come_back)
            for module in self.model.modules():
                at_the_end.callback(module.register_forward_pre_hook(enter).remove)
                at_the_end.callback(module.register_forward_hook(come_back, always_call=True).remove)
            at_the_end.enter_context(_Readings(leave))
            yield


class _Readings(TorchFunctionMode):
    """Calls `read` with each parameter before a function of torch reads its values.

    Some weights are read by another module than their own: those of a Mamba layer's convolution, of some routers of
    experts.
    """

    def __init__(self, read: Callable[[Tensor], None]):
        super().__init__()
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _reads(func):
            for p in _parameters_in([args, kwargs or {}]):
                self._read(p)
        return func(*args, **(kwargs or {}))


def _reads(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return func.__self__.__name__ in READING_ATTRIBUTES if name == "__get__" else name not in DESCRIBING


def _parameters_in(value: Any) -> Iterator[nn.Parameter]:
    if isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parameters_in(item)


def _loss_of(closure: Callable[[], Tensor]) -> Tensor:
    try:
        return closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError("MeZO's closure is called without gradients: leave loss.backward() out of it") from error


def _uncompiled() -> AbstractContextManager[Any]:
    """Within this context a compiled model runs as it is written: a graph would leave out the hooks that move weights,
    or trace through them."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
