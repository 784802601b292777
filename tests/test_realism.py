"""The statistics of realism against plain loops and hand-made numbers, and what they must notice."""

import numpy as np
import pytest

from torchtitan_bio.science import realism


def poisson(windows=40, neurons=6, bins=30, rate=0.4, seed=0):
    return np.random.default_rng(seed).poisson(rate, (windows, neurons, bins)).astype(np.uint8)


def waves(windows=60, neurons=6, bins=30, seed=0):
    """Counts that follow one slow wave, in which neighbouring bins and all neurons share."""
    generator = np.random.default_rng(seed)
    phase = generator.uniform(0, 2 * np.pi, (windows, 1, 1))
    wave = 1 + np.cos(np.arange(bins) * 0.3 + phase)
    return generator.poisson(wave * np.linspace(0.2, 0.8, neurons)[:, None]).astype(np.uint8)


def test_every_statistic_equals_a_plain_loop():
    windows = waves(windows=7, neurons=4, bins=11)
    found = realism.describe(windows)
    pairs = 0
    for i in range(4):
        train = windows[:, i].astype(float)
        mean, variance = train.mean(), train.var()
        products = [(w[t] - mean) * (w[t + 1] - mean) for w in train for t in range(10)]
        assert found.rate[i] == pytest.approx(mean) and found.fano[i] == pytest.approx(variance / mean)
        assert found.autocorrelation[i] == pytest.approx(sum(products) / len(products) / variance)
        for j in range(i + 1, 4):
            expected = np.corrcoef(train.ravel(), windows[:, j].ravel())[0, 1]
            assert found.correlation[pairs] == pytest.approx(expected)
            pairs += 1
    assert pairs == len(found.correlation)
    intervals, totals = [], []
    for window in windows:
        totals += [int(window[:, t].sum()) for t in range(11)]
        for train in window:
            times = [t for t in range(11) for _ in range(train[t])]
            intervals += [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    for shares, values in ((found.interval, intervals), (found.population, totals)):
        assert shares.sum() == pytest.approx(1)
        assert [share * len(values) for share in shares] == pytest.approx([values.count(k) for k in range(len(shares))])


def test_a_silent_or_constant_neuron_leaves_a_statistic_undefined_and_spoils_no_mean():
    windows = poisson()
    windows[:, 0] = 0
    windows[:, 1] = 2
    found = realism.describe(windows)
    assert np.isnan(found.fano[0]) and found.fano[1] == 0
    assert np.isnan(found.autocorrelation[:2]).all() and np.isnan(found.correlation[:9]).all()
    row = realism.compare(windows[:10], windows[10:])["correlation"]
    assert all(np.isfinite(value) for value in row.values())
    silent = realism.compare(np.zeros_like(windows[:2]), np.zeros_like(windows))
    assert silent["fano"] == {"samples": None, "data": None, "difference": None, "floor": None}
    nothing = dict.fromkeys(("samples", "data", "difference", "floor"))
    assert silent["interval"] == nothing and "  interval                 -         -           -             -" in "\n".join(
        realism.table(silent)
    )
    one_bin = realism.compare(np.ones((2, 3, 1), np.uint8), np.ones((9, 3, 1), np.uint8))
    assert one_bin["interval"] == nothing and one_bin["population"]["data"] == 3
    for samples, data, words in (
        (np.zeros_like(windows), windows, "no spikes in the samples"),
        (windows[:1] * 0, windows * 0, "no spikes in the data and the samples"),
        (np.ones((2, 3, 1), np.uint8), np.ones((9, 3, 1), np.uint8), "nowhere defined"),
    ):
        texts = [text for _, text, *_ in realism.draw(samples, data)._letters]
        one_sided = words.endswith("in the samples") and "data" not in words  # of intervals those of the data are drawn
        assert texts.count(words) == (3 if one_sided or words.startswith("nowhere") else 4), words
        assert texts.count("samples: none") == one_sided
    assert silent["rate"]["difference"] == 0 and silent["population"]["difference"] == 0
    assert any("-" in line for line in realism.table(silent))


def test_the_same_activity_differs_by_nothing_and_disjoint_histograms_by_one():
    windows = poisson()
    assert all(realism.difference(name, *[realism.describe(windows)] * 2) == 0 for name in realism.PER_NEURON)
    ones, threes = np.ones((1, 1, 5), np.uint8), np.full((1, 1, 5), 3, np.uint8)
    assert realism.difference("population", realism.describe(ones), realism.describe(threes)) == 1


def test_fresh_windows_of_the_same_process_are_as_near_as_the_floor():
    result = realism.compare(waves(windows=60, seed=1), waves(windows=400))
    for name, row in result.items():
        assert 0 < row["floor"] and row["difference"] < 2 * row["floor"], name


@pytest.mark.parametrize(
    "spoil, noticed, unnoticed",
    [
        ("time", ["autocorrelation", "interval"], ["rate", "fano", "correlation", "population"]),
        ("neurons", ["correlation", "population"], ["rate", "fano", "autocorrelation", "interval"]),
        ("scale", ["rate", "population"], []),
    ],
)
def test_what_is_lost_shows_in_the_statistics_that_are_about_it_and_no_others(spoil, noticed, unnoticed):
    generator, samples = np.random.default_rng(3), waves(windows=60, seed=1)
    if spoil == "time":  # whole bins in another order
        samples = np.stack([window[:, generator.permutation(30)] for window in samples])
    elif spoil == "neurons":  # each neuron's windows in another order
        samples = np.stack([samples[generator.permutation(60), i] for i in range(6)], axis=1)
    else:
        samples = samples * 2
    result = realism.compare(samples, waves(windows=400))
    for name in noticed:
        assert result[name]["difference"] > 3 * result[name]["floor"], name
    for name in unnoticed:
        assert result[name]["difference"] < 2 * result[name]["floor"], name


def test_the_floor_is_of_windows_that_the_data_side_does_not_hold():
    data = poisson(windows=9)
    whole = {window.tobytes() for window in data}
    for number, num_turns in ((1, 5), (2, 4), (4, 2), (5, 0), (9, 0)):
        turns = [[{window.tobytes() for window in part} for part in turn] for turn in realism.set_aside(data, number)]
        assert len(turns) == num_turns and len(set().union(*(control for control, _ in turns))) == number * num_turns
        assert all(len(control) == number and rest == whole - control for control, rest in turns)
    assert realism.compare(poisson(windows=5, seed=1), data)["rate"]["floor"] is None


def test_windows_of_a_recording_are_whole_and_a_long_one_is_sampled_from_end_to_end(monkeypatch):
    counts = np.arange(2 * 35, dtype=np.uint8).reshape(2, 35)
    windows = realism.windows_of(counts, 10)
    assert windows.shape == (3, 2, 10) and (windows.transpose(1, 0, 2).reshape(2, 30) == counts[:, :30]).all()
    assert realism.windows_of(counts, 36).shape == (0, 2, 36)
    monkeypatch.setattr(realism, "AT_ONCE", 2 * 10 * 2)
    few = realism.windows_of(counts, 10)
    assert (few == windows[[0, 1]]).all()
    monkeypatch.setattr(realism, "AT_ONCE", 2 * 5 * 2)
    assert realism.windows_of(counts, 5)[:, 0, 0].tolist() == [0, 15]


def test_windows_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="6 neurons and windows of 30 bins, the data 5 neurons and windows of 30 bins"):
        realism.compare(poisson(), poisson(neurons=5))


def test_the_picture_has_a_panel_for_each_statistic_and_marks_every_neuron():
    from torchtitan_bio.science import drawing

    pixels = realism.draw(waves(windows=8), waves(windows=100, seed=2), "title").pixels()
    blue, silver = (np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) for color in (drawing.BLUE, drawing.SILVER))
    for number in range(6):
        left, top = 70 + 385 * (number % 3), 76 + 365 * (number // 3)
        panel = pixels[top : top + 270, left : left + 300].astype(int)
        num_blue, num_silver = ((np.abs(panel - color).sum(-1) < 30).sum() for color in (blue, silver))
        assert num_blue >= 6 * 10  # six neurons at least, of which one dot may hide a part of another
        assert num_silver >= 6 * 3 or number >= 4
