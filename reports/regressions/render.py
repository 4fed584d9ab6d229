"""A check for people, for a pull request, for CI and for programs."""

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from reports import formats
from reports.names import counted
from reports.record import Record
from reports.regressions import findings, junit
from reports.regressions.check import METRICS, Check
from reports.regressions.exact import peak
from reports.regressions.findings import VERDICTS, Finding
from reports.regressions.pairing import PairedRow, RowKey
from reports.regressions.throughput import speed
from reports.table import NOTHING, Table

FORMATS = ("terminal", "markdown", "junit", "json")
MOST_ROWS = 100  # in the table of all rows; of more, those with something to say

_UNSURE = "No regression shown"  # nor excluded
_HEADLINES = {
    0: "Fine: no regression",
    1: "REGRESSION",
    3: "NOT COMPARABLE",
    4: "A RUN FAILED",
}


def render(check: Check, format: str, names: tuple[str, str]) -> str:
    """A check in one of the `FORMATS`; `names` are those of the baseline and the candidate."""
    if format == "json":
        return as_json(check, names)
    if format == "junit":
        return junit.render(check)
    section = (_heading(check, names), _tables(check), check.notes)
    return formats.markdown([section]) if format == "markdown" else formats.plain([section])


def verdict(check: Check) -> str:
    """The whole check in a line."""
    counts = Counter(finding.verdict for finding in check.findings)
    told = [f"{counts[name]} {_words(name)}" for name in VERDICTS if counts[name]]
    headline = _UNSURE if not check.code and counts[findings.INCONCLUSIVE] else _HEADLINES[check.code]
    return f"{headline} ({', '.join(told)})"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _heading(check: Check, names: tuple[str, str]) -> list[str]:
    baseline, candidate = (_printable(name) for name in names)
    before, after = (counted(count, "run") for count in check.counts)
    return [
        verdict(check),
        f"baseline: {baseline}, {before}; candidate: {candidate}, {after}",
    ]


def _tables(check: Check) -> list[Table]:
    flagged = [finding for finding in check.findings if finding.verdict not in findings.QUIET]
    together = [finding for finding in check.findings if not finding.task and finding.metric == "quality"]
    tables = [_counts(check), _flagged(flagged, _several_models(check)), _together(together), _rows(check)]
    return [table for table in tables if table.cells]


def _several_models(check: Check) -> bool:
    return len({key.model for key in check.rows}) > 1


def _counts(check: Check) -> Table:
    counts = Counter((finding.metric, finding.verdict) for finding in check.findings)
    metrics = [metric for metric in METRICS if any(finding.metric == metric for finding in check.findings)]
    verdicts = [name for name in reversed(VERDICTS) if any(counts[metric, name] for metric in metrics)]
    cells = [[metric, *(str(counts[metric, name] or NOTHING) for name in verdicts)] for metric in metrics]
    return Table("Verdicts", ["check", *map(_words, verdicts)], cells, {"check"})


def _flagged(flagged: list[Finding], models: bool) -> Table:
    headers = ["verdict", "check", "what", "baseline", "candidate", "change", "why"]
    cells = [
        [
            _words(finding.verdict),
            finding.metric,
            _what(finding, models),
            *_figures(finding),
            _printable(finding.reason) or NOTHING,
        ]
        for finding in flagged
    ]
    return Table("To look at", headers, cells, {"verdict", "check", "what", "why"})


def _what(finding: Finding, models: bool) -> str:
    words = [finding.task, finding.method, finding.model if models else ""]
    if not finding.task:
        return f"all rows of {_printable(finding.method)}" if finding.method else "everything"
    seeds = f" s{','.join(map(str, finding.seeds))}" if finding.metric == "runs" else ""
    return _printable(" ".join(filter(None, words))) + seeds


def _figures(finding: Finding) -> list[str]:
    """Baseline, candidate and change, in the units of the metric."""
    metric = METRICS[finding.metric]
    if finding.change is None or metric.value is None or metric.change is None:
        return [NOTHING] * 3
    known = [NOTHING if side is None else metric.value(side) for side in (finding.before, finding.after)]
    return [*known, metric.change(finding.change)]


def _together(together: list[Finding]) -> Table:
    cells = [[_what(finding, False), _words(finding.verdict), finding.reason] for finding in together]
    return Table("Quality of all rows together", ["rows", "verdict", "tests"], cells, {"rows", "verdict", "tests"})


def _rows(check: Check) -> Table:
    """Every row with its figures, absolute speeds among them."""
    by_row: dict[tuple[str, ...], dict[str, Finding]] = {}
    for finding in check.findings:
        by_row.setdefault((finding.task, finding.method, finding.model), {}).setdefault(finding.metric, finding)
    keys = [key for key, row in check.rows.items() if row.pairs]
    title = "Rows, baseline -> candidate"
    if len(keys) > MOST_ROWS:
        keys = [key for key in keys if any(f.verdict not in findings.QUIET for f in by_row[key].values())]
        title += f" (of {len(check.rows)} rows those with something to look at; --format json has all)"
    models = _several_models(check)
    columns = [(metric.name, *column) for metric in METRICS.values() for column in metric.columns]
    headers = ["task", "method", *(["model"] if models else []), *(header for _, header, _ in columns)]
    cells = [
        [
            *map(_printable, key if models else key[:2]),
            *(show(check.rows[key], by_row[key].get(name)) for name, _, show in columns),
        ]
        for key in keys
    ]
    return Table(title, headers, cells, {"task", "method", "model"})


def _printable(text: str) -> str:
    """Names and errors are somebody else's text: no line breaks, no terminal codes."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def as_json(check: Check, names: tuple[str, str]) -> str:
    """All findings, and the figures of all rows and seeds, raw."""
    document = {
        "exit_code": check.code,
        "verdict": verdict(check),
        "baseline": {"place": names[0], "runs": check.counts[0]},
        "candidate": {"place": names[1], "runs": check.counts[1]},
        "thresholds": asdict(check.thresholds),
        "notes": check.notes,
        "findings": [asdict(finding) for finding in check.findings],
        "rows": [_json_row(key, row) for key, row in check.rows.items()],
    }
    return json.dumps(document, indent=1, allow_nan=False)


def _json_row(key: RowKey, row: PairedRow) -> dict[str, Any]:
    pairs = {seed: {"baseline": _json_run(old), "candidate": _json_run(new)} for seed, (old, new) in row.pairs.items()}
    return {**key._asdict(), "seeds": pairs}


def _json_run(run: Record) -> dict[str, Any]:
    return {
        "run_id": run["run_id"],
        "status": run["status"],
        "peak_allocated_bytes": peak(run) or None,
        "tokens_per_second": speed(run) or None,
        "metrics": run["metrics"],
    }
