"""generate.py from checkpoint to pictures, the model it samples from, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from small_llama import SMALL, lively

import generate
from torchtitan_bio import attention, distributed, parallelize, recompute
from torchtitan_bio.checkpoint import Checkpointer
from torchtitan_bio.config import Config, ConfigError, Data, Training
from torchtitan_bio.data import spikes
from torchtitan_bio.models.llama3 import Model
from torchtitan_bio.science import sampling, trained

ROOT = Path(__file__).parent.parent
ARCHITECTURE = dataclasses.replace(SMALL, num_layers=2, vocab_size=256, rope_theta=77.0, rope_scaling_factor=4.0)
CPU = torch.device("cpu")
SOURCE = "ring-hmm:n=3,K=8,bins=50,test_rows=4"


def save(folder, world, dtype=torch.float32, **changes):
    architecture = dataclasses.replace(ARCHITECTURE, **changes)
    model = lively(Model(architecture)).to(dtype)
    config = Config(data=Data(source=SOURCE), training=Training(seq_len=64))
    identity = {"family": "llama3", "flavor": "small", "architecture": dataclasses.asdict(architecture)}
    state = {"step": 5, "config": dataclasses.asdict(config)}
    checkpoints = Checkpointer(folder / "checkpoint", world=world)
    for step in (3, 5):
        checkpoints.save(step, model, torch.optim.AdamW(model.parameters()), state, identity)
        with torch.no_grad():
            model.norm.weight.mul_(1.5)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with two steps of a model that was never trained."""
    folder = save(tmp_path_factory.mktemp("run"), distributed.start())
    distributed.stop()
    return folder


def flags(checkpoint, out, *words):
    return generate.read_flags(["--checkpoint", str(checkpoint), "--out", str(out), *map(str, words)])


def made(out):
    with np.load(out / "samples.npz") as arrays:
        return dict(arrays)


