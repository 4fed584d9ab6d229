"""The interface of every method: a `torch.optim.Optimizer` that is built from the model.

Every method follows four rules, and `optimizers.contract` checks them:

1. What requires gradients when `super().__init__` runs is what the method may ever train; `param_groups` never change.
2. Every tensor that a method keeps lives in `self.state[param]`.
3. Everything else that it must remember is JSON, in `extra_state`.
4. A hyper-parameter that a scheduler may change is read from the group at the moment of use.
"""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optimizers.shared import ranks, saved_states, sharded
from optimizers.shared.blocks import train_only
from optimizers.shared.construction import guard_construction, is_weight, mark_frozen
from optimizers.shared.coverage import Coverage
from optimizers.shared.gradient_hooks import changing, count_apart, hook_gradients, updating
from optimizers.shared.loop_guards import watch
from optimizers.shared.masters import LOW_PRECISION, Masters
from optimizers.shared.model_checks import check_parameters
from optimizers.shared.replicas import Replicas
from optimizers.shared.step_checks import (
    check_dense,
    check_not_rehearsed,
    check_not_updated,
    check_unchanged,
    check_used,
    hyperparameters,
)
from optimizers.shared.storages import storages_of
from optimizers.shared.values import (
    check_choice,
    check_count,
    check_hyperparameters,
    check_positive,
    check_share,
    plain,
)

__all__ = [
    "LOW_PRECISION",
    "MemoryEfficientOptimizer",
    "check_choice",
    "check_count",
    "check_hyperparameters",
    "check_positive",
    "check_share",
]


