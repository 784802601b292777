"""What `python -m torchtitan_bio.checkpoint` says of a folder is true, and it runs nothing that lies there."""

import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from torchtitan_bio import checkpoint, distributed, resume
from torchtitan_bio.checkpoint import dcp
from torchtitan_bio.checkpoint.__main__ import main

MODEL_JSON = {"family": "toy", "flavor": "small", "architecture": {"num_heads": 2, "rope_theta": 1e4}}


def save(folder, step, seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(40, 50)
    config = {"training": {"steps": 9}}
    state = resume.train_state(step, global_batch_size=4, seq_len=8, skipped_in_a_row=0, fingerprint={}, config=config)
    saver = checkpoint.Checkpointer(folder, world=distributed.start())
    saver.save(step, model, torch.optim.AdamW(model.parameters()), state, MODEL_JSON)
    return folder / f"step-{step:08d}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    yield save(folder, 3, seed=1), save(folder, 6, seed=2)
    if torch.distributed.is_initialized():  # --values has a group of its own, and ends it
        distributed.stop()


def test_inspect_tells_tensors_bytes_step_config_and_soundness(saved, capsys):
    assert main(["inspect", str(saved[0])]) == 0
    said = capsys.readouterr().out
    for words in ("model.weight", "(50, 40) float32", "8.00 kB", "model: 2 tensors, 8.20 kB", "step 3, ", "96 tokens seen"):
        assert words in said
    assert "config training: steps=9" in said and "num_heads=2" in said and "verifies by manifest and sizes" in said
    assert main(["inspect", str(saved[0]), "--hash"]) == 0 and "every byte is as written" in capsys.readouterr().out


def test_inspect_finds_a_missing_file_at_once_and_a_flipped_bit_with_hash(saved, tmp_path, capsys):
    folder = shutil.copytree(saved[0], tmp_path / "step-00000003")
    shard = folder / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["inspect", str(folder)]) == 0
    assert main(["inspect", str(folder), "--hash"]) == 1 and "DAMAGED: " in capsys.readouterr().out
    shard.unlink()
    assert main(["inspect", str(folder)]) == 1 and "__0_0.distcp is missing" in capsys.readouterr().out


def test_inspect_shows_another_trainers_folder_and_refuses_to_run_what_is_in_it(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group is meant
        torch_dcp.save({"layers.0.w": torch.ones(3), "train_state": {"step": 3}}, checkpoint_id=tmp_path / "old", no_dist=True)
    assert main(["inspect", str(tmp_path / "old")]) == 0
    assert "no manifest of torchtitan_bio" in capsys.readouterr().out
    index = dcp.read_metadata(tmp_path / "old")
    index.planner_data = print
    (tmp_path / "old" / ".metadata").write_bytes(pickle.dumps(index))
    assert main(["inspect", str(tmp_path / "old")]) == 2
    assert "is refused: it asks for builtins.print" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2


def lose_a_field(index):
    del index.state_dict_metadata["w"].properties


def spoil_places(index):
    for place in index.storage_data.values():
        place.offset = "here"


def move_a_chunk(index):
    [chunk] = index.state_dict_metadata["w"].chunks
    chunk.offsets = torch.Size([1])


def name_a_folder(index):
    index.storage_data = dict.fromkeys(index.storage_data, "elsewhere")


@pytest.mark.parametrize("spoil", [lose_a_field, spoil_places, move_a_chunk, name_a_folder])
def test_an_index_that_cannot_be_is_one_line_of_refusal(tmp_path, spoil, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group is meant
        torch_dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "old", no_dist=True)
    index = dcp.read_metadata(tmp_path / "old")
    spoil(index)
    (tmp_path / "old" / ".metadata").write_bytes(pickle.dumps(index))
    assert main(["inspect", str(tmp_path / "old")]) == 2
    error = capsys.readouterr().err
    assert ".metadata is refused: " in error and len(error.splitlines()) == 1


def test_a_folder_of_checkpoints_is_told_from_one(saved, capsys):
    assert main(["inspect", str(saved[0].parent)]) == 2
    assert "is a folder of checkpoints; name one of them, such as" in capsys.readouterr().err
    assert main(["diff", str(saved[0]), str(saved[0].parent)]) == 2


def test_diff_of_a_folder_with_itself_is_0_and_of_two_is_1_with_the_numbers(saved, capsys):
    one, other = map(str, saved)
    assert main(["diff", one, one, "--values"]) == 0 and "the same 8 tensors to the last bit" in capsys.readouterr().out
    assert main(["diff", one, other]) == 1
    said = capsys.readouterr().out
    assert "train_state.json: step is 3 and 6" in said and "weight" not in said
    assert main(["diff", one, other, "--values"]) == 1
    torch.manual_seed(1)
    first = torch.nn.Linear(40, 50).weight
    torch.manual_seed(2)
    gap = (first - torch.nn.Linear(40, 50).weight).abs().max().item()
    assert f"weight: values differ by up to {gap:.3g} " in capsys.readouterr().out
