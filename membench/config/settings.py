"""What the user asked for: command line over --config file over profile over defaults, checked before anything runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from membench.config import launcher
from membench.config.assignments import ALL_METHODS
from membench.config.declare import declared, hold_to_bounds, option, typed
from membench.config.errors import UserError
from membench.config.fan_out import check as check_fan_out
from membench.config.options import FanOutOptions, RunOptions, TrainingOptions, writable_folder
from membench.config.profiles import layers
from reports import files
from reports.names import suggestion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(FanOutOptions, TrainingOptions, RunOptions):
    """Everything that can be set; the names are those of the options and of the keys of a --config file."""

    save: str | None = option(None, "Folder for the trained models, in transformers' format.", check=writable_folder)
    fit_length: bool = False  # no option: was no sequence length given, so that it is to suit the model and the data?


_KEYS = [name for name in declared(Settings) if name != "hyperparameters"]  # of a file, which has a table per method


def resolve(given: Mapping[str, Any], config: str | None = None, content: dict[str, Any] | None = None) -> Settings:
    """The settings from what was `given` on the command line and a --config file.

    `content` is the file's, if it has already been read.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range, an unreadable file.
    """
    command_line = typed(Settings, given)
    file: dict[str, Any] = {}
    if config is not None:
        read = _options_of(read_toml(config, "--config ") if content is None else content, config)
        file = typed(Settings, read, config)
    above = {**file, **command_line}
    task, profile = (above.get(name, declared(Settings)[name].default) for name in ("task", "profile"))
    merged: dict[str, Any] = {}
    for layer in (*layers(task, profile, above.get("model"), above.get("data")), file, command_line):
        merged = _overlay(merged, layer)
    place = launcher.place()
    settings = Settings(
        **{"processes": place.size if place else 1, **merged}, fit_length="sequence_length" not in merged
    )
    _check(settings)
    return settings


def _overlay(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins; hyper-parameters are merged one by one, and its values for all methods win over `below`'s for one;
    steps and epochs replace each other."""
    if "steps" in above and "epochs" in above:
        raise UserError("give either steps or epochs, not both")
    if above.get("learning_rate") is not None and "lr" in above.get("hyperparameters", {}).get(ALL_METHODS, {}):
        raise UserError("the learning rate of all methods is given twice: give either --lr or --set lr=...")
    if "steps" in above or "epochs" in above:
        below = {key: value for key, value in below.items() if key not in ("steps", "epochs")}
    upper, lower = above.get("hyperparameters", {}), below.get("hyperparameters", {})
    general = {*upper.get(ALL_METHODS, {}), *({"lr"} if above.get("learning_rate") is not None else ())}
    lower = {name: {key: values[key] for key in values if key not in general} for name, values in lower.items()}
    methods = {name: {**lower.get(name, {}), **upper.get(name, {})} for name in [*lower, *upper]}
    options = {**below.get("options", {}), **above.get("options", {})}
    return {**below, **above, "hyperparameters": methods, "options": options}


def read_toml(path: str, option: str = "") -> dict[str, Any]:
    """The content of a TOML file; raises UserError, with the `option` that named the file, where there is none."""
    if not path.strip():
        raise UserError(f"{option or 'the file '}is empty: name a TOML file")
    try:
        return files.read_toml(path)
    except ValueError as error:
        raise UserError(f"{option}{error}") from error


def _options_of(content: dict[str, Any], path: str) -> dict[str, Any]:
    """Values from a file's content: options as keys (with _ or -), a table per method for its hyper-parameters."""
    options_of_task = content.get("options", {})
    content = {key: value for key, value in content.items() if key != "options"}
    methods = {key: value for key, value in content.items() if isinstance(value, dict)}
    for key in methods:
        if _name(key) in _KEYS:
            raise UserError(f"{path}: {key} is an option and can't be a table: give its value, as {key} = ...")
    options: dict[str, Any] = {}
    for key in content.keys() - methods.keys():
        if _name(key) in options:
            raise UserError(f"{path}: {_name(key)} is there twice, with _ and with -: give it once")
        options[_name(key)] = content[key]
    for key in options:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}. {suggestion(key, _KEYS)}")
    if not isinstance(options_of_task, dict):
        raise UserError(f"{path}: options must be a table of the task's options, not {options_of_task!r}")
    return {**options, "options": options_of_task, "hyperparameters": methods}


def _name(key: str) -> str:
    """The name of an option as a file may write it, with _ or -."""
    return key.replace("-", "_")


def _check(settings: Settings) -> None:
    hold_to_bounds(settings)
    for seed in settings.seeds:
        if settings.seeds.count(seed) > 1:
            raise UserError(f"--seeds has {seed} twice: give each seed once")
    _check_processes(settings)
    check_fan_out(settings, settings.processes)
    if settings.batch_size % settings.gradient_accumulation_steps:
        raise UserError(
            f"--batch-size {settings.batch_size} (examples per update) can't be split into "
            f"{settings.gradient_accumulation_steps} equal micro-batches: choose a multiple"
        )


def _check_processes(settings: Settings) -> None:
    """Refuse what several processes can't do together, and options that those of a launcher wouldn't use."""
    place = launcher.place()
    if place and settings.processes != place.size:
        raise UserError(
            f"--processes {settings.processes}: a launcher has started {place.size} processes, which make each run "
            "together: leave it out"
        )
    if place and (settings.executor != "local" or settings.devices or (settings.jobs or 1) > 1):
        raise UserError("a launcher's processes make the runs themselves: leave out --executor, --devices and --jobs")
    if settings.begun_with == settings.processes:
        raise UserError(f"--begun-with {settings.begun_with}: the same --processes go on by themselves: leave it out")
    if settings.processes == 1:
        if settings.strategy != "fsdp2" and settings.begun_with is None:
            raise UserError(f"--strategy {settings.strategy} is for several processes: also give --processes")
        return
    pieces = settings.gradient_accumulation_steps * settings.processes
    if settings.batch_size % pieces:
        raise UserError(
            f"--batch-size {settings.batch_size} (examples per update) can't be split into {pieces} equal shares, one "
            "per process and micro-batch: choose a multiple"
        )
    if settings.track is not None and settings.strategy == "fsdp2":
        raise UserError(
            f"--track {settings.track} takes a gradient of whole weights: leave it out, or give --strategy replicate"
        )
