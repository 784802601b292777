"""The ladder is fitted once for the data at hand, survives what can happen to its file, and says what it does not compare."""

import json
import os

import numpy as np
import pytest

from torchtitan_bio import resume
from torchtitan_bio.data import spikes
from torchtitan_bio.science import baselines, ladder


def write_recordings(folder, sessions, bins=60):
    """A recording of two neurons for each (split, session)."""
    for number, (split, session) in enumerate(sessions):
        counts = np.random.default_rng(number).poisson(0.7, (2, bins)).astype(np.uint8)
        path = folder / split / f"{session}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, spike_counts=counts, source_dataset="a", subject_id="s", session_id=session)


def build(folder, num_neurons="all"):
    source = {"source": str(folder), "seq_len": 24}
    return spikes.build(**source, num_neurons=num_neurons), spikes.build(**source, split="test", mode="aligned", overlap=True)


@pytest.fixture
def data(tmp_path):
    write_recordings(tmp_path, [("train", "one"), ("test", "one")])
    return build(tmp_path)


def a_score(held_out, bits_per_spike=0.5, windows=None):
    return {"step": 9, "bits_per_spike": bits_per_spike, "windows": windows or len(held_out)}


def shown(path, data, score):
    lines = []
    ladder.show(path, *data, score, lines.append)
    return lines


def rungs(lines):
    return [(line[2:46].strip(), float(line[46:])) for line in lines if line.startswith("  ")]


def no_fit(*_):
    raise AssertionError("the baselines were fitted again")


def test_the_model_stands_in_its_place_among_the_baselines(data, tmp_path):
    fitted = dict(baselines.ladder(*data))
    best = max(fitted, key=fitted.get)
    for value, side in ((fitted[best] + 0.25, "above"), (fitted[best] - 0.25, "below")):
        lines = shown(tmp_path / "ladder.json", data, a_score(data[1], value))
        table = rungs(lines)
        assert "held-out bits/spike" in lines
        assert [number for _, number in table] == sorted(number for _, number in table)
        assert dict(table) == pytest.approx(fitted | {"this model": value}, abs=5e-4)
        assert lines[-1] == f"this model is 0.250 bits/spike {side} the best baseline, {best}"


def test_a_second_look_fits_nothing_and_shows_the_same(data, tmp_path, monkeypatch):
    first = shown(tmp_path / "ladder.json", data, a_score(data[1]))
    monkeypatch.setattr(baselines, "ladder", no_fit)
    again = shown(tmp_path / "ladder.json", data, a_score(data[1]))
    assert again == first[-len(again) :] and len(rungs(again)) == 7
    assert not any(line.startswith("baselines:") for line in again) and first[0].startswith("baselines: fitting")


@pytest.mark.parametrize("split", ["train", "test"])
def test_changed_data_is_fitted_again_and_said_to_have_changed(data, tmp_path, split):
    path = tmp_path / "ladder.json"
    shown(path, data, a_score(data[1]))
    before = json.loads(path.read_text())["rungs"]
    write_recordings(tmp_path, [(split, "one")], bins=90)
    changed = build(tmp_path)
    lines = shown(path, changed, a_score(changed[1]))
    assert f"{'held_out' if split == 'test' else 'train'} num_counts: 120 -> 180" in lines[0]
    assert rungs(lines)[1:] != [] and json.loads(path.read_text())["rungs"] != before
    assert [list(rung) for rung in baselines.ladder(*changed)] == json.loads(path.read_text())["rungs"]


@pytest.mark.parametrize(
    "break_it",
    [
        lambda kept: "",
        lambda kept: json.dumps(kept)[:-40],
        lambda kept: json.dumps(kept["rungs"]),
        lambda kept: json.dumps(kept | {"rungs": [["a", "b"]]}),
        lambda kept: json.dumps(kept | {"train": None}),
        lambda kept: json.dumps({key: kept[key] for key in kept if key != "left_out"}),
        lambda kept: json.dumps(kept | {"left_out": ["a"]}),
        lambda kept: json.dumps(kept | {"version": ladder.VERSION + 1}),
        lambda kept: b"\xff\xfe",
    ],
    ids=[
        "empty",
        "torn",
        "before it had data",
        "words",
        "no fingerprint",
        "a key less",
        "no reasons",
        "a later version",
        "no text",
    ],
)
def test_a_file_that_is_no_ladder_is_made_anew(data, tmp_path, break_it):
    path = tmp_path / "ladder.json"
    expected = rungs(shown(path, data, a_score(data[1])))
    whole = path.read_bytes()
    broken = break_it(json.loads(whole))
    path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    lines = shown(path, data, a_score(data[1]))
    assert "fitting them again" in lines[0] and rungs(lines) == expected
    assert path.read_bytes() == whole


