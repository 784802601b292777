"""What goes out is what was trained, bit for bit, in the dialect that was asked for; and nothing private goes with it."""

import dataclasses
import json
import logging
import os
import pickle
import shutil
import sys
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
import whole_runs
from hub_server import Hub
from llama_folders import KINDS, save_hf, save_meta, tensors_of
from payload import Payload
from ranks import on_ranks

import dcp_to_llama
import llama_to_dcp
from torchtitan_bio import bridge, checkpoint, distributed, models, resume
from torchtitan_bio.checkpoint import dcp
from torchtitan_bio.config import Config
from torchtitan_bio.models import llama3

TOML = """
[model]
flavor = "debug"

[model.overrides]
num_heads = 8
ffn_dim = 160
vocab_size = 300
norm_eps = 1e-6
rope_theta = 5e5
rope_scaling_factor = 8.0
rope_original_context = 64
"""


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    yield
    if torch.distributed.is_initialized():
        distributed.stop()


def take_in(source, target, *more):
    asked = llama_to_dcp.parse(["--input_dir", str(source), "--output_dir", str(target), "--vocab", "keep", *more])
    assert bridge.run(lambda: llama_to_dcp.main(asked)) == 0
    return target


def give_out(source, target, *more):
    """The exit code."""
    asked = dcp_to_llama.parse(["--input_dir", str(source), "--output_dir", str(target), *map(str, more)])
    return bridge.run(lambda: dcp_to_llama.main(asked))


def retrain_on_rank(rank, folders, out):
    """Start from each folder on these ranks, as a run does, and save: what a run of no steps would leave."""
    from torch.distributed.fsdp import fully_shard

    world = distributed.start()
    for folder in folders:
        identity = json.loads((folder / "model.json").read_text())
        with torch.device("meta"):
            model = models.build("llama3", llama3.Architecture(**identity["architecture"]))
        for block in model.blocks():
            fully_shard(block, mesh=world.mesh["shard"])
        fully_shard(model, mesh=world.mesh["shard"])
        model.to_empty(device="cpu")
        checkpoint.init_from(folder, model, world=world, model_json=identity)
        saver = checkpoint.Checkpointer(out / folder.name, world=world)
        state = resume.train_state(
            7, global_batch_size=1, seq_len=64, skipped_in_a_row=0, fingerprint={}, config=dataclasses.asdict(Config())
        )
        saver.save(7, model, torch.optim.AdamW(model.parameters()), state, identity)


@pytest.fixture(scope="module")
def taken_in(tmp_path_factory):
    """The tensors of folders of every kind and type, Meta's among them, and the DCP folders made of them."""
    root = tmp_path_factory.mktemp("folders")
    tensors, folders = {}, []
    for kind in (*KINDS, "meta"):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{kind}-{str(dtype).removeprefix('torch.')}"
            if kind == "meta":
                _, tensors[name] = save_meta(root / "in" / name, 2, dtype)
            else:
                save_hf(root / "in" / name, kind, dtype)
                tensors[name] = tensors_of(root / "in" / name)
            folders.append(take_in(root / "in" / name, root / "dcp" / name))
    return tensors, folders


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_weights_come_back_bit_for_bit_from_any_number_of_ranks(tmp_path, taken_in, num_ranks):
    tensors, folders = taken_in
    on_ranks(num_ranks, retrain_on_rank, folders, tmp_path)
    for name, before in tensors.items():
        kept, out, (kind, _, dtype) = tmp_path / name / "step-00000007", tmp_path / "out" / name, name.partition("-")
        form = "pth" if kind == "meta" else "hf"
        assert give_out(kept, out, "--format", form, "--dtype", dtype, "--max_shard_size", "90KB") == 0
        after = torch.load(out / "consolidated.00.pth", weights_only=True) if kind == "meta" else tensors_of(out)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_export_and_makes_the_logits_of_the_original(tmp_path, kind, capsys):
    from transformers import AutoConfig, LlamaForCausalLM

    original = save_hf(tmp_path / "in", kind)
    folder = take_in(tmp_path / "in", tmp_path / "dcp")
    assert give_out(folder, tmp_path / "out", "--dtype", "float32", "--verify") == 0
    assert capsys.readouterr().out.count("of the largest logit") == 2
    again, found = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.randint(300, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(original(tokens).logits, again.eval()(tokens).logits)
    here, there = AutoConfig.from_pretrained(tmp_path / "in"), AutoConfig.from_pretrained(tmp_path / "out")
    for key in ("rope_parameters", "rms_norm_eps", "vocab_size", "tie_word_embeddings", "bos_token_id", "head_dim"):
        assert getattr(here, key) == getattr(there, key)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_meta_weights_come_back_bit_for_bit_as_one_file(tmp_path, dtype):
    params, whole = save_meta(tmp_path / "in", 2, getattr(torch, dtype))
    folder = take_in(tmp_path / "in", tmp_path / "dcp")
    assert give_out(folder, tmp_path / "out", "--format", "pth", "--dtype", dtype, "--verify") == 0
    again = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True, mmap=True)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)
    written = json.loads((tmp_path / "out" / "params.json").read_text())
    assert all(written[key] == params[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "rope_theta", "norm_eps"))
    assert written["use_scaled_rope"] and not (tmp_path / "out" / "config.json").exists()
    assert take_in(tmp_path / "out", tmp_path / "again", "--verify").is_dir()


