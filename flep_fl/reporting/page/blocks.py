"""What a page is made of. Plain data: the template escapes every text when it is rendered."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes
    ----------
    text
        What is shown.
    order
        What it is sorted by; None sorts by the text.
    """

    text: str
    order: float | None = None


def number(value: float | None, digits: int, *, scale: float = 1.0, unit: str = "", none: str = "-") -> Cell:
    """Return a cell with a number of ``value * scale``, sorted by it; ``none`` where there is none."""
    if value is None:
        return Cell(none)
    return Cell(f"{value * scale:,.{digits}f}{unit}", value * scale)


@dataclass(frozen=True, slots=True)
class Table:
    """A table that can be sorted by each of its columns.

    Attributes
    ----------
    caption
        What it shows, in words.
    columns
        Headings.
    rows
        As many cells each as there are columns; texts stand for themselves.
    key_column
        Whether the first column names the row.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    key_column: bool = True

    def cells(self) -> list[list[Cell]]:
        """Return the rows, every entry a cell."""
        return [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in self.rows]

    def headings(self) -> list[tuple[str, bool]]:
        """Return each heading, and whether its column holds numbers."""
        rows = self.cells()
        return [
            (title, any(row[i].order is not None for row in rows) and not (i == 0 and self.key_column))
            for i, title in enumerate(self.columns)
        ]


@dataclass(frozen=True, slots=True)
class Chart:
    """An inline SVG, and the same figures as a table.

    Attributes
    ----------
    title
        Heading.
    svg
        Made by :mod:`.charts`, which escapes its texts.
    table
        What the picture shows.
    note
        A sentence below.
    """

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    table: Table
    note: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture inside the page.

    Attributes
    ----------
    title, caption
        What stands below it.
    png
        The file's bytes.
    alt
        What it shows, for those who do not see it.
    small
        Whether its pixels should stay visible when it is enlarged.
    below
        An SVG under it.
    """

    title: str
    png: bytes = field(repr=False)
    alt: str
    caption: str = ""
    small: bool = True
    below: Markup | None = None

    @property
    def uri(self) -> str:
        """The picture as a ``data:`` address: the page asks nobody for anything."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures side by side; ``chain`` puts arrows between them."""

    kind: ClassVar[str] = "pictures"
    title: str
    pictures: Sequence[Picture]
    note: str = ""
    chain: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values, as a list of definitions."""

    kind: ClassVar[str] = "facts"
    facts: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Row:
    """Blocks that stand side by side where there is room."""

    kind: ClassVar[str] = "row"
    blocks: Sequence[Chart | Table | Text | Facts]


@dataclass(frozen=True, slots=True)
class Folded:
    """Blocks behind a heading that opens them."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: Sequence[Block]


Block = Table | Chart | Pictures | Text | Facts | Row | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading; ``name`` is its anchor, letters and dashes only."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure at the top of the page.

    Attributes
    ----------
    label, value, note
        What it is, how much, and against what.
    tone
        ``good``, ``bad`` or nothing.
    """

    label: str
    value: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page."""

    title: str
    lead: str
    figures: Sequence[Figure]
    sections: Sequence[Section]
    badge: str = ""
