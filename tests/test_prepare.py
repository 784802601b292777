"""prepare.py from the command line: from a lab's files to what training reads, what inspect says, how split divides."""

import json
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nwb_files import poisson_units, write_nwb
from spike_files import build, recordings, table, write_arrow

import prepare
from torchtitan_bio.config import ConfigError
from torchtitan_bio.data import keyed, rows, store
from torchtitan_bio.science import inventory

ROOT = Path(__file__).parent.parent


def run(*words):
    prepare.main(prepare.read_flags([str(word) for word in words]))


def test_a_labs_nwb_files_become_a_store_that_training_reads(tmp_path, capsys):
    pytest.importorskip("h5py", reason="NWB files are read with h5py, the extra nwb")
    lab, mylab = tmp_path / "lab", tmp_path / "mylab"
    lab.mkdir()
    intervals = {"trials": ([4.0, 9.0], [8.0, 21.0])}
    times = [poisson_units(num_units=n, seed=n) for n in (3, 5)]
    times[1][0] = np.array([5.0, np.nan])
    for number, of_session in enumerate(times):
        write_nwb(lab / f"{number}.nwb", of_session, session=f"day{number}", intervals=intervals)
    run("spikes", lab, "--bin-width", 0.05, "--interval", "trials", "--out", mylab)
    said = capsys.readouterr().out
    assert "1.nwb: 1 spike times are not numbers (NaN or infinite) and are left out: unit 0" in said
    assert f"{mylab}: 4 rows, 2,560 counts, made in" in said
    dataset = build(mylab, split_by="time")
    assert dataset.index.id == [f"mylab/m1/day{day}/trials-{trial}" for day in (0, 1) for trial in (0, 1)]
    for row, (day, trial) in enumerate((day, trial) for day in (0, 1) for trial in (0, 1)):
        edges = intervals["trials"][0][trial] + 0.05 * np.arange((80, 240)[trial] + 1)
        expected = np.stack([np.histogram(of_unit[np.isfinite(of_unit)], edges)[0] for of_unit in times[day]])
        assert (dataset.counts(row) == expected[:, : dataset.index.t[row]]).all()
    assert dataset.summary()["bin_width_s"] == 0.05
    assert store.read_table(mylab)["origin_s"].to_pylist() == [4.0, 9.0] * 2
    run("spikes", lab, "--bin-width", 0.05, "--interval", "trials", "--out", mylab)
    assert "is finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["spikes", "nowhere.nwb", "--out", "{}/out"], "nowhere.nwb does not exist"),
        (["spikes", "nowhere", "--out", "{}/out"], "neither an existing file or folder"),
        (["spikes", "{}/in", "--out", "{}/in/out"], "lies in .*name a folder elsewhere"),
        (["spikes", "{}/in", "--out", "{}/in"], "lies in .*name a folder elsewhere"),
        (["spikes", "{}/in", "--out", "{}"], "holds something else, empty for instance"),
        (["spikes", "{}/in", "--out", "{}/out", "--bin-width", "0"], "--bin-width=0.0 must be a positive number"),
        (["spikes", "{}/in", "--out", "{}/out", "--bin-width", "nan"], "--bin-width=nan must be a positive number"),
        (["spikes", "{}/in", "--out", "{}/out", "--order", "{}/none"], "none cannot be read: .*No such file"),
        (["spikes", "ring-hmm:n=4", "--out", "{}/out"], "nothing to prepare"),
        (["inspect", "{}/in", "--bin-width", "-1"], "--bin-width=-1.0 must be"),
        (["inspect", "{}/in", "--out", "{}/in/x.parquet"], "x.parquet is a file"),
        (["inspect", "{}/in", "--out", "{}/in/x.parquet/y"], "x.parquet/y cannot be written: .*Name another folder"),
        (["inspect", "{}/in", "--interval", "trials"], "x.parquet holds counts and no intervals"),
        (["spikes", "{}/in", "--out", "{}/out", "--interval", "trials"], "x.parquet holds counts and no intervals"),
        (["spikes", "{}/in", "{}/in/x.parquet", "--out", "{}/out"], "x.parquet is among the sources twice"),
        (["inspect", "{}/in", "{}/empty/../in"], "x.parquet is among the sources twice"),
        (["inspect", "ring-hmm:n=4", "ring-hmm:n=4"], "is among the sources twice"),
        (
            ["spikes", "{}/in", "--out", "{}/out", "--order", "{}/in/x.parquet"],
            "x.parquet cannot be read: it is not a text file",
        ),
        (["inspect", "{}/empty"], "expected .parquet, .arrow, .npz files"),
        (["split", "{}/in", "--by", "session"], "in is not a prepared store: prepare.py spikes .*in --out"),
        (["split", "{}/in", "--by", "session", "--test", "1"], "leave something for train"),
        (["split", "{}/in", "--by", "row", "--test", "0.6", "--validation", "0.5"], "leave something for train"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words_and_leaves_nothing(tmp_path, words, complaint):
    (tmp_path / "in").mkdir()
    (tmp_path / "empty").mkdir()
    pq.write_table(table(recordings(3)), tmp_path / "in" / "x.parquet")
    with pytest.raises(ConfigError, match=complaint):
        run(*(word.format(tmp_path) for word in words))
    assert not (tmp_path / "out").exists() and [path.name for path in (tmp_path / "in").iterdir()] == ["x.parquet"]


def test_the_process_ends_with_2_and_a_line_for_what_its_user_can_mend():
    command = [sys.executable, str(ROOT / "prepare.py"), "inspect", "nowhere"]
    answer = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert answer.returncode == 2 and answer.stderr.startswith("this command cannot work:\n  data source 'nowhere' is neither")
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    "text, size", [("512M", 2**29), ("1G", 2**30), ("1.5k", 1536), ("1000", 1000), ("0", None), ("G", None)]
)
def test_sizes_of_files_are_read_with_their_unit(text, size):
    words = ["spikes", "x", "--out", "y", "--shard-size", text]
    if size is None:
        with pytest.raises(SystemExit):
            prepare.read_flags(words)
    else:
        assert prepare.read_flags(words).shard_size == size


