"""What a checkpoint holds: equal to the last bit when it comes back, refused by name when it is not what it should be."""

# ruff: noqa: F401, F811  (fixtures: imported, and then parameters)

import io
import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from payload import Payload
from ranks import on_ranks
from torch import nn
from toy_checkpoints import MODEL_JSON, Toy, assert_bit_equal, build, flip_a_bit, full, listing, local, run, said, world

from torchtitan_bio import checkpoint, distributed
from torchtitan_bio.checkpoint import Checkpointer, CheckpointError, commit, dcp
from torchtitan_bio.checkpoint.tensors import model_tensors, optimizer_tensors

# Round trips


def save_on_rank(rank, folder, replicate, asynchronous):
    world = distributed.start(replicate_degree=replicate)
    model, optimizer = build(world, seed=1)
    checkpoints = Checkpointer(folder, world=world, keep_latest_k=1, asynchronous=asynchronous)
    checkpoints.save(7, model, optimizer, {"step": 7}, MODEL_JSON)
    saved = full(model, optimizer)
    if asynchronous:
        with torch.no_grad():
            for tensor in (*model_tensors(model).values(), *optimizer_tensors(model, optimizer).values()):
                tensor.zero_()  # training that goes on must not reach what is being written
    checkpoints.wait()
    return saved


def load_on_rank(rank, folder, replicate, forward_first=False):
    world = distributed.start(replicate_degree=replicate)
    model, optimizer = build(world, seed=2, steps=0)
    if forward_first:
        with torch.no_grad():
            model(torch.arange(5))
    checkpoints = Checkpointer(folder, world=world)
    path, train_state = checkpoints.latest()
    assert (path.name, train_state) == ("step-00000007", {"step": 7})
    checkpoints.load(path, model, optimizer, MODEL_JSON)
    return full(model, optimizer)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("before", "after"), [((1, 1), (2, 1)), ((2, 1), (1, 1)), ((2, 1), (2, 1)), ((2, 2), (4, 2)), ((4, 2), (2, 1))]
)
def test_what_n_ranks_save_m_ranks_load_to_the_last_bit(tmp_path, before, after, asynchronous):
    saved = on_ranks(before[0], save_on_rank, tmp_path, before[1], asynchronous)
    loaded = on_ranks(after[0], load_on_rank, tmp_path, after[1])
    for each in loaded:
        assert_bit_equal(each, saved[0])


def test_a_model_that_has_only_run_forward_is_loaded_and_saved_as_shards(tmp_path):
    saved = on_ranks(2, save_on_rank, tmp_path, 1, False)
    for each in on_ranks(2, load_on_rank, tmp_path, 1, True):
        assert_bit_equal(each, saved[0])


