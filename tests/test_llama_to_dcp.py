"""Weights of Hugging Face and Meta come in bit for bit, in the right order, and what cannot be right does not come in."""

import json
import os
import pickle
import shutil

import pytest
import torch
from llama_folders import KINDS, hf_model, save_hf, save_meta, tensors_of
from payload import Payload

import llama_to_dcp
from torchtitan_bio import bridge, checkpoint, convert, distributed, models
from torchtitan_bio.config_loader import tomllib
from torchtitan_bio.models import llama3
from torchtitan_bio.science import agreement


@pytest.fixture(scope="module")
def world():
    yield distributed.start()
    distributed.stop()


def run(*arguments):
    """The exit code of the script with these arguments."""
    asked = llama_to_dcp.parse([str(each) for each in arguments])
    return bridge.run(lambda: llama_to_dcp.main(asked))


def convert_folder(source, target, *more):
    assert run("--input_dir", source, "--output_dir", target, *more) == 0
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_transformers_are_ours_to_1e_5_after_conversion(tmp_path, world, kind):
    reference = save_hf(tmp_path / "in", kind)
    out = convert_folder(tmp_path / "in", tmp_path / "out", "--vocab", "keep")
    weights = checkpoint.open_weights(out, world=distributed.start())
    architecture = llama3.Architecture(**weights.document("model.json")["architecture"])
    ours = agreement.ours("llama3", architecture, weights.read)
    tokens = torch.randint(300, (2, 200), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        here, there = ours(tokens), reference(tokens).logits
    assert (here - there).abs().max() <= 1e-5 * there.abs().max()


def test_a_permutation_left_out_would_be_seen(tmp_path, monkeypatch, capsys):
    save_hf(tmp_path / "in", "gqa4")
    monkeypatch.setattr(convert, "from_hf", lambda name, tensor, head_dim: tensor)
    code = run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out", "--vocab", "keep", "--verify")
    assert code == 2 and "of the largest logit, above 1e-04" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_shards", "by_words"), [(1, True), (2, True), (4, True), (2, False)])
def test_meta_shards_are_joined_bit_for_bit(tmp_path, num_shards, by_words, dtype):
    params, whole = save_meta(tmp_path / "in", num_shards, dtype, by_words)
    out = convert_folder(tmp_path / "in", tmp_path / "out", "--vocab", "keep", "--verify")
    weights = checkpoint.open_weights(out, world=distributed.start())
    assert weights.names.keys() == whole.keys()
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in whole.items())
    numbers = weights.document("model.json")["architecture"]
    assert (numbers["ffn_dim"], numbers["rope_theta"], numbers["rope_scaling_factor"], numbers["vocab_size"]) == (
        160,
        5e5,
        8,
        300,
    )


