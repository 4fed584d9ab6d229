"""What is measured with noise, row by row and seed by seed, and the findings that are made of judging it."""

from dataclasses import dataclass, field
from statistics import fmean

from reports.regressions import findings
from reports.regressions.evidence import Judgement
from reports.regressions.findings import Finding
from reports.regressions.pairing import RowKey

VERDICTS = {"worse": findings.REGRESSION, "better": findings.IMPROVED}


@dataclass
class Measured:
    """Values of one row by seed, and their differences, turned so that less than 0 is worse."""

    before: dict[int, float] = field(default_factory=dict)
    after: dict[int, float] = field(default_factory=dict)
    differences: dict[int, float] = field(default_factory=dict)

    def add(self, seed: int, before: float, after: float, difference: float) -> None:
        """Another seed; the difference without the last bits of a subtraction, which are none."""
        self.before[seed], self.after[seed], self.differences[seed] = before, after, round(difference, 9)


def finding(metric: str, key: RowKey, measured: Measured, judged: Judgement, change: float, reason: str) -> Finding:
    """A row's finding, with means over its seeds."""
    return Finding(
        metric,
        VERDICTS.get(judged.verdict, judged.verdict),
        reason,
        *key,
        tuple(measured.differences),
        fmean(measured.before.values()),
        fmean(measured.after.values()),
        change,
        judged.p,
    )


def why(judged: Judgement, margin: str, one_seed: str, unknown: str) -> str:
    """How a verdict came about, in words.

    Args:
        judged: the verdict.
        margin: "2 points".
        one_seed: what a row of one seed is tested by.
        unknown: what is missing where nothing tells the noise.
    """
    if judged.p is None:
        return f"one seed, and {unknown}: nothing tells the noise" if judged.mean else ""
    test = one_seed if judged.seeds == 1 else f"paired t-test over {judged.seeds} seeds"
    return f"{test}: {p_words(judged)}; margin {margin}" + ("; not shown" if judged.verdict == "inconclusive" else "")


def p_words(judged: Judgement, what: str = "rows") -> str:
    """`p = 0.023, level 0.02 for 8 rows`."""
    assert judged.p is not None
    p = "p < 0.0001" if judged.p < 1e-4 else f"p = {judged.p:.2g}"
    many = f" for {judged.tested} {what}" if judged.tested > 1 else ""
    return f"{p}, level {judged.level:.2g}{many}"
