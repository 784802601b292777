"""The ladder on the embedded recording reaches the known figures, and each baseline equals a plain-loop account of it."""

from collections import Counter
from math import lgamma, log
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchtitan_bio.config import ConfigError
from torchtitan_bio.data import loader, spikes
from torchtitan_bio.science import baselines, evaluation
from torchtitan_bio.science.scores import SUMS
from torchtitan_bio.science.units import by_session


class Rows:
    """A data set of given recordings, all of one session unless named otherwise."""

    def __init__(self, *recordings, sessions=None):
        same = ["x"] * len(recordings)
        self.recordings, self.not_scored = recordings, []
        self.index = SimpleNamespace(
            id=[str(row) for row in range(len(recordings))],
            source_dataset=same,
            subject_id=same,
            session_id=sessions or same,
            t=[recording.shape[1] for recording in recordings],
        )
        self.session = np.unique(sessions or same, return_inverse=True)[1]

    def counts(self, row):
        return self.recordings[row]

    def width(self, row):
        return 1 + len(self.recordings[row])


def draw(seed, *shape, mean=0.7):
    return np.random.default_rng(seed).poisson(mean, shape).astype(np.uint8)


def one_session(*recordings):
    return baselines.gather(Rows(*recordings), range(len(recordings)))


def quiet(line):
    pass


@pytest.fixture(scope="module")
def embedded_ladder():
    train, test = (spikes.build(source="embedded:a2929", split=split, seq_len=512) for split in ("train", "test"))
    return dict(baselines.ladder(train, test))


@pytest.mark.parametrize(
    "name, bits_per_spike",
    [
        ("pooled token 3-gram (the predecessor's)", -1.07),
        ("Poisson null (oracle)", 0.0),
        ("per-neuron histogram", 0.246),
        ("Poisson GLM (past)", 1.093),
        ("Poisson GLM (past + same bin)", 1.113),
        ("own-history n-gram", 1.181),
    ],
)
def test_the_embedded_recording_gives_the_known_figure_within_0_01_bits(embedded_ladder, name, bits_per_spike):
    assert embedded_ladder[name] == pytest.approx(bits_per_spike, abs=0.01)


def test_a_plain_account_of_the_null_scores_0_for_it_pools_a_sessions_recordings_before_it_takes_means():
    a, b = draw(0, 3, 40), draw(1, 3, 25, mean=2.0)
    b[2] = a[2] = 0  # a silent neuron costs nothing
    whole = np.concatenate([a, b], axis=1)
    nats = np.zeros(65)
    for neuron in whole[:2].tolist():
        mean = sum(neuron) / len(neuron)
        nats += [mean - y * log(mean) + lgamma(y + 1) for y in neuron]
    rows = Rows(a, b)
    found = baselines.Scored(rows, {"plain": {0: nats[:40], 1: nats[40:]}}).on(by_session(rows))
    plain, null = (found[name].scores(with_errors=False) for name in ("plain", baselines.NULL))
    assert plain["bits_per_spike"] == pytest.approx(0, abs=1e-12) and plain["nll"] == pytest.approx(nats.sum() / 195, rel=1e-12)
    assert null["bits_per_spike"] == 0 and null["nll"] == null["null_nll"] == plain["null_nll"]


