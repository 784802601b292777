"""What a dataset tells the world of itself: sums that are right, and no place, recording or person."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from spike_files import build, recordings, table

from torchtitan_bio.data import summary


def plain_sums(matrices, columns, rows, crop=None):
    """The same figures by a loop over the matrices themselves."""
    neurons = [matrices[row].shape[0] for row in rows]
    used = [n if crop is None else min(n, crop) for n in neurons]
    bins = [matrices[row].shape[1] for row in rows]
    sources, subjects, sessions = (columns[name] for name in ("source_dataset", "subject_id", "session_id"))
    return {
        "recordings": len(rows),
        "counts": sum(n * t for n, t in zip(used, bins, strict=True)),
        "tokens": sum((n + 1) * t for n, t in zip(used, bins, strict=True)),
        "neurons": [min(neurons), max(neurons)],
        "subjects": len({(sources[row], subjects[row]) for row in rows if subjects[row]}),
        "sessions": len({(sources[row], subjects[row], sessions[row]) for row in rows if sessions[row]}),
        "clipped": sum(int((matrices[row] > 254).sum()) for row in rows),
    }


@pytest.mark.parametrize("crop", [None, 3])
def test_a_summary_equals_plain_sums_over_the_recordings_and_reads_no_count(tmp_path, monkeypatch, crop):
    matrices = recordings(9)
    matrices[4] = np.full((2, 7), 255)
    columns = {
        "source_dataset": ["a", "b", "a", "", "b", "a", "c", "c", "a"],
        "subject_id": ["m1", "m1", "m1", "", "m2", "m2", "m1", "", "m1"],
        "session_id": ["s1", "s1", "s1", "", "s1", "s1", "s2", "", "s2"],
    }
    pq.write_table(table(matrices, **columns), tmp_path / "x.parquet")
    dataset = build(tmp_path / "x.parquet", **({"num_neurons": crop} if crop else {}))
    monkeypatch.setattr(type(dataset.store), "block", None)
    found = json.loads(json.dumps(dataset.summary()))
    assert found["source"] == "x.parquet" and found["split_by"] == "given" and found["split"] == "train"
    assert found["bin_width_s"] is None and found["num_sources"] == 4 and found["num_neurons"] == (crop or "all")
    expected = plain_sums(matrices, columns, range(9), crop)
    assert {key: found[key] for key in expected} == expected and expected["clipped"] == 14
    for of in found["sources"]:
        rows = [row for row, name in enumerate(columns["source_dataset"]) if name == of["source_dataset"]]
        assert {key: value for key, value in of.items() if key != "source_dataset"} == plain_sums(matrices, columns, rows, crop)
    tokens = [of["tokens"] for of in found["sources"]]
    assert len(tokens) == 4 and tokens == sorted(tokens, reverse=True)


def test_what_is_left_out_is_counted_and_not_named(tmp_path):
    matrices = [*recordings(3), [[1, 2], [3]], np.ones((40, 5), int)]
    pq.write_table(table(matrices), tmp_path / "x.parquet")
    found = build(tmp_path, mode="aligned", max_malformed_rows=1).summary()
    assert (found["malformed"], found["too_wide"], found["recordings"]) == (1, 1, 4)
    assert "mouse" not in json.dumps(found) and str(tmp_path.parent) not in json.dumps(found)


def test_of_more_than_200_sources_the_smaller_ones_are_one_row(tmp_path):
    matrices = [np.zeros((2, 3 + row), int) for row in range(230)]
    pq.write_table(table(matrices, source_dataset=[f"lab{row}" for row in range(230)]), tmp_path / "x.parquet")
    found = build(tmp_path).summary()
    *_, last, rest = found["sources"]
    assert found["num_sources"] == 230 and len(found["sources"]) == 201
    assert (last["source_dataset"], rest["source_dataset"], rest["recordings"]) == ("lab30", "(30 smaller ones)", 30)
    assert rest["tokens"] == sum(3 * (3 + row) for row in range(30))
    assert sum(of["tokens"] for of in found["sources"]) == found["tokens"]


def test_only_an_embedded_recording_knows_its_bin_width():
    assert build("embedded:a2929").summary()["bin_width_s"] == 0.02
    generated = build("ring-hmm:n=2..5,rows=8").summary()
    assert (generated["source"], generated["bin_width_s"], generated["recordings"]) == ("ring-hmm:n=2..5,rows=8", None, 8)


@pytest.mark.parametrize(
    "source, name",
    {
        "embedded:a2929": "embedded:a2929",
        "ring-hmm:n=8,K=16,p=0.1": "ring-hmm:n=8,K=16,p=0.1",
        "eminorhan/neural-pile-primate": "eminorhan/neural-pile-primate",
        "/scratch/lab/primate pile": "primate pile",
        "data/mine.npz": "mine.npz",
        "./data/../mine/": "mine",
        "C:\\Users\\someone\\pile": "pile",
        "s3://bucket/pile": "pile",
        "someone@host:/pile": "pile",
        "/home/someone": "",
        "C:\\Users\\someone": "",
        "~someone": "",
        "someone@host:pile": "",
        "embedded:/home/someone": "",
        ".": "",
    }.items(),
)
def test_a_source_is_named_without_its_place_or_owner(source, name):
    assert summary.public_name(source) == name


def test_a_folder_that_looks_like_a_name_on_the_hub_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "someone" / "pile").mkdir(parents=True)
    assert summary.public_name("someone/pile") == "someone/pile"
    monkeypatch.chdir(tmp_path)
    assert summary.public_name("someone/pile") == "pile"
