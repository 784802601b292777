"""Pictures say what the arrays say: no spike is lost, ticks are round, lines stand where their numbers are."""

import numpy as np
import pytest

from torchtitan_bio.data import rows
from torchtitan_bio.science import drawing, inventory, rasters


def rgb(color):
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])


def is_color(pixels, color, near=40):
    return np.abs(pixels.astype(int) - rgb(color)).sum(-1) < near


@pytest.mark.parametrize("neurons, bins", [(5, 7), (1, 1), (400, 3000)], ids=["cells larger than pixels", "one", "smaller"])
def test_a_single_spike_anywhere_is_seen_where_it_belongs(neurons, bins):
    for neuron, bin in {(0, 0), (neurons - 1, bins - 1), (neurons // 2, bins // 3)}:
        counts = np.zeros((neurons, bins), np.uint8)
        counts[neuron, bin] = 1
        figure = drawing.Figure(300, 200)
        figure.axes((50, 20, 250, 170), x=(0, bins), y=(neurons, 0), x_ticks=[], y_ticks=[]).raster(counts)
        dark = figure.pixels()[21:169, 52:249].astype(int).sum(-1) < 3 * 60  # black, inside the frame
        rows, columns = np.nonzero(dark)
        row, column = 150 * (neuron + 0.5) / neurons - 1, 200 * (bin + 0.5) / bins - 2
        # Within half a cell, or the pixel that stands for it; at the frame's edge a pixel may be the frame's own.
        if len(rows) or (neurons, bins) != (400, 3000):
            assert abs(rows.mean() - row) < max(2, 75 / neurons) and abs(columns.mean() - column) < max(2, 100 / bins)
        else:
            assert neuron in (0, neurons - 1)


def test_more_spikes_are_darker():
    figure = drawing.Figure(300, 200)
    axes = figure.axes((50, 20, 250, 170), x=(0, 5), y=(1, 0), x_ticks=[], y_ticks=[])
    axes.raster(np.array([[0, 1, 2, 4, 9]], np.uint8), most=4)
    shades = figure.pixels()[90, 50 + 20 : 250 : 40].astype(int).mean(-1)
    assert shades[0] == 255 and shades[0] > shades[1] > shades[2] > shades[3] == shades[4]


def test_a_line_passes_through_its_numbers_and_stops_where_there_are_none():
    figure = drawing.Figure(300, 200)
    axes = figure.axes((50, 20, 250, 170), x=(1, 1000), y=(0, 1), log_x=True)
    axes.line([1, 10, np.nan, 100, 1000], [0.5, 0.5, 0.5, 0.5, 0.5], drawing.BLUE, width=3)
    row = is_color(figure.pixels()[95], drawing.BLUE)
    assert row[60:110].all() and row[190:245].all() and not row[125:180].any()
    assert not is_color(figure.pixels()[60], drawing.BLUE).any()


def test_what_lies_outside_the_axes_is_drawn_on_their_edge():
    figure = drawing.Figure(300, 200)
    axes = figure.axes((50, 20, 250, 170), x=(0, 1), y=(0, 1))
    axes.points([0.5, 0.5, np.nan], [7, -7, 0], drawing.ORANGE, radius=4)
    marked = is_color(figure.pixels(), drawing.ORANGE)
    assert marked[20, 150] and marked[170, 150] and marked.sum() < 140


def test_legends_name_every_curve_in_its_color():
    for place in ({}, {"right": False, "top": False}, {"above": True}):
        figure = drawing.Figure(400, 200)
        axes = figure.axes((50, 40, 390, 170), x=(0, 1), y=(0, 1))
        axes.level(0.5, drawing.GREEN, label="floor")
        axes.steps([0, 1, 2], [2, 2], drawing.PINK, label="model")
        before = is_color(figure.pixels(), drawing.GREEN).sum()
        axes.legend(**place)
        after = figure.pixels()
        assert is_color(after, drawing.GREEN).sum() > before - 100 and is_color(after, drawing.PINK).sum() > 20


@pytest.mark.parametrize(
    "low, high, wanted, ticks",
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 16, 4, [0, 5, 10, 15]),
        (0.013, 0.041, 3, [0.02, 0.03, 0.04]),
        (0, 131072, 4, [0, 50000, 100000]),
        (2, 2, 3, [2]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, wanted, ticks):
    assert drawing.round_numbers(low, high, wanted) == pytest.approx(ticks)


def test_ticks_are_written_in_as_few_digits_as_tell_them_apart():
    assert drawing.as_text([0, 0.5, 1]) == ["0.0", "0.5", "1.0"]
    assert drawing.as_text([-5.0, -0.0, 5.0]) == ["-5", "0", "5"]
    assert drawing.as_text([0, 50000]) == ["0", "50,000"]
    assert drawing.as_text([1e-9, 2e-9]) == ["1e-09", "2e-09"]
    assert drawing.powers_of_ten(1, 1000) == [1, 10, 100, 1000]


def test_a_logarithmic_axis_of_less_than_a_decade_or_of_many_has_a_few_ticks():
    assert drawing.log_ticks(0.12, 0.9) == pytest.approx([0.2, 0.5])
    assert drawing.log_ticks(0.05, 0.32) == pytest.approx([0.05, 0.1, 0.2])
    assert drawing.log_ticks(1e-6, 1e3) == pytest.approx([1e-6, 1e-3, 1.0, 1e3])


def check_letters(figure):
    """That all titles and labels are on the picture, and none of an axis lies over its ticks."""
    ticks = [(x - drawing.text_width(text), x, y) for (x, y), text, _, _, anchor, _ in figure._letters if anchor == "rm"]
    for (x, y), text, size, _, anchor, upwards in figure._letters:
        half = drawing.text_width(text, size) / 2
        if upwards:
            assert x >= 9, text
            for begin, end, at in ticks:
                assert begin > x + 7 or end < x - 7 or abs(at - y) > half + 8, (text, begin, x)
        elif anchor in ("ms", "ma"):
            assert half <= x <= figure.width - half, text


def test_no_label_lies_over_the_ticks_and_no_title_leaves_the_picture():
    rng = np.random.default_rng(0)
    for n, most in ((3, 2), (400, 40), (400, 250), (6000, 100)):
        counts = rng.integers(0, most, (2, n, 9)).astype(np.uint8)
        check_letters(rasters.draw(counts[0], counts, counts[1], "a title"))
    found = inventory.Inventory()
    for row in rows.read(rows.find("ring-hmm:n=4,rows=3,test_rows=1")[0])[0]:
        found.add(row)
    for scale in (1, 10_000, 1_000_000):
        result = found.result()
        result["sources"][0]["silent_neurons"] = 300 * scale
        result["sources"][0]["neurons_by_rate"] = [scale * number for number in result["sources"][0]["neurons_by_rate"]]
        check_letters(inventory.draw(result, found.raster, "a title"))


def test_limits_hold_every_finite_number():
    assert drawing.limits([np.nan, 3, 5], [4, np.inf]) == pytest.approx((2.9, 5.1))
    assert drawing.limits([], least=0) == pytest.approx((0, 1.05))
    low, high = drawing.limits([2, 2])
    assert low < 2 < high


@pytest.mark.parametrize("context, has_truth", [(40, True), (40, False), (0, False), (3, True)])
def test_the_raster_picture_shows_prompt_samples_and_truth(tmp_path, context, has_truth):
    from PIL import Image

    generator = np.random.default_rng(0)
    prompt, truth = generator.poisson(0.3, (9, context)), generator.poisson(0.3, (9, 12))
    samples = generator.poisson(0.3, (5, 9, 20)).astype(np.uint8)
    figure = rasters.draw(prompt.astype(np.uint8), samples, truth.astype(np.uint8) if has_truth else None, "a title")
    texts = [text for _, text, *_ in figure._letters]
    assert [text for text in texts if text.startswith("sample")] == [
        f"sample {number} of 5" for number in range(1, 2 if has_truth else 4)
    ]
    assert ("truth" in texts) == has_truth
    shown = {40: ["prompt, last 20 of 40 bins"], 3: ["prompt"], 0: []}[context]
    assert [text for text in texts if text.startswith("prompt")] == shown
    figure.save(tmp_path / "raster.png")
    picture = np.asarray(Image.open(tmp_path / "raster.png"))
    assert (picture == figure.pixels()).all() and picture.shape[1] == rasters.WIDTH
    assert (picture[:, -10:] == 255).all() and is_color(picture, drawing.ORANGE).sum() > 100
