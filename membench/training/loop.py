"""The training loop, the same for every method; the memory meter and the planner run its step, too."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from membench.config.errors import UserError, explain
from membench.config.run import Training
from membench.training import parallel, shards, tracking
from membench.training.activations import offloading
from membench.training.checkpoint import WAY_OUT
from membench.training.clock import Clock, device_name, process_memory, waited_seconds
from membench.training.schedule import scheduler
from membench.training.seeding import seed_generators
from optimizers import MemoryEfficientOptimizer
from optimizers.shared.affine_linear import kept_weights
from optimizers.shared.ranks import check_shards
from optimizers.shared.sharded import gathered, reshard
from reports.schema import ANY as LARGEST_SCORE
from tasks import ComparesScores, HasLargestBatch, HasReader, HasReference, is_language_model
from tasks.models.damage import is_out_of_memory
from tasks.models.modes import dropping_layers

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Phase = Callable[[str], AbstractContextManager]

_LOOKED_AT = 32  # batches to inspect of a task that doesn't know its largest
_HISTORY_ENTRIES = 500  # for a long run: the losses between two entries are averaged


class Task(Protocol):
    """What the loop needs from a task."""

    def batch(self, step: int) -> Batch: ...
    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...
    def evaluate(self, model: nn.Module) -> dict[str, float]: ...


@dataclass
class Progress:
    """The progress of a run: plain data, part of its checkpoint."""

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    waited_seconds: float | None = 0.0  # None: the system doesn't say
    evaluation_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # since the last entry of the history
    initial_metrics: dict[str, float] | None = None  # before the first step
    made_by: list[dict[str, Any]] = field(default_factory=list)  # what made how many steps, in their order
    # peaks of each rank's processes, before the first step or at the checkpoint
    memory: list[dict[str, Any]] = field(default_factory=list)


class Diverged(Exception):
    """The loss, or a weight, is no longer a finite number."""


def training_step(
    model: nn.Module,
    optimizer: MemoryEfficientOptimizer,
    loss_fn: Loss,
    micro_batches: Sequence[Batch],
    *,
    shares: Sequence[float] | None = None,
    max_grad_norm: float | None = None,
    phase: Phase,
) -> Tensor:
    """One update from the mean loss of `micro_batches`, which are on the model's device; returns that loss, detached.

    `shares` are the weights of the micro-batches in that mean, equal by default.

    The loss stays a tensor because fake tensors have no values. `phase(name)` is a context manager, entered for
    "forward" and "backward" of each micro-batch and once for "update", which includes dropping the gradients. All
    losses that a method asks for count as "forward".

    Raises:
        ValueError: accumulation or clipping with a method that updates inside the backward pass, or clipping with one
            that has no gradients.
    """
    check_combination(optimizer, len(micro_batches), max_grad_norm)
    weights = shares or [1 / len(micro_batches)] * len(micro_batches)
    pairs = zip(micro_batches, weights, strict=True)
    losses = [_backpropagate(model, optimizer, loss_fn, batch, weight, phase) for batch, weight in pairs]
    with phase("update"):
        if max_grad_norm is not None:
            optimizer.average_gradients()
            nn.utils.clip_grad_norm_(optimizer.trainable, max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def _backpropagate(
    model: nn.Module, optimizer: MemoryEfficientOptimizer, loss_fn: Loss, batch: Batch, weight: float, phase: Phase
) -> Tensor:
    learned = batch if weight else _with_labels(batch)

    def weighted_loss() -> Tensor:
        loss = loss_fn(model, learned)
        return loss * weight if weight != 1 else loss

    with phase("forward"):
        if optimizer.asks_losses:
            return optimizer.ask(weighted_loss)
        loss = weighted_loss()
    with phase("backward"):
        optimizer.backward(loss)
    return loss.detach()


def _with_labels(batch: Batch) -> Batch:
    """A batch that counts for nothing, with labels: the mean over none is NaN, and so would be 0 times that."""
    return {**batch, "labels": torch.zeros_like(batch["labels"])} if "labels" in batch else batch


def check_method(optimizer: MemoryEfficientOptimizer, training: Training) -> None:
    """Refuse, before anything is trained, what a method can't do of a training.

    Raises:
        ValueError: says what, and the way out.
    """
    check_combination(optimizer, training.gradient_accumulation_steps, training.max_grad_norm)
    if training.track == tracking.GRADIENT_NORM:
        tracking.check(optimizer)
    if training.processes > 1 and training.strategy == "fsdp2":
        check_shards(optimizer)


def check_combination(optimizer: MemoryEfficientOptimizer, micro_batches: int, max_grad_norm: float | None) -> None:
    """Refuse what can't work if gradients are gone before the step: accumulating them, or clipping their norm."""
    method = type(optimizer).__name__
    if optimizer.asks_losses and max_grad_norm is not None:
        raise ValueError(f"{method} has no gradients to clip to {max_grad_norm}: leave max_grad_norm out")
    if not optimizer.in_backward:
        return
    instead = ", or in_backward=False" if "in_backward" in inspect.signature(type(optimizer)).parameters else ""
    if micro_batches > 1:
        raise ValueError(
            f"{method} updates inside the backward pass and can't accumulate {micro_batches} micro-batches: "
            f"use a larger batch size with 1 accumulation step{instead}"
        )
    if max_grad_norm is not None:
        raise ValueError(
            f"{method} updates inside the backward pass, so the loop can't clip gradients to {max_grad_norm}: "
            f"leave max_grad_norm out or use the method's own clipping{instead}"
        )


