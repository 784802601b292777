"""Which tokens a window holds, against derivations that share no code with the library."""

import itertools
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from spike_files import table

from torchtitan_bio.data import keyed, packing, spikes
from torchtitan_bio.data.batch import IGNORED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four recordings of awkward shapes: long, one neuron, one bin, one neuron and one bin."""
    folder = tmp_path_factory.mktemp("recordings")
    rng = np.random.default_rng(0)
    for name, shape in {"a": (3, 50), "b": (1, 7), "c": (6, 1), "d": (1, 1), "e": (9, 23)}.items():
        np.savez(folder / f"{name}.npz", spike_counts=rng.integers(0, 200, shape, dtype=np.uint8))
    return folder


def document(counts):
    """A recording's tokens, the slow way."""
    return [token for column in counts.T for token in (255, *column.tolist())]


def documents(folder):
    return [document(np.load(file)["spike_counts"]) for file in sorted(folder.iterdir())]


def build(folder, **settings):
    return spikes.build(source=str(folder), **{"seq_len": 16, "seed": 5, **settings})


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 4097])
def test_a_keyed_permutation_hits_every_entry_once(size):
    permutation = keyed.Permutation(size, 1, 2, 3)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_a_keyed_permutation_favours_no_entry():
    first = Counter(keyed.Permutation(6, 9, 9, key)[0] for key in range(3000))
    assert set(first) == set(range(6))
    assert max(abs(count - 500) for count in first.values()) < 5 * np.sqrt(500 * 5 / 6)  # five standard deviations
    # Permutations of a few entries must come in all kinds: 24 of 4, and not only the even or the cyclic ones.
    assert len({tuple(keyed.Permutation(4, 9, 9, key)[i] for i in range(4)) for key in range(500)}) == 24


def test_keyed_bits_can_be_entered_anywhere_and_differ_by_every_key():
    whole = keyed.bits(50, 1, 2, 3, 4)
    for start in range(10):
        assert (keyed.bits(7, 1, 2, 3, 4, start=start) == whole[start : start + 7]).all()
    others = [keyed.bits(50, *keys) for keys in [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (1, 2, 4, 3)]]
    assert len(np.unique(np.concatenate([whole, *others]))) == 300
    assert keyed.bits(1, 42, 1).tolist() == np.random.Philox(key=[42, 1], counter=[0, 0, 0, 0]).random_raw(1).tolist()


