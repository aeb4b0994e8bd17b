"""Small charts as inline SVG. No library, no script; colours come from the page's style sheet.

Every chart carries a title, a description and the same figures as a table, and series differ by dash and
marker as well as by colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from flep_fl.reporting.page.blocks import Cell, Chart, Table, number

WIDTH, HEIGHT = 440, 270
SERIES = 8
"""Series that differ by colour and dash; further ones repeat them."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 44
_LEGEND_LINE = 18
_LETTER = 6.4  # mean width of a letter at the labels' size
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_SVG = "http://www.w3.org/2000/svg"


@dataclass(frozen=True, slots=True)
class Series:
    """One line.

    Attributes
    ----------
    name
        For the legend.
    points
        ``(x, y)`` in ascending x; None for y breaks the line.
    band
        ``(low, high)`` of each point, or None where there is none.
    plain
        Whether it is a reference: thin, dashed, without markers.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float, float] | None] | None = None
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """One set of bars: a value for each category, and how far it may be off, where that is known."""

    name: str
    values: Sequence[float]
    errors: Sequence[float | None] | None = None


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    digits: int = 3,
    percent: bool = False,
    whole: bool = False,
    note: str = "",
) -> Chart:
    """Draw lines over a numeric axis.

    Parameters
    ----------
    title
        Heading, and the picture's title.
    series
        At least one point among them.
    x, y
        Names of the axes.
    digits
        Digits after the point in the table.
    percent
        Whether y is a share, shown in percent.
    whole
        Whether x has whole numbers only.
    note
        A sentence below.

    Returns
    -------
    Chart
        Picture and table.
    """
    scale = 100.0 if percent else 1.0
    xs = [px for one in series for px, py in one.points if py is not None]
    ys = [scale * py for one in series for _, py in one.points if py is not None]
    ys += [scale * edge for one in series for pair in one.band or () if pair for edge in pair]
    frame = _Frame([one.name for one in series], [one.plain for one in series])
    frame.axes(_Axis(xs, exact=True, whole=whole), _Axis(ys), x, f"{y} (%)" if percent else y)
    for index, one in enumerate(series):
        frame.line(index, one, scale)
    described = f"{y} against {x}: " + "; ".join(_described(one, scale) for one in series)
    table = Table(title, [x, *(one.name for one in series)], _rows(series, digits, scale))
    return Chart(title, frame.markup(title, described), table, note)


def bar_chart(
    title: str,
    categories: Sequence[str],
    bars: Sequence[Bars],
    *,
    x: str,
    y: str,
    digits: int = 3,
    stacked: bool = False,
    note: str = "",
) -> Chart:
    """Draw bars side by side or one on another, with error bars where they are known.

    Parameters
    ----------
    title, x, y, digits, note
        As for :func:`line_chart`.
    categories
        One for each place on the x axis.
    bars
        A value of 0 or more for each category.
    stacked
        Whether the bars of a category stand on each other.

    Returns
    -------
    Chart
        Picture and table.
    """
    places = range(len(categories))
    if stacked:
        tops = [sum(one.values[i] for one in bars) for i in places]
    else:
        tops = [
            one.values[i] + ((one.errors or [None] * len(categories))[i] or 0.0)
            for one in bars
            for i in places
        ]
    frame = _Frame([one.name for one in bars], [False] * len(bars), boxes=True)
    frame.axes(None, _Axis([0.0, *tops], zero=True), x, y, categories=categories)
    frame.bars(categories, bars, stacked=stacked)
    sums = "; ".join(f"{one.name} {sum(one.values):.{digits}f} in all" for one in bars)
    table = Table(
        title,
        [x, *(one.name for one in bars)],
        [
            [Cell(name, float(i)), *(number(one.values[i], digits) for one in bars)]
            for i, name in enumerate(categories)
        ],
    )
    return Chart(title, frame.markup(title, f"{y} by {x}: {sums}"), table, note)


def histogram(title: str, counts: Sequence[int]) -> Markup:
    """Draw the histogram of an image, one count per grey level, as a small picture without axes."""
    height, step = 70.0, 256 / max(1, len(counts))
    top = max([*counts, 1])
    points = [f"M0 {height}"]
    for level, count in enumerate(counts):
        level_y = height - height * count / top
        points.append(f"L{level * step:.1f} {level_y:.1f} L{(level + 1) * step:.1f} {level_y:.1f}")
    root = _root(256, int(height), title, f"Histogram over {len(counts)} levels, at most {top} in one")
    ET.SubElement(root, "path", {"d": " ".join(points) + f" L256 {height} Z", "class": "area s0"})
    return _markup(root)


def standalone(svg: Markup) -> bytes:
    """Return a chart as an SVG file of its own, with its colours for light and dark."""
    return str(svg).replace(">", ">" + _STANDALONE_STYLE, 1).encode() + b"\n"


# --- inner ----------------------------------------------------------------------------------------


class _Axis:
    """Ticks at round numbers, and where a value stands between the ends (0..1).

    ``exact`` ends the axis at the values, else at the next ticks; ``whole`` has ticks at whole numbers only;
    ``zero`` begins at 0. An exact axis over a factor of fifty or more is logarithmic.
    """

    def __init__(
        self, values: Sequence[float], *, exact: bool = False, whole: bool = False, zero: bool = False
    ) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if zero:
            low = 0.0
        if high - low < 1e-12 * max(1.0, abs(high)):
            # One value only: some room around it.
            room = 0.5 if whole else (abs(high) * 0.1 or 1.0)
            low, high = (low if zero else low - room), high + room
        self.logarithmic = exact and low > 0 and high / low >= 50
        step = _round_step((high - low) / 4)
        if whole:
            step = max(1.0, round(step))
        if self.logarithmic:
            powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
            self.ticks = [10.0**power for power in powers]
            step = min(1.0, low)
        elif exact:
            first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
            self.ticks = [step * i for i in range(first, last + 1)]
        else:
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            self.ticks = [step * i for i in range(first, last + 1)]
        self.low, self.high = (low, high) if exact else (self.ticks[0], self.ticks[-1])
        self._digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0

    def place(self, value: float) -> float:
        if self.high <= self.low:
            return 0.5
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def label(self, tick: float) -> str:
        if abs(tick) >= 1e6 or (tick and abs(tick) < 1e-4):
            return f"{tick:.2g}"
        return f"{tick:,.{self._digits}f}"


class _Frame:
    """The picture under construction: legend above, then the plot with its axes."""

    def __init__(self, names: Sequence[str], plain: Sequence[bool], *, boxes: bool = False) -> None:
        self._plain = plain
        self._legend: list[tuple[float, float, int]] = []
        left, line = 0.0, 0
        for index, name in enumerate(names):
            width = 30 + _LETTER * len(_short(name))
            if left and left + width > WIDTH - 8:
                left, line = 0.0, line + 1
            self._legend.append((left, line * _LEGEND_LINE, index))
            left += width
        self._names, self._boxes = names, boxes
        self._top = _TOP + (line + 1) * _LEGEND_LINE
        self._height = HEIGHT + line * _LEGEND_LINE
        self._items: list[ET.Element] = []
        self._x: _Axis | None = None
        self._y = _Axis([])
        self._draw_legend()

    def _add(self, tag: str, text: str = "", **attributes: object) -> ET.Element:
        """Add an element; ``class_`` and ``stroke_dasharray`` get their right names."""
        names = {"class_": "class"}
        values = {names.get(k, k.replace("_", "-")): _text(v) for k, v in attributes.items()}
        element = ET.Element(tag, values)
        element.text = text or None
        self._items.append(element)
        return element

    def _draw_legend(self) -> None:
        for left, down, index in self._legend:
            middle = _TOP + down
            if self._boxes:
                self._add(
                    "rect", x=left + 4, y=middle - 5, width=16, height=10, class_=f"bar s{index % SERIES}"
                )
            else:
                self._sample(index, left, middle)
            self._add("text", _short(self._names[index]), x=left + 25, y=middle + 4, class_="legend")

    def _sample(self, index: int, left: float, middle: float) -> None:
        style = _line_class(index, self._plain[index])
        self._add(
            "path",
            d=f"M{left + 3:.1f} {middle}H{left + 21:.1f}",
            class_=style,
            **_dash(index, self._plain[index]),
        )
        if not self._plain[index]:
            self._marker(index, left + 12, middle)

    def _marker(self, index: int, x: float, y: float, title: str = "") -> None:
        shape = index % 3
        style = f"dot s{index % SERIES}"
        if shape == 0:
            dot = self._add("circle", cx=x, cy=y, r=3.2, class_=style)
        elif shape == 1:
            dot = self._add("rect", x=x - 3, y=y - 3, width=6, height=6, class_=style)
        else:
            dot = self._add("path", d=f"M{x:.1f} {y - 4:.1f}l4 7h-8z", class_=style)
        if title:
            ET.SubElement(dot, "title").text = title

    @property
    def _bottom(self) -> float:
        return self._height - _BOTTOM

    def _px(self, share: float) -> float:
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def _py(self, share: float) -> float:
        return self._bottom - share * (self._bottom - self._top)

    def axes(
        self, x: _Axis | None, y: _Axis, x_name: str, y_name: str, *, categories: Sequence[str] = ()
    ) -> None:
        """Draw grid, ticks and names."""
        self._x, self._y = x, y
        for tick in y.ticks:
            at = self._py(y.place(tick))
            self._add("path", d=f"M{_LEFT} {at:.1f}H{WIDTH - _RIGHT}", class_="grid")
            self._add("text", y.label(tick), x=_LEFT - 6, y=at + 4, class_="tick", text_anchor="end")
        if x is not None:
            for tick in x.ticks:
                at = self._px(x.place(tick))
                self._add("path", d=f"M{at:.1f} {self._bottom:.1f}v4", class_="axis")
                self._add(
                    "text", x.label(tick), x=at, y=self._bottom + 17, class_="tick", text_anchor="middle"
                )
        else:
            self._name_categories(categories)
        self._add("path", d=f"M{_LEFT} {self._bottom:.1f}H{WIDTH - _RIGHT}", class_="axis")
        self._add("text", x_name, x=self._px(0.5), y=self._height - 8, class_="name", text_anchor="middle")
        middle = (self._top + self._bottom) / 2
        self._add(
            "text",
            y_name,
            x=12,
            y=middle,
            class_="name",
            text_anchor="middle",
            transform=f"rotate(-90 12 {middle:.1f})",
        )

    def _name_categories(self, categories: Sequence[str]) -> None:
        room = (WIDTH - _LEFT - _RIGHT) / max(1, len(categories))
        every = max(1, math.ceil(max((len(c) for c in categories), default=1) * _LETTER / room))
        longest = max(3, int(room * every / _LETTER))
        for index in range(0, len(categories), every if len(categories) > 8 else 1):
            name = _short(categories[index], longest if len(categories) <= 8 else 18)
            if len(categories) <= 8:
                name = _short(categories[index], max(3, int(room / (_LETTER - 0.6))))
            at = _LEFT + (index + 0.5) * room
            self._add("text", name, x=at, y=self._bottom + 17, class_="tick", text_anchor="middle")

    def line(self, index: int, series: Series, scale: float) -> None:
        """Draw one series: its band, its line, its markers."""
        x = self._x
        if x is None:  # pragma: no cover - a chart of lines has an axis
            return
        known = [(i, px, py * scale) for i, (px, py) in enumerate(series.points) if py is not None]
        bands = series.band or [None] * len(series.points)
        edges = [(px, band) for i, px, _ in known if (band := bands[i])]
        if len(edges) > 1:
            upper = [
                f"{self._px(x.place(px)):.1f} {self._py(self._y.place(b[1] * scale)):.1f}" for px, b in edges
            ]
            lower = [
                f"{self._px(x.place(px)):.1f} {self._py(self._y.place(b[0] * scale)):.1f}" for px, b in edges
            ]
            self._add(
                "path", d="M" + "L".join([*upper, *reversed(lower)]) + "Z", class_=f"band s{index % SERIES}"
            )
        for px, band in edges if len(edges) == 1 else ():
            at = self._px(x.place(px))
            low, high = (self._py(self._y.place(edge * scale)) for edge in band)
            self._add("path", d=f"M{at:.1f} {low:.1f}V{high:.1f}", class_="error")
        path, pen = [], "M"
        for px, py in series.points:
            if py is None:
                pen = "M"
                continue
            path.append(f"{pen}{self._px(x.place(px)):.1f} {self._py(self._y.place(py * scale)):.1f}")
            pen = "L"
        if path:
            style = _line_class(index, series.plain)
            self._add("path", d="".join(path), class_=style, **_dash(index, series.plain))
        if not series.plain and len(known) <= 60:
            for _, px, py in known:
                spot = self._px(x.place(px)), self._py(self._y.place(py))
                self._marker(index, *spot, title=f"{series.name}: {_text(px)}, {py:.4g}")

    def bars(self, categories: Sequence[str], bars: Sequence[Bars], *, stacked: bool) -> None:
        """Draw all bars."""
        room = (WIDTH - _LEFT - _RIGHT) / max(1, len(categories))
        width = room * 0.72 / (1 if stacked else max(1, len(bars)))
        for place, category in enumerate(categories):
            below = 0.0
            for index, one in enumerate(bars):
                value = one.values[place]
                left = _LEFT + place * room + room * 0.14 + (0 if stacked else index * width)
                top = self._py(self._y.place(below + value))
                foot = self._py(self._y.place(below))
                bar = self._add(
                    "rect",
                    x=left,
                    y=top,
                    width=max(0.5, width - (0 if stacked else 1)),
                    height=max(0.0, foot - top),
                    class_=f"bar s{index % SERIES}",
                )
                ET.SubElement(bar, "title").text = f"{category}, {one.name}: {value:.4g}"
                if stacked:
                    below += value
                error = (one.errors or [None] * len(categories))[place]
                if error and not stacked:
                    ends = [self._py(self._y.place(max(0.0, value + sign * error))) for sign in (-1, 1)]
                    self._add(
                        "path", d=f"M{left + width / 2:.1f} {ends[0]:.1f}V{ends[1]:.1f}", class_="error"
                    )

    def markup(self, title: str, description: str) -> Markup:
        """Return the finished picture."""
        root = _root(WIDTH, self._height, title, description)
        root.extend(self._items)
        return _markup(root)


def _root(width: int, height: int, title: str, description: str) -> ET.Element:
    root = ET.Element(
        "svg",
        {
            "xmlns": _SVG,
            "viewBox": f"0 0 {width} {height}",
            "role": "img",
            "class": "chart",
            "aria-label": title,
        },
    )
    ET.SubElement(root, "title").text = title
    ET.SubElement(root, "desc").text = description
    return root


def _markup(root: ET.Element) -> Markup:
    # ElementTree has escaped every text and attribute.
    return Markup(ET.tostring(root, encoding="unicode"))  # noqa: S704


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e-3 else _plain(value)


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def _short(name: str, longest: int = 44) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _line_class(index: int, plain: bool) -> str:
    return f"line plain s{index % SERIES}" if plain else f"line s{index % SERIES}"


def _dash(index: int, plain: bool) -> dict[str, str]:
    dash = "4 4" if plain else _DASHES[index % len(_DASHES)]
    return {"stroke_dasharray": dash} if dash else {}


def _round_step(rough: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below ``rough``."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def _described(series: Series, scale: float) -> str:
    known = [(px, py * scale) for px, py in series.points if py is not None]
    if not known:
        return f"{series.name}: no value"
    (first_x, first_y), (last_x, last_y) = known[0], known[-1]
    return f"{series.name} from {first_y:.4g} at {first_x:g} to {last_y:.4g} at {last_x:g}"


def _rows(series: Sequence[Series], digits: int, scale: float) -> list[list[Cell]]:
    xs = sorted({px for one in series for px, _ in one.points})
    maps = [dict(one.points) for one in series]
    bands = [dict(zip((px for px, _ in one.points), one.band or (), strict=False)) for one in series]

    def cell(index: int, px: float) -> Cell:
        value = maps[index].get(px)
        band = bands[index].get(px)
        shown = number(value, digits, scale=scale)
        if band is None or value is None:
            return shown
        low, high = (f"{edge * scale:,.{digits}f}" for edge in band)
        return Cell(f"{shown.text} ({low} to {high})", shown.order)

    return [[Cell(f"{px:g}", px), *(cell(index, px) for index in range(len(series)))] for px in xs]


_STANDALONE_STYLE = (
    "<style>"
    ".chart{font:12px system-ui,sans-serif;--text:#1d2733;--muted:#5b6875;--line:#d9dfe6;"
    "--s0:#0b66c3;--s1:#c2410c;--s2:#0f7b53;--s3:#8a5a00;--s4:#7a3ea8;--s5:#0e7490;--s6:#b0285e;--s7:#4b5563}"
    "@media(prefers-color-scheme:dark){.chart{--text:#e6edf3;--muted:#9aa7b4;--line:#303a45;"
    "--s0:#6cb2ff;--s1:#ff9e64;--s2:#4fd1a1;--s3:#e5b94e;--s4:#c79bf2;--s5:#56cfe1;--s6:#ff8fb6;--s7:#aab4bf}}"
    + "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(SERIES))
    + ".grid{stroke:var(--line)}.axis,.error{stroke:var(--muted);fill:none}"
    ".line{stroke:var(--c);stroke-width:2;fill:none}.plain{stroke-width:1.3}"
    ".band{fill:var(--c);opacity:.16}.bar,.dot,.area{fill:var(--c)}"
    ".tick{fill:var(--muted);font-size:11px}.name,.legend{fill:var(--text)}"
    "</style>"
)
