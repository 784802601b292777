"""Files as they are found: unreadable ones named, Hugging Face's cache and saved data sets read as they stand."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from spike_files import build, recordings, table, write_arrow

from torchtitan_bio import exits
from torchtitan_bio.config import ConfigError


def truncated(path, keep=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def npy(path):
    with path.open("wb") as file:
        np.save(file, np.ones((2, 3), np.uint8))


UNREADABLE = {
    "cut.parquet": lambda path: (pq.write_table(table(recordings(9)), path), truncated(path)),
    "text.parquet": lambda path: path.write_text("spike_counts"),
    "schema.parquet": lambda path: pq.write_table(pa.table({"spikes": [1]}), path),
    "cut_stream.arrow": lambda path: (write_arrow(path, table(recordings(9))), truncated(path)),
    "cut_file.arrow": lambda path: (write_arrow(path, table(recordings(9)), pa.ipc.new_file), truncated(path)),
    "empty.arrow": lambda path: path.touch(),
    "schema.arrow": lambda path: write_arrow(path, pa.table({"spikes": [1]})),
    "text.npz": lambda path: path.write_text("spike_counts"),
    "npy.npz": npy,
    "empty.npz": lambda path: path.touch(),
    "cut.npz": lambda path: (np.savez(path, spike_counts=np.ones((30, 30), int)), truncated(path)),
    "objects.npz": lambda path: np.savez(path, spike_counts=np.array([{}, None])),
    "link.npz": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_as_the_users_to_mend(tmp_path, monkeypatch, name, in_memory):
    monkeypatch.setattr("torchtitan_bio.data.sources.IN_MEMORY_BYTES", 2**26 if in_memory else 0)
    (tmp_path / "data").mkdir()
    UNREADABLE[name](tmp_path / "data" / name)
    with pytest.raises(ConfigError) as caught, exits.blaming_the_input():
        build(tmp_path / "data", index_folder=None if in_memory else tmp_path / "index")
    message = str(caught.value)
    assert f"{tmp_path / 'data' / name} cannot be read: " in message and "pickle" not in message
    assert message.count("cannot be read") == 1


def test_a_file_or_folder_without_permission_is_named_and_not_passed_over(tmp_path, monkeypatch):
    """Tests may run as root, whom nothing is forbidden: the system is made to refuse."""
    (tmp_path / "more").mkdir()
    for file in (tmp_path / "x.parquet", tmp_path / "more" / "y.parquet"):
        pq.write_table(table(recordings(3)), file)

    def refusing(call, forbidden):
        def guarded(path, *rest, **named):
            if str(path) == str(forbidden):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *rest, **named)

        return guarded

    for owner, name, forbidden in (
        (pq, "read_table", tmp_path / "x.parquet"),
        (os, "scandir", tmp_path / "more"),
        (Path, "exists", tmp_path),
    ):
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=f"^{tmp_path}.* cannot be read: .*denied"):
            patched.setattr(owner, name, refusing(getattr(owner, name), forbidden))
            build(tmp_path)


def test_objects_beside_the_counts_of_an_npz_do_no_harm(tmp_path):
    np.savez(tmp_path / "x.npz", spike_counts=np.ones((2, 3), int), settings=np.array({"a": 1}), subject_id="mouse")
    assert build(tmp_path / "x.npz").index.subject_id == ["mouse"]


def test_counts_stored_as_floats_are_refused_with_the_cast_that_mends_them(tmp_path):
    for counts, advice in {
        ((0.0, 255.0),): r"spike_counts.astype\(np.uint8\)\nMend them$",
        ((0.0, 256.0),): r"spike_counts.astype\(np.uint16\)\nMend them$",
        ((False, True),): r"spike_counts.astype\(np.uint8\)\nMend them$",
        ((0.5, 1.0),): r"float64 \(1, 2\), expected \(neurons, bins\)\nMend them$",
        ((float("nan"), 1.0),): r"float64 \(1, 2\), expected \(neurons, bins\)\nMend them$",
        ((float("inf"), 1.0),): r"float64 \(1, 2\), expected \(neurons, bins\)\nMend them$",
        ((-1.0, 1.0),): r"float64 \(1, 2\), expected \(neurons, bins\)\nMend them$",
    }.items():
        np.savez(tmp_path / "x.npz", spike_counts=np.array(counts))
        with pytest.raises(ValueError, match=r"1 malformed of 1 row, data\.max.*\n.*" + advice):
            build(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", spike_counts=np.array([[1]]))
    with pytest.raises(ValueError, match="leave them out with data.max_malformed_rows=1$"):
        build(tmp_path)


def test_a_hugging_face_data_set_is_read_from_the_cache_and_its_absence_names_the_download(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", None)  # any connection fails
    with pytest.raises(ValueError, match=r"""python -c "from datasets import load_dataset; load_dataset\('lab/pile'\)"""):
        build("lab/pile")
    matrices = recordings(5)
    for split, rows in {"train": [0, 1, 2], "test": [3, 4]}.items():
        pq.write_table(table(matrices).take(rows), tmp_path / f"{split}-0.parquet")
    files = {split: str(tmp_path / f"{split}-0.parquet") for split in ("train", "test")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    # What load_dataset("lab/pile") leaves is named after the data set: the same files under another name.
    made = next((tmp_path / "made").glob("parquet/*/*/*/dataset_info.json"), None) or next(
        (tmp_path / "made").rglob("dataset_info.json")
    )
    target = tmp_path / "cache" / "lab___pile" / "default" / "0.0.0" / "0123abcd"
    shutil.copytree(made.parent, target)
    for file in target.glob("*.arrow"):
        file.rename(target / file.name.replace("parquet-", "pile-"))
    info = json.loads((target / "dataset_info.json").read_text())
    info["config_name"] = "default"
    info["dataset_name"] = "pile"
    (target / "dataset_info.json").write_text(json.dumps(info))
    dataset = build("lab/pile", split="test")
    assert dataset.index.segment_id == ["s3", "s4"] and (dataset.counts(1) == matrices[4]).all()
    assert dataset.store.files[0].suffix == ".arrow"


def test_a_data_set_saved_to_disk_is_read_as_it_stands(tmp_path):
    datasets = pytest.importorskip("datasets")
    matrices = recordings(5)
    saved = datasets.Dataset.from_dict({"spike_counts": [matrix.tolist() for matrix in matrices], "identifier": list("abcde")})
    datasets.DatasetDict(train=saved.select([0, 1, 2]), test=saved.select([3, 4])).save_to_disk(str(tmp_path / "saved"))
    assert build(tmp_path / "saved").index.id == ["a", "b", "c"]
    assert (build(tmp_path / "saved", split="test").counts(0) == matrices[3]).all()


def test_what_map_leaves_beside_a_saved_data_set_is_not_read_as_data(tmp_path):
    datasets = pytest.importorskip("datasets")
    matrices = recordings(5)
    made = datasets.Dataset.from_dict({"spike_counts": [matrix.tolist() for matrix in matrices], "identifier": list("abcde")})
    parts = datasets.DatasetDict(train=made.select([0, 1, 2]), test=made.select([3, 4]))
    parts.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1})
    datasets.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"more": 1})
    assert len(list((tmp_path / "saved" / "train").glob("*.arrow"))) == 3
    dataset = build(tmp_path / "saved")
    assert dataset.index.id == ["a", "b", "c"] and build(tmp_path / "saved", split="test").index.id == ["d", "e"]
    assert build(tmp_path / "saved" / "train").index.id == ["a", "b", "c"]
    (line,) = [line for line in dataset.report() if "left out" in line]
    assert line.startswith("data: 2 files are left out: ") and line.count("cache-") == 2 and line.count("state.json") == 2
    next((tmp_path / "saved" / "test").glob("data-*")).unlink()
    with pytest.raises(ValueError, match=r"test/data-00000-of-00001.arrow cannot be read: .*No such file"):
        build(tmp_path / "saved", split="test")


def test_leftovers_of_datasets_are_skipped_by_name_where_nothing_lists_the_data(tmp_path):
    names = ["pile-train.arrow", "cache-1f/own.arrow", "cache-0123456789abcdef.arrow", "tmpab_12xyz.arrow"]
    names += ["cache-0123456789abcdef_00000_of_00004.arrow", "half.incomplete/pile-train.arrow"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_arrow(tmp_path / name, table([np.full((2, 3), number)], segment_id=[name]))
    (tmp_path / "state.json").write_text('{"of another": "program"}')
    dataset = build(tmp_path)
    assert set(dataset.index.segment_id) == set(names[:2])
    assert "data: 4 files are left out: " in dataset.report()[1]
    assert build(tmp_path / names[2]).index.segment_id == [names[2]]  # by its name it is read
    for name in names[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"expected \.parquet.*files; .*cache-0123456789abcdef.arrow is not read: by its name"):
        build(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [')
    with pytest.raises(ValueError, match=f"^{tmp_path}/state.json cannot be read"):
        build(tmp_path)