@pytest.mark.parametrize("seq_len", [1, 2, 16, 1000])
def test_legacy_windows_equal_the_endlessly_repeated_stream(folder, seq_len):
    dataset = build(folder, mode="legacy", seq_len=seq_len)
    stream = np.array(list(itertools.chain(*documents(folder))))
    for i in [*range(40), 1000, 123456]:
        expected = stream[np.arange(i * (seq_len + 1), (i + 1) * (seq_len + 1)) % len(stream)]
        batch = dataset.collate([dataset.sample(i)])
        assert (batch.inputs["tokens"][0].numpy() == expected[:-1]).all()
        assert (batch.inputs["labels"][0].numpy() == expected[1:]).all()
        assert batch.inputs["cu_seqlens"] is None and batch.counts == {"next_token": seq_len}


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 64, 5000])
@pytest.mark.parametrize("shuffle_rows", [1, 2, 256])
def test_a_stream_epoch_predicts_every_token_but_first_ones_once_from_the_right_context(folder, seq_len, shuffle_rows):
    dataset = build(folder, mode="stream", seq_len=seq_len, shuffle_rows=shuffle_rows)
    texts = documents(folder)
    total = sum(map(len, texts))
    assert len(dataset) == -(-(total - 1) // seq_len)
    assert len({tuple(dataset.windows.epochs.table(epoch).rows) for epoch in range(10)}) > 5
    for epoch in (0, 3):
        predicted = Counter()
        for i in range(epoch * len(dataset), (epoch + 1) * len(dataset)):
            batch = dataset.collate([dataset.sample(i)])
            tokens, labels = (batch.inputs[name][0].tolist() for name in ("tokens", "labels"))
            row, position = batch.origins[0]
            order = dataset.windows.epochs.table(epoch).rows.tolist()
            for token, label in zip(tokens, labels, strict=True):
                if order.index(row) < len(order) and position == len(texts[row]):
                    row, position = order[order.index(row) + 1], 0
                assert token == texts[row][position]
                position += 1
                at_the_end = position == len(texts[row])
                assert (label == IGNORED) == at_the_end  # the next token starts another document, or nothing follows
                if at_the_end and row == order[-1]:
                    assert all(rest == IGNORED for rest in labels[len(labels) - labels[::-1].index(label) :])
                    break
                if not at_the_end:
                    assert label == texts[row][position]
                    predicted[row, position] += 1
            assert batch.counts == {"next_token": sum(label != IGNORED for label in labels)}
        assert predicted == Counter((row, position) for row, text in enumerate(texts) for position in range(1, len(text)))


@pytest.mark.parametrize("seq_len", [2, 7, 40])
def test_document_starts_are_boundaries_of_attention_unless_recordings_may_be_crossed(folder, seq_len):
    texts = documents(folder)
    dataset, crossing = (build(folder, mode="stream", seq_len=seq_len, cross_recordings=cross) for cross in (False, True))
    samples = [dataset.sample(i) for i in range(len(dataset))]
    batch = dataset.collate(samples)
    boundaries = batch.inputs["cu_seqlens"].tolist()
    assert boundaries == sorted(set(boundaries)) and boundaries[0] == 0 and boundaries[-1] == seq_len * len(samples)
    edges = set(range(0, boundaries[-1] + 1, seq_len))
    assert edges <= set(boundaries)
    order = dataset.windows.epochs.table(0).rows
    ends = np.cumsum([len(texts[row]) for row in order])[:-1].tolist()
    inner = [(begin // seq_len, begin % seq_len) for begin in ends if begin % seq_len]
    # The origin tells which window of the unshuffled stream each sample is.
    begins = dict(zip(order.tolist(), [0, *ends], strict=True))
    number = {(begins[row] + offset) // seq_len: i for i, (row, offset) in enumerate(batch.origins)}
    assert set(boundaries) - edges == {number[window] * seq_len + at for window, at in inner}
    plain = crossing.collate([crossing.sample(i) for i in range(len(crossing))])
    assert plain.inputs["cu_seqlens"] is None and plain.counts == batch.counts
    assert (plain.inputs["labels"] == batch.inputs["labels"]).all()


@pytest.mark.parametrize("mode", ["stream", "aligned"])
def test_windows_stay_inside_their_buffer_of_recordings_and_mix_there(mode):
    settings = {"seq_len": 8, "seed": 1, "shuffle_rows": 4}
    if mode == "stream":
        windows = packing.Stream(np.full(22, 100), packing.Draws(22, seed=1), **settings)
    else:  # 13 windows a recording, and some recordings too wide for any
        neurons = np.where(np.arange(22) % 7 == 3, 8, 3)
        windows = packing.Aligned(neurons, np.full(22, 25), packing.Draws(22, seed=1), **settings)
    orders = []
    for epoch in (0, 5):
        rows = [windows.window(i).origin[0] for i in range(epoch * len(windows), (epoch + 1) * len(windows))]
        order = windows.epochs.table(epoch).rows.tolist()
        assert sorted(order) == list(range(22))
        buffers = [order.index(row) // 4 for row in rows]
        assert buffers == sorted(buffers) and set(buffers) == set(range(6))  # five of four recordings and one of two
        assert sum(a != b for a, b in itertools.pairwise(rows)) > len(rows) / 2
        orders.append(order)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize("shuffle_rows", [1, 2, 256])
def test_aligned_training_covers_every_bin_once_from_a_separator(folder, shuffle_rows):
    dataset = build(folder, mode="aligned", seq_len=16, shuffle_rows=shuffle_rows)
    texts = documents(folder)
    seen, order = Counter(), []
    for i in range(len(dataset), 2 * len(dataset)):
        batch = dataset.collate([dataset.sample(i)])
        row, first_bin = batch.origins[0]
        width = dataset.width(row)
        bins = min(16 // width, len(texts[row]) // width - first_bin)
        text = texts[row][first_bin * width : (first_bin + bins) * width]
        padding = 16 - len(text)
        assert batch.inputs["tokens"][0].tolist() == text + [255] * padding
        assert batch.inputs["labels"][0].tolist() == text[1:] + [IGNORED] * (padding + 1)
        seen.update((row, first_bin + bin) for bin in range(bins))
        order.append(batch.origins[0])
    assert seen == Counter((row, bin) for row, text in enumerate(texts) for bin in range(len(text) // dataset.width(row)))
    assert order != sorted(order) and order != [dataset.sample(i).origin for i in range(len(dataset))]


@pytest.mark.parametrize("seq_len", [8, 20, 21, 30, 47, 500])
def test_aligned_evaluation_scores_each_count_once_with_half_a_window_of_context(folder, seq_len):
    dataset = build(folder, mode="aligned", seq_len=seq_len, overlap=True)
    texts = documents(folder)
    scored = Counter()
    for i in range(len(dataset)):
        batch = dataset.collate([dataset.sample(i)])
        row, first_bin = batch.origins[0]
        width = dataset.width(row)
        labels = batch.inputs["labels"][0].tolist()
        positions = [at + 1 for at, label in enumerate(labels) if label != IGNORED]
        assert all(texts[row][first_bin * width + at] == labels[at - 1] for at in positions)
        scored.update((row, first_bin * width + at) for at in positions)
        if first_bin:
            assert positions[0] // width >= (seq_len // width) // 2  # bins of context before the first that is scored
    excluded = {row for row, n in enumerate(dataset.index.n) if seq_len < 2 * (n + 1)}
    assert {name for name, _ in dataset.not_scored} == {dataset.index.id[row] for row in excluded}
    expected = ((row, at) for row, text in enumerate(texts) if row not in excluded for at in range(1, len(text)))
    assert scored == Counter(expected)
    with pytest.raises(IndexError, match="finite"):
        dataset.sample(len(dataset))


def test_a_recording_too_wide_for_a_window_is_reported(folder):
    dataset = build(folder, mode="aligned", seq_len=8)
    assert dataset.not_scored == [("e", "9 neurons need seq_len >= 10, it is 8")]
    with pytest.raises(ValueError, match="seq_len=3 holds 2 bins of no recording in use; the smallest, of 1 neuron, needs 4"):
        build(folder, mode="aligned", seq_len=3, overlap=True)


def test_where_each_recording_of_some_weight_is_too_wide_the_others_do_not_hide_it(tmp_path):
    pq.write_table(table([np.ones((40, 3), int), np.ones((2, 3), int)]), tmp_path / "x.parquet")
    settings = {"mode": "aligned", "seq_len": 8}
    wanted = "seq_len=8 holds 1 bin of no recording in use; the smallest, of 40 neurons, needs 41"
    for weight in (1.0, 0.5):
        with pytest.raises(ValueError, match=wanted):
            build(tmp_path / "x.parquet", **settings, source_weights={"lab0": weight, "lab1": 0.0})
    other = build(tmp_path / "x.parquet", **settings, source_weights={"lab0": 0.0})
    assert other.not_scored == [] and {other.origin(i)[0] for i in range(9)} == {1}


@pytest.mark.parametrize("mode", ["stream", "aligned"])
def test_sample_i_does_not_depend_on_what_was_read_before(folder, mode):
    straight, jumping = build(folder, mode=mode), build(folder, mode=mode)
    wanted = [straight.sample(i) for i in range(3 * len(straight))]
    for i in np.random.default_rng(0).permutation(len(wanted)):
        again = jumping.sample(int(i))
        assert (again.tokens == wanted[i].tokens).all()
        assert (again.labels, again.starts, again.origin) == (wanted[i].labels, wanted[i].starts, wanted[i].origin)
        assert jumping.origin(int(i)) == again.origin
    other = build(folder, mode=mode, seed=6)
    assert [other.origin(i) for i in range(len(other))] != [sample.origin for sample in wanted[: len(other)]]


def test_fractional_weights_repeat_rows_as_often_as_they_say():
    weights = [2.25, 0.5, 0.0, 1.0]
    draws, settings = packing.Draws(4, seed=3, weights=weights), {"seq_len": 16, "seed": 3, "shuffle_rows": 2}
    windows = packing.Aligned(np.full(4, 3), np.full(4, 40), draws, **settings)
    assert windows.num_windows.tolist() == [10] * 4
    rows = Counter()
    for epoch in range(400):
        drawn = Counter(windows.epochs.table(epoch).rows.tolist())
        assert drawn[0] in (2, 3) and drawn[1] in (0, 1) and drawn[2] == 0 and drawn[3] == 1
        rows.update(drawn)
    assert abs(rows[0] / 400 - 2.25) < 0.1 and abs(rows[1] / 400 - 0.5) < 0.1
    # Epochs of different lengths follow each other without a gap: the first windows of the first ten, one by one.
    sizes = [windows.epochs.table(epoch).num_windows for epoch in range(10)]
    assert len(set(sizes)) > 1
    located = [windows.epochs.locate(i) for i in range(sum(sizes))]
    assert located == [(epoch, i) for epoch, size in enumerate(sizes) for i in range(size)]
    fresh = packing.Aligned(np.full(4, 3), np.full(4, 40), packing.Draws(4, seed=3, weights=weights), **settings)
    assert fresh.window(333) == windows.window(333)
