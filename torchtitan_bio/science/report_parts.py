"""What a page is built of: tables, pictures and curves, as HTML and SVG that need nothing beside them.

Each part is a string of HTML. Whatever else comes in is text, and is escaped. A page forbids its reader's browser to run a
script or to fetch anything, so that it shows the same on any machine, and in print.
"""

import base64
import html
import math
from dataclasses import dataclass, field

import numpy as np

from torchtitan_bio.science import drawing

WIDE, NARROW = 760, 470  # charts, in the units of their SVG: across the page, and two side by side
LEFT, TOP, BOTTOM, EDGE = 70, 14, 46, 5
LINE = 15  # between the names of levels, so that they do not cover one another
DASHES = ("", "8 4", "2 3", "10 3 2 3", "5 2", "1 2")  # beside the colours, for print without any

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #222; background: #fff;
  max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; padding-top: .6rem; border-top: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0; max-width: 46rem; }
.small, figcaption, caption { color: #595959; font-size: .86rem; }
nav { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .9rem; margin: .7rem 0 0; }
a { color: #0060a0; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { flex: 1 1 10.5rem; border: 1px solid #ddd; border-radius: .4rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.25; font-weight: 600; }
.note { border-left: 4px solid #e69f00; background: #fdf6e6; padding: .45rem .8rem; margin: .7rem 0; max-width: 46rem; }
.bad { border-left-color: #d55e00; background: #fcefe6; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .22rem .75rem .22rem 0; border-bottom: 1px solid #e8e8e8; vertical-align: top; }
th { border-bottom-color: #999; font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; } th.w, td.w { text-align: left; white-space: normal; }
td.w:first-child { min-width: 8.5rem; }
tr.own td { font-weight: 600; background: #eef5fb; }
caption { text-align: left; padding-bottom: .2rem; }
figure { margin: 1rem 0; } figcaption { margin-top: .35rem; }
figure img { max-width: 100%; height: auto; border: 1px solid #eee; }
svg { display: block; width: 100%; height: auto; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.3rem; margin: .3rem 0; padding: 0;
  font-size: .86rem; }
ul.legend svg { display: inline-block; width: 30px; height: 10px; margin-right: .4rem; vertical-align: middle; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); gap: 0 1.6rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
@media (max-width: 36rem) {
  .tall, .tall caption, .tall tbody, .tall tr { display: block; } .tall thead, .tall td:empty { display: none; }
  .tall tr { border-bottom: 1px solid #bbb; padding: .3rem 0; }
  .tall td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0; white-space: normal; }
  .tall td[data-head]::before { content: attr(data-head); color: #595959; text-align: left; }
  .tall td.w:first-child { font-weight: 600; } .tall td.w:first-child::before { content: none; }
}
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; } nav { display: none; }
  figure, table, .card, .note { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; } details::details-content { content-visibility: visible; display: block; }
}
"""


class Html(str):
    """Text that is HTML already."""


def escaped(value) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(*parts) -> Html:
    return Html("\n".join(escaped(part) for part in parts if part))


def tag(name: str, *content, **attributes) -> Html:
    """An element. Of an attribute's name a trailing _ is dropped, and others become hyphens; empty ones are left out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value not in ("", None)
    )
    return Html(f"<{name}{words}>{''.join(map(escaped, content))}</{name}>")


def section(name: str, title: str, *content) -> Html:
    return tag("section", tag("h2", title, id=name), join(*content))


def note(text, *, is_bad=False) -> Html:
    return tag("p", text, class_="note bad" if is_bad else "note")


def table(head, rows, *, words=(0,), caption: str = "", own=()) -> Html:
    """Columns of numbers, but for those numbered in `words`; rows numbered in `own` stand out. No rows, no table.

    On a narrow screen a row is a block, its numbers one below the other beside the words of the head.
    """
    if not rows:
        return Html("")

    def line(kind, cells):
        heads = head if kind == "td" and len(head) == len(cells) else [""] * len(cells)
        return "".join(
            tag(kind, cell, class_="w" if place in words else "", data_head=heads[place]) for place, cell in enumerate(cells)
        )

    body = "".join(tag("tr", Html(line("td", row)), class_="own" if n in own else "") for n, row in enumerate(rows))
    named = tag("caption", caption) if caption else ""
    heading = tag("thead", tag("tr", Html(line("th", head))))
    return tag("div", tag("table", named, heading, tag("tbody", Html(body)), class_="tall" if head else ""), class_="scroll")


def cards(entries) -> Html:
    """(large, small) words side by side."""
    return tag(
        "div",
        *(tag("div", tag("b", large), tag("span", small, class_="small"), class_="card") for large, small in entries),
        class_="cards",
    )


def picture(png: bytes, caption, alt: str) -> Html:
    data = base64.b64encode(png).decode()
    return tag("figure", Html(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'), tag("figcaption", caption))


def page(title: str, *content) -> str:
    # A browser that obeys this policy runs no script and loads nothing, whatever stands below.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{join(*content)}\n</body>\n</html>\n"
    )


# ---- curves


def thin(x, y, num_columns: int):
    """(x, lowest, highest, mean) of y in at most so many equal stretches of x, so that no extreme is lost.

    x ascends. A stretch without a finite y is NaN and interrupts a line; one without any x is left out. As few points as fit
    are returned as they are.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) <= num_columns:
        return x, y, y, y
    column = ((x - x[0]) / (x[-1] - x[0]) * num_columns).astype(int).clip(max=num_columns - 1)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    known = np.isfinite(y)
    numbers, middle = np.add.reduceat(known, starts, dtype=float), np.add.reduceat(x, starts) / np.diff([*starts, len(x)])
    low = np.minimum.reduceat(np.where(known, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, y, -np.inf), starts)
    mean = np.add.reduceat(np.where(known, y, 0.0), starts) / np.maximum(numbers, 1)
    low, high, mean = (np.where(numbers > 0, each, np.nan) for each in (low, high, mean))
    return middle, low, high, mean


@dataclass
class Chart:
    """Axes, to which lines are added one after the other; svg() is the whole. x and y are (from, to)."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    width: int = WIDE
    height: int = 300
    right: int = 26
    """Room for the names of levels."""
    x_ticks: list[float] | None = None
    _inside: list[str] = field(default_factory=list)
    _levels: list[tuple[float, str, str, str]] = field(default_factory=list)
    _legend: list[tuple[str, str, str]] = field(default_factory=list)

    def line(self, x, y, color: str, *, dash: str = "", width: float = 2.0, name: str = "", opacity: float = 1.0):
        """Through the points; it is interrupted where one is not finite."""
        path, is_drawn = [], False
        for place in zip(np.asarray(x, float).tolist(), np.asarray(y, float).tolist(), strict=True):
            if known := all(map(math.isfinite, place)):
                path.append(f"{'L' if is_drawn else 'M'}{self._place(*place)}")
            is_drawn = known
        self._inside.append(
            tag(
                "path",
                d="".join(path),
                fill="none",
                stroke=color,
                stroke_width=width,
                stroke_linejoin="round",
                stroke_dasharray=dash,
                opacity=None if opacity == 1 else opacity,
            )
        )
        self._name(name, color, dash)

    def band(self, x, low, high, color: str, *, opacity: float = 0.28):
        """Between two lines, also where they are one."""
        for first, last in _finite_runs(low):
            there = [self._place(*each) for each in zip(x[first:last], high[first:last], strict=True)]
            back = [self._place(*each) for each in zip(x[first:last], low[first:last], strict=True)][::-1]
            path = f"M{'L'.join(there + back)}Z"
            self._inside.append(tag("path", d=path, fill=color, stroke=color, stroke_width=0.8, opacity=opacity))

    def points(self, x, y, color: str, *, errors=None, titles=None, radius: float = 3.2, name: str = ""):
        """Dots, with a bar of one error to either side where it is known, and words for whoever points at them."""
        errors, titles = errors or [None] * len(x), titles or [""] * len(x)
        for at, value, error, title in zip(x, y, errors, titles, strict=True):
            if value is None or not math.isfinite(value):
                continue
            if error:
                bar = f"M{self._place(at, value - error)}L{self._place(at, value + error)}"
                self._inside.append(tag("path", d=bar, stroke=color, stroke_width=1.2))
            across, along = self._place(at, value).split(" ")
            self._inside.append(tag("circle", _told(title), cx=across, cy=along, r=radius, fill=color))
        self._name(name, color, "dot")

    def level(self, y: float, name: str, color: str = drawing.GREY, *, dash: str = "4 3"):
        """A line across, named beside the frame."""
        self._levels.append((y, name, color, dash))

    def mark(self, x: float, title: str, color: str = drawing.GREY, *, dash: str = "1 3"):
        """A line upwards at x."""
        across = self._place(x, self.y[0]).split(" ")[0]
        self._inside.append(
            tag("path", _told(title), d=f"M{across} 0V{self._size()[1]}", stroke=color, stroke_width=1.3, stroke_dasharray=dash)
        )

    def svg(self, alt: str, caption="") -> Html:
        width, height = self._size()
        frame = tag("path", d=f"M{LEFT} {TOP}v{height}h{width}", fill="none", stroke=drawing.GREY)
        turned = f"translate(13 {TOP + height / 2}) rotate(-90)"
        labels = [
            _words(LEFT + width / 2, self.height - 6, self.x_label),
            tag("text", self.y_label, transform=turned, text_anchor="middle"),
        ]
        inside = tag(  # cuts off what lies outside, but for the half of a dot on the edge
            "svg",
            Html("".join(self._inside)),
            **dict(x=LEFT - EDGE, y=TOP - EDGE, width=width + 2 * EDGE, height=height + 2 * EDGE),
            viewBox=f"{-EDGE} {-EDGE} {width + 2 * EDGE} {height + 2 * EDGE}",
        )
        svg = tag(
            "svg",
            *(*self._grid(), frame, *self._named_levels(), *labels, inside),
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=alt,
            font_size=12.5,
            font_family="system-ui, sans-serif",
            fill=drawing.INK,
        )
        entries = [tag("li", swatch(color, dash), name) for name, color, dash in self._legend]
        legend = tag("ul", *entries, class_="legend") if entries else ""
        return tag("figure", legend, svg, tag("figcaption", caption) if caption else "")

    def _named_levels(self):
        width = self._size()[0]
        levels = sorted(self._levels, reverse=True)
        for (y, name, color, dash), end in zip(levels, self._level_ends(), strict=True):
            at = self._height_of(y)
            path = f"M{LEFT} {at:.1f}h{width}l8 {end - at:.1f}"
            yield tag("path", d=path, fill="none", stroke=color, stroke_width=1.3, stroke_dasharray=dash)
            yield _words(LEFT + width + 12, end + 4, name, color=color, anchor="start")

    def _grid(self):
        width, height = self._size()
        count_x, count_y = width / 75, height / 45
        x_ticks = ticks(self.x, count_x, self.log_x) if self.x_ticks is None else self.x_ticks
        y_ticks = ticks(self.y, count_y, self.log_y)
        for value, text in zip(x_ticks, drawing.as_text(x_ticks), strict=True):
            at = LEFT + float(self._place(value, self.y[0]).split(" ")[0])
            yield tag("path", d=f"M{at:.1f} {TOP}v{height}", stroke=drawing.GRID)
            yield _words(at, TOP + height + 17, text)
        for value, text in zip(y_ticks, drawing.as_text(y_ticks), strict=True):
            at = self._height_of(value)
            yield tag("path", d=f"M{LEFT} {at:.1f}h{width}", stroke=drawing.GRID)
            yield _words(LEFT - 7, at + 4, text, anchor="end")

    def _level_ends(self):
        """Where the names of levels stand, from the top down: beside their lines, or as near as others leave room."""
        ends = []
        for y, *_ in sorted(self._levels, reverse=True):
            at = self._height_of(y)
            ends.append(max(at, ends[-1] + LINE) if ends else at)
        limit = TOP + self._size()[1]
        for number in reversed(range(len(ends))):
            ends[number] = min(ends[number], limit)
            limit = ends[number] - LINE
        return ends

    def _size(self):
        return self.width - LEFT - self.right, self.height - TOP - BOTTOM

    def _place(self, x: float, y: float) -> str:
        """In the frame, as SVG has it."""
        width, height = self._size()
        across, along = _share(x, *self.x, self.log_x), _share(y, *self.y, self.log_y)
        return f"{across * width:.1f} {(1 - along) * height:.1f}"

    def _height_of(self, y: float) -> float:
        return TOP + float(self._place(self.x[0], y).split(" ")[1])

    def _name(self, name, color, dash):
        if name:
            self._legend.append((name, color, dash))


def swatch(color: str, dash: str) -> Html:
    dot = tag("circle", cx=15, cy=5, r=4, fill=color)
    stroke = tag("path", d="M0 5H30", stroke=color, stroke_width=3, stroke_dasharray=dash)
    return tag("svg", dot if dash == "dot" else stroke, viewBox="0 0 30 10", aria_hidden="true")


def ticks(span, num_wanted: float, log: bool) -> list[float]:
    low, high = span
    if not log:
        return drawing.round_numbers(low, high, num_wanted)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5) if low <= digit * 10.0**power <= high]
    return found if len(found) <= 2 * num_wanted else drawing.powers_of_ten(low, high)


def _share(value, low, high, log):
    if log:
        value, low, high = (math.log(max(each, 1e-300)) for each in (value, low, high))
    return (value - low) / (high - low or 1)


def _words(x, y, text, *, color="#444444", anchor="middle") -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, fill=color)


def _told(title: str) -> Html:
    """What a browser shows to whoever points at the element."""
    return tag("title", title) if title else Html("")


def _finite_runs(values):
    known = np.concatenate(([False], np.isfinite(values), [False]))
    return np.flatnonzero(np.diff(known.astype(int))).reshape(-1, 2).tolist()
