"""The synthetic population is what its formulas say, and every row is a function of its number."""

import numpy as np
import pytest

from torchtitan_bio.data import ring_hmm, spikes


def test_rows_are_the_same_whenever_and_in_whatever_pieces_they_are_read():
    population = ring_hmm.parse("ring-hmm:n=5,bins=40,rows=9,seed=3", "train")
    index = population.index()
    whole = [population.block(index, row, 0, 40) for row in range(9)]
    for row, begin, end in [(8, 0, 40), (2, 7, 9), (2, 39, 40), (0, 1, 40)]:
        assert (population.block(index, row, begin, end) == whole[row][:, begin:end]).all()
    datasets = [spikes.build(source=f"ring-hmm:n=5,bins=40,rows=9,p={p}", seq_len=32) for p in (0.1, 0.2)]
    assert {key for key, value in datasets[0].fingerprint.items() if value != datasets[1].fingerprint[key]} == {"generator"}
    other = ring_hmm.parse("ring-hmm:n=5,bins=40,rows=9,test_rows=9,seed=3", "test")
    assert (other.rates(0) == population.rates(0)).all()  # the same population, other walks
    assert all((other.block(other.index(), row, 0, 40) != whole[row]).any() for row in range(9))
    assert (ring_hmm.parse("ring-hmm:n=5,seed=4", "train").rates(0) != population.rates(0)).all()


def test_states_walk_and_counts_follow_the_rates_of_their_state():
    population = ring_hmm.parse("ring-hmm:n=3,K=8,p=0.2,bins=100,rows=2000", "train")
    index = population.index()
    z = np.stack([population.states(row, 100) for row in range(2000)])
    steps = np.diff(z, axis=1) % 8
    shares = [(steps == step).mean() for step in (7, 0, 1)]
    assert np.allclose(shares, [0.2, 0.6, 0.2], atol=0.005) and np.isin(steps, (7, 0, 1)).all()
    assert np.allclose(np.bincount(z[:, 0], minlength=8) / 2000, 1 / 8, atol=5 * np.sqrt(1 / 8 * 7 / 8 / 2000))
    counts = np.stack([population.block(index, row, 0, 100) for row in range(2000)])
    theta = 2 * np.pi * np.arange(8) / 8
    rates = population.rates(0)
    phi = np.arctan2(
        (np.log(rates - 0.02) * np.sin(theta)[:, None]).sum(0), (np.log(rates - 0.02) * np.cos(theta)[:, None]).sum(0)
    )
    peak = (rates - 0.02) / np.exp(3 * (np.cos(theta[:, None] - phi) - 1))
    assert np.allclose(peak, peak[0]) and (peak[0] > 0.5).all() and (peak[0] < 2.5).all()
    factorial = np.cumprod([1, 1, 2, 3, 4, 5, 6, 7])
    for state in range(8):
        for neuron in range(3):
            seen = counts[:, neuron][z == state]
            poisson = rates[state, neuron] ** np.arange(8) / factorial
            observed = np.bincount(seen, minlength=8) / len(seen)
            assert np.allclose(observed, poisson / poisson.sum(), atol=5 * 0.5 / np.sqrt(len(seen)))


def test_neurons_are_independent_given_the_state():
    population = ring_hmm.parse("ring-hmm:n=4,K=6,bins=200,rows=300", "train")
    index = population.index()
    z = np.concatenate([population.states(row, 200) for row in range(300)])
    counts = np.concatenate([population.block(index, row, 0, 200) for row in range(300)], axis=1).astype(float)
    means = np.stack([counts[:, z == state].mean(1) for state in range(6)])
    residual = counts - means[z].T
    lagged = np.corrcoef(residual, np.roll(residual, 1, axis=1))
    np.fill_diagonal(lagged, 0)
    assert abs(lagged).max() < 5 / np.sqrt(60000)
    assert abs(np.corrcoef(counts) - np.eye(4)).max() > 0.1  # which is what a model can learn


def test_a_range_of_sizes_gives_each_row_its_own_population():
    population = ring_hmm.parse("ring-hmm:n=10..1000,bins=5,rows=3000", "train")
    index = population.index()
    assert index.n.min() >= 10 and index.n.max() <= 1000
    assert abs(np.median(np.log10(index.n)) - 2) < 0.05  # log-uniform
    assert population.rates(3, 10).shape == (16, 10)
    assert (population.rates(3, 10) != population.rates(4, 10)).all()
    assert population.block(index, 7, 0, 5).shape == (index.n[7], 5)
    assert len(set(spikes.build(source="ring-hmm:n=10..20,rows=50", seq_len=64).session)) == 50


def test_aligned_windows_of_ring_hmm_are_whole_rows():
    dataset = spikes.build(source="ring-hmm:n=8,bins=32,test_rows=20", split="test", mode="aligned", seq_len=288, overlap=True)
    assert len(dataset) == 20 and set(dataset.session) == {0}
    batch = dataset.collate([dataset.sample(i) for i in range(20)])
    assert batch.origins == [(i, 0) for i in range(20)] and batch.counts == {"next_token": 20 * 287}
    assert (batch.inputs["tokens"][3].numpy().reshape(32, 9)[:, 1:] == dataset.counts(3).T).all()
    stream = spikes.build(source="ring-hmm:n=8,bins=32,rows=50", mode="stream", seq_len=100)
    assert len(stream) == -(-(50 * 288 - 1) // 100) and stream.sample(10**6).tokens.shape == (101,)


def test_settings_that_mean_nothing_are_refused_by_name():
    for source, message in {
        "ring-hmm:m=3": "no setting 'm'; there are n, K, p",
        "ring-hmm:n=8,K=x": "K=x is not a number",
        "ring-hmm:n=9..3,p=0.7": "n must be a number from 1 up.*; p must lie in 0 .. 0.5",
    }.items():
        with pytest.raises(ValueError, match=message):
            spikes.build(source=source, seq_len=32)
    with pytest.raises(ValueError, match="split must be one of train, test, not 'dev'"):
        spikes.build(source="ring-hmm", seq_len=32, split="dev")
    with pytest.raises(ValueError, match="split_by must be 'given'"):
        spikes.build(source="ring-hmm", seq_len=32, split_by="time")
