"""Recordings from every kind of file, what is refused in them, and how they are chosen."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spike_files import build, recordings, same_samples, table, write_arrow

from torchtitan_bio.data import loader, spikes


def test_the_embedded_recording_is_the_documented_one():
    train, test = (spikes.build(source="embedded:a2929", seq_len=512, split=split) for split in ("train", "test"))
    assert [train.counts(row).shape for row in range(2)] == [(15, 24000)] * 2
    assert [test.counts(row).shape for row in range(2)] == [(15, 6000)] * 2
    spikes_in = [sum(int(dataset.counts(row).sum()) for row in range(2)) for dataset in (train, test)]
    assert spikes_in == [98794 - 18592, 18592]
    assert test.session.tolist() == [0, 0] and not test.malformed and not test.clipped
    assert train.index.segment_id == ["sleep-train", "wake-train"]
    with pytest.raises(ValueError, match="there is embedded:a2929"):
        spikes.build(source="embedded:a2930", seq_len=512)


@pytest.mark.parametrize("number", [pa.uint8(), pa.int8(), pa.int64(), pa.uint16()])
@pytest.mark.parametrize("of", [pa.list_, pa.large_list])
def test_parquet_and_both_forms_of_arrow_and_every_integer_type_read_alike(tmp_path, number, of):
    matrices = recordings(10)
    data = table(matrices, of(of(number)))
    write_arrow(tmp_path / "plain.arrow", table(matrices))
    pq.write_table(data, tmp_path / "x.parquet")
    write_arrow(tmp_path / "stream.arrow", data)
    write_arrow(tmp_path / "file.arrow", data, pa.ipc.new_file)
    datasets = [build(tmp_path / name) for name in ("plain.arrow", "x.parquet", "stream.arrow", "file.arrow")]
    for dataset in datasets:
        for row, matrix in enumerate(matrices):
            counts = dataset.counts(row)
            assert counts.dtype == np.uint8 and (counts == matrix).all()
        assert dataset.index.id[4] == "lab1/mouse0/1/s4"
        assert same_samples(dataset, datasets[0]) and dataset.fingerprint == datasets[0].fingerprint


def test_an_npz_reads_as_the_same_recording_in_a_parquet_file(tmp_path):
    matrix = recordings(1)[0]
    np.savez(tmp_path / "one.npz", spike_counts=matrix)
    np.savez(tmp_path / "two.npz", anything=matrix, times=np.arange(3))
    pq.write_table(table([matrix]), tmp_path / "x.parquet")
    assert same_samples(build(tmp_path / "one.npz"), build(tmp_path / "x.parquet"))
    assert (build(tmp_path / "two.npz").counts(0) == matrix).all()
    assert build(tmp_path / "one.npz").index.id == ["one"]
    np.savez(tmp_path / "none.npz", times=np.arange(3))
    with pytest.raises(ValueError, match="spike_counts.*it holds times"):
        build(tmp_path / "none.npz")


def test_uint8_arrow_is_viewed_and_not_copied(tmp_path):
    write_arrow(tmp_path / "x.arrow", table(recordings()))
    dataset = build(tmp_path / "x.arrow")
    block = dataset.store.block(dataset.index, 2, 0, 1)
    assert not block.flags.owndata and not block.flags.writeable


def test_splits_are_found_in_the_names_of_files_and_folders(tmp_path):
    matrices = recordings(8)
    for name, rows in {
        "data/train-00000-of-00002.parquet": [0, 1],
        "data/train-00001-of-00002.parquet": [2],
        "data/test-00000-of-00001.parquet": [3],
        "more/validation/x.parquet": [4, 5],
        "more/contest.parquet": [6],
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(matrices).take(rows), tmp_path / name)
    found = {split: build(tmp_path, split=split).index.segment_id for split in ("train", "test", "validation")}
    assert found == {"train": ["s0", "s1", "s2", "s6"], "test": ["s3"], "validation": ["s4", "s5"]}
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train, validation"):
        build(tmp_path, split="dev")
    np.savez(tmp_path / "x.npz", spike_counts=matrices[0])
    with pytest.raises(ValueError, match="mixes .npz and .parquet"):
        build(tmp_path)


def test_local_files_need_no_package_of_hugging_face(tmp_path, monkeypatch):
    pq.write_table(table(recordings(3)), tmp_path / "x.parquet")
    packages = {"datasets", "torchdata", "huggingface_hub"}
    for module in packages | {name for name in sys.modules if name.partition(".")[0] in packages}:
        monkeypatch.setitem(sys.modules, module, None)  # importing it now raises
    for source in (tmp_path / "x.parquet", "embedded:a2929", "ring-hmm:rows=4"):
        assert build(source).sample(3).tokens.shape == (33,)
    with pytest.raises(ValueError, match="needs `pip install datasets`"):
        build("lab/pile")


def test_a_folder_whose_name_ends_like_a_file_is_a_folder(tmp_path):
    (tmp_path / "all.parquet").mkdir()
    pq.write_table(table(recordings(3)), tmp_path / "all.parquet" / "part-0.parquet")
    assert len(build(tmp_path).index) == len(build(tmp_path / "all.parquet").index) == 3


def test_a_source_that_is_nowhere_is_named():
    with pytest.raises(ValueError, match="'no/such/place.parquet' is neither an existing file"):
        build("no/such/place.parquet")


def test_missing_metadata_and_identifiers_are_tolerated(tmp_path):
    bare = {name: None for name in ("source_dataset", "subject_id", "session_id", "segment_id")}
    pq.write_table(table(recordings(3), **bare), tmp_path / "bare.parquet")
    pq.write_table(table(recordings(3), **bare, identifier=["x", "y", "z"]), tmp_path / "named.parquet")
    dataset = build(tmp_path / "bare.parquet")
    assert dataset.index.id == ["row 0", "row 1", "row 2"] and dataset.index.source_dataset == [""] * 3
    assert len(set(dataset.session)) == 3  # nothing says that two of them share their neurons
    assert build(tmp_path / "named.parquet").index.id == ["x", "y", "z"]


def test_malformed_rows_of_every_kind_are_listed_and_bounded_and_move_nothing(tmp_path):
    good = recordings(3)
    signed = pa.list_(pa.list_(pa.int64()))
    bad = [[[1, 2, 3], [1, 2]], [[0, -3]], [], [[], []], None, [[1, None]], [[1, 2], None]]
    mixed = [good[0], bad[0], bad[1], good[1], *bad[2:], good[2]]
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    pq.write_table(
        table(good, signed, segment_id=["s0", "s3", "s9"], source_dataset=None, subject_id=None), tmp_path / "good/a.parquet"
    )
    pq.write_table(table(mixed, signed, source_dataset=None, subject_id=None), tmp_path / "bad/a.parquet")
    flat = table([[1, 2], [3]], pa.list_(pa.uint8()), segment_id=["flat", "flatter"])
    pq.write_table(flat, tmp_path / "bad/b.parquet")
    real = table([np.ones((2, 2))], pa.list_(pa.list_(pa.float32())), segment_id=["real"])
    pq.write_table(real, tmp_path / "bad/c.parquet")

    dataset = build(tmp_path / "bad", max_malformed_rows=10)
    reasons = {name.split("/")[-1]: reason.split(":")[0] for name, reason in dataset.malformed}
    assert reasons == {
        "s1": "ragged",
        "s2": "negative",
        "s4": "empty",
        "s5": "empty",
        "s6": "missing",
        "s7": "missing",
        "s8": "missing",
        "flat": "1-D",
        "flatter": "1-D",
        "real": "not a matrix of integers",
    }
    assert same_samples(dataset, build(tmp_path / "good"))
    with pytest.raises(ValueError, match=r"10 malformed of 13 rows, data.max_malformed_rows=9:\n  1/s1: ragged"):
        build(tmp_path / "bad", max_malformed_rows=9)
    pq.write_table(table([]), tmp_path / "nothing.parquet")
    with pytest.raises(ValueError, match="nothing.parquet has no rows in split 'train'"):
        build(tmp_path / "nothing.parquet")
    many = table([[]] * 25, signed)
    pq.write_table(many, tmp_path / "many.parquet")
    with pytest.raises(ValueError, match=r"lab0/mouse1/1/s9: empty.*\n  \.\.\. and 15 more"):
        build(tmp_path / "many.parquet")


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64()])
def test_counts_of_255_and_more_are_clipped_and_counted_by_source(tmp_path, kind):
    largest = 255 if kind == pa.uint8() else 70000
    matrices = [np.array([[0, 254, 255]]), np.array([[largest, 1], [255, largest]]), np.array([[254]]), np.array([[255]])]
    pq.write_table(table(matrices, pa.list_(pa.list_(kind))), tmp_path / "x.parquet")
    dataset = build(tmp_path / "x.parquet")
    assert dataset.clipped == {"lab0": 2, "lab1": 3}
    assert dataset.counts(1).tolist() == [[254, 1], [254, 254]]
    samples = [dataset.sample(i) for i in range(len(dataset))]
    tokens = np.concatenate([sample.tokens[: sample.labels[1]] for sample in samples])
    assert (tokens == 255).sum() == 3 + 2 + 1 + 1  # the separators of all bins, and nothing else


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64()])
def test_under_a_split_by_time_clips_are_counted_in_the_part_that_is_used(tmp_path, kind):
    matrices = [np.ones((2, 10), int) for _ in range(4)]
    matrices[0][0, 7:9] = 255  # the last bin of train and the first of test
    matrices[1][1, 0] = 255
    matrices[2][:, 9] = 255
    pq.write_table(table(matrices, pa.list_(pa.list_(kind))), tmp_path / "x.parquet")
    train, test = (build(tmp_path / "x.parquet", split=split, split_by="time") for split in ("train", "test"))
    assert train.clipped == {"lab0": 1, "lab1": 1} and test.clipped == {"lab0": 1, "lab2": 2}
    for row, matrix in enumerate(matrices):
        parts = [train.counts(row), test.counts(row)]
        assert (np.concatenate(parts, axis=1) == np.minimum(matrix, 254)).all()


def test_the_report_names_the_split_each_malformed_row_and_the_clips_of_each_source(tmp_path):
    bad = [[[1], [1, 2]]] * 12
    pq.write_table(
        table([*bad, [[255, 0]], [[300, 1]], np.ones((40, 3))], pa.list_(pa.list_(pa.int64()))), tmp_path / "x.parquet"
    )
    report = build(tmp_path / "x.parquet", mode="aligned", max_malformed_rows=12).report()
    assert "3 recordings of 1 to 40 neurons, 124 counts, 3 sources, split train, by given" in report[0]
    for row in range(12):
        line = f"data: malformed and left out: lab{row % 3}/mouse{row % 2}/1/s{row}: ragged: its neurons have from 1 to 2 bins"
        assert report.count(line) == 1
    assert report[-2].endswith("1 row is too wide for a window: lab2/mouse0/1/s14: 40 neurons need seq_len >= 41, it is 32")
    assert report[-1] == "data: counts above 254 are read as 254: 1 of lab0, 1 of lab1"


def test_the_report_speaks_of_one_and_of_many(tmp_path):
    np.savez(tmp_path / "x.npz", spike_counts=np.zeros((5, 7), np.uint8))
    (line,) = build(tmp_path / "x.npz", seq_len=64).report()
    assert line.startswith("data: 1 recording of 5 neurons, 35 counts, 1 source, ") and "1 window an epoch" in line


def test_recordings_that_are_stored_twice_are_reported_and_used_as_they_stand(tmp_path):
    matrices = recordings(3)
    data = table(matrices)
    pq.write_table(pa.concat_tables([data, data.take([2, 0])]), tmp_path / "x.parquet")
    dataset = build(tmp_path / "x.parquet")
    twice = (
        "data: 2 recordings are stored more than once under one name, with the same counts: lab0/mouse0/1/s0; lab2/mouse0/1/s2"
    )
    assert dataset.report()[1:] == [twice] and len(dataset.index) == 5
    # One name for different counts, and the same counts under two names, are no copies.
    other = table([*matrices, matrices[0] + 1, matrices[0]], segment_id=["s0", "s1", "s2", "s0", "s9"])
    pq.write_table(other, tmp_path / "y.parquet")
    assert len(build(tmp_path / "y.parquet").report()) == 1


def test_a_reader_that_fails_names_the_recording_and_not_only_the_one_its_window_begins_in(tmp_path):
    pq.write_table(table([np.ones((2, 3), int)] * 4), tmp_path / "x.parquet")

    class Unreadable:
        def block(self, index, row, begin, end):
            if row == 2:
                raise OSError("block 7 is unreadable")
            return np.ones((2, end - begin), np.uint8)

    dataset = build(tmp_path / "x.parquet", seq_len=64)  # a window holds all four
    dataset.store = Unreadable()
    settings = {"start_step": 0, "global_batch_size": 1, "local_batch_size": 1, "rank": 0, "world_size": 1, "num_workers": 0}
    with pytest.raises(RuntimeError, match=r"sample 0 .*recording lab2/mouse0/1/s2 \(row 2\): OSError: block 7 is unreadable"):
        next(loader.build(dataset, **settings))


def test_a_crop_keeps_neurons_in_order_and_draws_them_anew_each_epoch(tmp_path):
    matrices = [np.arange(n)[:, None] + np.zeros((n, 40), int) for n in (3, 5, 50)]
    pq.write_table(table(matrices, source_dataset=["a"] * 3), tmp_path / "x.parquet")
    dataset = build(tmp_path / "x.parquet", num_neurons=5, mode="aligned", seq_len=12)
    drawn = set()
    for i in range(6 * len(dataset)):
        sample = dataset.sample(i)
        row = sample.origin[0]
        width = 6 if row else 4
        bins = sample.tokens[: sample.labels[1]].reshape(-1, width)
        assert (bins[:, 0] == 255).all() and (bins == bins[0]).all()
        neurons = tuple(bins[0, 1:].tolist())
        assert neurons == tuple(sorted(set(neurons)))
        assert row == 2 or neurons == tuple(range(width - 1))
        assert neurons == tuple(dataset.neurons(row, i // len(dataset)) if row == 2 else range(width - 1))
        drawn.add((i // len(dataset), row, neurons))
    assert len({neurons for _, row, neurons in drawn if row == 2}) == 6  # one choice an epoch, six different ones
    evaluation = build(tmp_path / "x.parquet", num_neurons=5, mode="aligned", seq_len=12, overlap=True)
    assert (evaluation.counts(2) == dataset.counts(2)).all() and evaluation.counts(2).shape == (5, 40)
    last = evaluation.sample(len(evaluation) - 1)
    assert last.tokens[1:6].tolist() == evaluation.counts(2)[:, 0].tolist()


def test_sources_are_filtered_and_weighted_by_name(tmp_path):
    pq.write_table(table(recordings(6)), tmp_path / "x.parquet")
    kept = build(tmp_path / "x.parquet", include_sources=["lab*"], exclude_sources=["lab[01]"])
    assert kept.index.segment_id == ["s2", "s5"]
    plain, twice = (build(tmp_path / "x.parquet", source_weights=weights) for weights in ({}, {"lab1": 2.0, "lab0": 0}))
    tokens = (plain.index.n + 1) * plain.index.t
    assert len(twice) == -(-(2 * (tokens[1] + tokens[4]) + tokens[2] + tokens[5] - 1) // 32)
    for settings, message in {
        "include_sources": (["lap1"], "'lap1' matches no source_dataset; did you mean 'lab1'"),
        "exclude_sources": (["lab*"], "leave nothing. There are 'lab0', 'lab1', 'lab2'"),
        "source_weights": ({"lab3": 1.0}, "no recording is of 'lab3'; did you mean 'lab"),
    }.items():
        with pytest.raises(ValueError, match=message[1].replace("*", r"\*")):
            build(tmp_path / "x.parquet", **{settings: message[0]})
    with pytest.raises(ValueError, match="all are 0"):
        build(tmp_path / "x.parquet", include_sources=["lab0"], source_weights={"lab0": 0.0})
    with pytest.raises(ValueError, match="legacy"):
        build(tmp_path / "x.parquet", mode="legacy", source_weights={"lab1": 2.0})


@pytest.mark.parametrize("mode", ["stream", "aligned"])
def test_sample_i_of_a_mixture_does_not_depend_on_what_was_read_before(tmp_path, mode):
    pq.write_table(table(recordings(9)), tmp_path / "x.parquet")
    settings = {"mode": mode, "source_weights": {"lab0": 0.4, "lab1": 2.5}, "num_neurons": 3, "shuffle_rows": 2}
    straight = build(tmp_path / "x.parquet", **settings)
    wanted = [straight.sample(i) for i in range(5 * len(straight))]
    assert len({straight.windows.epochs.table(epoch).num_windows for epoch in range(5)}) > 1  # epochs differ in length
    jumping = build(tmp_path / "x.parquet", **settings)
    for i in np.random.default_rng(0).permutation(len(wanted)).tolist():
        again = jumping.sample(i)
        assert again.origin == wanted[i].origin and (again.tokens == wanted[i].tokens).all()


def test_sessions_are_on_one_side_of_the_split_by_session_whatever_the_files_say(tmp_path):
    num = 600
    subjects = [f"animal{i // 3}" for i in range(num)]
    data = table([np.ones((1, 2), int)] * num, subject_id=subjects)
    pq.write_table(data.take(list(range(0, num, 2))), tmp_path / "train.parquet")
    pq.write_table(data.take(list(range(1, num, 2))), tmp_path / "test.parquet")
    sides = [build(tmp_path, split=split, split_by="session").index for split in ("train", "test")]
    assert not set(sides[0].subject_id) & set(sides[1].subject_id)
    assert sorted(sides[0].segment_id + sides[1].segment_id) == sorted(f"s{i}" for i in range(num))
    assert 0 < len(set(sides[1].subject_id)) < 10  # 1% of 200
    with pytest.raises(ValueError, match="of 1 session none falls"):
        spikes.build(source="embedded:a2929", seq_len=32, split="test", split_by="session")


def test_the_split_by_time_cuts_the_last_fifth_of_each_row(tmp_path):
    matrices = [np.arange(3 * t).reshape(3, t) % 200 for t in (10, 23, 4)]
    pq.write_table(table(matrices), tmp_path / "x.parquet")
    train, test = (build(tmp_path / "x.parquet", split=split, split_by="time") for split in ("train", "test"))
    assert test.index.t.tolist() == [2, 4]  # a fifth of four bins is none
    for row, matrix in enumerate(matrices):
        parts = [train.counts(row), test.counts(row)] if row < 2 else [train.counts(row)]
        assert (np.concatenate(parts, axis=1) == matrix).all()
    assert test.sample(0).tokens.tolist().count(255) > 0
    with pytest.raises(ValueError, match="splits train and test, not 'dev'"):
        build(tmp_path / "x.parquet", split="dev", split_by="time")
