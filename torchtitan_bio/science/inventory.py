"""What is in a source of recordings: sums by source_dataset, what cannot be read, what is there twice, and a picture.

One pass over the rows of data/rows.py, of which sums are kept, and of each source a stretch of one recording for the picture.
"""

import hashlib
from collections import Counter

import numpy as np

from torchtitan_bio.data.recordings import decode
from torchtitan_bio.science import drawing

FLAT_COUNTS = 2**20  # looked at together, since bincount makes 8 bytes of each
RATE_EDGES = np.logspace(-6, 3, 46)  # spikes a bin
SHOWN_BINS, SHOWN_NEURONS = 600, 400  # of a raster
MOST_BARS = 31  # the last is of all larger counts too
MOST_NAMED = 1000  # malformed rows and repeated ones that are listed by name; all are counted
WIDTH, PANEL, TOP, BETWEEN = 1240, 200, 66, 76  # of the picture
MOST_PANELS = 5


class Inventory:
    """Add rows one by one; `result` is JSON, `raster` has a stretch of the first readable recording of each source.

    A source is a source_dataset of what was asked for: of several folders that hold the same one, each has its own sums.
    """

    def __init__(self):
        self.sources, self.malformed, self.twice, self.raster, self._first = {}, [], [], {}, {}

    def add(self, row, found_in: str = ""):
        """found_in: which of the files or folders that were asked for."""
        source = row.source_dataset, found_in
        sums = self.sources.setdefault(source, _Sums())
        sums.splits[row.split] += 1
        if row.fault:
            sums.malformed += 1
            if len(self.malformed) < MOST_NAMED:
                named = {"name": row.name, "source_dataset": row.source_dataset, "found_in": found_in}
                self.malformed.append(named | {"fault": row.fault})
            return
        counts = decode(row.counts, len(row.clipped_at))
        flat = (counts.T if counts.flags.f_contiguous else np.ascontiguousarray(counts)).reshape(-1)
        spikes = counts.sum(1, dtype=np.int64)
        sums.add(row, flat, spikes)
        # Not a hash of the bytes, which lie in another order in a store than in the file that it was made of.
        digest = row.checksum, counts.shape, hashlib.sha256(spikes).digest()
        if digest in self._first:
            sums.twice += 1
            if len(self.twice) < MOST_NAMED:
                name, place = self._first[digest]
                self.twice.append({"name": row.name, "found_in": found_in, "first": name, "first_found_in": place})
        self._first.setdefault(digest, (row.name, found_in))
        if source not in self.raster:
            middle = max(0, (row.t - SHOWN_BINS) // 2)
            stretch = counts[:SHOWN_NEURONS, middle : middle + SHOWN_BINS].copy()
            self.raster[source] = row.name, middle, stretch

    def result(self) -> dict:
        largest_first = sorted(self.sources, key=lambda source: -self.sources[source].histogram.sum())
        total = _Sums()
        for sums in self.sources.values():
            total.take(sums)
        return {
            "sources": [
                {"source_dataset": name, "found_in": found_in} | self.sources[name, found_in].result()
                for name, found_in in largest_first
            ],
            "total": total.result(),
            "malformed": self.malformed,
            "twice": self.twice,
        }


class _Sums:
    def __init__(self):
        self.splits, self.neurons, self.bins, self.width_s = Counter(), Counter(), 0, Counter()
        self.histogram, self.rates, self.silent = np.zeros(256, np.int64), np.zeros(len(RATE_EDGES) - 1, np.int64), 0
        self.seconds, self.neuron_seconds = 0.0, 0.0
        self.clipped = self.malformed = self.twice = 0

    def add(self, row, flat, spikes):
        self.neurons[row.n] += 1
        self.bins += row.t
        self.width_s[row.bin_width_s] += 1
        for at in range(0, len(flat), FLAT_COUNTS):
            self.histogram += np.bincount(flat[at : at + FLAT_COUNTS], minlength=256)
        means = spikes / row.t
        self.rates += np.histogram(np.maximum(means[means > 0], RATE_EDGES[0]), RATE_EDGES)[0]  # all that are not silent
        self.silent += int(np.count_nonzero(means == 0))
        self.seconds += row.t * (row.bin_width_s or 0)
        self.neuron_seconds += row.n * row.t * (row.bin_width_s or 0)
        self.clipped += len(row.clipped_at)

    def take(self, other):
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def result(self) -> dict:
        num_counts, spikes = int(self.histogram.sum()), int(self.histogram @ np.arange(256))
        share = self.histogram[self.histogram > 0] / max(1, num_counts)
        widths = sorted(self.width_s, key=lambda width: (width is None, width))
        is_timed = num_counts > 0 and None not in widths
        return {
            "rows": sum(self.splits.values()),
            "splits": dict(sorted(self.splits.items())),
            "counts": num_counts,
            "spikes": spikes,
            "neurons": [min(self.neurons), max(self.neurons)] if self.neurons else None,
            "bins": self.bins,
            "seconds": self.seconds if is_timed else None,
            "bin_width_s": widths,
            "zeros": int(self.histogram[0]) / num_counts if num_counts else None,
            "spikes_per_bin": spikes / num_counts if num_counts else None,
            "spikes_per_s": spikes / self.neuron_seconds if is_timed else None,
            "bits_per_count": max(0.0, float(-(share * np.log2(share)).sum())) if num_counts else None,
            "silent_neurons": self.silent,
            "clipped": self.clipped,
            "malformed": self.malformed,
            "twice": self.twice,
            "histogram": np.trim_zeros(self.histogram, "b").tolist(),
            "neurons_by_rate": self.rates.tolist(),
        }


# ---- for the console ----


def label(source: dict, several: bool = False) -> str:
    """Its name, behind where it was found if several were asked for; without one, as in the tables of scores."""
    if several:
        return f"{source['found_in']}: {source['source_dataset'] or '(no name)'}"
    return source["source_dataset"] or f"(no name) {source['found_in']}".rstrip()


def table(result: dict) -> list[str]:
    """A line for each source, and for all of them where there are several."""
    head = ["source_dataset", "rows", "counts", "neurons", "seconds", "bin, s", "p(0)", "rate", "bits/count"]
    head += ["clipped", "malformed", "twice"]
    lines = [[label(source, _are_several(result)), *_cells(source)] for source in result["sources"]]
    if len(lines) > 1:
        lines.append(["all", *_cells(result["total"])])
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head))]
    padded = [
        [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (head, *lines)
    ]
    return ["  ".join(line).rstrip() for line in padded]


def _cells(source):
    def shown(value, form, otherwise="?"):
        return otherwise if value is None else format(value, form)

    neurons = source["neurons"] or ["?"]
    widths = [f"{width:g}" for width in source["bin_width_s"] if width is not None]
    unknown = ["?"] if len(widths) < len(source["bin_width_s"]) or not widths else []
    rate = (
        shown(source["spikes_per_bin"], ".3f") + "/bin" if source["spikes_per_s"] is None else f"{source['spikes_per_s']:.2f}/s"
    )
    return [
        f"{source['rows']:,}",
        f"{source['counts']:,}",
        f"{neurons[0]}" if neurons[0] == neurons[-1] else f"{neurons[0]} to {neurons[-1]:,}",
        shown(source["seconds"], ",.0f"),
        "several" if len(widths) > 1 else " and ".join(widths + unknown),
        shown(source["zeros"], ".4f"),
        rate if source["counts"] else "?",
        shown(source["bits_per_count"], ".3f"),
        *(f"{source[name]:,}" for name in ("clipped", "malformed", "twice")),
    ]


def findings(result: dict, most=10) -> list[str]:
    """What the table only counts, by name."""
    total, lines = result["total"], []
    splits = ", ".join(f"{name} {rows:,}" for name, rows in total["splits"].items())
    lines.append(f"splits: {splits}")

    def named(name, found_in):
        return (f"{found_in}: " if _are_several(result) else "") + (name or "a row")

    malformed = [f"{named(row['name'], row['found_in'])}: {row['fault']}" for row in result["malformed"]]
    twice = [
        f"{named(row['name'], row['found_in'])} has the counts of {named(row['first'], row['first_found_in'])}"
        for row in result["twice"]
    ]
    for what, number, some in (("malformed", total["malformed"], malformed), ("there twice", total["twice"], twice)):
        lines += [f"{what}: {line}" for line in some[:most]]
        if number > most:
            lines.append(f"{what}: ... and {number - most:,} more")
    if total["silent_neurons"]:
        lines.append(f"neurons without any spike in their row: {total['silent_neurons']:,}")
    return lines


def _are_several(result: dict) -> bool:
    return len({source["found_in"] for source in result["sources"]}) > 1


# ---- the picture ----


def draw(result: dict, raster: dict, title: str) -> drawing.Figure:
    """Of the largest sources: a stretch of a recording, how often each count is, how many neurons have which rate."""
    shown = [source for source in result["sources"] if source["counts"]][:MOST_PANELS]
    more = len(result["sources"]) - len(shown)
    title += f", the {len(shown)} largest of {len(result['sources'])} sources" if more > 0 else ""
    figure = drawing.Figure(WIDTH, TOP + len(shown) * (PANEL + BETWEEN), title)
    for number, source in enumerate(shown):
        top = TOP + number * (PANEL + BETWEEN)
        where = f"{source['found_in']}: " if _are_several(result) else ""
        _draw_raster(figure, top, source, where, *raster[source["source_dataset"], source["found_in"]])
        _draw_counts(figure, top, source)
        _draw_rates(figure, top, source)
    return figure


def _draw_raster(figure, top, source, where, name, first, counts):
    n, bins = counts.shape
    width = source["bin_width_s"][0] if len(source["bin_width_s"]) == 1 else None
    scale = width or 1
    of = f", the first {n} of its neurons" if n == SHOWN_NEURONS < source["neurons"][1] else ""
    figure.axes(
        (60, top, 640, top + PANEL),
        x=(first * scale, (first + bins) * scale),
        y=(n, 0),
        title=_cut(f"{where}{name or label(source)}{of}", 76),
        x_label="seconds from the recording's start" if width else "bins",
        y_label="neuron",
    ).raster(counts)


def _draw_counts(figure, top, source):
    histogram = np.array(source["histogram"], float)
    is_cut = len(histogram) > MOST_BARS
    histogram = np.append(histogram[: MOST_BARS - 1], histogram[MOST_BARS - 1 :].sum()) if is_cut else histogram
    log_share = np.log10(np.where(histogram > 0, histogram, np.nan) / histogram.sum())
    lowest = np.floor(np.nanmin(log_share))
    axes = figure.axes(
        (725, top, 940, top + PANEL),
        x=(-0.5, max(len(histogram), 4) - 0.5),
        y=(lowest - 0.3, 0.1),
        title=f"p(0) {source['zeros']:.3f}, {source['bits_per_count']:.3f} bits/count",
        x_label=f"count (the last is of {MOST_BARS - 1} and more)" if is_cut else "count",
        y_label="log10 of its share",
        x_ticks=[tick for tick in drawing.round_numbers(0, max(len(histogram), 4) - 1, 4) if tick == int(tick)],
    )
    for count, height in enumerate(log_share):
        if np.isfinite(height):
            axes.line([count, count], [lowest - 0.3, height], drawing.BLUE, width=max(1.0, min(12.0, 150 / len(histogram))))


def _draw_rates(figure, top, source):
    width = source["bin_width_s"][0] if len(source["bin_width_s"]) == 1 else None
    edges, rates = RATE_EDGES / (width or 1), np.array(source["neurons_by_rate"])
    used = np.flatnonzero(rates)
    low, high = (used[0], used[-1] + 1) if len(used) else (20, 30)
    low, high = max(0, low - 2), min(len(rates), high + 2)
    silent = source["silent_neurons"]
    figure.axes(
        (1025, top, 1220, top + PANEL),
        x=(edges[low], edges[high]),
        y=(0, 1.05 * max(1, rates.max())),
        x_ticks=drawing.log_ticks(edges[low], edges[high]),
        log_x=True,
        title=f"{rates.sum() + silent:,} neurons" + (f", {silent:,} silent" if silent else ""),
        x_label="spikes/s" if width else "spikes a bin",
        y_label="neurons of all rows",
    ).steps(edges[low : high + 1], rates[low:high], drawing.ORANGE)


def _cut(text, length):
    return text if len(text) <= length else f"{text[: length - 3]}..."
