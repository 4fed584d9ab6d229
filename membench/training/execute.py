"""One run, in this process: train, evaluate, then meter a fresh copy. A record is made from the result."""

import gc
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

import tasks
from membench.config.errors import UserError, explain, log_traceback
from membench.config.run import Run
from membench.memory.traffic import Traffic
from membench.training import parallel
from membench.training.build import (
    build_model,
    build_optimizer,
    check_unchanged,
    create_task,
    method_values,
    use_device,
)
from membench.training.loop import Diverged, Loop, largest_micro_batches, loss_function
from membench.training.metering import meter_cycle
from optimizers.shared.sharded import gathered
from tasks.models.damage import is_out_of_memory
from tasks.models.loading import quiet


@runtime_checkable
class HasTokenizer(Protocol):
    """A task with texts: its transformers tokenizer is saved with the model."""

    tokenizer: Any


def execute(
    run: Run,
    checkpoint_path: Path,
    checkpoint_every: int,
    report: Callable[[int, float], None] = lambda step, loss: None,
    stage: Callable[[str], None] = lambda name: None,
    save_to: Path | None = None,
    remember: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> dict[str, Any]:
    """The measured part of the record; if anything goes wrong, what was measured before.

    Args:
        run: what to do.
        checkpoint_path: to continue from, and to write every `checkpoint_every` steps (0: never).
        report: called with (step, loss) after each step.
        stage: called with the name of what follows the training.
        save_to: folder for the trained model.
        remember: called with each entry of the history but the last, whose metrics are those of the finished model.
    """
    use_device(run)
    measured: dict[str, Any] = {"status": "ok", "error": None}
    try:
        task = create_task(run.training, run.task, run.seed)
        check_unchanged(run, task)
        measured |= {"headline": task.headline, "higher_is_better": task.higher_is_better}
        try:
            _learn(run, task, measured, report, remember, stage, checkpoint_path, checkpoint_every, save_to)
        except Diverged as error:
            measured["status"], measured["error"] = "diverged", str(error)
        gc.collect()  # a method and its model refer to each other: a card that holds one would have to hold two
        stage("metering memory")
        measured |= _meter(run, task, measured["memory"])
    except Exception as error:
        log_traceback()
        measured["status"] = "out_of_memory" if is_out_of_memory(error) else "failed"
        measured["error"] = explain(error)
    return measured


def _learn(
    run: Run,
    task: tasks.Task,
    measured: dict[str, Any],
    report: Callable[[int, float], None],
    remember: Callable[[dict[str, Any]], None],
    stage: Callable[[str], None],
    checkpoint_path: Path,
    checkpoint_every: int,
    save_to: Path | None,
) -> None:
    """Train, evaluate and save a model, of which nothing is left afterwards, whatever happens."""
    loop = _train(run, task, measured, report, remember, path=checkpoint_path, every=checkpoint_every)
    stage("evaluating")
    # shards can't be saved, and adapters in shards not even be merged
    gathers = parallel.is_sharded(loop.model) and (loop.optimizer.adds_parameters or save_to is not None)
    whole = _whole_model(run, task, loop) if gathers else None
    _evaluate(run, task, loop, measured, whole)
    if save_to is not None and parallel.rank() == 0:
        stage("saving")
        save(whole or loop.model, task, save_to)


def _train(
    run: Run,
    task: tasks.Task,
    measured: dict[str, Any],
    report: Callable[[int, float], None],
    remember: Callable[[dict[str, Any]], None],
    *,
    path: Path,
    every: int,
) -> Loop:
    model = build_model(run, task)
    measured["parameters"] = sum(p.numel() for p in model.parameters())
    measured["hyperparameters"] = method_values(run, model)
    optimizer = parallel.place(model, run.method, run.training.strategy, partial(build_optimizer, run))
    measured["trainable_parameters"] = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    device = torch.device(run.device)
    jobs = run.environment.get("jobs", 1)
    loop = Loop(model, optimizer, task, run.training, seed=run.seed, device=device, jobs=jobs)
    try:
        loop.run(report=report, remember=remember, checkpoint_path=path, checkpoint_every=every)
    finally:
        measured["initial_metrics"] = loop.progress.initial_metrics
        measured |= {"history": loop.progress.history, "time": times(loop), "memory": loop.peaks()}
        measured["block_coverage"] = optimizer.block_coverage
        if len(loop.progress.made_by) > 1:
            measured["made_by"] = loop.progress.made_by
    return loop


def _whole_model(run: Run, task: tasks.Task, loop: Loop) -> nn.Module | None:
    """The finished model that is sharded over the ranks, on the CPU of the first of them; None on the others."""
    adapted = loop.optimizer.adds_parameters  # the states of other methods say nothing of the finished model
    weights = parallel.whole(loop.model.state_dict())
    state = parallel.whole(loop.optimizer.state_dict()) if adapted else None
    if parallel.rank():
        return None
    here = replace(run, device="cpu")
    model = build_model(here, task)
    optimizer = build_optimizer(here, model) if adapted else None
    model.load_state_dict(weights)
    if optimizer is None or state is None:
        return model
    optimizer.load_state_dict(state)
    return optimizer.finish()


def _evaluate(run: Run, task: tasks.Task, loop: Loop, measured: dict[str, Any], whole: nn.Module | None) -> None:
    adapted = parallel.is_sharded(loop.model) and loop.optimizer.adds_parameters  # shards of adapters can't be merged
    model = loop.model if adapted else loop.optimizer.finish()
    measured["metrics"] = loop.progress.history[-1]["metrics"] = loop.evaluate(model)
    if isinstance(task, tasks.HasValidation):
        measured |= {"validation_examples": task.validation_size, "constant_score": task.constant_score}
    measured["time"] = times(loop)
    trained = whole if adapted else model
    if trained is not None:
        before = build_model(replace(run, device="cpu"), task)  # a card may have no room for another model
        measured["trained_fraction"] = trained_fraction(before, trained)


def save(model: nn.Module, task: tasks.Task, folder: Path) -> None:
    """Write a finished model in transformers' format, with its tokenizer if the task has one: all of it, or no folder.

    Raises:
        UserError: it can't be written.
    """
    assert isinstance(model, PreTrainedModel)  # checked before anything ran
    half = folder.with_name(f"{folder.name}.half")
    try:
        shutil.rmtree(half, ignore_errors=True)  # what an earlier attempt has left
        with quiet():
            _make_generation_savable(model)
            model.save_pretrained(half)
            if isinstance(task, HasTokenizer):
                if task.tokenizer.is_fast:  # its file would cut all texts as those of the training were cut
                    task.tokenizer.backend_tokenizer.no_truncation()
                task.tokenizer.save_pretrained(half)
        shutil.rmtree(folder, ignore_errors=True)
        half.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(half, ignore_errors=True)
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise UserError(f"--save {folder.parent}: the model can't be written ({why}): make room there") from error


def _make_generation_savable(model: PreTrainedModel) -> None:
    """Leave only the token ids of generation settings that transformers reads but refuses to write: a temperature
    without sampling, as Vicuna's, or a padding id of -1."""
    own = vars(model).get("generation_config")
    try:
        if own is not None:
            own.validate(strict=True)
    except ValueError:
        ids = {name: vars(own).get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {name: value for name, value in ids.items() if not (isinstance(value, int) and value < 0)}
        model.generation_config = GenerationConfig(**known)


def times(loop: Loop) -> dict[str, Any]:
    """The record's section `time`."""
    progress = loop.progress
    *_, mine = [made for made in progress.made_by if made["steps"]] or [{"tokens": 0, "train_seconds": 0.0}]
    return {
        "train_seconds": progress.train_seconds,
        "waited_seconds": progress.waited_seconds,
        "evaluation_seconds": progress.evaluation_seconds,
        "tokens_per_second": mine["tokens"] / mine["train_seconds"] if mine["train_seconds"] else None,
        **loop.clock.medians(),
        **loop.clock.spread(),
    }


@torch.no_grad()
def trained_fraction(before: nn.Module, after: nn.Module) -> float:
    """Share of individual weights that differ between a freshly built model and the finished one."""
    trained = dict(after.named_parameters())
    changed = sum(int((p != gathered(trained[name]).to(p.device)).sum()) for name, p in before.named_parameters())
    return changed / sum(p.numel() for p in before.parameters())


def _meter(run: Run, task: tasks.Task, memory: dict[str, Any]) -> dict[str, Any]:
    """`memory`, with exact bytes of training steps over a full cycle of blocks, on a throw-away copy.

    All steps use the batch that needs the most memory, so that methods with long and short cycles see the same one.
    Of several ranks, it is that of the one with the largest peak; what each has is in the section `parallel`.
    """
    model, device = build_model(run, task), torch.device(run.device)
    batches = [parallel.share_of(batch) for batch in largest_micro_batches(task, run.training, device)]
    optimizer = parallel.place(model, run.method, run.training.strategy, partial(build_optimizer, run))
    with Traffic() as traffic:
        report = meter_cycle(
            model,
            optimizer,
            loss_function(task, run.training, device),
            lambda step: batches,
            max_grad_norm=run.training.max_grad_norm,
        )
    report = memory | {key: value for key, value in report.items() if key != "modules"}
    if parallel.ranks() == 1:
        return {"memory": report}
    reports = parallel.of_all_ranks(report)
    peaks = [one["peak_allocated_bytes"] for one in reports]
    section = {
        "processes": parallel.ranks(),
        "strategy": run.training.strategy,
        "sent_bytes": traffic.sent_bytes / max(1, optimizer._steps_done),
        "peaks_bytes": peaks,
    }
    return {"memory": reports[peaks.index(max(peaks))], "parallel": section}
