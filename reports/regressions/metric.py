"""What a check can look at: a metric, and the suite of paired rows that it judges."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from reports.regressions.findings import Finding
from reports.regressions.pairing import Pair, PairedRow, RowKey
from reports.regressions.thresholds import Thresholds
from reports.table import NOTHING

Show = Callable[[float], str]
Column = tuple[str, Callable[[PairedRow, Finding | None], str]]  # of the table of rows: a header, and what stands below


@dataclass(frozen=True)
class Suite:
    """Both sides of a check, row by row."""

    rows: dict[RowKey, PairedRow]
    references: dict[str, Pair]  # the reference method's runs, by `pairing.place`
    thresholds: Thresholds

    @property
    def others(self) -> dict[RowKey, PairedRow]:
        """The rows that aren't the reference's own."""
        return {key: row for key, row in self.rows.items() if not is_reference(row, self.thresholds.reference)}


@dataclass(frozen=True)
class Metric:
    """One row of what is checked.

    Attributes:
        name: for --only, and in findings.
        judge: its findings.
        value, change: show a figure, and how it changed, with their units.
        columns: in the table of rows.
        relative: it needs the reference's run on the same task and seed.
        notes: what a reader should know beside its findings.
    """

    name: str
    judge: Callable[[Suite], Iterator[Finding]]
    value: Show | None = None
    change: Show | None = None
    columns: tuple[Column, ...] = ()
    relative: bool = False
    notes: Callable[[Suite], list[str]] = lambda suite: []


def is_reference(row: PairedRow, reference: str) -> bool:
    """Is it a row of the method that savings and speeds are relative to?"""
    runs = [run for pair in row.pairs.values() for run in pair]
    return bool(runs) and runs[0]["method"] == reference


def arrow(show: Show) -> Callable[[Any, Finding | None], str]:
    """`81.0 -> 83.5`, or one figure where both sides show the same."""

    def cell(row: Any, finding: Finding | None) -> str:
        if finding is None or finding.before is None or finding.after is None:
            return NOTHING
        before, after = show(finding.before), show(finding.after)
        return before if before == after else f"{before} -> {after}"

    return cell
