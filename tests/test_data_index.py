"""What is known of recordings without reading them again: the index on disk, and the fingerprint that a resume compares."""

import json
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spike_files import build, recordings, same_samples, table, write_arrow

from torchtitan_bio.data import recordings as recordings_module
from torchtitan_bio.data import sources


def test_a_fingerprint_differs_in_the_entry_that_changed_and_not_with_the_place_of_the_files(tmp_path):
    matrices = recordings(6)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        pq.write_table(table(matrices), tmp_path / name / "x.parquet")
    pq.write_table(table([*matrices, matrices[0]]), tmp_path / "longer.parquet")
    base = build(tmp_path / "here").fingerprint
    assert build(tmp_path / "there").fingerprint == base and json.loads(json.dumps(base)) == base

    def changed(source="here", **settings):
        other = build(tmp_path / source, **settings).fingerprint
        return {key for key in base if base[key] != other[key]}

    assert changed("longer.parquet") == {"ids, shapes and counts", "num_rows", "num_counts"}
    assert changed(seq_len=33) == {"seq_len"} and changed(seed=2) == {"seed"} and changed(shuffle_rows=2) == {"shuffle_rows"}
    assert changed(mode="legacy") == {"mode", "shuffle_rows"} and changed(num_neurons=2) == {"num_neurons"}
    aligned = [build(tmp_path / "here", mode="aligned", shuffle_rows=rows).fingerprint for rows in (256, 2)]
    assert {key for key in base if aligned[0][key] != aligned[1][key]} == {"shuffle_rows"}
    assert changed(source_weights={"lab1": 2.0}) == {"source_weights"}
    assert changed(exclude_sources=["lab1"]) == {"ids, shapes and counts", "num_rows", "num_counts", "exclude_sources"}
    many = [f"lab[{'0' * i}0-9]" for i in range(200)]
    assert len(json.dumps(build(tmp_path / "here", include_sources=many).fingerprint)) < 1000


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64()])
def test_a_checksum_is_of_the_counts_as_they_are_read(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(recordings_module, "CHECKSUM_COUNTS", 7)  # so that a row takes several rounds
    matrices = [*recordings(5), np.array([[0, 255, 254]])]
    pq.write_table(table(matrices, pa.list_(pa.list_(kind))), tmp_path / "x.parquet")
    expected = [zlib.crc32(np.minimum(matrix, 254).astype(np.uint8).tobytes()) for matrix in matrices]
    assert build(tmp_path / "x.parquet").index.checksum.tolist() == expected


def test_other_counts_of_the_same_shapes_or_other_names_of_sources_are_another_fingerprint(tmp_path):
    names = {"identifier": list("abcdef")}
    matrices = recordings(6)
    swapped = [*matrices[:3], matrices[3][:, ::-1] + 1, *matrices[4:]]
    pq.write_table(table(matrices, **names), tmp_path / "x.parquet")
    pq.write_table(table(swapped, **names), tmp_path / "y.parquet")
    pq.write_table(table(matrices, **names, source_dataset=[f"lab{i % 2}" for i in range(6)]), tmp_path / "z.parquet")
    base, *others = (build(tmp_path / f"{name}.parquet").fingerprint for name in "xyz")
    for other in others:
        assert {key for key in base if base[key] != other[key]} == {"ids, shapes and counts"}


def test_an_index_left_on_disk_is_read_and_a_changed_file_makes_a_new_one(tmp_path, monkeypatch):
    matrices, file, folder = recordings(6), tmp_path / "x.arrow", tmp_path / "index"
    write_arrow(file, table(matrices))
    first = build(file, index_folder=folder)
    assert len(list(folder.iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(recordings_module, "_scan", None)  # nobody may look at the data again,
        patched.setattr(sources, "write_whole", None)  # or write, as where the folder is read-only
        again = build(file, index_folder=folder)
        assert same_samples(again, first) and again.fingerprint == first.fingerprint
    size = file.stat().st_size
    write_arrow(file, table([matrix + 1 for matrix in matrices]))
    os.utime(file, ns=(0, 10**18))
    changed = build(file, index_folder=folder)
    assert file.stat().st_size == size and (changed.counts(2) == matrices[2] + 1).all()
    assert (
        changed.fingerprint["ids, shapes and counts"] != first.fingerprint["ids, shapes and counts"]
        and len(list(folder.iterdir())) == 2
    )


@pytest.mark.parametrize("rows", [range(1), range(30, 50), range(79, 80)])
def test_other_data_under_one_name_size_and_time_has_an_index_of_its_own(tmp_path, rows):
    matrices = [np.ones((50, 200), np.int64) for _ in range(80)]
    sets = [matrices, [matrix + 400 * (i in rows) for i, matrix in enumerate(matrices)]]
    built = []
    for name, content in zip(("one", "other"), sets, strict=True):
        (tmp_path / name).mkdir()
        write_arrow(tmp_path / name / "train.arrow", table(content, pa.list_(pa.list_(pa.int64()))), max_rows=10)
        os.utime(tmp_path / name / "train.arrow", ns=(0, 0))
        built.append(build(tmp_path / name, index_folder=tmp_path / "index"))
    one, other = built
    assert one.store.files[0].stat().st_size == other.store.files[0].stat().st_size > 4 * sources.END_BYTES
    assert not one.clipped and sum(other.clipped.values()) == len(rows) * 50 * 200 and (other.counts(rows[0]) == 254).all()
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    build(tmp_path / "elsewhere", index_folder=tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 2  # the same data in another place needs no third


@pytest.mark.parametrize("number", [np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_wide_counts_are_never_wrapped_even_if_the_index_knows_of_none_to_clip(number):
    counts = np.array([[0, 254, 255, 256], [300, 511, 32767, 1]], number)
    stored = counts.copy()
    for clipped in (0, 5):
        read = recordings_module.decode(counts[:, 1:], clipped)
        assert read.dtype == np.uint8 and read.tolist() == [[254, 254, 254], [254, 254, 1]]
    assert (counts == stored).all()
    if number in (np.int16, np.int32, np.int64):
        assert recordings_module.decode(np.array([-1], number), 0).tolist() == [0]  # and not the separator


def test_two_that_build_at_once_each_leave_a_whole_index_that_others_may_read(tmp_path, monkeypatch):
    file, folder = tmp_path / "x.arrow", tmp_path / "index"
    write_arrow(file, table(recordings(6)))
    write_index, during = recordings_module.write_index, []

    def write_while_another_builds(index, path):
        if not during:
            Path(path).write_bytes(b"half")
            during.append(None)
            during[0] = build(file, index_folder=folder), [path.read_bytes() for path in folder.glob("index-*.parquet")]
            assert Path(path).read_bytes() == b"half"  # theirs went elsewhere
        write_index(index, path)

    monkeypatch.setattr(recordings_module, "write_index", write_while_another_builds)
    ours = build(file, index_folder=folder)
    theirs, left = during[0]
    assert ours.fingerprint == theirs.fingerprint and same_samples(ours, theirs)
    (index,) = folder.iterdir()
    assert [index.read_bytes()] == left
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert index.stat().st_mode == ordinary.stat().st_mode


def test_a_scan_that_fails_leaves_no_index(tmp_path, monkeypatch):
    file, folder = tmp_path / "x.arrow", tmp_path / "index"
    write_arrow(file, table(recordings(6)))
    with monkeypatch.context() as patched:
        patched.setattr(recordings_module, "_scan", None)
        with pytest.raises(TypeError):
            build(file, index_folder=folder)
    assert not list(folder.iterdir())
    assert len(build(file, index_folder=folder).index) == 6


def test_an_index_folder_that_cannot_be_written_is_refused_before_the_data_is_read(tmp_path, monkeypatch):
    write_arrow(tmp_path / "x.arrow", table(recordings(6)))
    (tmp_path / "file").touch()
    monkeypatch.setattr(recordings_module, "_scan", None)
    with pytest.raises(ValueError, match=r"file/index cannot be written .*Set data\.index_folder"):
        build(tmp_path / "x.arrow", index_folder=str(tmp_path / "file" / "index"))


def test_the_index_of_small_files_is_kept_only_where_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_arrow(tmp_path / "x.arrow", table(recordings(6)))
    build(tmp_path / "x.arrow", index_folder="")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    build(tmp_path / "x.arrow", index_folder="")
    assert len(list((tmp_path / "cache" / "torchtitan_bio").iterdir())) == 1


def test_large_parquet_is_turned_into_mapped_arrow_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    data = table(recordings(20))
    pq.write_table(data, tmp_path / "x.parquet", row_group_size=7)
    write_arrow(tmp_path / "x.arrow", data)
    folder = tmp_path / "cache"
    dataset = build(tmp_path / "x.parquet", index_folder=folder)
    assert same_samples(dataset, build(tmp_path / "x.arrow", index_folder=tmp_path / "other"))
    assert sorted(file.suffix for file in folder.iterdir()) == [".arrow", ".parquet"]
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", None)
    assert same_samples(dataset, build(tmp_path / "x.parquet", index_folder=folder))


def test_a_dataset_travels_to_another_process_without_its_data(tmp_path):
    write_arrow(tmp_path / "x.arrow", table([np.ones((50, 4000), int)] * 4))
    dataset = build(tmp_path / "x.arrow", seq_len=4096)
    dataset.sample(0)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000
    assert same_samples(pickle.loads(pickled), dataset)