def save_as_torchtitan(folder, weights, prefix, payload):
    """The folder of torchtitan and gpt-neuro-arch: weights under bare or "model." names, training state, pickles."""
    state = {prefix + name: tensor for name, tensor in weights.items()}
    state |= {f"optimizer.state.{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in weights.items()}
    state |= {
        "model.freqs_cis" if prefix else "freqs_cis": torch.ones(4, 2),
        "dataloader.dp_rank_0": payload,
        "train_state": {},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group is meant
        torch_dcp.save(state, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_checkpoint_of_the_predecessor_gives_its_model_alone_and_runs_nothing(tmp_path, prefix, capsys):
    save_hf(tmp_path / "in", "gqa4")
    ours = checkpoint.open_weights(take_in(tmp_path / "in", tmp_path / "dcp"), world=distributed.start())
    weights = {name: ours.read(name) for name in ours.names}
    touched = tmp_path / "touched"
    save_as_torchtitan(tmp_path / "old", weights, prefix, Payload(touched))
    assert give_out(tmp_path / "old", tmp_path / "out") == 2
    assert "name a TOML whose [model] says them: --config_file" in capsys.readouterr().err
    (tmp_path / "model.toml").write_text(TOML)
    assert give_out(tmp_path / "old", tmp_path / "out", "--dtype", "float32", "--config_file", tmp_path / "model.toml") == 0
    report = "left aside: 21 tensors of optimizer, 1 tensors of freqs_cis, 1 pickled values of dataloader"
    assert report in capsys.readouterr().out
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert not touched.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder: two steps of a small model on the shipped recording."""
    folder = tmp_path_factory.mktemp("runs") / "Dr. Somebody's run"
    ((raised, _, _),) = whole_runs.start(folder, "--training.steps=2", "--validation.max_windows=4")
    assert raised == ""
    return folder


def step_folder(run):
    return run / "checkpoint" / "step-00000002"


def test_the_export_of_a_run_says_what_it_is_and_nothing_of_where_it_was_made(tmp_path, trained):
    from huggingface_hub import RepoCard

    assert give_out(step_folder(trained), tmp_path / "out", "--format", "both", "--verify") == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    text = b"".join(content for name, content in files.items() if not name.endswith(("safetensors", "pth"))).decode()
    for private in ("Somebody", str(trained), str(tmp_path), os.environ.get("HOME", "/root"), "dump_folder"):
        assert private not in text
    assert json.loads(files["spikes.json"]) and RepoCard(files["README.md"].decode()).data.license is not None
    scores = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in scores if line["kind"] == "validation"][-1]
    assert f"{last['bits_per_spike']:.4f}" in files["README.md"].decode()
    assert json.loads(files["config.json"])["max_position_embeddings"] == 128
    manifest = json.loads(files["manifest.json"])
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}


def test_an_export_that_is_there_is_taken_and_another_or_a_changed_one_refused(tmp_path, trained, capsys):
    out, source = tmp_path / "out", step_folder(trained)
    assert give_out(source, out) == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert give_out(source, out) == 0 and "holds this export already" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert give_out(source, out, "--dtype", "float32") == 2
    assert "is there already and is no empty folder" in capsys.readouterr().err
    with (out / "config.json").open("a") as config:
        config.write("\n")
    assert give_out(source, out) == 2 and "has changed since it was exported: config.json" in capsys.readouterr().err


def test_the_check_that_is_asked_for_is_done_on_an_export_that_is_there_too(tmp_path, trained, monkeypatch, capsys):
    from torchtitan_bio import convert

    with monkeypatch.context() as patch:
        patch.setattr(convert, "to_hf", lambda name, tensor, head_dim: tensor)
        assert give_out(step_folder(trained), tmp_path / "out") == 0
    assert give_out(step_folder(trained), tmp_path / "out", "--verify") == 2
    assert "of the largest logit, above 1e-04" in capsys.readouterr().err and (tmp_path / "out").is_dir()


def test_a_card_gets_the_name_of_its_repo_later_and_what_a_person_wrote_into_it_stays(tmp_path, trained, capsys):
    source, out = step_folder(trained), tmp_path / "out"
    to_the_hub = ["--hf_repo_name", "lab/model", "--push_to_hub", "--dry_run"]

    def files_fit_their_manifest():
        files = json.loads((out / "manifest.json").read_text())["files"]
        return checkpoint.fingerprint([out / name for name in files]) == files

    assert give_out(source, out) == 0 and "lab/model" not in (out / "README.md").read_text()
    assert give_out(source, out, *to_the_hub) == 0
    assert 'from_pretrained("lab/model")' in (out / "README.md").read_text() and files_fit_their_manifest()
    with (out / "README.md").open("a") as card:
        card.write("consent: given\n")
    for _ in range(2):
        assert give_out(source, out, *to_the_hub) == 0
        assert "has been edited and goes out as it is" in capsys.readouterr().out
        assert (out / "README.md").read_text().endswith("consent: given\n") and files_fit_their_manifest()
    assert {path.name for path in out.iterdir()} == {"manifest.json", *json.loads((out / "manifest.json").read_text())["files"]}


def test_a_wrong_export_does_not_pass_the_check_and_is_not_there(tmp_path, trained, monkeypatch, capsys):
    from torchtitan_bio import convert

    monkeypatch.setattr(convert, "to_hf", lambda name, tensor, head_dim: tensor)
    assert give_out(step_folder(trained), tmp_path / "out", "--verify") == 2
    assert "of the largest logit, above 1e-04" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def flip(folder):
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "not there": (shutil.rmtree, "is not a folder"),
    "a flipped bit": (flip, "__0_0.distcp has changed since it was written"),
    "no index": (lambda folder: (folder / ".metadata").unlink(), ".metadata is missing"),
    "half-written": (lambda folder: folder.rename(folder.with_name("step-00000002.partial-0a1b2c3d")), "interrupted save"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_cannot_be_right_is_one_line_and_nothing_is_written(tmp_path, trained, damage, capsys):
    source = shutil.copytree(step_folder(trained), tmp_path / "step-00000002")
    spoil, words = DAMAGES[damage]
    spoil(source)
    [given] = list(tmp_path.iterdir()) or [source]
    assert give_out(given, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1 and not list(tmp_path.glob("out*"))


def test_a_tensor_is_rounded_as_it_is_read_as_it_would_be_afterwards(trained):
    weights = checkpoint.open_weights(step_folder(trained), world=distributed.start())
    whole, rounded = (weights.read("layers.0.feed_forward.w1.weight", dtype) for dtype in (None, torch.bfloat16))
    assert whole.dtype == torch.float32 and torch.equal(whole.to(torch.bfloat16), rounded)


def test_a_payload_in_the_place_of_a_tensor_is_one_line_and_not_run(tmp_path, trained, capsys):
    source = shutil.copytree(step_folder(trained), tmp_path / "foreign")
    (source / "manifest.json").unlink()  # whose hash would tell
    index, shard = dcp.read_metadata(source), source / "__0_0.distcp"
    torch.save(Payload(tmp_path / "touched"), tmp_path / "payload")
    [place] = [place for key, place in index.storage_data.items() if key.fqn == "model.norm.weight"]
    place.offset, place.length = shard.stat().st_size, (tmp_path / "payload").stat().st_size
    shard.write_bytes(shard.read_bytes() + (tmp_path / "payload").read_bytes())
    (source / ".metadata").write_bytes(pickle.dumps(index))
    assert give_out(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "it asks for io.open, which no tensor needs (of model.norm.weight)" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "touched").exists() and not list(tmp_path.glob("out*"))


def test_an_interruption_while_torch_reads_is_one_and_leaves_nothing(tmp_path, trained, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.TensorReader, "read_data", interrupt)
    assert give_out(step_folder(trained), tmp_path / "out") == 130
    assert "interrupted; what was there before is as it was" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_another_step_of_the_same_shapes_is_another_export(tmp_path, trained, capsys):
    """Also without a manifest, where the index may be the same."""
    one = shutil.copytree(step_folder(trained), tmp_path / "one")
    (one / "manifest.json").unlink()
    assert give_out(one, tmp_path / "out") == 0 and give_out(one, tmp_path / "out") == 0
    content = bytearray((one / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (one / "__0_0.distcp").write_bytes(content)
    assert give_out(one, tmp_path / "out") == 2 and "is there already" in capsys.readouterr().err


def test_a_line_of_metrics_torn_by_a_kill_is_passed_over(tmp_path, trained):
    run = shutil.copytree(trained, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "validation", "st')
    assert give_out(step_folder(run), tmp_path / "out") == 0
    assert "| `bits_per_spike` |" in (tmp_path / "out" / "README.md").read_text()


def test_a_toml_that_contradicts_the_checkpoint_is_refused_with_the_numbers(tmp_path, trained, capsys):
    (tmp_path / "model.toml").write_text('[model]\nflavor = "debug"\n[model.overrides]\nffn_dim = 160\n')
    assert give_out(step_folder(trained), tmp_path / "out", "--config_file", tmp_path / "model.toml") == 2
    assert "ffn_dim is 128 there and 160 here; leave the TOML out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hf_repo_name", "noslash", "--push_to_hub"], "'noslash' is no name of a repo on the Hub: it reads USER/NAME"),
        (["--copy_to", "gs://bucket/model"], "--copy_to needs blobfile: pip install"),
    ],
)
def test_what_cannot_leave_the_machine_is_known_before_anything_is_written(
    tmp_path, trained, monkeypatch, arguments, words, capsys
):
    monkeypatch.setitem(sys.modules, "blobfile", None)
    assert give_out(step_folder(trained), tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_copy_that_fails_is_one_line_and_the_export_stays(tmp_path, trained, capsys):
    assert give_out(step_folder(trained), tmp_path / "out", "--copy_to", "s3://bucket/model") == 2
    error = capsys.readouterr().err
    assert f"the export in {tmp_path / 'out'} is intact" in error and len(error.splitlines()) == 1
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_transformers_has_nothing_to_say_against_the_settings_of_an_export(tmp_path):
    """Of a scaled model whose input does not tell how long a text may be, as Meta's does not."""
    from transformers import LlamaForCausalLM

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    save_meta(tmp_path / "in", 1)
    assert give_out(take_in(tmp_path / "in", tmp_path / "dcp"), tmp_path / "out") == 0
    logging.getLogger("transformers").addHandler(handler)
    try:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not said and model.dtype == torch.bfloat16
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 8 * config["rope_scaling"]["original_max_position_embeddings"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_what_params_json_cannot_say_is_refused_before_a_byte_is_read(tmp_path, monkeypatch, capsys):
    save_hf(tmp_path / "in", "gqa4")  # whose original context is 64; Meta's is 8,192
    folder = take_in(tmp_path / "in", tmp_path / "dcp")
    monkeypatch.setattr(checkpoint.Weights, "read", lambda *_: pytest.fail("a tensor was read"))
    assert give_out(folder, tmp_path / "out", "--format", "both") == 2
    assert "rope_original_context=64 (it is 8192 there); use --format hf" in capsys.readouterr().err


def test_a_folder_of_checkpoints_and_one_without_a_vocabulary_are_named(tmp_path, trained, capsys):
    assert give_out(trained, tmp_path / "out") == 2
    assert "is a folder of checkpoints; name one of them" in capsys.readouterr().err
    save_hf(tmp_path / "in", "gqa4")
    assert give_out(tmp_path / "in", tmp_path / "out") == 2
    assert "is no checkpoint, but holds Llama weights; llama_to_dcp.py makes one" in capsys.readouterr().err
    asked = llama_to_dcp.parse(["--input_dir", str(tmp_path / "in"), "--output_dir", str(tmp_path / "dcp")])
    assert bridge.run(lambda: llama_to_dcp.main(asked)) == 0
    assert give_out(tmp_path / "dcp", tmp_path / "out") == 2
    assert "convert it with llama_to_dcp.py --vocab keep" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_and_tells_the_free_bytes(tmp_path, trained, monkeypatch, capsys):
    from torchtitan_bio import weight_files

    def fail(*_, **__):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(weight_files, "write_safetensors", fail)
    assert give_out(step_folder(trained), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "bytes are free" in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--hf_repo_name", "lab/model"], "--hf_repo_name does nothing without --push_to_hub"),
        (["--push_to_hub"], "--push_to_hub needs --hf_repo_name"),
        (["--public"], "--public does nothing without --push_to_hub"),
        (["--max_shard_size", "many"], "'many' is not a size like 5GB"),
        (["--max_shard_size", "1.2.3GB"], "'1.2.3GB' is not a size like 5GB"),
        (["--max_shard_size", "0"], "'0' is not a size like 5GB"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        dcp_to_llama.parse(["--input_dir", "in", "--output_dir", "out", *arguments])
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")  # huggingface_hub's own
def test_a_push_that_fails_leaves_the_export_and_the_same_command_finishes_it(tmp_path, trained, monkeypatch, capsys):
    from huggingface_hub import constants

    out, more = tmp_path / "out", ["--hf_repo_name", "lab/model", "--push_to_hub"]
    with Hub("lab", "hf_secret") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert give_out(step_folder(trained), out, *more, "--dry_run") == 0
        assert "would push" in capsys.readouterr().out and not hub.requests
        assert give_out(step_folder(trained), out, *more) == 2
        error = capsys.readouterr().err
        assert f"the export in {out} is intact" in error and len(error.splitlines()) == 1
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert give_out(step_folder(trained), out, *more) == 0
        assert "holds this export already" in capsys.readouterr().out
        assert hub.repos["lab/model"].private and "step-00000002" in hub.repos["lab/model"].tags
        assert hub.files("lab/model") == {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_a_copy_goes_to_an_object_store(tmp_path, trained, capsys):
    assert give_out(step_folder(trained), tmp_path / "out", "--copy_to", tmp_path / "store" / "model") == 0
    copied = {path.name: path.read_bytes() for path in (tmp_path / "store" / "model").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
