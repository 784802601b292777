"""Pictures from arrays, by Pillow alone: axes with ticks, lines, points, steps, rasters, legends.

    figure = Figure(640, 400, "what it shows")
    axes = figure.axes((60, 40, 620, 350), x=(0, 10), y=(0, 1), x_label="bins", y_label="nats")
    axes.line(x, y, BLUE, label="this model")
    axes.legend()
    figure.save(path)          # or figure.pixels(), uint8 (height, width, 3)

Lengths are pixels of the picture; y grows upwards inside axes and downwards in boxes (left, top, right, bottom). Colours are
told apart without red and green (Okabe and Ito's), and darker is more.
"""

import math

import numpy as np

INK, GREY, SILVER, GRID, PAPER = "#222222", "#767676", "#b9b9b9", "#e4e4e4", "#ffffff"
BLUE, ORANGE, GREEN, PINK, SKY, AMBER = "#0072b2", "#d55e00", "#009e73", "#b8578f", "#56b4e9", "#e69f00"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER)
FINER = 3  # shapes are drawn so many times larger and averaged, which smooths their edges; letters are smooth by themselves
TEXT, TITLE = 13, 15


class Figure:
    def __init__(self, width: int, height: int, title: str = ""):
        from PIL import Image, ImageDraw

        self.width, self.height = width, height
        self._large = Image.new("RGB", (width * FINER, height * FINER), PAPER)
        self._pen = ImageDraw.Draw(self._large)
        self._letters = []  # drawn last, at the size of the picture
        if title:
            self.text((12, 9), title, size=TITLE)

    def axes(self, box, *, x, y, title="", x_label="", y_label="", x_ticks=None, y_ticks=None, log_x=False) -> "Axes":
        """Axes whose frame is the box; x and y are (from, to). Ticks, where not given, are round numbers; [] is none."""
        return Axes(self, box, x, y, title, x_label, y_label, x_ticks, y_ticks, log_x)

    def text(self, place, text: str, *, size=TEXT, color=INK, anchor="la", upwards=False):
        """At (x, y) by Pillow's anchor: l, m, r and a (top), m, s (baseline). upwards: turned, and centred there."""
        self._letters.append((place, text, size, color, anchor, upwards))

    def polyline(self, points, color, width):
        self._pen.line([(FINER * x, FINER * y) for x, y in points], fill=color, width=round(FINER * width), joint="curve")

    def dot(self, place, radius, color):
        x, y = place
        box = [FINER * (x - radius), FINER * (y - radius), FINER * (x + radius), FINER * (y + radius)]
        self._pen.ellipse(box, fill=color)

    def rectangle(self, box, color):
        left, top, right, bottom = (FINER * side for side in box)
        self._pen.rectangle([left, top, right - 1, bottom - 1], fill=color)

    def paste(self, box, pixels):
        """uint8 (rows, columns, 3) stretched over the box, as sharp cells."""
        from PIL import Image

        left, top, right, bottom = (round(FINER * side) for side in box)
        image = Image.fromarray(np.ascontiguousarray(pixels)).resize((right - left, bottom - top), Image.Resampling.NEAREST)
        self._large.paste(image, (left, top))

    def image(self):
        from PIL import Image, ImageDraw, ImageFont

        picture = self._large.reduce(FINER)
        pen = ImageDraw.Draw(picture)
        for (x, y), text, size, color, anchor, upwards in self._letters:
            font = ImageFont.load_default(size)
            if not upwards:
                pen.text((x, y), text, fill=color, font=font, anchor=anchor)
                continue
            left, top, right, bottom = font.getbbox(text, anchor="ls")
            line = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2), 0)
            ImageDraw.Draw(line).text((1 - left, 1 - top), text, fill=255, font=font, anchor="ls")
            line = line.rotate(90, expand=True)
            picture.paste(color, (round(x - line.width / 2), round(y - line.height / 2)), line)
        return picture

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image())

    def save(self, path):
        self.image().save(path, format="PNG", optimize=True)