def test_a_run_goes_on_from_its_held_out_data_and_leaves_samples_pictures_and_scores(run, tmp_path, capsys):
    generate.main(flags(run, tmp_path / "out", "--samples", 4, "--row", 2, "--start-bin", 7))
    counts, found = spikes.build(source=SOURCE, split="test", seq_len=64).counts(2), made(tmp_path / "out")
    # 64 tokens are 16 bins of 3 neurons: half of them prompt
    assert (found["prompt"] == counts[:, 7:15]).all() and (found["truth"] == counts[:, 15:23]).all()
    assert found["samples"].shape == (4, 3, 8) and found["samples"].dtype == np.uint8
    assert (found["samples"][0] != found["samples"][1]).any()
    record = json.loads((tmp_path / "out" / "generated.json").read_text())
    assert record["tokens"] == 4 * 8 * 4 and record["tokens_per_s"] > 0 and "newest of 2" in record["loaded"]
    assert set(record["realism"]) == {"rate", "fano", "autocorrelation", "correlation", "interval", "population"}
    assert record["asked"]["seed"] == 0 and "ring-hmm/test-2 from bin 7" in record["prompt"]
    for picture in ("raster.png", "realism.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "tokens/s" in said and "correlation" in said and "warning" not in said


def test_a_step_folder_gives_the_same_samples_whatever_is_computed_at_once_and_another_step_others(run, tmp_path):
    common = ("--samples", 5, "--bins", 4)
    for name, folder, at_once in (("run", run, 16), ("step", run / "checkpoint/step-00000005", 2), ("old", None, 16)):
        folder = folder or run / "checkpoint/step-00000003"
        generate.main(flags(folder, tmp_path / name, *common, "--at-once", at_once))
    run_s, step_s, old_s = (made(tmp_path / name)["samples"] for name in ("run", "step", "old"))
    assert (run_s == step_s).all() and (run_s != old_s).any()


def test_many_prompts_are_spread_over_the_recording_each_with_its_truth_and_with_chance_of_its_own(run, tmp_path):
    common = ("--bins", 5, "--context-bins", 4, "--samples", 2, "--start-bin", 1)
    generate.main(flags(run, tmp_path / "out", *common, "--prompts", 3, "--at-once", 4))
    counts, found = spikes.build(source=SOURCE, split="test", seq_len=64).counts(0), made(tmp_path / "out")
    for number, start in enumerate((1, 21, 41)):
        assert (found["prompt"][number] == counts[:, start : start + 4]).all()
        assert (found["truth"][number] == counts[:, start + 4 : start + 9]).all()
    assert found["samples"].shape == (3, 2, 3, 5)
    assert len({sample.tobytes() for sample in found["samples"].reshape(6, 3, 5)}) == 6
    generate.main(flags(run, tmp_path / "first", *common))
    assert (made(tmp_path / "first")["samples"] == found["samples"][0]).all()


def test_a_window_wider_than_training_is_used_with_a_warning(run, tmp_path, capsys):
    common = ("--bins", 12, "--context-bins", 8, "--samples", 1)
    generate.main(flags(run, tmp_path / "known", *common))
    assert "are more than the 16 that the model sees at once" in capsys.readouterr().out
    generate.main(flags(run, tmp_path / "wide", *common, "--window-bins", 30))
    assert "80 tokens are seen at once, and the model was trained on sequences of 64" in capsys.readouterr().out
    known, wide = (made(tmp_path / name)["samples"][0] for name in ("known", "wide"))
    assert (known[:, :8] == wide[:, :8]).all() and (known != wide).any()


def test_a_prompt_comes_from_a_file_or_from_nowhere(run, tmp_path, capsys):
    counts = np.random.default_rng(0).poisson(0.5, (6, 40)).astype(np.int64)
    np.savez(tmp_path / "mine.npz", spike_counts=counts)
    generate.main(flags(run, tmp_path / "file", "--prompt", tmp_path / "mine.npz", "--bins", 3, "--samples", 2))
    found = made(tmp_path / "file")
    assert (found["prompt"] == counts).all() and "truth" not in found and found["samples"].shape == (2, 6, 3)
    # 64 tokens are 9 bins
    assert "40 + 3 bins are more than the 9 that the model sees at once" in capsys.readouterr().out
    generate.main(flags(run, tmp_path / "cut", "--prompt", tmp_path / "mine.npz", "--context-bins", 5, "--bins", 3))
    assert (made(tmp_path / "cut")["truth"] == counts[:, 5:8]).all()
    generate.main(flags(run, tmp_path / "none", "--neurons", 7, "--samples", 1))
    found = made(tmp_path / "none")
    assert found["prompt"].shape == (7, 0) and found["samples"].shape == (1, 7, 8)  # 64 tokens are 8 bins
    assert "no recording" in capsys.readouterr().out and not (tmp_path / "none" / "realism.png").exists()


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--row", 4], "--row=4, but ring-hmm:n=3,K=8,bins=50,test_rows=4 has rows 0 to 3"),
        (["--row", 0, "--neurons", 3], "--row and --neurons are two prompts"),
        (["--context-bins", 51], "ring-hmm/test-0 has 50 bins; from --start-bin=0 on they do not hold 51 of context"),
        (["--neurons", 3, "--context-bins", 2], "goes without --context-bins"),
        (["--prompts", 40, "--bins", 5], "5 to compare with for 40 prompts"),
        (["--bins", 0, "--samples", -1], "--bins=0 must be at least 1"),
        (["--top-k", 256], "top_k=256 does not lie in 1 .. 255"),
        (["--temperature", -1], "temperature=-1.0 is not positive"),
        (["--split", "dev"], "must be one of train, test"),
        (["--prompt", "flat.npz"], "expected (neurons, bins)"),
        (["--prompt", "halves.npz"], "not a matrix of integers: spike_counts is float64 (2, 9)"),
        (["--prompt", "nowhere.npz"], "nowhere.npz"),
        (["--data", "nowhere"], "nowhere"),
        (["--prompt", "lab.nwb"], "of NWB files prepare.py spikes lab.nwb --out FOLDER makes a store"),
        (["--data", "lab"], "of NWB files prepare.py spikes lab --out FOLDER makes a store"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_a_folder_is_made(run, tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    Path("lab").mkdir()
    for name in ("lab.nwb", "lab/day1.nwb"):
        Path(name).touch()
    np.savez("flat.npz", spike_counts=np.zeros(9, np.uint8))
    np.savez("halves.npz", spike_counts=np.full((2, 9), 0.5))
    with pytest.raises(ConfigError) as refusal:
        generate.main(flags(run, "out", *words))
    assert complaint in str(refusal.value) and not Path("out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(trained, "load", None)
    with pytest.raises(ConfigError, match="file/out cannot be written: .*Not a directory.*Name another folder"):
        generate.main(flags(run, tmp_path / "file" / "out"))
    distributed.stop()


def test_folders_that_hold_no_model_or_hold_something_are_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "samples.npz").touch()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.toml").touch()
    for checkpoint, out, complaint in (
        (tmp_path / "gone", "out", "gone is not a folder"),
        (tmp_path, "out", "holds no model"),
        (tmp_path / "cut", "out", "the run .*cut has no checkpoint yet"),
        (run, "full", "full holds something"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            generate.main(flags(checkpoint, tmp_path / out))


# ---- The model that is sampled from


def logits_of(folder, tokens, world=None, dtype=torch.float32):
    own = world or distributed.start()
    model, line = trained.load(trained.find(folder), world=own, param_dtype=dtype)
    logits = model.logits({"tokens": tokens}).float()
    if world is None:
        distributed.stop()
    return logits, line


def test_the_architecture_is_that_of_the_checkpoint_rope_and_all(tmp_path):
    """The predecessor sampled with one theta whatever the model was trained with."""
    tokens, world = torch.randint(0, 256, (1, 40)), distributed.start()
    for name, changes in {"near": {}, "far": {"rope_theta": 5e5}, "stretched": {"rope_scaling_factor": 8.0}}.items():
        folder = save(tmp_path / name, world, **changes)
        expected = lively(Model(dataclasses.replace(ARCHITECTURE, **changes)))
        logits, _ = logits_of(folder / "checkpoint/step-00000003", tokens, world)
        assert torch.equal(logits, expected.logits({"tokens": tokens}))
    distributed.stop()


def test_of_a_run_whose_newest_step_is_damaged_the_one_before_is_taken_and_the_reason_told(tmp_path):
    folder, tokens = save(tmp_path, distributed.start()), torch.randint(0, 256, (1, 20))
    distributed.stop()
    sound, _ = logits_of(folder / "checkpoint/step-00000003", tokens)
    (folder / "checkpoint/step-00000005/.metadata").write_bytes(b"no pickle")
    logits, line = logits_of(folder, tokens)
    assert torch.equal(logits, sound) and "step-00000003" in line and "step-00000005" in line
    with pytest.raises(ValueError, match="step-00000005"):
        trained.find(folder / "checkpoint/step-00000005")


def test_weights_stored_in_bfloat16_are_computed_with_in_the_type_asked_for(tmp_path):
    folder, tokens = save(tmp_path, distributed.start(), torch.bfloat16), torch.randint(0, 256, (1, 20))
    distributed.stop()
    logits, _ = logits_of(folder / "checkpoint/step-00000003", tokens)
    expected = lively(Model(ARCHITECTURE)).bfloat16().float()
    assert torch.equal(logits, expected.logits({"tokens": tokens}))


def test_a_folder_of_hugging_face_gives_the_logits_of_transformers_and_can_be_sampled(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "llama3", "rope_theta": 99.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=60,
        rope_parameters=rope | {"original_max_position_embeddings": 32},
    )
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, 256, (2, 50))
    logits, line = logits_of(tmp_path / "hf", tokens)
    expected = theirs(tokens).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max() and "Hugging Face" in line
    assert trained.find(tmp_path / "hf").seq_len == 60
    with pytest.raises(ConfigError, match="give --data, --prompt or --neurons"):
        generate.main(flags(tmp_path / "hf", tmp_path / "out"))
    generate.main(flags(tmp_path / "hf", tmp_path / "out", "--neurons", 5, "--samples", 2))
    assert made(tmp_path / "out")["samples"].shape == (2, 5, 10)
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds neither model.safetensors"):
        generate.main(flags(tmp_path / "hf", tmp_path / "other", "--neurons", 5))


def generate_on_a_rank(rank, folder, out, words):
    """The samples of a rank, which holds a part of each weight, and the largest share that it holds of one."""
    asked, world = flags(folder, out, *words), distributed.start()
    found = trained.find(folder)
    model, _ = trained.load(found, world=world, param_dtype=torch.float32)
    shares = [parameter.to_local().numel() / parameter.numel() for parameter in model.parameters()]
    kernel = sampling.choose_kernel(world.device, torch.float32, found.architecture.head_dim)
    sampler = sampling.Sampler(model=model, kernel=kernel, dtype=torch.float32, device=world.device)
    samples, _ = generate.generate(sampler, generate.read_prompts(asked, found), asked, world, lambda line: None)
    return samples, max(shares)


@pytest.mark.parametrize("mode", ["full", "keep_attention"])
def test_a_model_in_the_midst_of_training_is_sampled_like_any_other(mode):
    world, tokens = distributed.start(), torch.randint(0, 256, (1, 30))
    kernel = attention.choose("auto", device=CPU, dtype=torch.float32, head_dim=ARCHITECTURE.head_dim, with_halves=True)
    kept = recompute.KeptAttention(kernel) if mode == "keep_attention" else None
    model, plain = lively(Model(ARCHITECTURE, kept or kernel, ffn_tiles=2)), lively(Model(ARCHITECTURE))
    types = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    how = {"recompute": mode, "compile_blocks": False, "reshard_after_forward": True, "kept_attention": kept}
    parallelize.parallelize(model, world.mesh, **types, **how)
    batch, losses, drawn = {"tokens": tokens, "labels": tokens.short()}, [], []
    for each in (model, plain, model):
        sampler = sampling.Sampler(model=each, kernel=kernel, dtype=torch.float32, device=CPU)
        prompt = sampler.read(sampling.encode(np.ones((1, 4, 5), np.uint8)), 4)
        drawn.append(sampler.roll_out(prompt, bins=4, rollouts=[0, 1]))
        losses.append(each(batch)["next_token"])
        losses[-1].backward()
    assert (drawn[0] == drawn[1]).all() and (drawn[0] == drawn[2]).all()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    distributed.stop()


@pytest.mark.parametrize("changes", [("--at-once", 1), ("--at-once", 2), ("--prompts", 3, "--at-once", 6)], ids=str)
def test_two_ranks_that_share_the_weights_draw_the_samples_of_one(run, tmp_path, changes):
    words = ("--samples", 3, "--bins", 3, *changes)  # one rank has less to do than the other
    generate.main(flags(run, tmp_path / "one", *words))
    ranks = on_ranks(2, generate_on_a_rank, run, tmp_path / "two", words)
    for samples, share in ranks:
        assert (samples.squeeze() == made(tmp_path / "one")["samples"]).all() and share == 0.5


def test_a_script_that_is_asked_for_what_cannot_be_ends_with_2(tmp_path):
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and "holds no model" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_benchmark_draws_the_same_counts_with_the_cache_and_without(tmp_path):
    toy = "--lengths 40 90 --neurons 3 --bins 3 --tokens 5 --rollouts 1 2".split()
    command = [sys.executable, str(ROOT / "benchmarks/generate.py"), *toy]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| yes |") == 2 and "NO" not in result.stdout