def test_a_write_that_fails_leaves_the_old_file_and_the_table_is_shown(data, tmp_path, monkeypatch):
    path = tmp_path / "ladder.json"
    path.write_text("old")

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    lines = shown(path, data, a_score(data[1]))
    assert len(rungs(lines)) == 7 and any("No space left" in line for line in lines)
    assert path.read_text() == "old" and not [file for file in os.listdir(tmp_path) if file.startswith(".")]


def test_a_score_of_some_windows_says_so(data, tmp_path):
    lines = shown(tmp_path / "ladder.json", data, a_score(data[1], windows=3))
    assert f"this model (3 of {len(data[1])} windows)" in dict(rungs(lines))
    assert any("validation.max_windows" in line for line in lines)


def test_held_out_recordings_without_training_data_of_their_session_are_told_also_from_the_file(tmp_path, monkeypatch):
    write_recordings(tmp_path, [("train", "one"), ("test", "one"), ("test", "two")])
    np.savez(tmp_path / "test" / "wide.npz", spike_counts=np.ones((30, 5), np.uint8))  # for no window, so for no model
    data = build(tmp_path)
    assert [name for name, _ in data[1].not_scored] == ["wide"]
    first = shown(tmp_path / "ladder.json", data, a_score(data[1]))
    monkeypatch.setattr(baselines, "ladder", no_fit)
    for lines in (first, shown(tmp_path / "ladder.json", data, a_score(data[1]))):
        assert "1 of 2 held-out recordings (two)" in lines[-1] and "no training data of their session" in lines[-1]
        name, best = rungs(lines)[-2]  # the model has 0.5, and more than any baseline
        assert lines[-2].startswith(
            f"this model's 0.500 bits/spike and the {best:.3f} of the best baseline, {name}, are of other"
        )
        assert not any("best baseline" in line and ("above" in line or "below" in line) for line in lines)


def test_with_no_session_in_common_the_model_stands_alone(tmp_path):
    write_recordings(tmp_path, [("train", "one"), ("test", "two")])
    data = build(tmp_path)
    lines = shown(tmp_path / "ladder.json", data, a_score(data[1]))
    assert rungs(lines) == [("this model", 0.5)] and not any("best baseline" in line for line in lines)
    assert "1 of 1 held-out recordings (two)" in lines[-1]


def test_a_model_trained_on_some_neurons_of_each_recording_stands_alone_and_is_told_why(tmp_path):
    write_recordings(tmp_path, [("train", "one"), ("test", "one")])
    data = build(tmp_path, num_neurons=1)
    lines = shown(tmp_path / "ladder.json", data, a_score(data[1], windows=3))
    assert rungs(lines) == [(f"this model (3 of {len(data[1])} windows)", 0.5)]
    assert "another number of neurons" in lines[-1] and "(data.num_neurons): 1 of 1 held-out recordings (one)" in lines[-1]
    assert not any("no training data" in line or "max_windows" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda score, held_out: None, "not been validated"),
        (lambda score, held_out: score | {"bits_per_spike": None}, "without a spike"),
        (lambda score, held_out: {"step": 9}, "without a spike"),
        (lambda score, held_out: score | {"held_out": "another"}, "other held-out data"),
    ],
    ids=["no validation", "no spike", "another score", "data changed since"],
)
def test_without_a_score_of_this_data_one_line_says_why_there_is_no_ladder(data, tmp_path, monkeypatch, change, word):
    monkeypatch.setattr(baselines, "ladder", no_fit)
    (line,) = shown(tmp_path / "ladder.json", data, change(a_score(data[1]), data[1]))
    assert "no ladder" in line and word in line


@pytest.mark.parametrize("held_out", [None, object()], ids=["nothing held out", "a family without a headline"])
def test_without_a_headline_one_line_says_that_there_is_no_ladder(data, tmp_path, held_out):
    (line,) = shown(tmp_path / "ladder.json", (data[0], held_out), {"step": 9})
    assert "no ladder" in line


def test_a_score_that_names_this_held_out_data_is_taken(data, tmp_path):
    score = a_score(data[1]) | {"held_out": resume.sha256(data[1].fingerprint)}
    assert ("this model", 0.5) in rungs(shown(tmp_path / "ladder.json", data, score))
