"""What a checkpoint promises: whole or absent, equal to the last bit, refused by name when it is not what it should be."""

import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint import filesystem

from torchtitan_bio import checkpoint, distributed
from torchtitan_bio.checkpoint import Checkpointer, CheckpointError, commit, dcp
from torchtitan_bio.checkpoint.tensors import model_tensors, optimizer_tensors

MODEL_JSON = {"family": "toy", "flavor": "small", "architecture": {"dim": 6, "rope_theta": 1e4, "scaling": {"factor": 8.0}}}


class Toy(nn.Module):
    """Uneven first dimensions, a parameter of one element, a saved buffer, and a weight under two names."""

    def __init__(self, dim=6):
        super().__init__()
        self.embedding = nn.Embedding(5, dim)
        self.layers = nn.ModuleDict({"0": nn.Linear(dim, 3), "1": nn.Linear(3, dim)})
        self.temperature = nn.Parameter(torch.ones(1))
        self.output = nn.Linear(dim, 5, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("count", torch.zeros(3))

    def forward(self, tokens):
        hidden = self.layers["1"](self.layers["0"](self.embedding(tokens)))
        return (self.output(hidden) * self.temperature).square().sum()


def build(world, seed, *, steps=2, frozen=()):
    """A model and its AdamW after a few steps whose gradients do not depend on the number of ranks."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = Toy()
    model.count += seed
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for layer in model.layers.values():
        fully_shard(layer, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(steps):
        model(torch.arange(5)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def full(model, optimizer):
    """Every tensor in full, as NumPy arrays by name."""
    tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
    whole = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in tensors.items()}
    return {name: tensor.numpy().copy() for name, tensor in whole.items()}


def assert_bit_equal(left, right):
    assert left.keys() == right.keys()
    different = [name for name in left if left[name].tobytes() != right[name].tobytes()]
    assert not different


@pytest.fixture(scope="module")
def world():
    yield distributed.start()
    distributed.stop()


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(world, tmp_path, said):
    """save(step, seed) into tmp_path, and the Checkpointer that does it."""

    class Run:
        folder = tmp_path
        checkpoints = Checkpointer(tmp_path, world=world, keep_latest_k="all", say=said.append)

        def save(self, step, seed=1, checkpoints=None):
            (checkpoints or self.checkpoints).save(
                step, *build(world, seed), {"step": step, "next_sample": step * 4}, MODEL_JSON
            )
            return tmp_path / f"step-{step:08d}"

    return Run()


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


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


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


# Commit


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_step_that_is_there_and_verifies_is_not_written_again(run, said):
    path = run.save(1, seed=1)
    before = {name.name: name.stat().st_mtime_ns for name in path.iterdir()}
    run.save(1, seed=2)
    assert {name.name: name.stat().st_mtime_ns for name in path.iterdir()} == before
    assert "not saved again" in said[-1]


def test_a_damaged_folder_of_the_same_step_is_set_aside_and_written_anew(run):
    path = run.save(1)
    flip_a_bit(path / "model.json")
    run.save(1)
    assert checkpoint.verify(path) == []
    assert (run.folder / "step-00000001.invalid-1" / "__0_0.distcp").exists()


@pytest.mark.parametrize("crash_point", ["manifest.json.new", "manifest.json", "step-00000002"])
def test_a_crash_at_any_rename_leaves_the_older_checkpoint_to_resume_from(run, monkeypatch, said, crash_point):
    older = run.save(1)
    rename = os.rename

    class Crash(BaseException):
        pass

    def crash(source, target):
        if crash_point == Path(source).name:
            raise Crash
        rename(source, target)
        if crash_point == Path(target).name:
            raise Crash

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(Crash):
        run.save(2)
    monkeypatch.undo()
    path, state = run.checkpoints.latest()
    committed = crash_point == "step-00000002"
    assert path == (run.folder / "step-00000002" if committed else older) and checkpoint.verify(path) == []
    assert committed or any("left over" in line and "step-00000002.partial-" in line for line in said)


def test_a_crash_between_rename_and_retention_leaves_two_and_the_next_save_tidies_up(run, world, monkeypatch):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=1)
    run.save(1, checkpoints=checkpoints)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", crash)
    with pytest.raises(KeyboardInterrupt):
        run.save(2, checkpoints=checkpoints)
    monkeypatch.undo()
    assert checkpoints.latest()[0].name == "step-00000002"
    run.save(3, checkpoints=checkpoints)
    assert [path.name for path in run.folder.iterdir()] == ["step-00000003"]


def fill_the_disk(monkeypatch, suffix):
    """Every file with this ending is written to /dev/full."""
    opened = Path.open

    def to_full(self, mode="r", *args, **kwargs):
        if "w" in mode and self.name.endswith(suffix):
            self.symlink_to("/dev/full")
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", to_full)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("suffix", [".distcp", ".metadata.tmp", "train_state.json", "manifest.json.new"])
def test_a_full_disk_is_an_error_with_path_and_free_bytes_and_the_old_checkpoint_verifies(
    run, world, monkeypatch, suffix, asynchronous
):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=1, asynchronous=asynchronous)
    older = run.save(1)
    fill_the_disk(monkeypatch, suffix)
    with pytest.raises(CheckpointError, match=rf"{run.folder}/step-00000002 .*No space left.* \d+ bytes free"):
        run.save(2, checkpoints=checkpoints)
        checkpoints.wait()
    assert [path.name for path in run.folder.iterdir()] == [older.name]
    assert checkpoint.verify(older) == []


def test_an_error_of_an_asynchronous_save_is_raised_at_the_next_save_and_only_once(run, world, monkeypatch):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=1, asynchronous=True)
    run.save(1, checkpoints=checkpoints)
    checkpoints.wait()
    fill_the_disk(monkeypatch, ".distcp")
    run.save(2, checkpoints=checkpoints)
    with pytest.raises(CheckpointError, match="step-00000002"):
        run.save(3, checkpoints=checkpoints)
    monkeypatch.undo()
    checkpoints.wait()
    assert [path.name for path in run.folder.iterdir()] == ["step-00000001"]


def fail_on_one_rank(rank, folder, place):
    """Rank 1 fails at `place`; what each rank raised."""
    world = distributed.start()
    checkpoints = Checkpointer(folder, world=world)
    model, optimizer = build(world, seed=1)
    checkpoints.save(1, model, optimizer, {}, MODEL_JSON)

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "broken wire")

    patch = pytest.MonkeyPatch()
    if rank == 1 and place == "write":
        patch.setattr(filesystem, "_write_item", fail)
    if rank == 1 and place == "hash":
        patch.setattr(commit, "sha256", fail)
    if place == "parameter":
        with torch.no_grad():
            model.layers["0"].weight.to_local()[-1:] = torch.nan if rank == 1 else 0.0
    try:
        checkpoints.save(2, model, optimizer, {}, MODEL_JSON)
        raised = "nothing"
    except (CheckpointError, ValueError) as error:
        raised = str(error)
    patch.undo()
    path, _ = checkpoints.latest()
    checkpoints.load(path, model, optimizer, MODEL_JSON)
    return raised, path.name


@pytest.mark.parametrize(
    ("place", "words"),
    [("write", "rank 1: OSError"), ("hash", "rank 1: OSError"), ("parameter", "rank 1: not saved: model.layers.0.weight")],
)
def test_a_failure_on_one_rank_is_the_same_error_on_all_and_nothing_is_committed(tmp_path, place, words):
    outcomes = on_ranks(2, fail_on_one_rank, tmp_path, place)
    assert outcomes[0] == outcomes[1]
    assert words in outcomes[0][0] and outcomes[0][1] == "step-00000001"
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_shard_that_did_not_reach_the_files_in_full_is_not_committed(run, monkeypatch):
    write = dcp.write

    def lose_the_end(folder, tensors, peers):
        write(folder, tensors, peers)
        os.truncate(folder / "__0_0.distcp", 3000)

    monkeypatch.setattr(dcp, "write", lose_the_end)
    with pytest.raises(CheckpointError, match="did not reach the files in full"):
        run.save(1)
    assert listing(run.folder) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["parameter", "moment"])
def test_values_that_are_not_finite_are_not_saved(world, tmp_path, kind, value):
    model, optimizer = build(world, seed=1)
    broken = model.temperature if kind == "parameter" else optimizer.state[model.temperature]["exp_avg"]
    with torch.no_grad():
        broken.fill_(value)
    with pytest.raises(ValueError, match=r"temperature.* not finite"):
        Checkpointer(tmp_path, world=world).save(1, model, optimizer, {}, MODEL_JSON)
    assert listing(tmp_path) == []


# Discovery


def flip_a_bit(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped shard": ("__0_0.distcp", flip_a_bit),
    "flipped metadata": (".metadata", flip_a_bit),
    "flipped train state": ("train_state.json", flip_a_bit),
    "flipped manifest": ("manifest.json", flip_a_bit),
    "truncated": ("__0_0.distcp", lambda path: os.truncate(path, 100)),
    "missing shard": ("__0_0.distcp", Path.unlink),
    "missing manifest": ("manifest.json", Path.unlink),
    "empty manifest": ("manifest.json", lambda path: path.write_bytes(b"")),
    "manifest of nothing": ("manifest.json", lambda path: path.write_text("{}")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_by_name_and_the_one_before_is_used(world, run, said, damage):
    older, newest = run.save(1), run.save(2)
    name, harm = DAMAGES[damage]
    harm(newest / name)
    assert name in checkpoint.verify(newest)[0]
    assert run.checkpoints.latest()[0] == older
    assert sorted(os.listdir(run.folder)) == ["step-00000001", "step-00000002"], "touched before the run was agreed to"
    run.checkpoints.load(older, *build(world, seed=2), MODEL_JSON)
    assert any(name in line and "set aside as step-00000002.invalid-1" in line for line in said)
    assert sorted(os.listdir(run.folder)) == ["step-00000001", "step-00000002.invalid-1"]
    assert run.checkpoints.latest()[0] == older


def test_step_folders_of_which_none_verifies_are_an_error_and_stay_where_they_are(run):
    for step in (1, 2):
        flip_a_bit(run.save(step) / "__0_0.distcp")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none that verifies(.|\n)*step-00000002/__0_0(.|\n)*step-00000001/__0_0"):
            run.checkpoints.latest()
    assert sorted(os.listdir(run.folder)) == ["step-00000001", "step-00000002"]


def test_a_folder_without_step_folders_starts_at_step_0_and_says_so(run, said):
    assert run.checkpoints.latest() is None
    (run.folder / "step-00000002.partial-0123abcd").mkdir()
    (run.folder / "step-00000002.trash-0123abcd").mkdir()
    (run.folder / "step-2").mkdir()
    (run.folder / "step-00000009").write_text("a file, not a folder")
    (run.folder / "run.lock").write_text("")
    assert run.checkpoints.latest() is None
    assert "starting at step 0" in said[-1] and sum("left over" in line for line in said) == 2
    assert len(os.listdir(run.folder)) == 5


def test_an_unreadable_disk_is_an_error_and_sets_nothing_aside(run, monkeypatch):
    run.save(1)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(commit, "sha256", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        run.checkpoints.latest()
    assert os.listdir(run.folder) == ["step-00000001"]


# Retention


def test_retention_keeps_k_that_verify_and_touches_nothing_foreign(run, world, said):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=2, say=said.append)
    for step in (1, 2, 3, 4):
        run.save(step)
    os.truncate(run.folder / "step-00000004" / "__0_0.distcp", 10)
    (run.folder / "step-00000001" / "hf").mkdir()
    strays = ["step-5", "step-00000002.bak", "step-00000009.invalid-1", "best", "step-00000003.partial-0123abcd"]
    for name in strays:
        (run.folder / name).mkdir()
    (run.folder / "notes.txt").write_text("mine")
    (run.folder / "step-00000002.trash-0123abcd").mkdir()
    run.save(6, checkpoints=checkpoints)
    kept = ["step-00000001", "step-00000003", "step-00000004", "step-00000006"]
    assert sorted(os.listdir(run.folder)) == sorted([*kept, *strays, "notes.txt"])
    assert any("step-00000001 is kept because it holds hf" in line for line in said)
    assert any("neither counted nor deleted" in line and "step-00000004" in line for line in said)


def test_retention_never_deletes_what_was_just_saved(run, world):
    for step in (5, 6):
        run.save(step)
    run.save(2, checkpoints=Checkpointer(run.folder, world=world, keep_latest_k=1))
    assert sorted(os.listdir(run.folder)) == ["step-00000002", "step-00000006"]


def test_an_asynchronous_save_retires_nothing_before_it_is_committed(run, world):
    checkpoints = Checkpointer(run.folder, world=world, keep_latest_k=1, asynchronous=True)
    run.save(1, checkpoints=checkpoints)
    run.save(2, checkpoints=checkpoints)
    assert "step-00000001" in os.listdir(run.folder)
    checkpoints.wait()
    assert os.listdir(run.folder) == ["step-00000002"]


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


class Payload:
    """A pickle that touches a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


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


# Preflight


def test_preflight_names_the_path_and_both_numbers_when_space_is_short(world, tmp_path, run):
    free = shutil.disk_usage(tmp_path).free
    for keep, copies in ((3, 4), ("all", 2)):
        checkpoints = Checkpointer(tmp_path, world=world, keep_latest_k=keep)
        checkpoints.preflight(1000, saves_ahead=copies)
        too_large = free // copies + 10**9
        told = rf"{tmp_path} has [\d.]+ GiB free, and {copies} more checkpoint\(s\) of {too_large / 2**30:.1f} GiB each"
        with pytest.raises(ValueError, match=told):
            checkpoints.preflight(too_large, saves_ahead=9)
        checkpoints.preflight(too_large, saves_ahead=1)
    assert listing(tmp_path) == []
    run.save(1)
    Checkpointer(tmp_path, world=world, keep_latest_k=1).preflight(int(free * 0.6), saves_ahead=9)


def test_preflight_refuses_a_folder_that_cannot_be_written(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Checkpointer(tmp_path / "file" / "checkpoint", world=world).preflight(1, 1)

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ValueError, match="cannot be written: .*Permission denied"):
        Checkpointer(tmp_path / "new", world=world).preflight(1, 1)


def test_the_size_foretold_is_the_size_on_disk_within_a_tenth(world, tmp_path):
    model = nn.Linear(300, 400)
    optimizer = torch.optim.AdamW(model.parameters())
    Checkpointer(tmp_path, world=world).save(1, model, optimizer, {}, MODEL_JSON)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert checkpoint.num_bytes(model) == pytest.approx(on_disk, rel=0.1)


def test_keep_latest_k_of_nothing_is_refused(world, tmp_path):
    for wrong in (0, -1, "some"):
        with pytest.raises(ValueError, match="keep_latest_k"):
            Checkpointer(tmp_path, world=world, keep_latest_k=wrong)


def die_in_a_save(rank, folder):
    world = distributed.start()
    checkpoints = Checkpointer(folder, world=world, keep_latest_k=1)
    model, optimizer = build(world, seed=1)
    checkpoints.save(7, model, optimizer, {"step": 7}, MODEL_JSON)
    if rank == 1:
        filesystem._write_item = lambda *args: os._exit(9)
    checkpoints.save(8, model, optimizer, {"step": 8}, MODEL_JSON)


def test_a_rank_that_dies_inside_a_save_leaves_no_step_folder_and_the_previous_one_loads(tmp_path, world, said):
    with pytest.raises(RuntimeError, match=r"rank 0 failed(.|\n)*(closed|reset) by peer"):
        on_ranks(2, die_in_a_save, tmp_path)
    checkpoints = Checkpointer(tmp_path, world=world, say=said.append)
    path, state = checkpoints.latest()
    assert (path.name, state) == ("step-00000007", {"step": 7})
    checkpoints.load(path, *build(world, seed=2), MODEL_JSON)
    assert len(os.listdir(tmp_path)) == 2 and "step-00000008.partial-" in said[0]