# ---- inspect ----


def three_labs(path):
    """Rows of three sources, of which one is there twice, one is ragged, one has counts above 254 and silent neurons."""
    rng = np.random.default_rng(2)
    matrices = [rng.poisson(rng.gamma(0.5, 0.6, (n, 1)), (n, bins)) for n, bins in ((4, 700), (9, 300), (2, 80), (5, 60))]
    matrices += [matrices[1].copy(), np.array([[0, 300, 254], [0, 0, 0]])]
    columns = {"source_dataset": ["a", "b", "b", "a", "b", "c", "c"], "segment_id": [f"s{i}" for i in range(7)]}
    pq.write_table(table([*matrices, [[1, 2], [3]]], pa.list_(pa.list_(pa.int64())), **columns), path)
    return matrices, columns["source_dataset"]


def plain_figures(matrices, width):
    """By loops over plain arrays."""
    clipped = [np.minimum(matrix, 254) for matrix in matrices]
    counts = Counter(np.concatenate([matrix.ravel() for matrix in clipped]).tolist())
    total = sum(counts.values())
    spikes = sum(value * times for value, times in counts.items())
    return {
        "counts": total,
        "spikes": spikes,
        "neurons": [min(map(len, matrices)), max(map(len, matrices))],
        "bins": sum(matrix.shape[1] for matrix in matrices),
        "seconds": pytest.approx(width * sum(matrix.shape[1] for matrix in matrices)),
        "zeros": counts[0] / total,
        "spikes_per_bin": pytest.approx(spikes / total),
        "spikes_per_s": pytest.approx(spikes / total / width),
        "bits_per_count": pytest.approx(-sum(times / total * np.log2(times / total) for times in counts.values())),
        "silent_neurons": sum(int((matrix.sum(1) == 0).sum()) for matrix in matrices),
        "clipped": sum(int((matrix > 254).sum()) for matrix in matrices),
        "histogram": [counts[value] for value in range(max(counts) + 1)],
    }


