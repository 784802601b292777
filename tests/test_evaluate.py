"""evaluate.py from checkpoint to numbers: the same on any number of ranks, those of the run's own validation."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from small_llama import SMALL, lively
from toy_checkpoints import flip_a_bit

import dcp_to_llama
import evaluate
import train
from torchtitan_bio import assembly, bridge, config_loader, distributed, resume
from torchtitan_bio.checkpoint import Checkpointer
from torchtitan_bio.config import Config, ConfigError, Data, Parallelism, Training
from torchtitan_bio.data import spikes
from torchtitan_bio.models.llama3 import Model
from torchtitan_bio.science import baselines, contamination, drawing, evaluation, score_plots
from torchtitan_bio.science.scores import SpikeScores

ARCHITECTURE = dataclasses.replace(SMALL, num_layers=2, vocab_size=256, rope_theta=77.0, rope_scaling_factor=4.0)
SOURCE = "ring-hmm:n=3,K=8,bins=50,rows=40,test_rows=12"
SEQ_LEN = 64  # 16 bins
FORECAST = "--rollouts 3 --prompts 5 --horizon 2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two steps of a model that was never trained, of a run on eight ranks."""
    folder, world = tmp_path_factory.mktemp("run"), distributed.start()
    model = lively(Model(ARCHITECTURE))
    config = Config(
        data=Data(source=SOURCE),
        training=Training(seq_len=SEQ_LEN, local_batch_size=3, global_batch_size=24),
        parallelism=Parallelism(data_parallel_shard_degree=8),
    )
    identity = {"family": "llama3", "flavor": "small", "architecture": dataclasses.asdict(ARCHITECTURE)}
    fingerprint = spikes.build(source=SOURCE, seq_len=SEQ_LEN).fingerprint
    common = {"global_batch_size": 24, "seq_len": SEQ_LEN, "skipped_in_a_row": 0, "fingerprint": fingerprint}
    state = resume.train_state(5, **common, config=dataclasses.asdict(config))
    checkpoints = Checkpointer(folder / "checkpoint", world=world)
    for step in (3, 5):
        checkpoints.save(step, model, torch.optim.AdamW(model.parameters()), state, identity)
        with torch.no_grad():
            model.norm.weight.mul_(1.5)
    (folder / "config.toml").write_text(config_loader.dump(config))
    distributed.stop()
    return folder


def evaluated(checkpoint, out, *words):
    flags, rest = evaluate.read_own_flags(["--checkpoint", str(checkpoint), "--out", str(out), *map(str, words)])
    evaluate.main(config_loader.load(rest), flags)
    return json.loads((Path(out) / "evaluation.json").read_text())


def on_a_rank(rank, checkpoint, out, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "stop", lambda: None)  # the group is used again
        flags, rest = evaluate.read_own_flags(["--checkpoint", str(checkpoint), "--out", str(out), *words])
        evaluate.main(config_loader.load(rest), flags)


