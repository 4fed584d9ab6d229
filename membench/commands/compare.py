"""`membench compare`: the runs of a comparison that are missing, and the tables of all of them."""

from typing import Annotated, Any

import typer


def _option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, show_default=False)


def compare(
    optimizers: Annotated[
        str | None, _option("--optimizers", help="Methods, such as badam,blockllm, all, or package.module:Class.")
    ] = None,
    task: Annotated[
        str | None,
        _option("--task", help="superglue (all of it), superglue/rte, c4, instruct, classify, package.module:Task."),
    ] = None,
    profile: Annotated[
        str | None, _option("--profile", help="demo (the default: small, offline) or paper (as published).")
    ] = None,
    model: Annotated[str | None, _option("--model", help="config:NAME (random weights), a hub id, a folder.")] = None,
    tokenizer: Annotated[str | None, _option("--tokenizer", help="An id of the hub or a folder.")] = None,
    data: Annotated[str | None, _option("--data", help="demo, hub, or a file or folder in the task's format.")] = None,
    seeds: Annotated[str | None, _option("--seeds", help="Such as 0,1,2.")] = None,
    steps: Annotated[int | None, _option("--steps", help="Updates of each run.")] = None,
    epochs: Annotated[float | None, _option("--epochs", help="Passes over the training data.")] = None,
    batch_size: Annotated[int | None, _option("--batch-size", help="Examples an update.")] = None,
    sequence_length: Annotated[int | None, _option("--sequence-length", help="Tokens a sequence, at most.")] = None,
    dtype: Annotated[str | None, _option("--dtype", help="Of the weights: float32 or bfloat16.")] = None,
    autocast: Annotated[str | None, _option("--autocast", help="bfloat16: compute in that dtype.")] = None,
    device: Annotated[str | None, _option("--device", help="auto (the default), cpu, cuda, cuda:1.")] = None,
    checkpointing: Annotated[
        bool | None, _option("--checkpointing/--no-checkpointing", help="Gradient checkpointing, of every layer.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, _option("--gradient-accumulation-steps", help="Micro-batches that a batch is split into.")
    ] = None,
    max_grad_norm: Annotated[float | None, _option("--max-grad-norm", help="Clip gradients to this norm.")] = None,
    learning_rate: Annotated[
        float | None, _option("--learning-rate", "--lr", help="For all methods; --set badam.lr=1e-5 for one.")
    ] = None,
    schedule: Annotated[str | None, _option("--schedule", help="linear (the default), cosine or constant.")] = None,
    warmup_fraction: Annotated[float | None, _option("--warmup-fraction", help="Of the steps; 0.1 by default.")] = None,
    final_fraction: Annotated[
        float | None, _option("--final-fraction", help="Of the learning rate, where the schedule ends; 0 by default.")
    ] = None,
    evaluate_every: Annotated[
        int | None, _option("--evaluate-every", help="Steps between evaluations; by default at the end only.")
    ] = None,
    evaluate_before: Annotated[
        bool | None, _option("--evaluate-before/--no-evaluate-before", help="Also before the first step.")
    ] = None,
    option: Annotated[
        list[str] | None, _option("--option", metavar="KEY=VALUE", help="Of the task, such as packing=true.")
    ] = None,
    set_: Annotated[
        list[str] | None, _option("--set", metavar="METHOD.KEY=VALUE", help="Hyper-parameter; KEY=VALUE: of all.")
    ] = None,
    config: Annotated[
        str | None, _option("--config", help="TOML file: these options as keys, and a table for each method.")
    ] = None,
    out: Annotated[str | None, _option("--out", help="Folder of the records; ./runs by default.")] = None,
    save: Annotated[
        str | None, _option("--save", help="Folder for the trained models, as transformers saves them.")
    ] = None,
    reference: Annotated[bool | None, _option("--reference/--no-reference", help="Add adamw (the default).")] = None,
    checkpoint_every: Annotated[
        int | None, _option("--checkpoint-every", help="Steps between checkpoints, 500 by default; 0 for none.")
    ] = None,
    threads: Annotated[int | None, _option("--threads", help="CPU threads of a run.")] = None,
    trust_remote_code: Annotated[
        bool | None, _option("--trust-remote-code", help="Run code that comes with a model of the hub.")
    ] = None,
    retry: Annotated[
        bool | None, _option("--retry", help="Make runs again that diverged or ran out of memory, too.")
    ] = None,
    quiet: Annotated[bool | None, _option("--quiet", help="No progress bar: one line a run.")] = None,
    dry_run: Annotated[bool | None, _option("--dry-run", help="Print what would be run, and run nothing.")] = None,
) -> None:
    """Train the same model on the same data with each method, measure it, print the tables.

    Makes only the runs that are missing in --out: the same command again continues where it was stopped. Any value
    comes from the command line, else from --config, else from the profile, else from the defaults.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from membench.config.settings import parse_options, resolve
    from membench.runs.compare import compare as make

    assignments, config_file = given.pop("set_", []), given.pop("config", None)
    given["options"] = parse_options(given.pop("option", []))
    raise typer.Exit(make(resolve(given, assignments, config_file)))
