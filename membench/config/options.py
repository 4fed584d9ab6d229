"""Every option of a comparison, each in one place: its name, type, default, help, bounds, and effect on a run's id.

Command line, `--config` and study files, `Settings`, `Training`, the record's section `training`, the id of a run and
`--dry-run` follow from the fields. A recorded option also has a row in the record's schema, which says what old records
meant without it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from membench.config.assignments import parse_hyperparameters, parse_options, parse_slurm
from membench.config.declare import like, option
from membench.config.errors import UserError

LONGEST_SEQUENCE = 512  # tokens, where none are given: of a model that takes as many and of texts that have them


def writable_folder(flag: str, path: str) -> None:
    """Raises UserError unless it is a folder or a path where one can be created."""
    folder = Path(path)
    for place in (folder, *folder.absolute().parents):
        if _exists(flag, place):
            if not place.is_dir():
                raise UserError(f"{flag} {folder}: {place} is a file, not a folder: choose another path")
            if not os.access(place, os.W_OK | os.X_OK):
                raise UserError(f"{flag} {folder}: no permission to write to {place}: choose another path")
            return


def installed(flag: str, names: tuple[str, ...]) -> None:
    """Raises UserError unless the packages of trackers are there."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"{flag} {name} needs {name}: pip install 'membench[{name}]'")


