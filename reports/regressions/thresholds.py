"""What a check tolerates: each limit with its default and its comment; printed, they are a file to change."""

import textwrap
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from reports import files
from reports.names import suggestion

MISSING = ("fail", "report")
_COMMENT = "comment"
_HEAD = "What `membench check` tolerates. Give a changed copy with --thresholds FILE; what it leaves out is as here."


def _limit(default: Any, comment: str) -> Any:
    return field(default=default, metadata={_COMMENT: comment})


@dataclass(frozen=True)
class Thresholds:
    """The limits, in the order of the file."""

    reference: str = _limit("adamw", "The method that savings and speeds are relative to.")
    memory_percent: float = _limit(
        1.0,
        "Memory is measured to the byte, so that a repeated run has the same peak. A peak that rises by more than this "
        "many percent is a regression; one that falls by more is reported as an improvement.",
    )
    saving_points: float = _limit(
        1.0,
        "A method's saving is 1 - its peak / the reference's peak on the same task and seed. A saving that falls by "
        "more than this many points is a regression, whatever the bytes themselves did.",
    )
    quality_points: float = _limit(
        2.0,
        "How much worse a score may be. A point is a hundredth of a score's scale (1, 10 or 100, the least that it "
        "is within), and 1 % of a metric of which less is better (loss, perplexity), whose ratios are compared.",
    )
    explosion_times: float = _limit(
        10.0,
        "A score of which less is better that, with any one seed, is more than so many times the worst of the "
        "baseline's seeds is a regression, whatever the other seeds did: no test can show one of three.",
    )
    throughput_percent: float = _limit(
        25.0,
        "How much a method's speed relative to the reference of the same run may fall: two runs of the same code "
        "differed by up to 20 %. Absolute speeds are never failed, nor is a ratio where the two sides come from "
        "different machines, of fewer than 10 steps, or of a busy machine.",
    )
    false_alarms: float = _limit(
        0.05,
        "The share of suites without any change that may be called a regression by chance, quality and throughput "
        "together.",
    )
    missing: str = _limit(
        "fail",
        'Runs of the baseline that the candidate hasn\'t got: "fail", or "report" where a candidate makes a part of '
        "them.",
    )


def default_text() -> str:
    """The commented file of the defaults, to start one's own from."""
    blocks = [_comment(_HEAD)]
    for one in fields(Thresholds):
        value = f'"{one.default}"' if isinstance(one.default, str) else one.default
        blocks.append(f"{_comment(one.metadata[_COMMENT])}\n{one.name} = {value}")
    return "\n\n".join(blocks) + "\n"


def _comment(text: str) -> str:
    return textwrap.fill(text, 110, initial_indent="# ", subsequent_indent="# ")


def load(path: Path | str | None = None) -> Thresholds:
    """The thresholds of a file, over the defaults.

    Raises:
        ValueError: it can't be read, or has a key or a value that means nothing; one sentence that names the file.
    """
    values = files.read_toml(path) if path is not None else {}
    known = [one.name for one in fields(Thresholds)]
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}. {suggestion(key, known)}")
    thresholds = Thresholds(**values)
    _check(thresholds, str(path))
    return thresholds


def _check(thresholds: Thresholds, where: str) -> None:
    values = asdict(thresholds)
    for one in fields(Thresholds):
        value = values[one.name]
        if one.type is str and not isinstance(value, str):
            raise ValueError(f"{where}: {one.name} must be a text, not {value!r}.")
        if one.type is float and not (type(value) in (int, float) and 0 <= value < float("inf")):
            raise ValueError(f"{where}: {one.name} must be a number of at least 0, not {value!r}.")
    if not 0 < thresholds.false_alarms < 0.5:
        raise ValueError(f"{where}: false_alarms must lie between 0 and 0.5, not {thresholds.false_alarms}.")
    if thresholds.throughput_percent >= 100:
        raise ValueError(f"{where}: throughput_percent must be below 100, not {thresholds.throughput_percent}.")
    if thresholds.explosion_times < 1:
        raise ValueError(f"{where}: explosion_times must be at least 1, not {thresholds.explosion_times:g}.")
    if thresholds.missing not in MISSING:
        raise ValueError(f"{where}: missing must be one of {', '.join(MISSING)}, not {thresholds.missing!r}.")