def micro_batches(task: Task, step: int, training: Training, device: torch.device) -> list[Batch]:
    """The micro-batches of update `step` (from 0), on `device`."""
    parts = training.gradient_accumulation_steps
    batches = [task.batch(step * parts + part) for part in range(parts)]
    return [_on(device, batch) for batch in batches]


def _on(device: torch.device, batch: Batch) -> Batch:
    """Raises ValueError unless it is tensors, with a mask of its tokens."""
    odd = next((key for key, value in batch.items() if not torch.is_tensor(value)), None)
    if odd is not None or "attention_mask" not in batch:
        what = "has no attention_mask, by which tokens are counted" if odd is None else f"has a {odd} that is no tensor"
        raise ValueError(f"batch() of a task returns tensors with attention_mask among them: this one {what}")
    return {key: value.to(device) for key, value in batch.items()}


def _numbers(metrics: Any) -> dict[str, float]:
    """What a task's `evaluate` returned, as plain numbers: those of numpy and torch can't be kept.

    Raises:
        ValueError: names what isn't a number.
    """
    if not isinstance(metrics, dict):
        raise ValueError(f"evaluate() of a task returns its metrics by name, a dict, not {type(metrics).__name__}")
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = value.__float__()  # not float(value), which takes texts
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"evaluate() of a task returned {name}={value!r:.60}, which is no number") from error
    return numbers


def largest_micro_batches(task: Task, training: Training, device: torch.device) -> list[Batch]:
    """The micro-batches of the update that needs the most memory, the same for every method.

    For a task that doesn't know them, these are the largest of its first batches, preferably with padding.
    """
    if isinstance(task, HasLargestBatch):
        largest = task.largest_batch()
    else:
        largest = max((task.batch(step) for step in range(min(training.steps, _LOOKED_AT))), key=_needs)
    parts = range(training.gradient_accumulation_steps)
    return [{key: value.to(device, copy=True) for key, value in largest.items()} for _ in parts]


def _needs(batch: Batch) -> tuple[int, bool]:
    mask = batch.get("attention_mask")
    return sum(value.nbytes for value in batch.values()), mask is not None and not bool(mask.all())


