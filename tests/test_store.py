"""Prepared stores: the same samples as the files they were made of, the same bytes after a kill, and never half of one."""

import errno
import hashlib
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spike_files import build, recordings, same_samples, table, write_arrow

from torchtitan_bio.data import conversion, rows, spikes, store


def convert(sources, folder, tell=lambda row: None, **settings):
    sources = sources if isinstance(sources, list) else [sources]
    files = [file for source in sources for file in rows.find(str(source))]
    return conversion.convert(files, folder, conversion.Settings(**settings), tell=tell)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def hub_folder(path):
    """Two splits, in two forms of Arrow's types, with a ragged row, rows without a name and counts that are clipped."""
    matrices = [*recordings(9, seed=3), np.array([[0, 300, 254], [255, 1, 0]])]
    path.mkdir()
    bare = {name: None for name in ("subject_id", "session_id", "segment_id", "source_dataset")}
    pq.write_table(table([*matrices[:5], [[1, 2], [3]]], pa.list_(pa.list_(pa.int64()))), path / "train-00000-of-00002.parquet")
    pq.write_table(table(matrices[8:], pa.list_(pa.list_(pa.int64()))), path / "train-00001-of-00002.parquet")
    pq.write_table(table(matrices[5:8], **bare), path / "test-00000-of-00001.parquet")
    return path