def numbers(value, path=""):
    """{path: number} of nested JSON."""
    if isinstance(value, dict):
        return {name: n for key, each in value.items() for name, n in numbers(each, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {name: n for key, each in enumerate(value) for name, n in numbers(each, f"{path}/{key}").items()}
    return {path: value} if isinstance(value, int | float) and not path.endswith("seconds") else {}


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    return evaluated(run, tmp_path_factory.mktemp("whole"), *FORECAST.split())


def test_the_scores_are_those_of_the_runs_own_validation_and_all_is_written(run, whole, tmp_path, capsys):
    config = Config(data=Data(source=SOURCE), training=Training(seq_len=SEQ_LEN))
    world = distributed.start()
    held_out = spikes.build(source=SOURCE, split="test", mode="aligned", overlap=True, seq_len=SEQ_LEN)
    model = assembly.build_model(config, ARCHITECTURE, None, world, lambda line: None).model
    with torch.no_grad():
        for own, other in zip(model.parameters(), lively(Model(ARCHITECTURE)).parameters(), strict=True):
            own.to_local().copy_(other)
        model.norm.weight.to_local().mul_(1.5)
    expected = train.validate(model, held_out, world, SpikeScores(held_out), local_batch_size=5)
    distributed.stop()
    (record,) = whole["checkpoints"]
    assert record["step"] == 5 and "newest of 2" in record["loaded"]
    assert {name: record["scores"][name] for name in expected} == pytest.approx(expected, rel=1e-6)
    again = evaluated(run / "checkpoint/step-00000005", tmp_path, "--batch", 7, "--by", "recording")
    assert numbers(again["checkpoints"][0]["scores"]) == pytest.approx(numbers(record["scores"]), rel=1e-6)
    assert len(again["checkpoints"][0]["groups"]) == 12 and len(again["checkpoints"][0]["curves"]) == 13
    for picture in ("context.png", "neurons.png", "calibration.png", "groups.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "ideal observer" in said and "model ahead by" in said and "LEAK" not in said and "co-bps" not in said


@pytest.mark.parametrize(
    ("world_size", "words"),
    [
        (2, []),
        (4, ["--batch", "2", "--no-baselines"]),
        (2, ["--parallelism.context_parallel_degree", "2", "--no-baselines"]),
        (2, ["--parallelism.context_parallel_degree", "2", "--parallelism.context_parallel_method", "ring", "--no-baselines"]),
    ],
    ids=["2 ranks", "4 ranks", "2 ranks that share each window", "2 ranks around a ring"],
)
def test_ranks_get_the_numbers_of_one_process(run, whole, tmp_path, world_size, words):
    on_ranks(world_size, on_a_rank, run, tmp_path, [*words, *FORECAST.split()])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (tmp_path / "forecast.png").read_bytes().startswith(b"\x89PNG")
    for each in (found, whole):
        (record,) = each["checkpoints"] = copy.deepcopy(each["checkpoints"])
        assert len(record["forecast"]["fp_bits_per_spike"]) == 2 and record["forecast"]["prompts"] == 5
        if not found["baselines"]:
            record["forecast"].pop("baselines", None)
    assert numbers(found["checkpoints"]) == pytest.approx(numbers(whole["checkpoints"]), rel=1e-5, abs=1e-6)
    ours, theirs = (numbers(each["checkpoints"][0]["scores"]) for each in (found, whole))
    assert ours == pytest.approx(theirs, rel=1e-6)
    if found["baselines"]:
        assert numbers(found["baselines"]) == pytest.approx(numbers(whole["baselines"]), rel=1e-5, abs=1e-6)


def test_every_checkpoint_makes_a_learning_curve_and_a_broken_one_is_left_out_by_name(run, whole, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    result = evaluated(tmp_path / "run", tmp_path / "all", "--all-checkpoints", "--no-baselines")
    assert [each["step"] for each in result["checkpoints"]] == [3, 5]
    assert result["checkpoints"][0]["scores"] != result["checkpoints"][1]["scores"] == whole["checkpoints"][0]["scores"]
    assert (tmp_path / "all/learning.png").exists() and result["baselines"] == {} and result["warnings"] == []
    flip_a_bit(next((tmp_path / "run/checkpoint/step-00000005").glob("*.distcp")))
    rest = evaluated(tmp_path / "run", tmp_path / "rest", "--all-checkpoints", "--no-baselines")
    assert [each["step"] for each in rest["checkpoints"]] == [3] and "step-00000005" in rest["warnings"][0]
    assert not (tmp_path / "rest/learning.png").exists()
    with pytest.raises(ConfigError, match="step-00000005"):
        evaluated(tmp_path / "run/checkpoint/step-00000005", tmp_path / "none")
    distributed.stop()


def test_the_baselines_are_those_of_the_ladder_and_the_models_lead_over_each_is_the_difference(whole):
    train_data, held_out = (spikes.build(source=SOURCE, split=split, seq_len=SEQ_LEN) for split in ("train", "test"))
    expected, ladder = dict(baselines.ladder(train_data, held_out)), whole["baselines"]["all"]
    assert {rung["name"]: rung["bits_per_spike"] for rung in ladder["rungs"]} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    null = ladder["rungs"][0]
    assert (null["name"], null["bits_per_spike"], null["standard_error"]) == (baselines.NULL, 0, 0)
    assert ladder["model"]["bits_per_spike"] == pytest.approx(whole["checkpoints"][0]["scores"]["bits_per_spike"], rel=1e-9)
    for rung in ladder["rungs"]:
        assert rung["model_ahead"] == pytest.approx(ladder["model"]["bits_per_spike"] - rung["bits_per_spike"], rel=1e-9)
        assert rung["model_ahead_standard_error"] > 0


def test_a_folder_of_hugging_face_scores_as_the_checkpoint_it_was_made_from(run, whole, tmp_path):
    step, exported = run / "checkpoint/step-00000005", tmp_path / "hf"
    words = ["--input_dir", str(step), "--output_dir", str(exported), "--dtype", "float32"]
    bridge.run(lambda: dcp_to_llama.main(dcp_to_llama.parse(words)))
    with pytest.raises(ConfigError, match="--out says where"):
        evaluate.out_folder(evaluate.trained.find(exported), evaluate.read_own_flags(["--checkpoint", "x"])[0])
    with pytest.raises(ConfigError, match="hf was trained on: give --data"):
        evaluated(exported, tmp_path / "out")
    result = evaluated(exported, tmp_path / "out", "--data", SOURCE, "--no-baselines", "--training.seq_len", SEQ_LEN)
    ours, theirs = (numbers(each["checkpoints"][0]["scores"]) for each in (result, whole))
    assert ours == pytest.approx(theirs, rel=1e-6) and result["checkpoints"][0]["step"] is None


def write_recording(folder, split, name, counts, source="m1-a", session="one"):
    (folder / split).mkdir(parents=True, exist_ok=True)
    np.savez(folder / split / f"{name}.npz", spike_counts=counts, source_dataset=source, subject_id="s", session_id=session)


def test_recordings_sessions_and_benchmarks_that_the_model_was_trained_on_are_told(tmp_path):
    random, folder = np.random.default_rng(0), tmp_path / "neural-pile-of-mine"
    first, second, third = (random.poisson(0.5, (3, 60)).astype(np.uint8) for _ in range(3))
    write_recording(folder, "train", "a", first)
    write_recording(folder, "test", "b", second)
    write_recording(folder, "test", "c", third, session="two")

    def build(**changes):
        return spikes.build(**{"source": str(folder), "seq_len": 24} | changes)

    train_data, held_out = build(), build(split="test", mode="aligned", overlap=True)
    lines = contamination.warnings(train_data, held_out)
    assert len(lines) == 3 and lines[0].startswith("1 of 2 held-out recordings are of sessions that are also")
    assert "was trained on: in m1-a (FALCON (dandiset 000941))" in lines[1] and "FALCON" in lines[2]
    write_recording(folder, "test", "d", first, session="three")
    assert contamination.warnings(train_data, build(split="test"))[0].startswith(
        "1 of 3 held-out recordings are in the training"
    )
    assert "nothing is known" in contamination.warnings(None, held_out)[0]
    # Of rows divided by time no bin is in both parts; of the whole and a part there are.
    parts = {split: build(split=split, split_by="time").index for split in ("train", "test")}
    ids = [parts["test"].id[row] for row in contamination.seen_again(parts["train"], parts["test"])]
    assert len(parts["test"]) == 4 and len(ids) == 0
    assert len(contamination.seen_again(train_data.index, parts["test"])) == 2  # it is stored twice


def test_the_model_and_baselines_are_compared_on_the_recordings_that_have_training_data_and_on_no_others(
    run, tmp_path, monkeypatch, capsys
):
    """With a session that was not trained on beside it, all comparisons stay what they are without it."""
    drawn, line = {}, drawing.Axes.line
    monkeypatch.setattr(
        drawing.Axes,
        "line",
        lambda axes, x, y, *rest, label="", **how: drawn.update({label: y}) or line(axes, x, y, *rest, **how),
    )
    random = np.random.default_rng(0)
    for split, session, mean in (("train", "1", 0.5), ("train", "2", 0.5), ("test", "1", 0.5), ("test", "2", 0.0)):
        write_recording(tmp_path / "data", split, session, random.poisson(mean, (3, 60)).astype(np.uint8), session=session)
    words = ["--data", tmp_path / "data", "--by", "session", *"--rollouts 2 --prompts 100 --horizon 2".split()]
    fewer = evaluated(run, tmp_path / "fewer", *words)
    levels = {name for name in drawn if name == "per-neuron histogram"}
    write_recording(tmp_path / "data", "test", "3", random.poisson(2.5, (3, 60)).astype(np.uint8), session="3")
    drawn.clear()
    capsys.readouterr()
    found = evaluated(run, tmp_path / "found", *words)
    said = capsys.readouterr().out

    (record,), (other,) = found["checkpoints"], fewer["checkpoints"]
    assert record["scores"]["bits_per_spike"] != pytest.approx(other["scores"]["bits_per_spike"], rel=0.1)
    assert list(record["groups"]) == ["m1-a/s/1", "m1-a/s/2", "m1-a/s/3"]
    assert record["groups"]["m1-a/s/2"]["bits_per_spike"] is None
    # The session without a spike is in the ladder of all, and has none of its own.
    assert list(found["baselines"]) == list(fewer["baselines"]) == ["all", "m1-a/s/1"]
    lost = [ladder.pop("counts_left_out") for each in (found, fewer) for ladder in each["baselines"].values()]
    assert lost == [3 * 60, 0, 0, 0]
    assert numbers(found["baselines"]) == pytest.approx(numbers(fewer["baselines"]), rel=1e-9, abs=1e-12)
    ladder = fewer["baselines"]["all"]
    assert ladder["model"]["bits_per_spike"] == pytest.approx(other["scores"]["bits_per_spike"], rel=1e-12)
    for rung in ladder["rungs"]:
        assert rung["model_ahead"] == pytest.approx(ladder["model"]["bits_per_spike"] - rung["bits_per_spike"], rel=1e-9)
    # So are the forecasts, whose windows come first in both.
    ahead, same = record["forecast"], record["forecast"]["on_the_same_recordings"]
    assert (
        "on_the_same_recordings" not in other["forecast"] and ahead["prompts"] > same["prompts"] == other["forecast"]["prompts"]
    )
    assert {name: same[name] for name in ("fp_bits_per_spike", "together")} == {
        name: other["forecast"][name] for name in ("fp_bits_per_spike", "together")
    }
    assert ahead["baselines"] == other["forecast"]["baselines"]
    for each in ahead["baselines"].values():
        lead = same["together"]["fp_bits_per_spike"] - each["together"]["fp_bits_per_spike"]
        assert each["model_ahead"]["together"]["fp_bits_per_spike"] == pytest.approx(lead, rel=1e-9)
    # Words and pictures: what stands side by side is of the same counts.
    assert said.count("\n  this model, on the same recordings") == 2 and "baselines leave out 1 held-out recording: no" in said
    assert levels and not levels & drawn.keys()
    (curve,) = (y for name, y in drawn.items() if name.endswith("with training data"))
    assert list(curve) == same["fp_bits_per_spike"]
    ladders = {name: each | {"counts_left_out": 180} for name, each in found["baselines"].items()}
    legends, legend = [], drawing.Axes.legend
    monkeypatch.setattr(
        drawing.Axes, "legend", lambda axes, **how: legends.append([name for name, _ in axes.labels]) or legend(axes, **how)
    )
    score_plots.draw_groups(found | {"baselines": ladders})
    score_plots.draw_groups(fewer | {"baselines": {name: each | {"counts_left_out": 0} for name, each in ladders.items()}})
    assert legends == [["this model"], ["this model", "best baseline"]]
    drawn.clear()
    score_plots.draw_learning(found | {"baselines": ladders})
    assert "this model" in drawn and not levels & drawn.keys()
    score_plots.draw_learning(fewer | {"baselines": {name: each | {"counts_left_out": 0} for name, each in ladders.items()}})
    assert levels <= drawn.keys()


def test_a_subset_of_windows_is_compared_with_baselines_on_the_same_bins(run, whole, tmp_path):
    result = evaluated(run, tmp_path, "--windows", 20)
    scores, ladder = result["checkpoints"][0]["scores"], result["baselines"]["all"]
    assert scores["windows"] == 20 and result["windows"].startswith("20 of 72")
    assert ladder["model"]["bits_per_spike"] == pytest.approx(scores["bits_per_spike"], rel=1e-12)
    assert result["checkpoints"][0]["ideal"]["gap"] != whole["checkpoints"][0]["ideal"]["gap"]
    assert [rung["name"] for rung in ladder["rungs"]] == [rung["name"] for rung in whole["baselines"]["all"]["rungs"]]


@pytest.mark.parametrize("out", ["/proc/nope", "a-file", "a-file/in/it"])
def test_a_folder_of_results_that_cannot_be_written_is_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch, out):
    (tmp_path / "a-file").touch()
    monkeypatch.setattr(evaluate.trained, "load", None)
    with pytest.raises(ConfigError, match=f"{out}.* cannot be written: .*--out names another folder"):
        try:
            evaluated(run, tmp_path / out)
        finally:
            distributed.stop()


def test_a_column_is_as_wide_as_its_widest_cell_wants():
    rungs = [{"name": "null", "bits_per_spike": 0.0, "standard_error": 0.0} | {"model_ahead": -9988.122}]
    rungs[0]["model_ahead_standard_error"] = 9911.619
    ladder = {"model": {"bits_per_spike": -9988.122, "standard_error": 9911.619}, "rungs": rungs, "counts_left_out": 0}
    _, head, model, null = evaluation.ladder_lines(ladder)
    assert "-9988.122 +- 9911.619" in model and len(null) == len(head) and null.index(" 0.000") + 15 == len(model)


def test_forecasts_are_asked_for_by_their_rollouts(capsys):
    for words, complaint in (("--horizon 3", "--horizon is of a forecast; give --rollouts"), ("--rollouts 0", "at least 1")):
        with pytest.raises(SystemExit, match="2"):
            evaluate.read_own_flags(["--checkpoint", "x", *words.split()])
        assert complaint in capsys.readouterr().err


def test_a_model_that_is_worse_than_the_histogram_has_captured_nothing(whole):
    ideal = whole["checkpoints"][0]["ideal"]
    assert ideal["captured"] < 0 and "captured nothing" in evaluation.ideal_lines(ideal)[-1]
    assert "captured 40.0%" in evaluation.ideal_lines(ideal | {"captured": 0.4})[-1]


def test_other_data_and_another_length_of_windows_are_taken_from_the_command_line(run, tmp_path, capsys):
    source = "ring-hmm:n=2,K=8,bins=20,rows=4,test_rows=3"
    result = evaluated(run, tmp_path, "--data", source, "--training.seq_len", 30, "--no-baselines")
    assert result["data"]["source"] == source and result["seq_len"] == 30
    assert result["checkpoints"][0]["scores"]["counts"] == 3 * 2 * 20
    longer = evaluated(run, tmp_path, "--data", source, "--training.seq_len", 96, "--no-baselines", "--split", "train")
    assert longer["checkpoints"][0]["scores"]["counts"] == 4 * 2 * 20
    assert "trained on 64: it has never met the positions beyond" in capsys.readouterr().out


def test_how_the_run_was_spread_over_devices_is_not_taken_over_but_its_windows_and_data_are(run):
    found = evaluate.trained.find(run)
    flags, _ = evaluate.read_own_flags(["--checkpoint", str(run)])
    config = evaluate.settle(config_loader.load([]), found, flags)
    assert found.config["parallelism"]["data_parallel_shard_degree"] == 8
    assert (config.parallelism, config.training.seq_len, config.data.source) == (Parallelism(), SEQ_LEN, SOURCE)
    assert config.training.local_batch_size == 3 and config.training.global_batch_size == "auto"
    given = evaluate.settle(config_loader.load(["--training.seq_len", "32", "--data.split_by", "time"]), found, flags)
    assert (given.training.seq_len, given.data.split_by, given.data.source) == (32, "time", SOURCE)


@pytest.mark.parametrize(
    ("change", "words", "complaint"),
    [
        (lambda run: run / "nothing", [], "is not a folder"),
        (lambda run: run / "checkpoint/step-00000003", ["--all-checkpoints"], "needs a run folder"),
        (lambda run: run, ["--data", "nowhere.npz"], "nowhere.npz"),
        (lambda run: run, ["--split", "dev"], "dev"),
        (lambda run: run, ["--training.seq_len", "7"], "holds 2 bins of no recording"),
        (
            lambda run: run,
            ["--rollouts", "2", "--horizon", "16"],
            "no window holds 1 . 16 bins, seen and forecast: the longest",
        ),
    ],
    ids=["no folder", "one step", "no data", "no split", "short windows", "far horizon"],
)
def test_what_cannot_be_evaluated_is_refused_with_words(run, tmp_path, change, words, complaint):
    with pytest.raises(ConfigError, match=complaint):
        try:
            evaluated(change(run), tmp_path, *words)
        finally:
            if torch.distributed.is_initialized():
                distributed.stop()
    assert not list(tmp_path.iterdir())