@pytest.mark.parametrize("prepared", [False, True])
def test_inspect_says_of_files_and_of_their_store_what_plain_loops_find(tmp_path, capsys, prepared):
    matrices, names = three_labs(tmp_path / "x.parquet")
    source = tmp_path / "x.parquet"
    if prepared:
        run("spikes", source, "--bin-width", 0.05, "--out", tmp_path / "store")
        source = tmp_path / "store"
    run("inspect", source, *([] if prepared else ["--bin-width", 0.05]), "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "inventory.json").read_text())
    expected = {name: plain_figures([m for m, of in zip(matrices, names, strict=False) if of == name], 0.05) for name in "abc"}
    assert {of["source_dataset"]: {key: of[key] for key in expected["a"]} for of in found["sources"]} == expected
    assert {key: found["total"][key] for key in expected["a"]} == plain_figures(matrices, 0.05)
    assert [(of["source_dataset"], of["rows"], of["malformed"], of["twice"]) for of in found["sources"]] == [
        ("b", 3, 0, 1),
        ("a", 2, 0, 0),
        ("c", 2, 1, 0),
    ]
    fault = {"name": "c/mouse0/1/s6", "source_dataset": "c", "fault": "ragged: its neurons have from 1 to 2 bins"}
    assert found["malformed"] == [fault | {"found_in": source.name}]
    twice = {"name": "b/mouse0/1/s4", "first": "b/mouse1/1/s1", "found_in": source.name, "first_found_in": source.name}
    assert found["twice"] == [twice]
    assert sum(found["total"]["neurons_by_rate"]) + found["total"]["silent_neurons"] == sum(map(len, matrices))
    said = capsys.readouterr().out
    for line in ("malformed: c/mouse0/1/s6: ragged", "there twice: b/mouse0/1/s4 has the counts of b/mouse1/1/s1", "all  "):
        assert line in said
    assert str(tmp_path) not in (tmp_path / "out" / "inventory.json").read_text()
    assert (tmp_path / "out" / "inventory.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_bin_width_nothing_is_said_of_seconds(tmp_path, capsys):
    pq.write_table(table(recordings(3)), tmp_path / "x.parquet")
    run("inspect", tmp_path / "x.parquet")
    said = capsys.readouterr().out
    assert "/bin" in said and "/s " not in said and sorted(path.name for path in tmp_path.iterdir()) == ["x.parquet"]


def test_a_store_keeps_its_bin_width_and_takes_one_only_where_it_knows_none(tmp_path, capsys):
    pq.write_table(table(recordings(3)), tmp_path / "x.parquet")
    run("spikes", tmp_path / "x.parquet", "--out", tmp_path / "unknown")
    run("spikes", tmp_path / "unknown", "--bin-width", 0.05, "--out", tmp_path / "known")
    assert set(store.read_table(tmp_path / "unknown")["bin_width_s"].to_pylist()) == {None}
    assert set(store.read_table(tmp_path / "known")["bin_width_s"].to_pylist()) == {0.05}
    for words in (["inspect", tmp_path / "known"], ["spikes", tmp_path / "known", "--out", tmp_path / "out"]):
        with pytest.raises(ConfigError, match="known has bins of 0.05 s, and counts are not binned again"):
            run(*words, "--bin-width", 0.02)
    assert not (tmp_path / "out").exists()


def test_counts_beside_nwb_do_not_get_the_default_bin_width_of_spike_times(tmp_path):
    pytest.importorskip("h5py", reason="NWB files are read with h5py, the extra nwb")
    write_nwb(tmp_path / "a.nwb", [[0.1, 0.5]])
    pq.write_table(table(recordings(1)), tmp_path / "x.parquet")
    run("spikes", tmp_path / "a.nwb", tmp_path / "x.parquet", "--out", tmp_path / "out")
    assert store.read_table(tmp_path / "out")["bin_width_s"].to_pylist() == [0.02, None]


def test_a_neuron_of_one_spike_in_days_is_among_the_rates(tmp_path):
    counts = np.zeros((2, 1_200_000), np.uint8)
    counts[0, 5] = 1
    np.savez(tmp_path / "x.npz", spike_counts=counts)
    run("inspect", tmp_path / "x.npz", "--out", tmp_path / "out")
    total = json.loads((tmp_path / "out" / "inventory.json").read_text())["total"]
    assert (sum(total["neurons_by_rate"]), total["silent_neurons"]) == (1, 1)


def test_what_is_not_listed_is_counted(tmp_path, capsys, monkeypatch):
    pytest.importorskip("h5py", reason="NWB files are read with h5py, the extra nwb")
    monkeypatch.setattr(prepare, "MOST_LINES", 1)
    for name in "abc":
        write_nwb(tmp_path / f"{name}.nwb", [[0.1, np.nan]])
    run("inspect", tmp_path)
    said = capsys.readouterr().out
    assert said.count("are left out") == 1 and "... and 2 more such lines; --out keeps all" in said


def test_a_byte_that_changed_in_a_store_is_found_by_inspect(tmp_path, capsys):
    run("spikes", "embedded:a2929", "--out", tmp_path / "store")
    (shard,) = (tmp_path / "store").glob("*.u8")
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    run("inspect", tmp_path / "store")
    assert "malformed: pynapple-A2929/A2929/200711/sleep-train: damaged: its bytes are not those" in capsys.readouterr().out


def test_neither_inspect_nor_a_conversion_holds_more_than_a_row_or_so(tmp_path):
    rng, (n, bins, num_rows) = np.random.default_rng(0), (50, 40_000, 20)
    counts = rng.integers(0, 3, num_rows * n * bins, np.uint8)
    inner = pa.ListArray.from_arrays(pa.array(np.arange(num_rows * n + 1, dtype=np.int32) * bins), pa.array(counts))
    outer = pa.ListArray.from_arrays(pa.array(np.arange(num_rows + 1, dtype=np.int32) * n), inner)
    write_arrow(tmp_path / "x.arrow", pa.table({"spike_counts": outer}), max_rows=1)
    del counts, inner, outer
    for words in (["inspect", tmp_path / "x.arrow"], ["spikes", tmp_path / "x.arrow", "--out", tmp_path / "store"]):
        tracemalloc.start()
        run(*words)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * 2**20 < num_rows * n * bins, (words[0], peak)  # of which bincount's 2**20 integers are 8


def test_several_sources_are_one_table_in_which_each_line_says_where_it_was_found(tmp_path, capsys):
    matrices, names = three_labs(tmp_path / "x.parquet")
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "y.npz", spike_counts=recordings(2, seed=number)[1])
    given = [tmp_path / name for name in ("x.parquet", "one/y.npz", "two")]
    run("inspect", *given, "--out", tmp_path / "out")
    table_of = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[:7]]
    assert table_of[0] == "source_dataset" and table_of[6] == "all"
    assert sorted(table_of[1:6]) == ["two: (no name)", *(f"x.parquet: {name}" for name in "abc"), "y.npz: (no name)"]
    found = json.loads((tmp_path / "out" / "inventory.json").read_text())
    assert found["asked"] == ["x.parquet", "y.npz", "two"] and found["total"]["rows"] == len(names) + 2
    assert {of["found_in"] for of in found["sources"] if not of["source_dataset"]} == {"y.npz", "two"}
    assert found["total"]["counts"] == sum(matrix.size for matrix in matrices) + sum(
        recordings(2, seed=number)[1].size for number in (0, 1)
    )


