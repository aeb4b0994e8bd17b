"""Progress and tables: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unicodedata import category

from flep_fl.contracts.records import RoundRecord

COLUMNS = (
    "round",
    "accuracy",
    "loss",
    "MB up",
    "MB down",
    "train s",
    "encrypt s",
    "aggregate s",
    "decrypt s",
    "sites",
)

_QUIET_SECONDS = 2.0
"""What takes less is not worth a line."""


def say(line: str) -> None:
    """Print one plain line at once."""
    print(printable(line), flush=True)  # noqa: T201


def printable(text: str) -> str:
    """Put ``?`` for control characters: names and reasons come from others, a terminal obeys escape codes."""
    return "".join("?" if category(char)[0] == "C" and char not in "\n\t" else char for char in text)


class Progress:
    """One line per event; on a terminal a live spinner with the elapsed time as well.

    Parameters
    ----------
    name
        Prefix of each line, the party that speaks.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = time.monotonic()
        self._status: Any = None
        self._quarters: dict[str, tuple[int, float]] = {}

    def __call__(self, line: str) -> None:
        """Report an event."""
        elapsed = time.monotonic() - self._started
        say(f"[{self._name} {elapsed:6.1f} s] {line}")
        if self._status is not None:
            self._status.update(f"{self._name}: {line}")

    def bar(self, what: str, done: int, total: int) -> None:
        """Show how far something has come: a bar on a terminal; elsewhere a line now and then."""
        if self._status is not None:
            from rich.progress_bar import ProgressBar
            from rich.table import Table

            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=max(total, 1), completed=done, width=40)
            row.add_row(f"{self._name}: {what}", bar, f"{done}/{total}")
            self._status.update(row)
            return
        quarter, now = 4 * done // total if total else 4, time.monotonic()
        last, told = self._quarters.setdefault(what, (0, now))
        if last != quarter and now - told >= _QUIET_SECONDS:
            self._quarters[what] = (quarter, now)
            self(f"{what}: {done} of {total} records")

    @contextmanager
    def live(self) -> Iterator[Callable[[str], None]]:
        """Show a spinner while the block runs, where standard output is a terminal."""
        if not sys.stdout.isatty():
            yield self
            return
        from rich.console import Console

        with Console().status(self._name) as status:
            self._status = status
            try:
                yield self
            finally:
                self._status = None


def warn_few_contributors(min_contributors: int, say_line: Callable[[str], None]) -> None:
    """Say what ``federation.min_contributors=2`` means, where it is set."""
    if min_contributors == 2:
        say_line(
            "warning: federation.min_contributors=2: with two contributors, the sum minus one's own update "
            "is the other's update"
        )


def round_row(record: RoundRecord) -> list[str]:
    """Format one round for the table."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    times = [number(record.seconds[name], 2) for name in ("train", "encrypt", "aggregate", "decrypt")]
    sites = str(len(record.replied)) + (f" (+{len(record.failed)} failed)" if record.failed else "")
    return [
        str(record.round) + (f" {record.error}" if record.error else ""),
        number(record.accuracy, 4),
        number(record.loss, 4),
        number(record.bytes_up / 1e6, 3),
        number(record.bytes_down / 1e6, 3),
        *times,
        sites,
    ]


def print_table(rounds: Sequence[RoundRecord], *, title: str) -> None:
    """Print the closing table: rich on a terminal, aligned plain text elsewhere."""
    print_rows(title, COLUMNS, [round_row(record) for record in rounds], justify="right")


def print_rows(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    justify: Literal["left", "right"] = "left",
) -> None:
    """Print a table: rich on a terminal, aligned plain text elsewhere.

    Parameters
    ----------
    title
        A line above the table.
    columns
        Their headings.
    rows
        As many cells each as there are columns.
    justify
        Where a cell's text stands.
    """
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title)
        for column in columns:
            table.add_column(column, justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    place = str.rjust if justify == "right" else str.ljust
    say(title)
    for line in (columns, *rows):
        say("  ".join(place(cell, width) for cell, width in zip(line, widths, strict=True)).rstrip())