SETTINGS = [
    {"mode": "stream"},
    {"mode": "stream", "num_neurons": 3},
    {"mode": "stream", "seq_len": 150, "cross_recordings": True},
    {"mode": "aligned"},
    {"mode": "aligned", "split_by": "time"},
    {"mode": "aligned", "split_by": "time", "split": "test"},
    {"mode": "stream", "split": "test"},
    {"mode": "legacy"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_store_gives_the_samples_of_its_files_bit_for_bit_under_the_same_fingerprint(tmp_path, settings):
    hub = hub_folder(tmp_path / "hub")
    convert(hub, tmp_path / "store", shard_bytes=300)
    of_files, of_store = (build(source, max_malformed_rows=1, **settings) for source in (hub, tmp_path / "store"))
    assert same_samples(of_store, of_files) and of_store.fingerprint == of_files.fingerprint
    assert of_store.clipped == of_files.clipped and of_store.malformed == of_files.malformed
    batches = [dataset.collate([dataset.sample(i) for i in range(3)]) for dataset in (of_files, of_store)]
    for name, of_file in batches[0].inputs.items():
        assert of_file is None or (batches[1].inputs[name] == of_file).all()
    for row in range(len(of_files.index)):
        assert (of_store.counts(row) == of_files.counts(row)).all()
    assert len(list((tmp_path / "store").glob("*.u8"))) > 3  # rows of several shards were read


def test_windows_of_many_blocks_and_widths_are_the_same_from_a_store(tmp_path):
    rng = np.random.default_rng(0)
    matrices = [rng.integers(0, 4, shape).astype(np.uint8) for shape in ((1, 3000), (300, 700), (40, 3000), (3000, 2), (7, 1))]
    write_arrow(tmp_path / "x.arrow", table(matrices))
    convert(tmp_path / "x.arrow", tmp_path / "store")
    for seq_len, mode in ((200_000, "stream"), (50_000, "aligned"), (77, "stream")):
        of_files, of_store = (build(tmp_path / name, seq_len=seq_len, mode=mode) for name in ("x.arrow", "store"))
        for i in np.linspace(0, len(of_files) - 1, 40).astype(int).tolist():
            assert (of_store.sample(i).tokens == of_files.sample(i).tokens).all()


def test_the_embedded_recording_an_npz_and_a_store_of_a_store_are_prepared_alike(tmp_path):
    convert("embedded:a2929", tmp_path / "store")
    convert(tmp_path / "store", tmp_path / "again", shard_bytes=1)
    matrix = recordings(1)[0]
    np.savez(tmp_path / "one.npz", spike_counts=matrix, subject_id="mouse")
    convert(tmp_path / "one.npz", tmp_path / "npz")
    for one, other, settings in (
        ("embedded:a2929", tmp_path / "store", {"split": "test"}),
        ("embedded:a2929", tmp_path / "again", {"split": "train"}),
        (tmp_path / "one.npz", tmp_path / "npz", {}),
    ):
        datasets = [build(source, seq_len=512 if settings else 32, **settings) for source in (one, other)]
        assert datasets[0].fingerprint == datasets[1].fingerprint and same_samples(*datasets)
    assert build(tmp_path / "store", seq_len=512).summary()["bin_width_s"] == 0.02


def test_a_store_travels_to_another_process_without_its_data(tmp_path):
    write_arrow(tmp_path / "x.arrow", table([np.ones((50, 4000), int)] * 4))
    convert(tmp_path / "x.arrow", tmp_path / "store")
    dataset = build(tmp_path / "store", seq_len=4096)
    dataset.sample(0)
    assert len(pickle.dumps(dataset)) < 20_000 and same_samples(pickle.loads(pickle.dumps(dataset)), dataset)


class Killed(Exception):
    pass


def kill_after(num_rows):
    told = []

    def tell(row):
        told.append(row)
        if len(told) == num_rows:
            raise Killed

    return tell


def tear_line(folder):
    with (folder / "rows.jsonl").open("ab") as journal:
        journal.write(b'{"name": "half a li')


def tear_row(folder):
    with max(folder.glob("*.u8")).open("ab") as shard:
        shard.write(b"bytes of a row that no line tells of")


def lose_bytes(folder):
    """What a power cut may leave: the length of what was written, and zeros in it."""
    shard = max(path for path in folder.glob("*.u8") if path.stat().st_size)
    content = shard.read_bytes()
    shard.write_bytes(content[:-5] + bytes(5))


def lose_shard(folder):
    max(folder.glob("*.u8")).unlink()


@pytest.mark.parametrize("damage", [None, tear_line, tear_row, lose_bytes, lose_shard])
def test_a_conversion_killed_after_any_row_and_given_again_has_every_byte_of_the_straight_one(tmp_path, damage):
    hub = hub_folder(tmp_path / "hub")
    settings = {"shard_bytes": 400, "order": "rate"}
    straight = convert(hub, tmp_path / "straight", **settings)
    for num_rows in (1, 6, 7, 11):
        folder = tmp_path / f"killed-{num_rows}"
        with pytest.raises(Killed):
            convert(hub, folder, kill_after(num_rows), **settings)
        if damage:
            damage(folder)
        with pytest.raises(ValueError, match="is not finished.*same command"):
            build(folder)
        told = []
        assert convert(hub, folder, told.append, **settings) == straight and len(told) == 11
        assert contents(folder) == contents(tmp_path / "straight")


@pytest.mark.slow
def test_a_conversion_killed_by_the_system_goes_on(tmp_path):
    write_arrow(tmp_path / "x.arrow", table(recordings(60)))
    script = (
        "import time, sys; from test_store import convert\n"
        f"convert({str(tmp_path / 'x.arrow')!r}, {str(tmp_path / 'killed')!r}, lambda row: time.sleep(0.05), shard_bytes=500)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)})
    journal, deadline = tmp_path / "killed" / "rows.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ValueError, match="another process is making"):
        convert(tmp_path / "x.arrow", tmp_path / "killed", shard_bytes=500)
    child.kill()
    assert child.wait() == -9
    for name in ("killed", "straight"):
        convert(tmp_path / "x.arrow", tmp_path / name, shard_bytes=500)
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")


def test_a_finished_conversion_given_again_changes_nothing(tmp_path):
    hub = hub_folder(tmp_path / "hub")
    made, before = convert(hub, tmp_path / "store"), contents(tmp_path / "store")
    assert convert(hub, tmp_path / "store", kill_after(1)) == made and contents(tmp_path / "store") == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_sources_or_settings_into_the_same_folder_are_refused_and_touch_nothing(tmp_path, finished):
    hub, store_folder = hub_folder(tmp_path / "hub"), tmp_path / "store"
    np.savez(tmp_path / "one.npz", spike_counts=recordings(1)[0])
    if finished:
        convert(hub, store_folder)
    else:
        with pytest.raises(Killed):
            convert(hub, store_folder, kill_after(3))
    before = contents(store_folder)
    for sources, settings, complaint in (
        ([hub, tmp_path / "one.npz"], {}, r"one\.npz is new"),
        (tmp_path / "one.npz", {}, r"train-00000-of-00002\.parquet is gone"),
        (hub, {"order": "rate"}, "order was given and is now rate"),
        (hub, {"bin_width_s": 0.05}, "bin_width_s was nothing and is now 0.05"),
    ):
        with pytest.raises(ValueError, match=f"is a store of something else.*{complaint}"):
            convert(sources, store_folder, **settings)
    assert contents(store_folder) == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "one.npz", spike_counts=recordings(1)[0])
    with pytest.raises(ValueError, match=r"holds something else, one\.npz for instance"):
        convert(tmp_path / "one.npz", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file cannot be written"):
        convert(tmp_path / "one.npz", tmp_path / "file")


def test_a_full_disk_is_told_and_the_same_command_goes_on_when_there_is_room(tmp_path, monkeypatch):
    hub = hub_folder(tmp_path / "hub")
    convert(hub, tmp_path / "straight")
    write = conversion._Begun._write

    def write_until_full(self, counts, clipped):
        if len(self.rows) == 4:
            self.out.write(b"as much as there is room for")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, counts, clipped)

    with monkeypatch.context() as patched:
        patched.setattr(conversion._Begun, "_write", write_until_full)
        with pytest.raises(ValueError, match="store cannot be written.*No space left.*same command goes on"):
            convert(hub, tmp_path / "store")
    convert(hub, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "straight")


def test_a_store_that_was_copied_in_part_is_refused_and_one_inside_a_folder_of_files_is_named(tmp_path):
    hub = hub_folder(tmp_path / "hub")
    convert(hub, tmp_path / "store")
    (shard,) = (tmp_path / "store").glob("*.u8")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=rf"shard-00000.u8 cannot be read: it has {len(content) - 1:,} bytes .* {len(content):,}"
    ):
        build(tmp_path / "store", split="test")
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00000.u8 cannot be read: .*No such file"):
        build(tmp_path / "store", split="test")
    with pytest.raises(ValueError, match="store is a prepared store inside"):
        build(tmp_path)
    (tmp_path / "store" / "prepared.json").write_text('{"format": "torchtitan_bio store 0"}')
    with pytest.raises(ValueError, match="format is 'torchtitan_bio store 0', and this version reads"):
        build(tmp_path / "store")


def test_malformed_rows_stay_in_a_store_and_are_bounded_as_in_the_files(tmp_path):
    hub = hub_folder(tmp_path / "hub")
    made = convert(hub, tmp_path / "store")
    assert made["files"][0]["malformed"] == [["lab2/mouse1/1/s5", "ragged: its neurons have from 1 to 2 bins"]]
    messages = []
    for source in (hub, tmp_path / "store"):
        with pytest.raises(ValueError, match="1 malformed of 8 rows, data.max_malformed_rows=0") as caught:
            build(source)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def sessions(path):
    """Three rows of one session, one of another, one that names none."""
    rng = np.random.default_rng(5)
    matrices = [rng.poisson(rng.gamma(1, 1, (6, 1)), (6, bins)) for bins in (40, 30, 20, 50, 25)]
    columns = {"subject_id": ["m", "m", "m", "m", ""], "session_id": ["1", "1", "1", "2", ""], "source_dataset": ["lab"] * 5}
    pq.write_table(table(matrices, **columns), path)
    return matrices


def orders(folder):
    return [None if order is None else np.array(order) for order in store.read_table(folder)["order"].to_pylist()]


def test_the_most_active_neurons_come_first_in_a_sessions_first_row_and_keep_their_places_in_the_others(tmp_path):
    matrices = sessions(tmp_path / "x.parquet")
    convert(tmp_path / "x.parquet", tmp_path / "store", order="rate")
    reordered, found = build(tmp_path / "store"), orders(tmp_path / "store")
    for row, first in enumerate((0, 0, 0, 3, 4)):
        expected = np.argsort(-matrices[first].sum(1), kind="stable")
        assert (found[row] == expected).all() and (reordered.counts(row) == matrices[row][expected]).all()
        assert (reordered.counts(row)[np.argsort(found[row])] == matrices[row]).all()  # undone
    plain = build(tmp_path / "x.parquet")
    assert {key for key in plain.fingerprint if plain.fingerprint[key] != reordered.fingerprint[key]} == {
        "ids, shapes and counts"
    }


def test_an_order_is_undone_and_composed_by_converting_the_store_again(tmp_path):
    sessions(tmp_path / "x.parquet")
    (tmp_path / "order.txt").write_text("5, 3 1\n0 2 4")
    convert(tmp_path / "x.parquet", tmp_path / "plain")
    convert(tmp_path / "x.parquet", tmp_path / "rate", order="rate")
    convert(tmp_path / "rate", tmp_path / "undone", order="original")
    convert(tmp_path / "rate", tmp_path / "kept")
    for listed in ("plain", "rate"):
        convert(tmp_path / listed, tmp_path / f"{listed}-listed", order=str(tmp_path / "order.txt"))
    shards = {path.name: (path / "shard-00000.u8").read_bytes() for path in tmp_path.iterdir() if path.is_dir()}
    assert shards["undone"] == shards["plain"] != shards["rate"] == shards["kept"]
    assert shards["plain-listed"] == shards["rate-listed"] and orders(tmp_path / "undone") == [None] * 5
    assert all((order == [5, 3, 1, 0, 2, 4]).all() for order in orders(tmp_path / "rate-listed"))
    assert build(tmp_path / "undone").fingerprint == build(tmp_path / "x.parquet").fingerprint
    for text, complaint in {
        "0 1": "has 6 neurons, and .*order.txt orders 2",
        "0 1 1": "expected the whole numbers 0 to 2",
    }.items():
        (tmp_path / "order.txt").write_text(text)
        with pytest.raises(ValueError, match=complaint):
            convert(tmp_path / "plain", tmp_path / f"refused-{len(text)}", order=str(tmp_path / "order.txt"))


def test_what_a_store_says_of_its_origin_is_true_and_names_no_place(tmp_path):
    hub = hub_folder(tmp_path / "hub")
    made = convert(hub, tmp_path / "store", bin_width_s=0.05)
    for of_file in made["files"]:
        content = (hub / of_file["file"]).read_bytes()
        assert of_file["sha256"] == hashlib.sha256(content).hexdigest() and of_file["bytes"] == len(content)
    assert [of_file["clipped"] for of_file in made["files"]] == [0, 2, 0] and made["clipped"] == 2
    assert made == json.loads((tmp_path / "store" / "provenance.json").read_text()) and made["bin_width_s"] == 0.05
    for path in (tmp_path / "store").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    for line in store.read_table(tmp_path / "store").to_pylist():
        if not line["fault"]:
            begin, end = line["offset"], line["offset"] + line["n"] * line["t"]
            stored = (tmp_path / "store" / f"shard-{line['shard']:05d}.u8").read_bytes()[begin:end]
            assert line["sha256"] == hashlib.sha256(stored).hexdigest()


def test_only_one_bin_of_a_store_is_read_for_one_bin(tmp_path):
    """A view of the mapped file: nothing is copied, nothing may be written."""
    convert("embedded:a2929", tmp_path / "store")
    dataset = spikes.build(source=str(tmp_path / "store"), seq_len=512)
    block = dataset.store.block(dataset.index, 1, 7, 8)
    assert not block.flags.owndata and not block.flags.writeable and block.T.flags.c_contiguous
    assert dataset.store.bin_width_s == 0.02