def _exists(flag: str, place: Path) -> bool:
    try:
        os.lstat(place)
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: of a zero byte
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{flag} {str(place)[:100]!r}: no folder can be called so ({why}): choose another path"
        ) from error


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Which runs to make, how long they are, and their hyper-parameters."""

    optimizers: tuple[str, ...] = option(
        ("badam", "blockllm"), "Methods: badam,blockllm (the default), all, or package.module:Class."
    )
    task: tuple[str, ...] = option(
        ("superglue",),
        "superglue (all of it; the default), superglue/rte, c4, instruct, dpo, classify, package.module:Task.",
    )
    seeds: tuple[int, ...] = option((0,), "Such as 0,1,2; 0 by default.", at_least=0, below=2**31)
    steps: int | None = option(None, "Updates of each run.", at_least=1)
    epochs: float | None = option(None, "Passes over the training data.", more_than=0)
    learning_rate: float | None = option(
        None, "For all methods; --set badam.lr=1e-5 for one.", flags=("--learning-rate", "--lr"), at_least=0
    )
    hyperparameters: Mapping[str, Mapping[str, Any]] = option(
        {},
        "Hyper-parameter; KEY=VALUE sets it for all methods.",
        flags=("--set",),
        metavar="METHOD.KEY=VALUE",
        parse=parse_hyperparameters,
    )
    reference: bool = option(True, "Also run adamw (the default).", flags=("--reference/--no-reference",))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What all runs of a comparison share: the model, the data, and how it is trained."""

    profile: str = option("demo", "demo (the default: small, offline) or paper (as published).", identifies="never")
    model: str = option("", "config:NAME (random weights), a hub id, a folder.", recorded=False, identifies="never")
    tokenizer: str | None = option(None, "A hub id or a folder.", recorded=False, identifies="never")
    trust_remote_code: bool = option(
        False, "Run code that comes with a model on the hub.", recorded=False, identifies="never"
    )
    data: str = option("demo", "demo, hub, or a file or folder in the task's format.", identifies="never")
    options: Mapping[str, Any] = option(
        {}, "Option of the task, such as packing=true.", flags=("--option",), metavar="KEY=VALUE", parse=parse_options
    )
    batch_size: int = option(16, "Examples per update.", at_least=1, identifies="always")
    sequence_length: int = option(
        LONGEST_SEQUENCE,
        f"Most tokens in a sequence; by default what suits model and data, up to {LONGEST_SEQUENCE}.",
        at_least=1,
        identifies="always",
    )
    gradient_accumulation_steps: int = option(1, "Micro-batches per batch.", at_least=1, identifies="always")
    dtype: Literal["float32", "bfloat16"] = option("float32", "Weights: float32 or bfloat16.", identifies="always")
    autocast: Literal["bfloat16"] | None = option(None, "bfloat16: compute in this dtype.", identifies="always")
    checkpointing: bool = option(
        False,
        "Gradient checkpointing in every layer.",
        flags=("--checkpointing/--no-checkpointing",),
        record_as="gradient_checkpointing",
        identifies="always",
    )
    checkpointing_every: int = option(
        1, "Checkpoint only every Nth layer, starting with the first; the others keep their activations.", at_least=1
    )
    loss_chunks: int = option(
        1, "Compute the logits in this many pieces of the sequence, one after another (causal models).", at_least=1
    )
    offload_activations: bool = option(
        False,
        "Keep activations in host memory until the backward pass needs them (on a GPU).",
        flags=("--offload-activations/--no-offload-activations",),
    )
    max_grad_norm: float | None = option(None, "Clip gradients to this norm.", more_than=0, identifies="always")
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "linear, cosine or constant; by default linear, for c4, instruct and dpo cosine.", identifies="always"
    )
    warmup_fraction: float = option(
        0.1, "Share of the steps; {default} by default.", at_least=0, below=1, identifies="always"
    )
    final_fraction: float = option(
        0.0, "Share of the learning rate at the end of the schedule; {default:g} by default.", at_least=0, below=1
    )
    evaluate_every: int | None = option(
        None, "Steps between evaluations; by default only at the end.", at_least=1, identifies="always"
    )
    processes: int = option(
        1, "Processes that make a run together, each with its share of the batch and a device.", at_least=1, below=1_000
    )
    strategy: Literal["fsdp2", "replicate"] = option(
        "fsdp2", "With --processes: fsdp2 (the default) shards the model, replicate gives each process all of it."
    )
    track: Literal["gradient_norm"] | None = option(
        None, "gradient_norm: of all weights, on fixed examples, put into the history."
    )
    evaluate_before: bool = option(
        False, "Also evaluate before the first step.", flags=("--evaluate-before/--no-evaluate-before",)
    )


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Where and how runs are carried out."""

    device: str = option("auto", "auto (the default), cpu, cuda, cuda:1.")
    threads: int | None = option(None, "CPU threads per run.", at_least=1, below=10_000)
    jobs: int | None = option(
        None,
        "Runs at a time; by default 1, or 1 per device; times of runs that share a device tell nothing.",
        at_least=1,
        below=1_000,
    )
    out: str = option("runs", "Folder for the records; ./{default} by default.", check=writable_folder)
    checkpoint_every: int = option(500, "Steps between checkpoints, {default} by default; 0 for none.", at_least=0)
    retry: bool = option(False, "Also repeat runs that diverged or ran out of memory.")
    log_to: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] | None = option(
        None, "Also log to trackers: tensorboard, trackio, wandb, mlflow.", check=installed
    )
    quiet: bool = option(False, "No progress bar: one line per run.")
    dry_run: bool = option(False, "Print what would run, and run nothing.")


@dataclass(frozen=True, kw_only=True)
class FanOutOptions(ExecutionOptions):
    """Where many runs are made at once."""

    executor: Literal["local", "ray", "slurm"] = option(
        "local", "local (the default): processes on this machine; ray: tasks on a cluster; slurm: an array of jobs."
    )
    devices: tuple[str, ...] | None = option(
        None, "With local: cuda:0,cuda:1 makes a run on each at a time, which then has its device to itself."
    )
    ray_address: str | None = option(
        None, "With ray: auto or HOST:PORT of a running cluster; by default one is started on this machine."
    )
    slurm: Mapping[str, Any] = option(
        {},
        "With slurm: an option of sbatch, such as partition=gpu or time=240 (minutes); "
        "cluster=local and cluster=debug try it without Slurm.",
        flags=("--slurm",),
        metavar="KEY=VALUE",
        parse=parse_slurm,
    )
    detach: bool = option(
        False, "With ray or slurm: Ctrl-C leaves the runs going; the same command again collects them."
    )
    begun_with: int | None = option(
        None, "Go on with the runs that the same command has begun with so many --processes.", at_least=1, below=1_000
    )


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(ExecutionOptions):
    """How a published table is made again."""

    out: str = like(ExecutionOptions, "out", default="reproductions")
    dry_run: bool = like(ExecutionOptions, "dry_run", help="Print what it needs, and run nothing.")
    scale: Literal["paper", "tiny"] = option(
        "paper", "paper (the default), or tiny: tiny models and a few steps, to try it on a CPU."
    )


@dataclass(frozen=True)
class WorkloadOptions:
    """What `membench plan` plans: a model and a training step on it, without the method."""

    model: str = like(
        TrainingOptions, "model", help="A built-in configuration (llama3-8b), a config.json, a folder, a hub id."
    )
    batch_size: int = like(TrainingOptions, "batch_size", default=1, help="Sequences per step; {default} by default.")
    sequence_length: int = like(
        TrainingOptions,
        "sequence_length",
        help="Tokens per sequence; by default {default}, or what the model takes.",
    )
    dtype: Literal["bfloat16", "float32", "float16"] = like(
        TrainingOptions, "dtype", default="bfloat16", help="Weights: bfloat16 (the default), float32, float16."
    )
    gradient_accumulation_steps: int = like(
        TrainingOptions,
        "gradient_accumulation_steps",
        help="Micro-batches per step, into which its sequences are split.",
    )
    checkpointing: bool = like(TrainingOptions, "checkpointing")
    checkpointing_every: int = like(TrainingOptions, "checkpointing_every")
    loss_chunks: int = like(TrainingOptions, "loss_chunks")
    offload_activations: bool = like(TrainingOptions, "offload_activations")
    attention: Literal["sdpa", "eager"] | None = option(None, "sdpa or eager; by default the model's own choice.")
    trust_remote_code: bool = like(TrainingOptions, "trust_remote_code")
    gpus: int = option(
        1, "Train on this many, and plan one of them; batch size and budget are of each.", at_least=1, below=10_000
    )
    strategy: Literal["fsdp2", "replicate"] = like(
        TrainingOptions,
        "strategy",
        help="With --gpus: fsdp2 (the default) shards the model, replicate gives each of them all of it.",
    )
    task: Literal["dpo"] | None = option(
        None, "dpo: with its loss, on pairs of sequences; by default the model's own loss, on single ones."
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """On what `membench evaluate` scores saved models, and how."""

    tasks: tuple[str, ...] = option((), "Such as gsm8k,mmlu,hellaswag, or the harness's own names.")
    device: str = like(ExecutionOptions, "device")
    limit: int | None = option(None, "Documents per task; all by default.", at_least=1)
    batch_size: int = option(8, "Sequences per batch; {default} by default.", at_least=1)
    fewshot: int | None = option(None, "Examples in the prompt; by default each task's own number.", at_least=0)
    chat_template: bool = option(False, "Use the tokenizer's chat template.")
    run_code: bool = option(False, "Run code written by the model on this machine (humaneval, mbpp).")
    include: str | None = option(None, "Folder with your own tasks in the harness's format.")