def shares(
    batches: Sequence[Batch], whole: Sequence[Batch] | None = None, *, model: nn.Module | None = None
) -> list[float]:
    """The weights of micro-batches in an update: their shares of all labels (-100 doesn't count).

    Nor does the first label of a row if `model` is a causal language model of transformers: it predicts the others.

    A loss is a mean over labels, whose number varies between texts: with these weights the mean is the whole batch's.
    If `batches` are this rank's parts of the `whole` ones, it is so for the mean over ranks.

    Raises:
        ValueError: there are none.
    """
    count = _predicted if model is not None and is_language_model(model) else _labels
    total = sum(map(count, batches if whole is None else whole))
    if not total:
        raise ValueError("a batch has nothing to learn, since all of its labels are -100: leave such rows out")
    ranks = 1 if whole is None else parallel.ranks()
    return [ranks * count(batch) / total for batch in batches]


def _labels(batch: Batch) -> int:
    """How many a batch has; rows of one without."""
    return int((batch["labels"] != -100).sum()) if "labels" in batch else len(next(iter(batch.values())))


def _predicted(batch: Batch) -> int:
    """How many labels a causal language model predicts, from the tokens before."""
    return _labels({**batch, "labels": batch["labels"][:, 1:]} if "labels" in batch else batch)


def loss_function(task: Task, training: Training, device: torch.device) -> Loss:
    """The task's loss, under autocast and with activations offloaded if requested."""
    loss = task.loss if training.autocast is None else _autocast(task.loss, training, device)
    return offloading(loss) if training.offload_activations else loss


def _autocast(task_loss: Loss, training: Training, device: torch.device) -> Loss:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with _precision(training, device):
            return task_loss(model, batch)

    return loss


def _precision(training: Training, device: torch.device) -> AbstractContextManager:
    """A context manager in which training computes."""
    return torch.autocast(device.type, getattr(torch, training.autocast)) if training.autocast else nullcontext()