def test_a_new_vocabulary_leaves_embedding_and_output_out_and_says_how_to_start_from_it(tmp_path, capsys):
    save_hf(tmp_path / "in", "gqa4", torch.bfloat16, max_shard_size="40KB")
    out = convert_folder(tmp_path / "in", tmp_path / "out", "--dtype", "float32", "--verify")
    weights = checkpoint.open_weights(out, world=distributed.start())
    assert not set(convert.OF_THE_VOCABULARY) & weights.names.keys()
    assert {entry["dtype"] for entry in weights.tensors.values()} == {"float32"}
    theirs = tensors_of(tmp_path / "in")["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(weights.read("layers.1.feed_forward.w1.weight"), theirs.float())
    settings = tomllib.loads(capsys.readouterr().out.partition("starts from it says")[2])
    overrides = settings["model"]["overrides"]
    architecture = models.resolve("llama3", settings["model"]["flavor"], overrides)
    with torch.device("meta"):
        model = models.build("llama3", architecture)
    model.to_empty(device="cpu").init_weights(0)
    identity = {"family": "llama3", "flavor": "debug", "architecture": {**vars(architecture)}}
    lines = checkpoint.init_from(
        settings["checkpoint"]["init_from"],
        model,
        allow_missing=settings["checkpoint"]["init_allow_missing"],
        world=distributed.start(),
        model_json=identity,
    )
    assert "19 tensors loaded, 2 keep fresh values" in lines[0] and not any("WARNING" in line for line in lines)
    assert torch.equal(model.layers[1].feed_forward["w1"].weight, theirs.float())


def test_a_model_of_other_shapes_is_refused_with_the_number_that_differs(tmp_path):
    save_hf(tmp_path / "in", "gqa4")
    out = convert_folder(tmp_path / "in", tmp_path / "out")
    architecture = llama3.Architecture(dim=64, num_layers=2, num_heads=8, num_kv_heads=2, ffn_dim=128)
    model = models.build("llama3", architecture)
    with pytest.raises(ValueError, match="architecture.ffn_dim is 160 in the checkpoint and 128 here"):
        checkpoint.init_from(
            out,
            model,
            allow_missing=list(convert.OF_THE_VOCABULARY),
            world=distributed.start(),
            model_json={"family": "llama3", "flavor": "debug", "architecture": {**vars(architecture)}},
        )


def test_the_file_of_transformers_4_means_the_same_model_and_old_buffers_are_passed_over(tmp_path, capsys):
    from safetensors.torch import save_file

    save_hf(tmp_path / "in", "gqa4", torch.float16)
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    del config["head_dim"]
    path.write_text(json.dumps(config))
    tensors = tensors_of(tmp_path / "in")
    for name in ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        tensors[name] = torch.ones(4)
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    convert_folder(tmp_path / "in", tmp_path / "out", "--vocab", "keep", "--verify")
    said = capsys.readouterr().out
    assert "rope_theta=500000.0, rope_scaling_factor=8.0" in said and "verified against transformers" in said


# Name: dim, layers, multiple_of, multiplier and the width that the release's tensors have.
RELEASES = {
    "Llama-2-7b": (4096, 32, 256, None, 11008),
    "Llama-2-13b": (5120, 40, 256, None, 13824),
    "Llama-2-70b": (8192, 80, 4096, 1.3, 28672),
    "Llama-3.1-8B": (4096, 32, 1024, 1.3, 14336),
    "Llama-3.1-405B": (16384, 126, 4096, 1.2, 53248),
    "Llama-3.2-1B": (2048, 16, 256, 1.5, 8192),
    "Llama-3.2-3B": (3072, 28, 256, 1.0, 8192),
}


@pytest.mark.parametrize("release", RELEASES)
def test_the_params_of_releases_give_their_widths_and_scaling_and_come_back(release):
    dim, num_layers, multiple_of, multiplier, ffn_dim = RELEASES[release]
    params = {"dim": dim, "n_layers": num_layers, "n_heads": 32, "multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
    params |= {"vocab_size": -1, "use_scaled_rope": not release.startswith("Llama-2")}
    numbers = convert.numbers_of_params(params, 128256)
    assert (numbers["ffn_dim"], numbers["num_kv_heads"], numbers["vocab_size"]) == (ffn_dim, 32, 128256)
    factor = {"2": None, "3.1": 8, "3.2": 32}[release.split("-")[1]]
    assert numbers.get("rope_scaling_factor") == factor
    whole = {"rope_theta": 5e5} | vars(llama3.Architecture(**numbers))
    for changed in ({}, {"rope_scaling_factor": 4.0}, {"ffn_dim": ffn_dim + 1}):
        again = convert.params_of(whole | changed)
        assert llama3.Architecture(**convert.numbers_of_params(again, 128256)) == llama3.Architecture(**whole | changed)
    assert ("use_scaled_rope" in convert.params_of(whole)) == (factor is not None)


def test_shards_of_meta_that_are_missing_are_counted_and_settings_that_cannot_be_are_named(tmp_path, capsys):
    save_meta(tmp_path / "in", 4)
    for number in (2, 3):
        (tmp_path / "in" / f"consolidated.{number:02d}.pth").unlink()
    assert run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert "holds 2 of 4 shards by params.json's dim=64; download the rest" in capsys.readouterr().err
    edit("params.json", multiple_of=0, n_heads="8")(tmp_path / "in")
    assert run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert "n_heads='8' is no positive whole number; params.json: multiple_of=0 is no" in capsys.readouterr().err


def test_of_two_kinds_of_settings_in_a_folder_those_count_whose_weights_are_there(tmp_path, capsys):
    _, whole = save_meta(tmp_path / "in", 1)
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weights = checkpoint.open_weights(
        convert_folder(tmp_path / "in", tmp_path / "out", "--vocab", "keep"), world=distributed.start()
    )
    assert "Llama weights of Meta" in capsys.readouterr().out and weights.names.keys() == whole.keys()


def drop(name):
    return lambda folder: (folder / name).unlink()


def cut(name, num_bytes):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - num_bytes)


def edit(name, **changes):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def move_tensor(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "model-00009-of-00009.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def store(change):
    """Make one file of what this makes of each name and tensor."""

    def spoil(folder):
        from safetensors.torch import save_file

        tensors = dict(change(name, tensor) for name, tensor in tensors_of(folder).items())
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors")

    return spoil


def only_pickles(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()


DAMAGES = {
    "no such folder": (lambda folder: folder.rename(folder.with_name("elsewhere")), "is not a folder"),
    "no config": (drop("config.json"), "has neither config.json (Hugging Face) nor params.json (Meta); it holds"),
    "no shard": (drop("model-00002-of-00003.safetensors"), "of which model-00002-of-00003.safetensors"),
    "truncated": (cut("model-00002-of-00003.safetensors", 5), "is truncated; 5 of"),
    "absent shard": (move_tensor, "of which model-00009-of-00009.safetensors"),
    "damaged config": (cut("config.json", 9), "config.json is damaged"),
    "wrong shape": (edit("config.json", intermediate_size=96), "layers.0.mlp.gate_proj.weight (160, 64) instead of (96, 64)"),
    "one layer more": (edit("config.json", num_hidden_layers=3), "missing: model.layers.2.self_attn.q_proj.weight"),
    "another family": (edit("config.json", model_type="mistral"), "model_type='mistral'; only llama is understood"),
    "a bias": (edit("config.json", attention_bias=True), "attention_bias=true; the projections here have no bias"),
    "another rope": (edit("config.json", rope_parameters={"rope_type": "yarn"}), "rope_type='yarn'"),
    "another head": (edit("config.json", head_dim=16), "hidden_size / num_attention_heads = 64 / 8 is not head_dim=16"),
    "seven heads": (edit("config.json", num_attention_heads=7, head_dim=None), "64 / 7 is not a whole number"),
    "no heads": (edit("config.json", num_attention_heads=0), "num_attention_heads=0 is no positive whole number"),
    "a text for a number": (edit("config.json", hidden_size="64"), "hidden_size='64' is no positive whole number"),
    "a text for a table": (edit("config.json", rope_parameters="x"), "rope_parameters='x' is no table"),
    "two mistakes": (edit("config.json", mlp_bias=True, hidden_act="gelu"), "have no bias; config.json: hidden_act='gelu'"),
    "pickles": (only_pickles, "let transformers write safetensors"),
    "integers": (store(lambda name, tensor: (name, tensor.to(torch.int8))), "is of torch.int8; take weights that are not quan"),
    "a name of ours": (store(lambda name, tensor: (name.replace("model.norm", "norm"), tensor)), "unknown: norm.weight"),
    "quantized": (edit("config.json", quantization_config={}), "take the weights that are not quantized"),
}


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    save_hf(folder, "gqa4", max_shard_size="170KB")
    assert (folder / "model-00003-of-00003.safetensors").exists()
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_input_is_one_line_and_nothing_is_left_behind(tmp_path, three_shards, capsys, damage):
    source = shutil.copytree(three_shards, tmp_path / "in")
    spoil, words = DAMAGES[damage]
    spoil(source)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run("--input_dir", source, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and len(error.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_folder_that_holds_something_is_refused_and_unharmed(tmp_path, three_shards, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert run("--input_dir", three_shards, "--output_dir", tmp_path / "out") == 2
    assert "is there already and is no empty folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert run("--input_dir", three_shards, "--output_dir", tmp_path / "link") == 2
    assert "is no empty folder" in capsys.readouterr().err


def test_nothing_is_written_where_the_input_lies_or_the_command_runs(tmp_path, three_shards, monkeypatch, capsys):
    source = shutil.copytree(three_shards, tmp_path / "in")
    before = sorted(path.name for path in source.iterdir())
    assert run("--input_dir", source, "--output_dir", source / "dcp") == 2
    assert "lies inside" in capsys.readouterr().err and sorted(path.name for path in source.iterdir()) == before
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("--input_dir", source, "--output_dir", ".") == 2
    assert "is the folder that this command runs in" in capsys.readouterr().err


def test_what_a_kill_or_another_conversion_left_is_named_and_not_touched(tmp_path, three_shards, capsys):
    left = tmp_path / "Llama[8B].partial-00000000"
    left.mkdir()
    convert_folder(three_shards, tmp_path / "Llama[8B]")
    said = capsys.readouterr().err
    assert f"{left} is an interrupted conversion's, to be deleted, or one's that is running now" in said and left.is_dir()


def test_a_full_disk_is_one_line_with_the_free_bytes_and_leaves_nothing(tmp_path, three_shards, monkeypatch, capsys):
    from torchtitan_bio.checkpoint import commit

    def fail(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(commit, "flush", fail)
    assert run("--input_dir", three_shards, "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "bytes free" in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_behind(tmp_path, three_shards, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "from_hf", interrupt)
    assert run("--input_dir", three_shards, "--output_dir", tmp_path / "out") == 130  # though torch's writer is in between
    assert "interrupted; what was there before is as it was" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_payload_in_a_pth_is_refused_and_not_run(tmp_path, capsys):
    save_meta(tmp_path / "in", 1)
    with open(tmp_path / "in" / "consolidated.00.pth", "wb") as stream:
        torch.save({"tok_embeddings.weight": Payload(tmp_path / "touched")}, stream, pickle_module=pickle)
    assert run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "wants to run code" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "touched").exists() and not (tmp_path / "out").exists()


def test_a_head_that_says_it_is_tied_but_differs_is_refused(tmp_path, capsys):
    from safetensors.torch import save_file

    model = hf_model("mha")
    model.config.save_pretrained(tmp_path / "in")
    edit("config.json", tie_word_embeddings=True)(tmp_path / "in")
    save_file(dict(model.state_dict()), tmp_path / "in" / "model.safetensors")
    assert run("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out") == 2
    assert "says tie_word_embeddings, but lm_head differs" in capsys.readouterr().err