def test_the_files_hold_tensors_only_under_plain_names(run):
    index = dcp.read_metadata(run.save(3))
    assert index.state_dict_metadata.keys() == dcp.stored_tensors(index).keys()
    parameters = ["embedding.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "temperature"]
    moments = {f"optimizer.{name}.{key}" for name in parameters for key in ("exp_avg", "exp_avg_sq", "step")}
    assert set(index.state_dict_metadata) == {f"model.{name}" for name in (*parameters, "count")} | moments


def test_more_documents_lie_beside_the_train_state_under_the_same_seal(run, world):
    document = {"seed": 7, "sources": ["a", "b"]}
    run.checkpoints.save(1, *build(world, seed=1), {"step": 1}, MODEL_JSON, documents={"data.json": document})
    path = run.folder / "step-00000001"
    assert json.loads((path / "data.json").read_text()) == document and checkpoint.verify(path) == []
    flip_a_bit(path / "data.json")
    assert "data.json" in checkpoint.verify(path)[0]


def test_names_are_free_of_compile_and_recompute_wrappers():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = Toy()
    wrapped.layers["0"] = checkpoint_wrapper(wrapped.layers["0"])
    assert model_tensors(torch.compile(wrapped)).keys() == model_tensors(Toy()).keys()


def test_loading_fills_an_optimizer_that_has_made_no_step_and_a_zero_state_is_what_it_would_have_had(world):
    model, fresh = build(world, seed=1, steps=0)
    before = {name: tensor.clone() for name, tensor in model_tensors(model).items()}
    state = optimizer_tensors(model, fresh)
    assert all(float(tensor.sum()) == 0 for tensor in map(local, state.values()))
    assert all(torch.equal(local(tensor), local(before[name])) for name, tensor in model_tensors(model).items())
    assert fresh.param_groups[0]["lr"] == 0.1 and all(p.grad is None for p in model.parameters())
    reference, never_filled = build(world, seed=1, steps=0)
    for each, optimizer in ((model, fresh), (reference, never_filled)):
        each(torch.arange(5)).backward()
        optimizer.step()
    assert_bit_equal(full(model, fresh), full(reference, never_filled))


def test_frozen_parameters_have_no_optimizer_state_and_come_back(world, tmp_path):
    checkpoints = Checkpointer(tmp_path, world=world)
    model, optimizer = build(world, seed=1, frozen=["embedding.weight"])
    checkpoints.save(1, model, optimizer, {}, MODEL_JSON)
    stored = dcp.stored_tensors(dcp.read_metadata(tmp_path / "step-00000001"))
    assert not [name for name in stored if name.startswith("optimizer.embedding")]
    other, other_optimizer = build(world, seed=2, steps=0, frozen=["embedding.weight"])
    checkpoints.load(tmp_path / "step-00000001", other, other_optimizer, MODEL_JSON)
    assert_bit_equal(full(other, other_optimizer), full(model, optimizer))


def test_one_line_says_what_was_loaded_from_where_and_why(run, world, said):
    run.save(1)
    path = run.save(2)
    said.clear()
    checkpoints = Checkpointer(run.folder, world=world, say=said.append)
    found, state = checkpoints.latest()
    assert (found, state) == (path, {"step": 2, "next_sample": 8})
    checkpoints.load(found, *build(world, seed=2), MODEL_JSON)
    assert said == [f"checkpoint: loaded {path} (newest of 2 that verifies): 7 model and 18 optimizer tensors"]


def test_evaluation_loads_the_weights_alone_and_changes_nothing(run, world):
    run.save(1, seed=1)
    damaged = run.save(2, seed=3)
    flip_a_bit(damaged / "__0_0.distcp")
    before = listing(run.folder)
    model, _ = build(world, seed=2, steps=0)
    line = checkpoint.load_model(run.folder, model, MODEL_JSON, world=world)
    assert "step-00000001" in line and "__0_0.distcp" in line
    assert torch.equal(model.temperature.full_tensor(), build(world, seed=1)[0].temperature.full_tensor())
    assert listing(run.folder) == before


# Strict loading


def rejected(run, world, words, *, model_json=MODEL_JSON, change=lambda model: None):
    path = run.save(1)
    model, optimizer = build(world, seed=2, steps=0)
    change(model)
    before = {name: local(tensor).clone() for name, tensor in model_tensors(model).items()}
    with pytest.raises(ValueError, match=words):
        run.checkpoints.load(path, model, optimizer, model_json)
    assert all(torch.equal(local(tensor), before[name]) for name, tensor in model_tensors(model).items())


def test_a_number_that_differs_is_named_with_both_values(run, world):
    other = {"family": "toy", "flavor": "renamed", "architecture": MODEL_JSON["architecture"] | {"rope_theta": 5e5}}
    rejected(run, world, r"architecture.rope_theta is 10000.0 in the checkpoint and 500000.0 here$", model_json=other)
    nested = {"family": "toy", "flavor": "small", "architecture": {"dim": 6, "rope_theta": 1e4, "scaling": None}}
    rejected(run, world, r"architecture.scaling is \{'factor': 8.0\}", model_json=nested)


def test_missing_unexpected_and_misshaped_names_are_listed_and_nothing_is_copied(run, world):
    def change(model):
        model.scale = model.temperature
        del model.temperature
        model.count = torch.zeros(4)

    rejected(
        run,
        world,
        r"missing: model.scale, optimizer.scale.exp_avg, .*; unexpected: model.temperature, .*; "
        r"mis-shaped: model.count \(\(3,\) float32 stored, \(4,\) float32 here\)",
        change=change,
    )


def test_a_long_list_of_names_is_ten_and_a_count(run, world):
    def change(model):
        for number in range(25):
            model.register_parameter(f"extra{number:02d}", nn.Parameter(torch.ones(1), requires_grad=False))

    rejected(run, world, r"missing: model.extra00, .*model.extra09 and 15 more \(25 in all\)", change=change)


def test_another_type_is_refused_because_resume_would_not_be_exact(run, world):
    def change(model):
        model.count = model.count.double()

    rejected(run, world, r"count \(\(3,\) float32 stored, \(3,\) float64 here\)", change=change)


def test_a_checkpoint_without_optimizer_state_is_refused_for_training(world, tmp_path):
    model, optimizer = build(world, seed=1, frozen=[name for name, _ in Toy().named_parameters() if name != "temperature"])
    optimizer.param_groups[0]["params"] = []
    checkpoints = Checkpointer(tmp_path, world=world)
    checkpoints.save(1, model, optimizer, {}, MODEL_JSON)
    with pytest.raises(ValueError, match="no optimizer state.*init_from"):
        checkpoints.load(tmp_path / "step-00000001", *build(world, seed=1), MODEL_JSON)


# Hostile files


def forge(folder, name, content):
    """Replace a file and make the manifest agree, as an attacker would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["files"][name] = {"bytes": len(content), "sha256": commit.sha256(folder / name)}
    commit.write_json(folder / "manifest.json", manifest | {"sha256": commit.seal(manifest)})


def hide_in_metadata(folder, touched):
    index = dcp.read_metadata(folder)
    index.planner_data = Payload(touched)
    forge(folder, ".metadata", pickle.dumps(index))


def hide_in_value(folder, touched):
    """The index of one tensor points to a pickle at the end of the shard."""
    index = dcp.read_metadata(folder)
    place = max(index.storage_data.values(), key=lambda each: each.length)
    value = io.BytesIO()
    torch.save(Payload(touched), value)
    shard = bytearray((folder / place.relative_path).read_bytes())
    value = value.getvalue()
    place.offset, place.length = len(shard), len(value)
    shard += value
    forge(folder, place.relative_path, bytes(shard))
    forge(folder, ".metadata", pickle.dumps(index))


def replace_a_tensor_by_a_pickle(folder, touched):
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = dcp.read_metadata(folder)
    index.state_dict_metadata["model.temperature"] = BytesStorageMetadata()
    forge(folder, ".metadata", pickle.dumps(index))


@pytest.mark.parametrize("hide", [hide_in_metadata, hide_in_value, replace_a_tensor_by_a_pickle])
def test_a_hostile_checkpoint_is_refused_and_its_payload_not_run(run, world, tmp_path_factory, hide):
    touched = tmp_path_factory.mktemp("outside") / "touched"
    path = run.save(1)
    hide(path, touched)
    with pytest.raises((ValueError, CheckpointError)):
        run.checkpoints.load(path, *build(world, seed=2), MODEL_JSON)
    with pytest.raises((ValueError, CheckpointError)):
        checkpoint.init_from(path, build(world, seed=2)[0], world=world)
    assert not touched.exists()
    if hide is hide_in_metadata:
        with pytest.raises(BaseException):  # noqa: B017  the payload is alive: torch's own reader runs it
            torch_dcp.load({"model.count": torch.zeros(3)}, checkpoint_id=path)
            raise RuntimeError
        assert touched.exists()


def test_a_checkpoint_that_names_files_outside_its_folder_is_refused(run, world):
    path = run.save(1)
    index = dcp.read_metadata(path)
    for place in index.storage_data.values():
        place.relative_path = f"../elsewhere/{place.relative_path}"
    forge(path, ".metadata", pickle.dumps(index))
    with pytest.raises(ValueError, match="outside its folder"):
        run.checkpoints.load(path, *build(world, seed=2), MODEL_JSON)