def test_what_two_folders_hold_under_the_same_names_is_told_apart(tmp_path, capsys):
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 3, (3, 50))
    for number, folder in enumerate(("lab1", "lab2")):
        (tmp_path / folder).mkdir()
        matrices = [np.array([[2, 2]]), rng.integers(1, 3, (2, 40 + number)), shared, [[1, 2], [3]]]
        columns = {"source_dataset": ["flat", "a", "a", "a"], "subject_id": list("flat")}
        pq.write_table(table(matrices, **columns), tmp_path / folder / "x.parquet")
        (tmp_path / folder / f"tmp{number}2345678.arrow").touch()
    run("spikes", tmp_path / "lab2", "--bin-width", 0.05, "--out", tmp_path / "store")
    assert "--data.max_malformed_rows 1; look at it" in capsys.readouterr().out
    run("inspect", tmp_path / "lab1", tmp_path / "store", "--out", tmp_path / "out")
    said = capsys.readouterr().out
    lines = {line.partition("  ")[0]: re.split(r"  +", line) for line in said.splitlines()}
    assert lines["lab1: a"][2:6] == ["230", "2 to 3", "?", "?"] and lines["store: a"][2:6] == ["232", "2 to 3", "5", "0.05"]
    assert lines["all"][1:3] == ["8", "466"] and lines["all"][5] == "0.05 and ?"
    assert lines["lab1: flat"][8] == "0.000" and "-0.000" not in said
    for place in ("lab1", "store"):
        assert f"malformed: {place}: a/t/1/s3: ragged" in said
    assert "there twice: store: a/a/1/s2 has the counts of lab1: a/a/1/s2" in said
    found = json.loads((tmp_path / "out" / "inventory.json").read_text())
    assert [of["silent_neurons"] for of in found["sources"]] == [0] * 4
    given = inventory.Inventory()
    for file in rows.find(str(tmp_path / "lab1")):
        for row in rows.read(file)[0]:
            given.add(row, "lab1")
    titles = [text for _, text, *_ in inventory.draw(given.result(), given.raster, "")._letters if "neurons" in text]
    assert titles == ["5 neurons", "neurons of all rows", "1 neurons", "neurons of all rows"]
    run("inspect", tmp_path / "lab1", tmp_path / "lab2")
    said = capsys.readouterr().out
    for place, number in (("lab1", 0), ("lab2", 1)):
        assert f"{place}: tmp{number}2345678.arrow is not read: by its name a leftover" in said
    (tmp_path / "a").mkdir()
    (tmp_path / "lab2").rename(tmp_path / "a" / "lab1")
    run("inspect", tmp_path / "lab1", tmp_path / "a" / "lab1")
    assert "there twice: lab1 (2): a/a/1/s2 has the counts of lab1 (1): a/a/1/s2" in capsys.readouterr().out