def test_a_baseline_that_is_given_as_logits_scores_what_its_costs_score_and_has_their_standard_errors():
    """The per-neuron histogram written as logits is a model that is ahead of that baseline by 0 in every recording."""
    source = "ring-hmm:n=3,K=8,bins=50,rows=20,test_rows=3"
    train = spikes.build(source=source, seq_len=26)
    held_out = spikes.build(source=source, split="test", mode="aligned", overlap=True, seq_len=26)
    counts = np.concatenate([train.counts(row) for row in range(20)], axis=1).astype(np.int64)
    times = np.stack([np.bincount(of_neuron, minlength=255) for of_neuron in counts]).astype(np.float64)
    distinct = (times > 0).sum(axis=1, keepdims=True)
    q = (times + distinct / 255) / (counts.shape[1] + distinct)  # Witten and Bell's, backed off to the uniform
    of_width = torch.randn(4, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of_width[1:, :255] = torch.from_numpy(np.log(q))
    logits = of_width[(torch.arange(26) + 1) % 4]  # position p answers for token p + 1
    scored = baselines.score(train, held_out, quiet)
    for numbers in (None, [1, 2, 5, 20, 30, 33, 40]):
        scorer = evaluation.Scorer(held_out, "recording")
        for batch in loader.finite(held_out, local_batch_size=7, rank=0, world_size=1, subset=numbers):
            scorer.add(logits.expand(7, 26, 256), batch)
        measured = scorer.result(lambda array: array)
        of_costs = scored.on(measured.cells.units, evaluation.scored_bins(held_out, numbers))["per-neuron histogram"]
        for ours, theirs in zip(parts(measured.cells), parts(of_costs), strict=True):
            assert [ours[name] for name in OF_COUNTS] == pytest.approx([theirs[name] for name in OF_COUNTS], rel=1e-9, abs=1e-9)
            assert all(ours[name] is not None and theirs.get(name) is None for name in OF_TOKENS)
        ladders = evaluation.against_baselines(held_out, numbers, measured, scored)
        assert len(ladders) == 4
        for ladder in ladders.values():
            rung = {rung.pop("name"): rung for rung in ladder["rungs"]}["per-neuron histogram"]
            lead = {"model_ahead": 0, "model_ahead_standard_error": 0}
            assert rung == pytest.approx(ladder["model"] | lead, rel=1e-9, abs=1e-9) and rung["standard_error"] > 1e-3


OF_COUNTS = ("nll", "bits_per_count", "bits_per_spike", "bits_per_spike_hist", "null_nll", "hist_nll")
OF_TOKENS = ("nll_all", "nll_bos", "leak", "bits_per_spike_rate")  # which a baseline does not have


def parts(cells):
    """Scores of all, of the mean and of each group, then the standard errors of each."""
    scores = cells.scores(with_errors=True)
    found = [scores, scores["macro"], *scores["sources"].values()]
    return [*found, *(part["standard_errors"] for part in found)]


def witten_bell(seen, neuron, history, y):
    """The definition, by recursion over a list of (neuron, history, count)."""
    if history is None:
        return 1 / 255
    follow = Counter(count for other, past, count in seen if other == neuron and past[: len(history)] == history)
    shorter = witten_bell(seen, neuron, history[:-1] if history else None, y)
    total, distinct = sum(follow.values()), len(follow)
    return (follow[y] + distinct * shorter) / (total + distinct) if total else shorter


@pytest.mark.parametrize("block_counts", [1, 2**21])
def test_the_n_gram_equals_the_recursive_definition_and_its_past_stops_at_a_recordings_start(monkeypatch, block_counts):
    monkeypatch.setattr(baselines, "BLOCK_COUNTS", block_counts)

    def events(*recordings):
        for counts in recordings:
            for neuron, row in enumerate(counts.tolist()):
                for i, y in enumerate(row):
                    yield neuron, tuple(row[i - lag] if i >= lag else 0 for lag in (1, 2, 3)), y

    train, test = [draw(0, 2, 60), draw(1, 2, 30)], [draw(2, 2, 20, mean=1.5), draw(3, 2, 1)]
    seen = list(events(*train))
    expected = np.zeros((4, 21))
    for order in range(4):
        first, second = (
            [-log(witten_bell(seen, neuron, past[:order], y)) for neuron, past, y in events(each)] for each in test
        )
        expected[order] = [*np.reshape(first, (2, 20)).sum(0), sum(second)]
    found = baselines.own_history(one_session(*train), one_session(*test), quiet)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_token_trigram_equals_counting_over_the_written_stream():
    def stream(*recordings):
        return [255, 255, *(token for counts in recordings for bin in counts.T.tolist() for token in (255, *bin))]

    train, test = [draw(0, 3, 30), draw(1, 3, 10)], [draw(2, 3, 20)]
    tokens = stream(*train)
    three = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    two = Counter(zip(tokens[:-1], tokens[1:-1], strict=False))
    held_out = stream(*test)
    nats = []
    for a, b, c in zip(held_out, held_out[1:], held_out[2:], strict=False):
        nats = [*nats, 0.0] if c == 255 else [*nats[:-1], nats[-1] - log((three[a, b, c] + 1) / (two[a, b] + 256))]
    model = baselines.TokenTrigram()
    model.add(one_session(*train))
    np.testing.assert_allclose(model.nats(one_session(*test)), nats, rtol=1e-12)


@pytest.mark.parametrize("same_bin", [False, True])
def test_the_gradient_of_the_plain_penalised_loss_vanishes_at_the_glms_weights(same_bin):
    recordings = [draw(0, 3, 300), draw(1, 3, 200, mean=0.3)]
    lags = range(0 if same_bin else 1, 4)
    weights = baselines.fit_poisson(baselines.Regressors(one_session(*recordings), lags), quiet, tolerance=1e-12)
    if same_bin:
        assert weights[:3].tril().abs().max() == 0  # neuron i is not told of itself nor of later ones
    weights.requires_grad_()
    loss = 0.0
    for counts in recordings:
        padded = np.concatenate([np.zeros((3, 3)), np.log1p(counts.T.astype(float))])
        design = np.concatenate([padded[3 - lag : len(padded) - lag] for lag in lags] + [np.ones((counts.shape[1], 1))], axis=1)
        log_rate = torch.tensor(design) @ weights
        loss = loss + (log_rate.exp() - torch.tensor(counts.T) * log_rate).sum()
    spikes = torch.tensor(sum(counts.sum(axis=1).astype(float) for counts in recordings))
    loss = loss + 0.5 * (weights[:-1].square().sum() + (weights[-1] - torch.log((spikes + 0.5) / 501)).square().sum())
    (gradient,) = torch.autograd.grad(loss, weights)
    if same_bin:
        gradient[:3] = gradient[:3].triu(1)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("same_bin", [False, True])
def test_the_glm_pays_for_each_bin_what_its_rates_say(same_bin):
    train, test = draw(0, 3, 300), [draw(1, 3, 20), draw(2, 3, 10, mean=2.0)]
    lags = range(0 if same_bin else 1, 4)
    weights = baselines.fit_poisson(baselines.Regressors(one_session(train), lags), quiet).numpy()
    expected = []
    for counts in test:
        padded = np.concatenate([np.zeros((3, 3)), np.log1p(counts.T.astype(float))])
        for bin, column in enumerate(counts.T.tolist()):
            x = np.concatenate([*(padded[3 + bin - lag] for lag in lags), [1.0]])
            expected.append(sum(np.exp(eta) - y * eta + lgamma(y + 1) for y, eta in zip(column, x @ weights, strict=True)))
    found = baselines.poisson_glm(one_session(train), one_session(*test), quiet, same_bin=same_bin)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_what_bins_cost_goes_to_the_recordings_that_they_are_of():
    train = Rows(draw(0, 3, 200), draw(1, 2, 200), sessions=["x", "y"])
    test = Rows(draw(2, 3, 50), draw(3, 2, 20), draw(4, 3, 30, mean=2.0), sessions=["x", "y", "x"])
    scored = baselines.score(train, test, quiet)
    for row, counts in enumerate(test.recordings):
        assert all(by_row[row].shape == (counts.shape[1],) for by_row in scored.nats.values())
    both = baselines.own_history(one_session(train.recordings[0]), one_session(*test.recordings[::2]), quiet)[0]
    np.testing.assert_array_equal(np.concatenate([scored.nats["per-neuron histogram"][row] for row in (0, 2)]), both)
    for cells in scored.on(by_session(test)).values():
        assert cells.sums[:, SUMS.index("counts")].tolist() == [3 * 80, 2 * 20]
        assert cells.nulls[:, 0].tolist() == [sum(test.recordings[row].sum() for row in (0, 2)), test.recordings[1].sum()]


def test_the_command_prints_the_ladder_of_a_data_set_and_names_what_it_leaves_out(capsys, monkeypatch, tmp_path):
    bad = draw(4, 3, 9).astype(np.int64)
    bad[1, 2] = -1
    for name, counts, session in (
        ("train/a", draw(0, 3, 200), "one"),
        ("train/bad", bad, "one"),
        ("test/b", draw(1, 3, 50), "one"),
        ("test/c", draw(2, 3, 50), "two"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.savez(tmp_path / f"{name}.npz", spike_counts=counts, source_dataset="x", subject_id="s", session_id=session)
    words = ["baselines", "--data", str(tmp_path), "--max-malformed-rows"]
    monkeypatch.setattr("sys.argv", [*words, "0"])
    with pytest.raises(ConfigError, match="data.max_malformed_rows=1"):
        baselines.main()
    monkeypatch.setattr("sys.argv", [*words, "1"])
    baselines.main()
    first, _, title, *rungs, last = capsys.readouterr().out.splitlines()
    assert first.startswith("bad is malformed and left out: ") and "negative" in first
    # A bin of these recordings is wider than the windows that the command reads through: whole recordings have none.
    assert title == "held-out bits/spike" and len(rungs) == 6
    assert any(line.endswith("0.000") and "Poisson null (oracle)" in line for line in rungs)
    assert last.startswith("no training data of their session: 1 of 2 held-out recordings (c);")
    (tmp_path / "test/b.npz").unlink()
    baselines.main()
    lines = capsys.readouterr().out.splitlines()
    assert "held-out bits/spike" not in lines and lines[-1].startswith("no baseline: no held-out recording with a spike")
    assert "1 of 1 held-out recordings (c)" in lines[-2]
    monkeypatch.setattr("sys.argv", [*words, "-1"])
    with pytest.raises(SystemExit, match="2"):
        baselines.main()
    assert "--max-malformed-rows=-1 must be 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["nowhere"], ["ring-hmm:n=3,colour=1"], ["ring-hmm:n=3", "--split-by", "time"]])
def test_the_command_refuses_what_is_no_data_as_its_users_mistake(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["baselines", "--data", *words])
    with pytest.raises(ConfigError, match=words[0]):
        baselines.main()


def test_a_neuron_silent_in_training_costs_a_finite_score():
    train, test = draw(0, 3, 200), draw(1, 3, 50)
    train[1] = 0
    scores = dict(baselines.ladder(Rows(train), Rows(test), quiet))
    assert len(scores) == 6 and all(np.isfinite(list(scores.values())))
    assert baselines.ladder(Rows(train), Rows(0 * test), quiet) == []  # no spike, and nothing is so many bits a spike


def test_recordings_of_sessions_without_training_data_are_left_out_and_named():
    train, known, unknown = Rows(draw(0, 3, 200)), draw(1, 3, 50), draw(2, 3, 50)
    mixed = Rows(known, unknown, sessions=["x", "y"])
    assert baselines.ladder(train, mixed, quiet) == baselines.ladder(train, Rows(known), quiet)
    assert baselines.match(train, mixed) == ([([0], [0])], {baselines.NOT_SEEN: ["1"]})
    assert baselines.ladder(train, Rows(unknown, sessions=["y"]), quiet) == []


def test_recordings_that_name_no_session_are_matched_by_their_own_name_and_not_by_their_width():
    """The two parts of one recording, divided by time, share it; two recordings of as many neurons do not."""
    train, test = Rows(draw(0, 3, 20), draw(1, 3, 20)), Rows(draw(2, 3, 10), draw(3, 3, 10))
    for rows in (train, test):
        rows.index.subject_id = rows.index.session_id = ["", ""]
    test.index.id = ["1", "2"]
    assert baselines.match(train, test) == ([([1], [0])], {baselines.NOT_SEEN: ["2"]})


def test_a_recording_of_which_other_neurons_were_trained_on_is_not_called_one_without_training_data():
    train = Rows(draw(0, 3, 20), draw(1, 3, 20), sessions=["x", "y"])
    test = Rows(draw(2, 4, 10), draw(3, 3, 10), draw(4, 4, 10), sessions=["x", "y", "z"])
    assert baselines.match(train, test) == ([([1], [1])], {baselines.OTHER_WIDTH: ["0"], baselines.NOT_SEEN: ["2"]})


def test_a_recording_too_wide_for_a_window_is_not_called_one_without_training_data():
    train, test = Rows(draw(0, 3, 20)), Rows(draw(1, 3, 10), draw(2, 9, 10))
    test.not_scored = [("1", "9 neurons need more")]
    assert baselines.match(train, test) == ([([0], [0])], {})


def test_of_a_session_with_too_many_counts_the_last_recordings_are_fitted():
    parts = [draw(seed, 2, 10) for seed in range(4)]
    some = baselines.gather(Rows(*parts), range(4), max_counts=45)
    np.testing.assert_array_equal(some.counts[:, some.inside], np.concatenate(parts[2:], axis=1))
