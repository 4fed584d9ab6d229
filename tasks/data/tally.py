"""What happens to the rows of a source: which are left out and why, what was fixed, and which fields weren't used."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from tasks.data.rows import Row, RowError, listed

T = TypeVar("T")

MOST = 10  # reasons or fields to name
MENDED = "characters that aren't Unicode replaced by U+FFFD"


@dataclass
class Errors:
    """Why items of one kind can't be used."""

    first: str = ""  # the message of the first of them
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, error: RowError) -> None:
        """Count an error."""
        self.first = self.first or str(error)
        self.reasons[error.reason] += 1

    def check(self, source: str, count: int, what: str = "row") -> None:
        """Raises ValueError if they are more than half of `count`."""
        total = self.reasons.total()
        if 2 * total > count:
            others = [
                f"{reason} ({number:,})" for reason, number in self.reasons.most_common(5) if reason not in self.first
            ]
            also = f"; others: {'; '.join(others)}" if others else ""
            raise ValueError(f"{self.first} ({total:,} of the {_counted(count, what)} of {source} can't be used{also})")


@dataclass
class Tally:
    """Counts, each with the first place it occurred; `notes` reports them to a reader of the results.

    One bad row doesn't stop a data set: it is left out and counted. A file in which most rows are bad is an error,
    since nobody could say what it taught.

    Args:
        needless: fields of a format that carry nothing for a model, such as row numbers.
    """

    needless: frozenset[str] = frozenset()

    left_out: Counter[str] = field(default_factory=Counter)  # rows, by reason
    mended: Counter[str] = field(default_factory=Counter)  # what was done, and how often
    unused: Counter[str] = field(default_factory=Counter)  # fields, and how many rows have them
    first: dict[str, str] = field(default_factory=dict)  # the first place where a reason or fix occurred

    def use(self, source: str, rows: Iterable[Row | RowError], make: Callable[[Row], T]) -> Iterator[T]:
        """The result of `make` for each row of a file.

        Args:
            source: the file's name in messages.
            rows: its rows, and errors for whatever isn't a row.
            make: raises RowError for a row that it can't use.

        Raises:
            ValueError: the file has no rows, or more than half of them can't be used or had to be fixed.
        """
        count, mended, errors = 0, 0, Errors()
        for row in rows:
            count += 1
            try:
                if isinstance(row, RowError):
                    raise row
                made = make(row)
            except RowError as error:
                errors.add(error)
                self.leave_out(error)
                continue
            mended += row.mended > 0
            self._note(row)
            yield made
        if not count:
            raise ValueError(f"{source}: it has no rows")
        errors.check(source, count)
        if 2 * mended > count:
            raise ValueError(f"{source}: it must be UTF-8, but {mended:,} of its {count:,} rows are not: convert it")

    def leave_out(self, error: RowError) -> None:
        """Count a row that isn't used."""
        self.left_out[error.reason] += 1
        self.first.setdefault(error.reason, f"{error.where}{error.found}")

    def mend(self, what: str, where: str, count: int = 1) -> None:
        """Count something that had to be changed to be usable."""
        self.mended[what] += count
        self.first.setdefault(what, where)

    def _note(self, row: Row) -> None:
        if row.mended:
            self.mend(MENDED, row.where, row.mended)
        names = (name for name in row.unused() if name.rpartition(".")[2] not in self.needless)
        self.unused.update(dict.fromkeys(names, 1))

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know, one sentence for each point."""
        return [*self._left_out(), *self._mended(), *self._unused()]

    def _left_out(self) -> Iterator[str]:
        named = self.left_out.most_common(MOST)
        for why, count in named:
            yield f"{_counted(count, 'row')} left out: {why} (first: {self.first[why]})"
        others = self.left_out.total() - sum(count for _, count in named)
        if others:
            yield f"{_counted(others, 'row')} left out for {len(self.left_out) - MOST} other reasons"

    def _mended(self) -> Iterator[str]:
        for what, count in self.mended.items():
            yield f"{count:,} {what} (first: {self.first[what]})"

    def _unused(self) -> Iterator[str]:
        named = [f"{name} ({count:,})" for name, count in self.unused.most_common(MOST)]
        more = len(self.unused) - len(named)
        if named:
            yield f"unused fields: {listed(named)}" + (f" and {more} more" if more else "")


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