class Loop:
    """A training run that can stop after any step and resume from a checkpoint, to the same bits.

    All randomness in a step (dropout) is seeded from `(seed, step)`, so evaluating or resuming never changes a run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MemoryEfficientOptimizer,
        task: Task,
        training: Training,
        *,
        seed: int,
        device: torch.device,
        jobs: int = 1,
    ):
        """`jobs`: how many runs are made on the device at a time."""
        check_method(optimizer, training)
        self.model, self.optimizer, self.task, self.training = model, optimizer, task, training
        self.seed, self.device, self.jobs = seed, device, jobs
        self.scheduler = scheduler(optimizer, training)
        self.clock = Clock(device)
        self.progress = Progress()
        self._stepped = False  # in this process
        self._loss_fn = loss_function(task, training, device)
        self.gradient_norm: tracking.GradientNorm | None = None
        if not isinstance(task, HasReference):  # which knows no batch before it has seen the model
            self.begin_to_track()

    def begin_to_track(self) -> None:
        """Make what takes the tracked gradient, if one is asked for."""
        if self.training.track == tracking.GRADIENT_NORM and self.gradient_norm is None:
            batches = tracking.first_batches(self.task, self.training, self.device)
            given = self.model, self.optimizer, self._loss_fn, batches, shares(batches, model=self.model)
            self.gradient_norm = tracking.GradientNorm(*given)

    def ask_reference(self, task: HasReference) -> None:
        """Have the task remember what the model says of all that it is trained and evaluated on."""
        batches = self.training.steps * self.training.gradient_accumulation_steps
        if self.training.track:
            batches = max(batches, tracking.batches_of(self.training))
        with self._evaluating():
            with _precision(self.training, self.device):
                task.remember_training(self.model, batches)
            task.remember_held_out(self.model)

    def run(
        self,
        *,
        report: Callable[[int, float], None] = lambda step, loss: None,
        remember: Callable[[dict[str, Any]], None] = lambda entry: None,
        checkpoint_path: Path | None = None,
        checkpoint_every: int = 0,
    ) -> None:
        """Train to the last step, from the checkpoint if there is one; `report(step, loss)` after each step.

        `remember` is called with each entry of the history but that of the last step, which lacks its metrics.

        Raises:
            Diverged: the loss, or at the end a weight, isn't finite.
        """
        if checkpoint_path is not None:
            self._resume(checkpoint_path)
        self._sign()
        if self.progress.step == 0:
            self._look_before()
        self.begin_to_track()
        self.model.train()
        remembered = 0
        self._waited = waited_seconds()
        while self.progress.step < self.training.steps:
            report(self.progress.step + 1, self._step())
            if self.progress.step < self.training.steps:
                for entry in self.progress.history[remembered:]:
                    remember(entry)
                remembered = len(self.progress.history)
            if checkpoint_path is not None and checkpoint_every and self.progress.step % checkpoint_every == 0:
                self.progress.memory = parallel.of_all_ranks(self.peaks())
                shards.save(self.state_dict(), checkpoint_path, self.progress.step)
        waited = parallel.of_all_ranks(self.progress.waited_seconds)  # each step is as slow as the slowest of them
        self.progress.waited_seconds = None if None in waited else max(waited)
        if not all(torch.isfinite(gathered(t)).all() for t in kept_weights(self.model)):
            raise Diverged(f"a weight is not finite after the last step ({self.training.steps})")

    def _sign(self) -> None:
        """Note what makes the steps from here: times of steps that were made in another way aren't mixed with its."""
        mine: dict[str, Any] = {"processes": parallel.ranks(), "strategy": self.training.strategy}
        mine |= {"device_name": device_name(self.device), "jobs": self.jobs}
        made_by = self.progress.made_by
        if not made_by or any(made_by[-1].get(name, value) != value for name, value in mine.items()):
            moved = not made_by or any(made_by[-1].get(name) != mine[name] for name in mine.keys() - {"jobs"})
            made_by.append({**mine, "steps": 0, "tokens": 0, "train_seconds": 0.0})
            if self.progress.step == self.training.steps:  # there will be no others
                return
            self.clock = Clock(self.device)
            if moved:
                self.progress.memory = []

    def peaks(self) -> dict[str, Any]:
        """See `process_memory`: of this process, and of those before it from whose checkpoint it went on."""
        saved = self.progress.memory
        before = saved[parallel.rank()] if parallel.rank() < len(saved) else {}
        known = {name: [value, before.get(name)] for name, value in process_memory(self.device).items()}
        return {name: max((v for v in values if v is not None), default=None) for name, values in known.items()}

    def _look_before(self) -> None:
        """What a task must know of the model before the first step, and its scores if they are asked for."""
        on_card = self.device.type == "cuda"
        if on_card:  # what it took to build the model counts
            self.progress.memory = parallel.of_all_ranks(self.peaks())
        if isinstance(self.task, HasReference):
            self.ask_reference(self.task)
        if self.training.evaluate_before:
            self.progress.initial_metrics = self.evaluate(self.model)
            if isinstance(self.task, ComparesScores):
                self.task.remember_scores()
        if on_card:  # what the allocator has reserved for this isn't the training's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def _step(self) -> float:
        progress, training = self.progress, self.training
        seed_generators(self.seed, progress.step)
        whole = micro_batches(self.task, progress.step, training, self.device)
        if not self._stepped:
            parallel.check_same(whole)
            self._stepped = True
        if parallel.rank() and not self._drops_layers_together():  # its dropout masks are its own
            seed_generators(self.seed, progress.step, parallel.rank())
        batches = [parallel.share_of(batch) for batch in whole]
        rate = self.optimizer.param_groups[0]["lr"]
        mean = training_step(
            self.model,
            self.optimizer,
            self._loss_fn,
            batches,
            shares=shares(batches, whole, model=self.model),
            max_grad_norm=training.max_grad_norm,
            phase=self.clock.phase,
        )
        with self.clock.phase("update"):  # a step has ended when it has on all ranks
            mean = parallel.mean_of(mean)
        loss = float(mean.item())
        self.scheduler.step()
        tokens, seconds = sum(int(batch["attention_mask"].sum()) for batch in whole), self.clock.end_step()
        progress.step += 1
        progress.tokens += tokens
        progress.train_seconds += seconds
        mine = progress.made_by[-1]
        mine["steps"] += 1
        mine["tokens"] += tokens
        mine["train_seconds"] += seconds
        self._remember(loss, rate)
        return loss

    def _drops_layers_together(self) -> bool:
        """Must all ranks leave out the same layers? To gather shards of a layer, all must run it."""
        return parallel.is_sharded(self.model) and bool(dropping_layers(self.model))

    def _add_waited(self) -> None:
        """Add what was waited since the last entry of the history: to look at all threads in each step takes time."""
        before, self._waited, known = self._waited, waited_seconds(), self.progress.waited_seconds
        if before is None or self._waited is None or known is None:
            self.progress.waited_seconds = None
        else:  # a thread that ended has taken with it what it had waited
            self.progress.waited_seconds = known + max(0.0, self._waited - before)

    def _remember(self, loss: float, rate: float) -> None:
        progress = self.progress
        progress.losses.append(loss)
        finite = math.isfinite(loss)
        evaluate_every = self.training.evaluate_every
        evaluates = evaluate_every is not None and progress.step % evaluate_every == 0
        every = max(1, self.training.steps // _HISTORY_ENTRIES)
        last = progress.step == self.training.steps
        tracks = self.gradient_norm is not None and (last or progress.step % tracking.interval(self.training) == 0)
        if progress.step % every == 0 or last or evaluates or tracks or not finite:
            self._add_waited()
            mean = sum(progress.losses) / len(progress.losses)
            progress.history.append(self._entry(mean if finite else None, rate))
            progress.losses.clear()
        if not finite:
            raise Diverged(f"the loss is {loss} at step {progress.step}")
        if tracks and self.gradient_norm is not None:
            norm = self.gradient_norm()  # not finite where the weights have just become so; the loss will tell
            progress.history[-1]["gradient_norm"] = norm if math.isfinite(norm) else None
        if evaluates and progress.step < self.training.steps:
            progress.history[-1]["metrics"] = self.evaluate(self.model)
            self.model.train()
        if tracks or evaluates:
            self._waited = waited_seconds()

    def _entry(self, loss: float | None, rate: float) -> dict[str, Any]:
        progress = self.progress
        entry = {"step": progress.step, "tokens": progress.tokens, "seconds": progress.train_seconds}
        return {**entry, "loss": loss, "learning_rate": rate, "metrics": None}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The task's metrics.

        Raises:
            Diverged: a metric isn't finite, or larger than a record can hold.
            ValueError: one isn't a number.
        """
        with self._evaluating():
            metrics = _numbers(self.task.evaluate(model))
        reshard(model)  # an evaluation leaves the outermost weights whole
        for name, value in metrics.items():
            if not abs(value) <= LARGEST_SCORE:  # nor is a NaN
                raise Diverged(f"{name} is {value:g} after step {self.progress.step}")
        return metrics

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The time within this context isn't the training's."""
        clock = Clock(self.device)
        with clock.phase("forward"):
            yield
        self.progress.evaluation_seconds += clock.end_step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; of a sharded model, this rank's shards."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": asdict(self.progress),
            "seconds": self.clock.steps,
            "reader": self.task.state_dict() if isinstance(self.task, HasReader) else None,
        }

    def _resume(self, path: Path) -> None:
        state = shards.load(path, self.model, self.optimizer)
        if state is None:
            return
        try:
            self.model.load_state_dict(parallel.shards(state["model"], self.model.named_parameters()))
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.progress = Progress(**state["progress"])
            self.clock.steps = state["seconds"]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = f"{path} doesn't fit the run as this version of membench makes it ({explain(error)})"
            raise UserError(f"checkpoint {why}: {WAY_OUT}") from error
        if isinstance(self.task, HasReader):
            self.task.load_state_dict(state["reader"])
