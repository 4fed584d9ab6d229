"""Which layers does the loss reach? A model with several towers may run only some: without images, no vision tower."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from optimizers.shared.blocks import find_layers
from optimizers.shared.loop_guards import leaves_of
from optimizers.shared.sharded import has_values, is_sharded


class Reach:
    """Before the first forward pass of training, leave out the layers that it doesn't run, with a warning.

    To find them, that pass is run an extra time, in evaluation mode, where no layer is dropped at random. A layer that
    runs for nothing, as CANINE's last in a classifier, isn't reached either. A model with all its layers in one list is
    assumed to run them all.

    Args:
        model: the model that the method trains.
        leave_out: called with the parameters that nothing reaches; the method then chooses among all others that it
            had when it was built.
        anywhere: the method's `on_any_replica`, since an image may be in one replica's first batch only.
        worst_case: the method's; called again if it was called before, since its choice may be left out now.
    """

    def __init__(
        self,
        model: nn.Module,
        leave_out: Callable[[set[nn.Parameter]], None],
        anywhere: Callable[[Sequence[bool]], Sequence[bool]],
        worst_case: Callable[[], None],
    ):
        self.model, self._leave_out, self._anywhere, self._worst_case = model, leave_out, anywhere, worst_case
        self.at_worst = False  # did the method choose its worst case?
        self.unreached: list[str] | None = None  # layers, once known
        self._layers = find_layers(model)
        self._in_one_list = len({name.rpartition(".")[0] for name in self._layers}) < 2
        self._watch()
        if self._in_one_list:
            self._know([])

    def state(self) -> dict[str, Any]:
        """What must be saved, as JSON."""
        return {"unreached": self.unreached}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; call it first, since the method's choice depends on it.

        Raises:
            ValueError: it names a layer that the model doesn't have.
        """
        unreached: list[str] | None = state.get("unreached")
        strangers = set(unreached or ()) - self._layers.keys()
        if strangers:
            raise ValueError(f"this state was saved for another model: it leaves out {', '.join(sorted(strangers))}")
        if unreached == self.unreached or (unreached is None and self._in_one_list):
            return
        self._know(unreached or [])
        if unreached is None:  # of before the first batch: the next one tells
            self.unreached = None
            self._watch()

    def remove(self) -> None:
        """Look no more: the training ends."""
        self._hook.remove()

    def _watch(self) -> None:
        self._hook = self.model.register_forward_pre_hook(_Probe(self._probe), with_kwargs=True)

    def _probe(self, *args: Any, **kwargs: Any) -> None:
        if self.unreached is not None:
            return
        ran = self._run(args, kwargs)
        reached = self._anywhere([name in ran or not ran for name in self._layers])
        unreached = [name for name, known in zip(self._layers, reached, strict=True) if not known]
        if unreached:
            names = unreached[0] if len(unreached) == 1 else f"{unreached[0]} to {unreached[-1]}"
            warnings.warn(
                f"{len(unreached)} layers are not trained, since the first batch doesn't reach them: {names}",
                stacklevel=2,
            )
        self._know(unreached)
        if self.at_worst:
            self._worst_case()

    def _know(self, unreached: list[str]) -> None:
        before, self.unreached = self.unreached, unreached
        self.remove()
        if unreached or before:
            reached = {p for name, layer in self._layers.items() if name not in unreached for p in layer.parameters()}
            self._leave_out({p for name in unreached for p in self._layers[name].parameters()} - reached)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
        """The names of the layers that a forward pass runs, but for those that run for nothing."""
        recorded: dict[str, bool] = {}  # by layers that ran: did autograd see all of it?

        def note(name: str) -> None:
            recorded[name] = recorded.get(name, True) and torch.is_grad_enabled()

        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: note(name))  # type: ignore[misc]
            for name, layer in self._layers.items()
            for module in layer.modules()  # the model may run a layer's parts by itself
        ]
        modes = [(module, module.training) for module in self.model.modules()]
        like = next(self.model.parameters())
        devices = [like.device.index] if like.is_cuda and has_values(like) else []
        try:
            self.model.eval()
            with torch.random.fork_rng(devices):
                used = self._used(args, kwargs)
        finally:
            for module, training in modes:
                module.training = training
            for handle in handles:
                handle.remove()
        return {
            name for name, seen in recorded.items() if not (seen and used) or used & {*self._layers[name].parameters()}
        }

    def _used(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[Tensor]:
        """Run a forward pass; the weights of layers on which anything that it returns depends, or none if that can't be
        told: shards come and go, an object may hold anything. Autograd records the pass, but keeps no activation.
        """
        if any(map(is_sharded, self.model.parameters())):
            with torch.no_grad():
                self.model.forward(*args, **kwargs)
            return set()
        weights = [p for layer in self._layers.values() for p in layer.parameters() if p.is_floating_point()]
        required = {p: p.requires_grad for p in weights}
        try:
            for p in required:
                p.requires_grad_(True)
            with saved_tensors_hooks(lambda _: None, lambda _: None):  # type: ignore[arg-type, return-value]
                output = tree_leaves(self.model.forward(*args, **kwargs))
            plain = all(value is None or isinstance(value, Tensor | int | float | str) for value in output)
            return set(leaves_of(output)).intersection(required) if plain else set()
        finally:
            for p, before in required.items():
                p.requires_grad_(before)
            torch.clear_autocast_cache()  # it may hold casts of weights as if they were trained


REENTRANT = "re-entrant gradient checkpointing, which loses gradients (set use_reentrant=False)"


def warn_of_idle(what: str, parts: Mapping[str, Iterable[Tensor]], remedy: str) -> None:
    """After the first backward pass: say which parts of the model got no gradient.

    Args:
        what: each of them is, as "adapters".
        parts: their parameters, by module.
        remedy: what to do about modules that the model doesn't call.
    """
    idle = [name for name, params in parts.items() if all(p.grad is None for p in params)]
    if idle:
        warnings.warn(
            f"no gradient reached the {what} of {len(idle)} of {len(parts)} modules in the first step, the first being "
            f"{idle[0]}: the model didn't call them ({remedy}), or uses {REENTRANT}",
            stacklevel=2,
        )


def check_reached(model: nn.Module, state: Mapping[Tensor, Any]) -> None:
    """Refuse to go on if parts of a layer were to be trained and none was: it has no state.

    Raises:
        RuntimeError: names the layer.
    """
    for name, layer in find_layers(model).items():
        trained = [p for p in layer.parameters() if p.requires_grad]
        if trained and not any(state.get(p) for p in trained):
            raise RuntimeError(
                f"no gradient ever reached {name}: the loss doesn't depend on it (freeze its parameters before "
                f"building the method), or the model uses {REENTRANT}"
            )


class _Probe:
    """The hook; in a copy of the model it does nothing, since the copy isn't being trained."""

    def __init__(self, probe: Callable[..., None] = lambda *_, **__: None):
        self.probe = probe

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled():
            self.probe(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _Probe, ()