class MemoryEfficientOptimizer(torch.optim.Optimizer):
    """A training method: which parameters it trains, how it updates them, what it keeps.

    A subclass implements `update` and, if it chooses what to train, `after_step`, `advance` and the two `extra_state`
    methods. The training loop is the same for all: `backward(loss)`, `step()`, `scheduler.step()`, `zero_grad()`;
    with `ask(closure)` as its first call it also works for methods without gradients.

    Args:
        model: the model to train. Parameters that don't require gradients at this point are never touched.
        defaults: hyper-parameters of the groups (`lr`, `weight_decay`, ...).
        may_train: the parameters that the method may ever train (default: all that require gradients); the others are
            frozen until `finish()`.
        in_backward: run `update` inside the backward pass, one parameter at a time, and free each gradient at once;
            `step()` then only counts. Rules out gradient accumulation, clipping by the loop and fp16 loss scaling.
        fp32_gradients: give low-precision parameters fp32 gradients (torch's `param.grad_dtype`).

    Raises:
        TypeError: `model` isn't a model.
        ValueError: a hyper-parameter is out of range, nothing is left to train, a parameter is of a kind that can't be
            trained, or another method is training it. The model is left as it was.
    """

    summary: ClassVar[str] = ""  # one line: what it does
    paper: ClassVar[str] = ""  # where it comes from
    trains: ClassVar[str] = ""  # what it trains
    keeps: ClassVar[str] = ""  # bytes that it keeps, as a formula
    excludes: ClassVar[str] = ""  # what it can't be combined with
    varies_with: ClassVar[str] = ""  # on what else the bytes of a step depend: plans take the worst
    only_linear: ClassVar[bool] = False  # weights outside linear modules, such as fused experts, stay as they are
    example: ClassVar[dict[str, Any]] = {}  # hyper-parameters that suit a tiny model; the contract's checks use them
    # keywords added after records were made with the method: at their defaults, which must never change, a run is the
    # same as without them, so they appear neither in its id nor in its record
    added_later: ClassVar[tuple[str, ...]] = ()

    in_backward: bool = False
    seed: int = 0  # for all random choices; a keyword of the methods that make any
    # the loop must call `backward(loss)`: a bare `loss.backward()` raises, at once or in `step()`
    needs_loss: bool = False
    # the method uses no gradients but asks for losses at weights of its choice: the loop must call `ask(closure)`
    asks_losses: ClassVar[bool] = False
    adds_parameters: bool = False  # does it put modules of its own into the model, until `finish()`?

    def __init_subclass__(cls, **given: Any):
        super().__init_subclass__(**given)
        if "__init__" in vars(cls):
            cls.__init__ = guard_construction(cls.__init__)  # type: ignore[method-assign]

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
        defaults = plain(defaults)
        self.model = model
        self.in_backward = in_backward
        self._requires_grad = {p: p.requires_grad for p in model.parameters()}
        self._dropped = weakref.finalize(self, mark_frozen, self._requires_grad, type(self).__name__)
        self._dropped.atexit = False
        self._name_of = {p: name for name, p in model.named_parameters()}
        if may_train is not None:
            chosen = set(may_train)
            for p in self._requires_grad:
                p.requires_grad_(p.requires_grad and p in chosen)
        check_parameters(type(self).__name__, model, [(n, p) for n, p in model.named_parameters() if p.requires_grad])
        super().__init__(self.group_parameters(model, defaults), defaults)
        _separate(self.param_groups)
        self._hooks: list[Any] = []
        self._group_of: dict[nn.Parameter, int | None] = {}
        for index, group in enumerate(self.param_groups):
            self._group_of |= dict.fromkeys(group["params"], index)
        self._number_of = {p: number for number, p in enumerate(self._group_of)}
        if in_backward:
            count_apart(self._group_of)
        self._chosen: set[nn.Parameter] | None = None  # what it trains now; None: all that it may
        self._seen: list[torch.dtype | None] = []  # of the model's parameters that required gradients when last checked
        self._dtypes: dict[nn.Parameter, torch.dtype] = {}  # of parameters when they were last trained
        self._updated: set[nn.Parameter] = set()
        self._used: list[dict[str, Any]] = []  # the hyper-parameters of each group at the step's first update
        self._masters = Masters()
        self._steps_done = 0
        self._stepped = False  # in this process: a state that is loaded has steps done elsewhere
        self._finished = False
        self._replicas: Replicas | None = None
        self._averaged = False  # are the gradients those of all replicas?
        self._agreed: tuple[int, ...] | None = None  # what all ranks were last seen to train: numbers of parameters
        self._fp32_gradients = fp32_gradients
        self._gradient_dtypes: dict[nn.Parameter, torch.dtype | None] = {}
        if fp32_gradients:
            self._gradient_dtypes = {p: p.grad_dtype for p in self._group_of if p.dtype in LOW_PRECISION}
            _set_gradient_dtypes(dict.fromkeys(self._gradient_dtypes, torch.float32))
        if in_backward:
            hook_gradients(self, updating(self))
        ranks.check_model_on_ranks(self)

    def group_parameters(self, model: nn.Module, defaults: dict[str, Any]) -> list[dict[str, Any]]:
        """The param groups: weights of two or more dimensions get weight decay, the others (biases, norms) don't."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"{type(self).__name__} has nothing to train: no parameter requires gradients")
        decayed = [(name, p) for name, p in named if is_weight(name, p)]
        others = [(name, p) for name, p in named if not is_weight(name, p)]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]  # with named parameters torch refuses an empty one

    # ---- what a method implements

    def update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        """Update one group's `params` in place from `grads`: two lists of tensors, equal in shape pair by pair."""
        raise NotImplementedError

    def before_update(self) -> None:
        """Called when all gradients exist and nothing is updated yet (never with `in_backward`)."""

    def after_step(self) -> None:
        """Called when a step is complete: is it time for the next block?"""

    def advance(self) -> None:
        """Select the next block now."""

    @property
    def worst_cases(self) -> int:
        """How many selections could have the largest memory peak, depending on the model and the batch shape."""
        return 1

    def worst_case(self, number: int = 0) -> None:
        """Make the selection with the largest peak, if selections depend on values; `number` is below `worst_cases`."""

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of `loss`, a scalar.

        Raises:
            RuntimeError: `loss` doesn't depend on anything that is being trained.
        """
        self.before_backward(loss)
        loss.backward()
        self.note_loss(loss)

    def note_loss(self, loss: Tensor) -> None:
        """Called by `backward` with each loss whose gradients it has computed."""

    def ask(self, closure: Callable[[], Tensor]) -> Tensor:
        """Prepare a step from the loss that `closure` computes: `backward(closure())` for a method with gradients.

        Returns:
            the loss, detached.
        """
        loss = closure()
        self.backward(loss)
        return loss.detach()

    def drop_step(self) -> None:
        """Forget what was prepared for a step that won't be made, gradients aside: a loss, slopes.

        `zero_grad()` calls it, since a loop may skip a step, and `load_state_dict()`, since it may go back.
        """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and all else that was prepared for the next step: it may be skipped."""
        super().zero_grad(set_to_none)
        self._averaged = False
        self.drop_step()

    def extra_state(self) -> dict[str, Any]:
        """What must be saved besides tensors, as JSON."""
        return {}

    def load_extra_state(self, extra: dict[str, Any]) -> None:
        """Restore what `extra_state` returned.

        Raises:
            ValueError: it doesn't fit this optimizer.
        """

    def weights_with_master(self, p: nn.Parameter) -> Tensor:
        """The weights of `p` that `self.state[p]["master"]`, if there is one, stands for, in its shape."""
        return p

    def expected_state(self, p: nn.Parameter, saved: dict[str, Any]) -> dict[str, Any]:
        """What the method would keep for `p` in place of `saved`: the same entries, with meta tensors as examples.

        `load_state_dict` refuses any difference in names, shapes or dtypes. By default each tensor has the shape of
        `p` or is a scalar, and a floating-point one has its dtype or fp32; a method that keeps others says so here.
        """
        return {key: saved_states.example(value, p) for key, value in saved.items()}

    def finish(self) -> nn.Module:
        """End the training: remove all hooks, restore `requires_grad`, and return a plain model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for p, requires_grad in self._requires_grad.items():
            p.requires_grad_(requires_grad)
        for p in (*self._requires_grad, *self._group_of):  # of adapters, too, which the model didn't have
            p.grad = None
        _set_gradient_dtypes(self._gradient_dtypes)
        self._dropped.detach()
        self._finished = True
        return self.model

    # ---- what it gets for free

    def train_only(self, active: set[nn.Parameter]) -> set[nn.Parameter]:
        """Let exactly `active`, of what the method may ever train, require gradients; returns these as a set.

        For a method that chooses: until the next call, `step()` refuses to go on if others do.
        """
        self._check_not_finished("advance")
        self._chosen = self._group_of.keys() & active
        train_only(self._group_of, self._chosen)
        if any(map(sharded.is_sharded, self._group_of)):
            sharded.follow_choice(self.model)
        return self._chosen

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the method is built: what it trains follows from its model."""
        if "_group_of" in vars(self):
            raise ValueError(
                f"{type(self).__name__} trains what its model had when it was built, so no group can be added: "
                "finish() it and build another, on a model that has the new parameters"
            )
        super().add_param_group(param_group)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters that the model had when the method was built, whether it trains them or not."""
        return list(self._requires_grad)

    @property
    def chooses(self) -> bool:
        """Does the method choose again, after some steps, what it trains?"""
        return type(self).after_step is not MemoryEfficientOptimizer.after_step

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that are being trained: of a model that was sharded since, the shards."""
        self.follow_sharding()
        return [p for p in self._group_of if p.requires_grad]

    @property
    def elementwise(self) -> bool:
        """Does each weight's update depend on its own gradient and state alone? Then each rank can update its shard."""
        return False

    @property
    def why_not_sharded(self) -> str | None:
        """Why it can't train a model that FSDP2 shards, in words that follow its name; None if it can."""
        if self._gradient_dtypes:
            return "has fp32_gradients, but FSDP2 gives shards gradients in the dtype of the weights"
        return None

    @property
    def cycle_length(self) -> int:
        """How many calls of `advance` it takes to go once through everything that is trained in turn."""
        return 1

    @property
    def selection(self) -> str | None:
        """What is being trained, in words; None for a method without a choice."""
        return None

    @property
    def block_coverage(self) -> float | None:
        """Share of the blocks trained at least once; None for a method without blocks."""
        return None

    def coverage_after(self, steps: int) -> Coverage | None:
        """What so many steps come to; None for a method without blocks, or where values decide."""
        return None

    def state_bytes(self) -> int:
        """Bytes of everything this process keeps in `self.state`, each storage counted once."""
        tensors = [t for state in self.state.values() for t in state.values() if torch.is_tensor(t)]
        storages = [storage for t in tensors for storage in storages_of(t)]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    @torch._disable_dynamo  # torch.compile(optimizer.step) would trace what changes from step to step
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update what is being trained.

        Raises:
            RuntimeError: the training was ended by `finish()`, or the model has other parameters, or other ones that
                require gradients, than the method trains.
        """
        self._check_not_finished("step")
        if not self.state and self.chooses:
            check_not_rehearsed(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow_sharding()
        if any(map(sharded.is_sharded, self._group_of)):
            sharded.reshard(self.model)
        self._stepped = True
        if not self._updated:
            check_unchanged(self)
        if self.in_backward:
            check_used(self)
        else:
            self.average_gradients()
            ranks.check(self, ((p, p.grad) for p in self._group_of))
            if torch._C._is_any_autocast_enabled():
                with _without_autocast(next(iter(self._group_of))):
                    self._update_all()
            else:
                self._update_all()
        torch.clear_autocast_cache()  # in a loop that is within autocast it holds casts of the weights as they were
        self._updated.clear()
        self._averaged = False
        self._steps_done += 1
        self.after_step()
        return loss

    def _update_all(self) -> None:
        self.before_update()
        for group in self.param_groups:
            pairs = [(p, p.grad) for p in group["params"] if p.requires_grad and p.grad is not None and p.numel()]
            if pairs:
                check_dense(self, pairs)
                self._update(pairs, group)

    def _update(self, pairs: list[tuple[nn.Parameter, Tensor]], group: dict[str, Any]) -> None:
        """`update`, on shards if the method can, else on one sharded tensor after another, gathered."""
        low = [p for p, _ in pairs if p.dtype in LOW_PRECISION]
        if low:
            self._masters.follow(low, self.state, self.weights_with_master)
        apart = [] if self.elementwise else [(p, g) for p, g in pairs if sharded.is_sharded(p)]
        together = [(p, g) for p, g in pairs if not sharded.is_sharded(p)] if apart else pairs
        if together:
            self.update([p for p, _ in together], [g for _, g in together], group)
        for p, g in apart:
            with sharded.whole(p, self.state[p]):
                self.update([p], [sharded.gathered(g)], group)
        if low:
            self._masters.note(low)

    @torch.no_grad()
    def _receive(self, p: nn.Parameter) -> None:
        """The hook of `in_backward`: use a gradient at once, or later if not all replicas get one of this parameter."""
        if self._replicas is None or not self._replicas.comes_late(p, self._group_of, self._use):
            self._use(p)

    @torch.no_grad()
    def _use(self, p: nn.Parameter) -> None:
        """Make one gradient, inside the backward pass, that of all replicas, and update its parameter."""
        if self._replicas is not None and p.grad is not None:
            self._replicas.average([p.grad])
        if not self._updated:
            check_unchanged(self)
            ranks.check(self, [(p, p.grad)])
        self._update_now(p)

    @torch.no_grad()
    def _update_now(self, p: nn.Parameter) -> None:
        """Inside the backward pass: update one parameter and free its gradient."""
        check_not_updated(self, p)
        assert p.grad is not None  # a hook that torch calls after accumulating it
        if not self._updated:
            self._follow_groups()
        index = self._group_of[p]
        if p.numel() and index is not None:
            check_dense(self, [(p, p.grad)])
            group = self.param_groups[index]
            if torch._C._is_any_autocast_enabled():
                with _without_autocast(p):
                    self._update([(p, p.grad)], group)
            else:
                self._update([(p, p.grad)], group)
        self._updated.add(p)
        p.grad = None

    def _follow_groups(self) -> None:
        """Note in which group each parameter is now, since a loop may have made others of them, and what it gives."""
        self._used = hyperparameters(self)
        now = {p: index for index, group in enumerate(self.param_groups) for p in group["params"]}
        for p in self._group_of:
            self._group_of[p] = now.get(p)

    def data_parallel(self, group: Any = None) -> None:
        """Keep the replicas of the model in the processes of `group` equal, without a wrapper of the model.

        All get the weights of the first one now. From then on gradients are averaged where they are used: in `step()`,
        or inside the backward pass; so are losses that the method looks at. Only what is being trained is sent. Call it
        before the first step, in all processes; to clip gradients in the loop, call `average_gradients()` before.

        Args:
            group: a process group of torch.distributed; None for all processes. With a group of this process alone,
                nothing is averaged or compared.

        Raises:
            ValueError: there is no process group, this process isn't in it, or the model is sharded.
        """
        if any(sharded.is_sharded(p) for p in self._requires_grad):
            raise ValueError("data_parallel() is for whole replicas; a sharded model averages its gradients by itself")
        self._replicas = Replicas(group)
        model = self.model
        self._replicas.copy_from_first([t.detach() for t in (*model.parameters(), *model.buffers())])
        if not self.in_backward:
            hook_gradients(self, changing(self))
        watch(self)

    @property
    def is_data_parallel(self) -> bool:
        """Was `data_parallel()` called?"""
        return self._replicas is not None

    def on_any_replica(self, here: Sequence[bool]) -> list[bool]:
        """Whether each is true on any replica; all of them must ask."""
        if self._replicas is None:
            return list(here)
        return self._replicas.anywhere(here, next(iter(self._group_of)).device)

    def average_gradients(self) -> None:
        """Average the gradients over the replicas, unless that is done: before clipping. `step()` does it, too."""
        if self._replicas is not None and not self._averaged:
            self._replicas.average_gradients(self.trainable)
            self._averaged = True

    def follow_sharding(self) -> None:
        """If the model was sharded after the method was built, go on with the shards; nothing after the first step.

        `backward(loss)`, `step()` and `load_state_dict()` call it.

        Raises:
            RuntimeError: it should have acted before, on gradients.
            ValueError: it can't train shards.
        """
        new = {} if self._stepped else sharded.replaced_parameters(self.model, self._name_of)
        if not new:
            return
        ranks.check_shards(self)
        if self.in_backward and any(p.grad is not None for p in new.values()):
            raise RuntimeError(
                f"{type(self).__name__} was built before the model was sharded, and acts on gradients of parameters "
                "that are no longer the model's: build it after fully_shard(model), or call optimizer.backward(loss) "
                "instead of loss.backward()"
            )
        sharded.put_in_place(vars(self), new)
        params = iter(self._group_of)
        for group in self.param_groups:  # where a library may have put others
            group["params"] = [next(params) for _ in group["params"]]
        if self.in_backward:
            hook_gradients(self, updating(self))

    def before_backward(self, loss: Tensor) -> None:
        """What `backward(loss)` does first: follow sharding, refuse a loss without a graph.

        Raises:
            RuntimeError: it depends on nothing that is being trained; torch's own message wouldn't give the reason.
        """
        self.follow_sharding()
        if not loss.requires_grad:
            raise RuntimeError(
                f"the loss depends on nothing that {type(self).__name__} is training ({self.selection or 'all'}): "
                "freeze what the loss doesn't reach before building the method, compute it with gradients enabled, and "
                "let the model drop no layers at random (layerdrop 0)"
            )

    def _check_not_finished(self, call: str) -> None:
        if self._finished:
            raise RuntimeError(f"{type(self).__name__}.{call}() after finish(): build a new optimizer to train on")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"{type(self).__name__} can't be copied or pickled, since it acts on its own model: save its state_dict() "
            "and load that into one built from the other model"
        )

    def rounding_keys(self, params: Iterable[Tensor]) -> list[tuple[int, int, int]]:
        """The key of each parameter's random numbers in this step's update."""
        return [(self.seed, self._steps_done, self._number_of[p]) for p in params]  # type: ignore[index]

    def finished_state_dict(self) -> dict[str, Tensor]:
        """The `state_dict` of the model that `finish()` would return now; training isn't affected."""
        return self.model.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """As torch's, plus `extra`: the method's name and its JSON."""
        saved = super().state_dict()
        tensors = saved_states.count_tensors(saved["state"])
        own = {"method": type(self).__name__, "tensors": tensors, "steps_done": self._steps_done}
        extra = plain({**own, **self.extra_state()})
        saved["param_groups"] = plain(saved["param_groups"])  # a scheduler may have put others there
        saved["param_groups"][0]["extra"] = extra  # torch.distributed.checkpoint drops everything but state and groups
        return {**saved, "extra": extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, to the last bit: tensors keep the dtype that they were saved in.

        As in torch, hooks that are registered for it may adapt the state before, and see the optimizer afterwards.

        Raises:
            ValueError: it was saved by another method, for a model with other parameters, or is incomplete. The
                optimizer is left as it was.
            RuntimeError: the training was ended by `finish()`, or the model was sharded since the method was built, and
                it can't follow.
        """
        self._check_not_finished("load_state_dict")
        self.follow_sharding()
        extra, groups, saved = saved_states.parts(self, saved_states.adapted(self, state_dict))
        before, kept = self.extra_state(), copy.copy(self.state)
        try:
            self.load_extra_state(extra)
            saved_states.check_entries(self, saved)
        except Exception as error:
            self.load_extra_state(before)
            self.state = kept
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"this state is damaged: {type(error).__name__}: {error}") from error
        # not by torch's own method, which casts floating-point state to the parameter's dtype
        params = [p for group in self.param_groups for p in group["params"]]
        self.param_groups = [
            {**copy.deepcopy(group), "params": own["params"]}
            for group, own in zip(groups, self.param_groups, strict=True)
        ]
        _separate(self.param_groups)
        self.state = defaultdict(dict)
        self._steps_done = extra.get("steps_done", 0)
        self._dtypes.clear()
        self._masters.forget()
        self._updated.clear()
        self._averaged = False
        self.drop_step()
        for index, entries in saved.items():
            p = params[index]
            self.state[p] = {key: sharded.placed(_copy(value, p.device), p) for key, value in entries.items()}
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


def _without_autocast(p: Tensor) -> AbstractContextManager[Any]:
    """Within this context matrix products have the dtype of their factors, though a loop is within autocast."""
    return nullcontext() if p.is_meta else torch.autocast(p.device.type, enabled=False)


def _separate(groups: list[dict[str, Any]]) -> None:
    """Give each group its own tensors for hyper-parameters, which schedulers and loops change in place.

    The first keeps those that were given, so that a loop may also change these.
    """
    for group in groups[1:]:
        group |= {key: value.clone() for key, value in group.items() if torch.is_tensor(value)}


def _set_gradient_dtypes(dtypes: dict[nn.Parameter, torch.dtype | None]) -> None:
    for p, dtype in dtypes.items():
        p.grad_dtype = dtype


def _copy(value: Any, device: torch.device) -> Any:
    return value.detach().to(device, copy=True) if torch.is_tensor(value) else copy.deepcopy(value)
