"""What a check tolerates: the defaults, with their comments, are a TOML file beside this one."""

import difflib
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

DEFAULT = Path(__file__).with_name("thresholds.toml")
MISSING = ("fail", "report")


@dataclass(frozen=True)
class Thresholds:
    """See thresholds.toml for what each one means."""

    reference: str
    memory_percent: float
    saving_points: float
    quality_points: float
    throughput_percent: float
    false_alarms: float
    missing: str


def default_text() -> str:
    """The commented file of the defaults, to start one's own from."""
    return DEFAULT.read_text(encoding="utf-8")


def load(path: Path | str | None = None) -> Thresholds:
    """The thresholds of a file, over the defaults.

    Raises:
        ValueError: it can't be read, or has a key or a value that means nothing; one sentence that names the file.
    """
    values = tomllib.loads(default_text())
    for key, value in (_read(path) if path is not None else {}).items():
        if key not in values:
            near = difflib.get_close_matches(key, values, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{path}: unknown key {key!r}.{hint} Available: {', '.join(values)}.")
        values[key] = value
    thresholds = Thresholds(**values)
    _check(thresholds, str(path))
    return thresholds


def _read(path: Path | str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}.") from error


def _check(thresholds: Thresholds, where: str) -> None:
    values = asdict(thresholds)
    for field in fields(Thresholds):
        value = values[field.name]
        if field.type is str and not isinstance(value, str):
            raise ValueError(f"{where}: {field.name} must be a text, not {value!r}.")
        if field.type is float and not (type(value) in (int, float) and 0 <= value < float("inf")):
            raise ValueError(f"{where}: {field.name} must be a number of at least 0, not {value!r}.")
    if not 0 < thresholds.false_alarms < 0.5:
        raise ValueError(f"{where}: false_alarms must lie between 0 and 0.5, not {thresholds.false_alarms}.")
    if thresholds.throughput_percent >= 100:
        raise ValueError(f"{where}: throughput_percent must be below 100, not {thresholds.throughput_percent}.")
    if thresholds.missing not in MISSING:
        raise ValueError(f"{where}: missing must be one of {', '.join(MISSING)}, not {thresholds.missing!r}.")