def test_a_store_of_nothing_but_malformed_rows_is_not_offered_for_training(tmp_path, capsys):
    pq.write_table(table([[[1, 2], [3]]]), tmp_path / "x.parquet")
    run("spikes", tmp_path / "x.parquet", "--out", tmp_path / "store")
    said = capsys.readouterr().out
    assert "none of its rows can be read" in said and "--data.source" not in said


def test_a_synthetic_population_is_inspected_too(capsys):
    run("inspect", "ring-hmm:n=3,bins=16,rows=20,test_rows=5")
    assert "splits: test 5, train 20" in capsys.readouterr().out


# ---- split ----


def many_sessions(path, num=60):
    rng = np.random.default_rng(0)
    subjects = [f"m{i % 20}" for i in range(num)]
    matrices = [rng.integers(0, 3, (3, 10)) for _ in range(num)]
    sessions = [f"{i % 40}" for i in range(num)]
    pq.write_table(table(matrices, subject_id=subjects, session_id=sessions), path)
    return [
        dict(subject=a, session=f"{a}/{b}", row=f"lab{i % 3}/{a}/{b}/s{i}")
        for i, (a, b) in enumerate(zip(subjects, sessions, strict=True))
    ]


@pytest.mark.parametrize("by", ["subject", "session", "row"])
def test_a_division_is_a_hash_of_names_that_no_two_sides_share_and_training_reads_it(tmp_path, capsys, by):
    names = many_sessions(tmp_path / "x.parquet")
    run("spikes", tmp_path / "x.parquet", "--out", tmp_path / "store")
    shards = (tmp_path / "store" / "shard-00000.u8").read_bytes()
    run("split", tmp_path / "store", "--by", by, "--test", 0.3, "--validation", 0.2)
    divided = {split: build(tmp_path / "store", split=split).index.id for split in ("train", "validation", "test")}
    sides = {split: {name[by] for name in names if name["row"] in ids} for split, ids in divided.items()}
    assert sum(map(len, divided.values())) == 60 and all(sides.values())
    assert not (sides["train"] & sides["test"] or sides["train"] & sides["validation"] or sides["validation"] & sides["test"])
    for split, low, high in (("test", 0.0, 0.3), ("validation", 0.3, 0.5), ("train", 0.5, 1.0)):
        assert sides[split] == {name[by] for name in names if low <= keyed.text_key(name[by]) / 2**64 < high}
    first = store.read_table(tmp_path / "store")["split"].to_pylist()
    run("split", tmp_path / "store", "--by", by, "--test", 0.3, "--validation", 0.2)
    assert store.read_table(tmp_path / "store")["split"].to_pylist() == first
    assert (tmp_path / "store" / "shard-00000.u8").read_bytes() == shards
    said = capsys.readouterr().out
    assert f"test: {len({name['subject'] for name in names if name['row'] in divided['test']})} subjects" in said
    assert ("there are rows on several sides" in said) == (by == "row")
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train, validation"):
        build(tmp_path / "store", split="dev")


def test_by_session_and_one_percent_it_is_what_split_by_session_makes(tmp_path):
    many_sessions(tmp_path / "x.parquet", num=400)
    run("spikes", tmp_path / "x.parquet", "--out", tmp_path / "store")
    both = [build(tmp_path / "store", split=split, split_by="session").index.id for split in ("train", "test")]
    run("split", tmp_path / "store", "--by", "session", "--test", 0.01)
    assert [build(tmp_path / "store", split=split).index.id for split in ("train", "test")] == both


def test_a_division_that_leaves_a_side_empty_or_has_no_names_to_go_by_is_refused_and_changes_nothing(tmp_path):
    run("spikes", "embedded:a2929", "--out", tmp_path / "store")
    before = (tmp_path / "store" / "index.parquet").read_bytes()
    with pytest.raises(ConfigError, match="by session, of 1 session none falls into 'test'.*they lie at 0.415"):
        run("split", tmp_path / "store", "--by", "session")
    assert (tmp_path / "store" / "index.parquet").read_bytes() == before
    np.savez(tmp_path / "x.npz", spike_counts=recordings(1)[0])
    run("spikes", tmp_path / "x.npz", "--out", tmp_path / "nameless")
    for by, complaint in (("subject", "1 of 1 row name no subject"), ("session", "1 of 1 row name no session")):
        with pytest.raises(ConfigError, match=complaint):
            run("split", tmp_path / "nameless", "--by", by)