class Axes:
    def __init__(self, figure, box, x, y, title, x_label, y_label, x_ticks, y_ticks, log_x):
        self.figure, self.box, self.x, self.y, self.log_x, self.labels = figure, box, x, y, log_x, []
        left, top, right, bottom = box
        x_ticks = (powers_of_ten(*x) if log_x else round_numbers(*x, (right - left) / 60)) if x_ticks is None else x_ticks
        y_ticks = round_numbers(*sorted(y), (bottom - top) / 40) if y_ticks is None else y_ticks
        for value, text in zip(x_ticks, as_text(x_ticks), strict=True):
            at = self._place(value, y[0])[0]
            figure.polyline([(at, top), (at, bottom)], GRID, 1)
            figure.text((at, bottom + 4), text, color=GREY, anchor="ma")
        for value, text in zip(y_ticks, as_text(y_ticks), strict=True):
            at = self._place(x[0], value)[1]
            figure.polyline([(left, at), (right, at)], GRID, 1)
            figure.text((left - 6, at), text, color=GREY, anchor="rm")
        figure.polyline([(left, top), (left, bottom), (right, bottom)], GREY, 1)
        if title:
            inside = figure.width - 8 - text_width(title) / 2  # a title that is wider than its axes stays on the picture
            figure.text((min((left + right) / 2, inside), top - 6), title, anchor="ms")
        if x_label:
            figure.text(((left + right) / 2, bottom + (23 if len(x_ticks) else 8)), x_label, anchor="ma")
        if y_label:
            room = max(46, 22 + max(map(text_width, as_text(y_ticks)))) if len(y_ticks) else 14
            figure.text((left - room, (top + bottom) / 2), y_label, upwards=True)

    def line(self, x, y, color, *, width=2.0, label=""):
        """Through the points (x, y); it is interrupted where one of them is not finite."""
        run = []
        for place in [*zip(np.asarray(x, float).tolist(), np.asarray(y, float).tolist(), strict=True), (math.nan, math.nan)]:
            if all(map(math.isfinite, place)):
                run.append(self._place(*place))
            elif run:
                self.figure.polyline(run, color, width)
                run = []
        self._name(label, color)

    def steps(self, edges, heights, color, *, width=2.0, label=""):
        """The outline of a histogram: heights[i] between edges[i] and edges[i + 1]."""
        self.line(np.repeat(edges, 2)[1:-1], np.repeat(heights, 2), color, width=width, label=label)

    def points(self, x, y, color, *, radius=3.0, label=""):
        for place in zip(np.asarray(x, float).tolist(), np.asarray(y, float).tolist(), strict=True):
            if all(map(math.isfinite, place)):
                self.figure.dot(self._place(*place), radius, color)
        self._name(label, color)

    def level(self, y, color=GREY, *, width=1.0, label=""):
        """A horizontal line across."""
        self.line(self.x, (y, y), color, width=width, label=label)

    def raster(self, counts, *, most=None):
        """Counts (neurons, bins) over the whole box, neuron 0 on top: white is none, black is `most` or more.

        Where there are more cells than pixels, a pixel shows the largest of its cells: a spike is never lost.
        """
        left, top, right, bottom = self.box
        rows, columns = (max(1, round(size)) for size in (bottom - top, right - left))
        counts = _largest(_largest(np.asarray(counts), rows, 0), columns, 1).astype(float)
        share = counts / max(1, most or counts.max(initial=1))
        shade = np.where(counts > 0, 0.45 + 0.55 * np.clip(share, 0, 1), 0)[..., None]
        pixels = 255 - shade * (255 - np.array([0x22, 0x22, 0x22]))
        self.figure.paste(self.box, pixels.round().astype(np.uint8))
        self.figure.polyline([(left, top), (left, bottom), (right, bottom)], GREY, 1)

    def legend(self, *, right=True, top=True, above=False):
        """The labels so far, in a corner, or in a row above the frame, where they hide nothing."""
        widths = [text_width(label) + 34 for label, _ in self.labels]
        if above:
            x = self.box[2] - sum(widths) - 8 * (len(widths) - 1)
            for (label, color), width in zip(self.labels, widths, strict=True):
                self._legend_entry(x, self.box[1] - 12, label, color)
                x += width + 8
            return
        width = max(widths)
        x = self.box[2] - width - 4 if right else self.box[0] + 6
        y = self.box[1] + 4 if top else self.box[3] - 6 - 18 * len(self.labels)
        self.figure.rectangle((x, y, x + width, y + 18 * len(self.labels)), PAPER)
        for number, (label, color) in enumerate(self.labels):
            self._legend_entry(x, y + 18 * number + 9, label, color)

    def _legend_entry(self, x, middle, label, color):
        self.figure.polyline([(x + 5, middle), (x + 23, middle)], color, 3)
        self.figure.text((x + 29, middle), label, anchor="lm")

    def _name(self, label, color):
        if label:
            self.labels.append((label, color))

    def _place(self, x, y):
        """In pixels; what lies outside is drawn on the edge."""
        left, top, right, bottom = self.box
        low, high = self.x
        if self.log_x:
            x, low, high = math.log(max(x, low)), math.log(low), math.log(high)
        across = (x - low) / (high - low or 1)
        along = (y - self.y[0]) / (self.y[1] - self.y[0] or 1)
        return left + min(max(across, 0), 1) * (right - left), bottom - min(max(along, 0), 1) * (bottom - top)


def text_width(text: str, size=TEXT) -> float:
    from PIL import ImageFont

    return ImageFont.load_default(size).getlength(text)


def _largest(counts, num_cells, axis):
    """The maxima of at most num_cells stretches along an axis."""
    size = counts.shape[axis]
    if size <= num_cells:
        return counts
    return np.maximum.reduceat(counts, np.arange(num_cells) * size // num_cells, axis=axis)


def round_numbers(low: float, high: float, num_wanted: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], about so many."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1.0, num_wanted)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def powers_of_ten(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def log_ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Powers of ten, at most so many, evenly spread; where there are fewer than two, 1, 2 and 5 times them."""
    powers = powers_of_ten(low, high)
    if len(powers) >= 2:
        return powers[:: math.ceil(len(powers) / most)]
    around = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in around for digit in (1, 2, 5) if low <= (tick := digit * 10.0**power) <= high]


def as_text(numbers) -> list[str]:
    """Ticks in as few digits as tell them apart."""
    numbers = [float(number) for number in numbers]
    for digits in range(7):
        texts = [f"{number:,.{digits}f}" for number in numbers]
        if all(
            math.isclose(float(text.replace(",", "")), number, rel_tol=1e-6, abs_tol=1e-12)
            for text, number in zip(texts, numbers, strict=True)
        ):
            return [text.replace("-0", "0") if float(text.replace(",", "")) == 0 else text for text in texts]
    return [f"{number:g}" for number in numbers]


def limits(*arrays, least: float | None = None) -> tuple[float, float]:
    """A range that holds every finite number of the arrays with a little air; it begins at `least` where that is given."""
    values = np.concatenate([np.asarray(array, float).ravel() for array in arrays])
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    low = low if least is None else least
    air = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (float(low) if least is not None else float(low - air)), float(high + air)
