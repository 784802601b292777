"""Rasters side by side, prompt | samples | truth, with the population's rate below each."""

import numpy as np

from torchtitan_bio.science import drawing
from torchtitan_bio.science.disclosure import public_text

WIDTH = 1240  # of the picture
LEFT, RIGHT, GAP, TOP = 82, 20, 34, 62
ROW_PIXELS, LEAST_RASTER, MOST_RASTER, RATE = 14, 150, 520, 130
BETWEEN = 36  # a raster and the rate below it
NARROW = 180  # a panel without room for the name of its axis


def draw(prompt, samples, truth=None, title: str = "") -> drawing.Figure:
    """prompt (neurons, bins), samples (rollouts, neurons, bins) and, where it is known, the truth (neurons, bins).

    One rollout is shown beside the truth, three where there is none; of a prompt as much as is generated. Time is in bins from
    the prompt's end. The title may name a recording: it is shown as disclosure.py lets it pass, since a report has the picture.
    """
    num_rollouts, n, bins = samples.shape
    shown = prompt[:, max(0, prompt.shape[1] - bins) :]
    has_truth = truth is not None and truth.shape[1] > 0
    panels = []  # (title, counts, first bin)
    if shown.shape[1]:
        cut = "" if shown.shape[1] == prompt.shape[1] else f", last {shown.shape[1]:,} of {prompt.shape[1]:,} bins"
        panels.append((f"prompt{cut}", shown, -shown.shape[1]))
    for number in range(min(num_rollouts, 1 if has_truth else 3)):
        panels.append((f"sample {number + 1} of {num_rollouts}", samples[number], 0))
    if has_truth:
        panels.append(("truth", truth, 0))

    height = int(np.clip(n * ROW_PIXELS, LEAST_RASTER, MOST_RASTER))
    figure = drawing.Figure(WIDTH, TOP + height + BETWEEN + RATE + 52, public_text(title))
    rates = [counts.sum(0, dtype=np.int64) for _, counts, _ in panels]
    mean = samples.sum(1, dtype=np.int64).mean(0)
    highest = drawing.limits(*rates, mean, least=0)
    most = max(int(counts.max(initial=1)) for _, counts, _ in panels)
    a_bin = (WIDTH - LEFT - RIGHT - GAP * (len(panels) - 1)) / sum(counts.shape[1] for _, counts, _ in panels)
    left = LEFT
    for (name, counts, first), rate in zip(panels, rates, strict=True):
        is_first, right = left == LEFT, left + a_bin * counts.shape[1]
        x, top = (first, first + counts.shape[1]), TOP + height + BETWEEN
        figure.axes(
            (left, TOP, right, TOP + height),
            x=x,
            y=(n, 0),
            title=name,
            y_label="neuron" if is_first else "",
            x_ticks=[],
            y_ticks=None if is_first else [],
        ).raster(counts, most=most)
        axes = figure.axes(
            (left, top, right, top + RATE),
            x=x,
            y=highest,
            x_label="" if right - left < NARROW else "bins from the prompt's end" if prompt.shape[1] else "bins",
            y_label="spikes a bin" if is_first else "",
            y_ticks=None if is_first else [],
        )
        edges = np.arange(first, first + counts.shape[1] + 1)
        axes.steps(edges, rate, drawing.ORANGE if name.startswith("sample") else drawing.INK, width=1.5, label="this raster")
        if first == 0 and num_rollouts > 1:
            axes.steps(np.arange(bins + 1), mean, drawing.BLUE, width=1.5, label=f"mean of {num_rollouts} samples")
            axes.legend(above=True)
        left = right + GAP
    return figure
