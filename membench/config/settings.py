"""What a user asked for: command line over --config file over profile over defaults, checked before anything runs."""

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from membench.config.errors import UserError
from membench.config.profiles import choose
from membench.config.values import annotations, convert, parse, suggestion

ALL_METHODS = "*"  # the key of hyper-parameters that go to every method which has them


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that can be set; the names are those of the options and of the keys of a --config file."""

    optimizers: tuple[str, ...] = ("badam", "blockllm")
    task: tuple[str, ...] = ("superglue",)
    profile: str = "demo"
    model: str = ""
    tokenizer: str | None = None
    data: str = "demo"
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    sequence_length: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: Literal["bfloat16"] | None = None
    device: str = "auto"
    checkpointing: bool = False
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    evaluate_every: int | None = None
    evaluate_before: bool = False
    learning_rate: float | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = 0.1
    final_fraction: float = 0.0
    reference: bool = True
    checkpoint_every: int = 500
    threads: int | None = None
    trust_remote_code: bool = False
    out: str = "runs"
    save: str | None = None
    retry: bool = False
    quiet: bool = False
    dry_run: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hyperparameters: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


_TYPES = annotations(Settings)
_POSITIVE = (
    "steps",
    "epochs",
    "batch_size",
    "sequence_length",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "evaluate_every",
    "threads",
)
_NOT_NEGATIVE = ("checkpoint_every", "learning_rate")


def resolve(
    given: Mapping[str, Any], assignments: list[str], config: str | None = None, content: dict[str, Any] | None = None
) -> Settings:
    """The settings from what was `given` on the command line, its --set `assignments` and a --config file.

    `content` is that of the file, where it has been read already.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, an unreadable file.
    """
    command_line = _typed({**given, "hyperparameters": parse_assignments(assignments)})
    file: dict[str, Any] = {}
    if config:
        file = _typed(_options_of(read_toml(config, "--config ") if content is None else content, config), config)
    above = {**file, **command_line}
    profile = choose(above.get("task", Settings.task), above.get("profile", Settings.profile))
    merged: dict[str, Any] = {}
    for layer in (profile.values, profile.of_model.get(above.get("model", ""), {}), file, command_line):
        merged = _overlay(merged, layer)
    settings = Settings(**merged)
    _check(settings)
    return settings


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins; hyper-parameters one by one, and what it says of all methods over what `below` says of one; steps
    and epochs replace each other."""
    if "steps" in above and "epochs" in above:
        raise UserError("give either steps or epochs, not both")
    if "steps" in above or "epochs" in above:
        below = {key: value for key, value in below.items() if key not in ("steps", "epochs")}
    upper, lower = above.get("hyperparameters", {}), below.get("hyperparameters", {})
    general = {*upper.get(ALL_METHODS, {}), *({"lr"} if above.get("learning_rate") is not None else ())}
    lower = {name: {key: values[key] for key in values if key not in general} for name, values in lower.items()}
    methods = {name: {**lower.get(name, {}), **upper.get(name, {})} for name in [*lower, *upper]}
    options = {**below.get("options", {}), **above.get("options", {})}
    return {**below, **above, "hyperparameters": methods, "options": options}


def _typed(layer: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    return {key: _typed_value(key, value, where) for key, value in layer.items()}


def _typed_value(key: str, value: Any, where: str | None) -> Any:
    try:
        return convert(value, _TYPES[key])
    except TypeError as error:
        raise UserError(f"{_name(key, where)} must be {error}, not {value!r}") from error


def _name(key: str, where: str | None = None) -> str:
    return f"{where}: {key}" if where else "--" + key.replace("_", "-")


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """`packing=true`, of the task."""
    options: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip().isidentifier():
            raise UserError(f"--option {text}: write KEY=VALUE (packing=true)")
        options[key.strip()] = parse(value)
    return options


def parse_assignments(assignments: list[str]) -> dict[str, dict[str, Any]]:
    """`badam.switch_every=50` for one method; `weight_decay=0` for all that have it."""
    methods: dict[str, dict[str, Any]] = {}
    for text in assignments:
        target, equals, value = text.partition("=")
        method, _, key = target.strip().rpartition(".")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise UserError(f"--set {text}: write METHOD.KEY=VALUE (badam.switch_every=50), or KEY=VALUE for all")
        methods.setdefault(method or ALL_METHODS, {})[key] = parse(value)
    return methods


def read_toml(path: str, option: str = "") -> dict[str, Any]:
    """The content of a TOML file; raises UserError, with the `option` that named the file, where there is none."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{option}{path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{option}{path}: not valid TOML: {error}") from error


def _options_of(content: dict[str, Any], path: str) -> dict[str, Any]:
    """Of a file's content: options as keys (with _ or -), a table per method for its hyper-parameters."""
    options_of_task = content.get("options", {})
    content = {key: value for key, value in content.items() if key != "options"}
    methods = {key: value for key, value in content.items() if isinstance(value, dict)}
    options = {key.replace("-", "_"): value for key, value in content.items() if key not in methods}
    for key in options:
        if key not in _TYPES or key == "hyperparameters":
            known = [name for name in _TYPES if name != "hyperparameters"]
            raise UserError(f"{path}: unknown key {key!r}. {suggestion(key, known)}")
    if not isinstance(options_of_task, dict):
        raise UserError(f"{path}: options must be a table of the task's options, not {options_of_task!r}")
    return {**options, "options": options_of_task, "hyperparameters": methods}


def _check(settings: Settings) -> None:
    values = dataclasses.asdict(settings)
    for key in _POSITIVE:
        if values[key] is not None and not 0 < values[key] < float("inf"):
            raise UserError(f"{_name(key)} must be more than 0, not {values[key]}")
    for key in _NOT_NEGATIVE:
        if values[key] is not None and not 0 <= values[key] < float("inf"):
            raise UserError(f"{_name(key)} must be a finite number of at least 0, not {values[key]}")
    for key in ("warmup_fraction", "final_fraction"):
        if not 0 <= values[key] < 1:
            raise UserError(f"{_name(key)} must be at least 0 and below 1, not {values[key]}")
    for key in ("optimizers", "task", "seeds"):
        if not values[key]:
            raise UserError(f"{_name(key)} names nothing")
    if not all(0 <= seed < 2**31 for seed in settings.seeds):
        raise UserError(f"--seeds must be whole numbers of at least 0 and below 2**31, not {settings.seeds}")
    if settings.batch_size % settings.gradient_accumulation_steps:
        raise UserError(
            f"--batch-size {settings.batch_size} (examples an update) can't be split into "
            f"{settings.gradient_accumulation_steps} equal micro-batches: choose a multiple"
        )
    for key in ("out", "save"):
        if values[key] is not None:
            _check_folder(_name(key), Path(values[key]))


def _check_folder(option: str, folder: Path) -> None:
    """A folder, or a path on which one can be made."""
    for path in (folder, *folder.absolute().parents):
        if path.exists() or path.is_symlink():
            if not path.is_dir():
                raise UserError(f"{option} {folder}: {path} is a file, not a folder: choose another path")
            if not os.access(path, os.W_OK | os.X_OK):
                raise UserError(f"{option} {folder}: no permission to write to {path}: choose another path")
            return
