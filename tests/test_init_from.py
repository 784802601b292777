"""A warm start takes exactly the weights it was told to take, says which, and refuses the rest."""

import json
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from payload import Payload
from ranks import on_ranks
from torch import nn

from torchtitan_bio import distributed
from torchtitan_bio.checkpoint import Checkpointer, CheckpointError, dcp, init_from

MODEL_JSON = {"family": "toy", "flavor": "small", "architecture": {"num_heads": 2, "rope_theta": 1e4, "vocab_size": 7}}


class Language(nn.Module):
    def __init__(self, vocab_size=7, num_layers=2, dtype=torch.float32):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocab_size, 4, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False, dtype=dtype) for _ in range(num_layers))
        self.output = nn.Linear(4, vocab_size, bias=False, dtype=dtype)


def build(seed, **sizes):
    torch.manual_seed(seed)
    return Language(**sizes)


@pytest.fixture(scope="module")
def world():
    yield distributed.start()
    distributed.stop()


@pytest.fixture
def ours(world, tmp_path):
    """A step folder of this trainer."""
    model = build(1)
    Checkpointer(tmp_path, world=world).save(5, model, torch.optim.AdamW(model.parameters()), {"step": 5}, MODEL_JSON)
    return tmp_path / "step-00000005"


def save_foreign(folder, tensors):
    """What torchtitan and its kin leave: one DCP folder with weights, optimizer and pickled values in it."""
    state = {
        "optimizer.state.output.weight.exp_avg": torch.ones(7, 4),
        "train_state": {"step": 3},
        "lr_scheduler.last_epoch": 3,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed is up or not, as other tests have left it; both are meant here
        torch_dcp.save(tensors | state, checkpoint_id=folder)
    return folder


def copies(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left, right):
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_our_own_checkpoint_gives_all_weights_and_no_more(ours, world):
    model = build(2)
    lines = init_from(ours, model, world=world, model_json=MODEL_JSON)
    assert_equal(model.state_dict(), build(1).state_dict())
    assert lines == [f"init_from {ours}: 4 tensors loaded, 0 keep fresh values, 0 there left unused"]


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_foreign_dcp_folder_gives_its_weights_under_bare_names_and_under_model(tmp_path, world, prefix):
    source = build(1).state_dict()
    save_foreign(tmp_path, {prefix + name: tensor for name, tensor in source.items()})
    model = build(2)
    init_from(tmp_path, model, world=world)
    assert_equal(model.state_dict(), source)


def test_renaming_carries_each_star_over_and_the_first_pattern_that_matches_counts(tmp_path, world):
    source = build(1)
    names = {"emb": "tok_embeddings.weight", "blocks.0.linear.w": "layers.0.weight", "blocks.1.linear.w": "layers.1.weight"}
    save_foreign(
        tmp_path, {there: source.state_dict()[here] for there, here in names.items()} | {"head": source.output.weight.data}
    )
    model = build(2)
    rename = {"blocks.*.linear.*": "layers.*.*eight", "emb": "tok_embeddings.weight", "head": "output.weight", "e*": "never*"}
    lines = init_from(tmp_path, model, rename=rename, world=world)
    assert_equal(model.state_dict(), source.state_dict())
    assert "blocks.1.linear.w -> layers.1.weight" in lines[1] and lines[1].startswith("init_from renamed: ")


def test_a_language_model_starts_another_vocabulary_with_fresh_embedding_and_output(ours, world):
    model = build(2, vocab_size=9)
    fresh = copies(model)
    lines = init_from(ours, model, allow_missing=["tok_embeddings.*", "output.*"], world=world)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (build(1).state_dict() if "layers" in name else fresh)[name])
    assert "tok_embeddings.weight ((7, 4) float32 there, (9, 4) float32 here)" in lines[1]


def test_layers_only_here_stay_fresh_and_layers_only_there_stay_unused_where_allowed(ours, world):
    deeper = build(2, num_layers=3)
    fresh = deeper.layers[2].weight.clone()
    lines = init_from(ours, deeper, allow_missing=["layers.2.*"], world=world)
    assert torch.equal(deeper.layers[2].weight, fresh) and lines[1] == "init_from fresh: layers.2.weight"
    lines = init_from(ours, build(2, num_layers=1), allow_missing=["layers.1.*"], world=world)
    assert lines[1] == "init_from unused: layers.1.weight"


@pytest.mark.parametrize(
    ("sizes", "settings", "words"),
    [
        ({"num_layers": 3}, {}, "missing: layers.2.weight$"),
        ({"num_layers": 1}, {}, "unexpected: layers.1.weight$"),
        ({"vocab_size": 9}, {"allow_missing": ["output.*"]}, r"mis-shaped: tok_embeddings.weight \(\(7, 4\).*\(9, 4\)"),
        ({}, {"allow_missing": ["outptu.*"]}, r"allow_missing patterns that match no name: outptu.\*"),
        ({}, {"rename": {"model.layers.*": "layers.*"}}, r"rename patterns that match no name in the source: model.layers.\*"),
        ({}, {"rename": {"layers.*": "layers"}}, "same number of"),
        ({}, {"rename": {"layers.0.*": "layers.1.*"}}, "two tensors of the source are called layers.1.weight"),
        ({}, {"rename": {"*": "other.*"}, "allow_missing": ["*"]}, "nothing that the model wants"),
    ],
)
def test_what_does_not_fit_is_an_error_by_name_and_nothing_is_copied(ours, world, sizes, settings, words):
    model = build(2, **sizes)
    before = copies(model)
    with pytest.raises(ValueError, match=words):
        init_from(ours, model, world=world, **settings)
    assert_equal(model.state_dict(), before)


def test_numbers_that_shapes_cannot_show_are_named_in_a_warning(ours, world):
    other = MODEL_JSON | {"architecture": {"num_heads": 4, "rope_theta": 5e5, "vocab_size": 7}}
    lines = init_from(ours, build(2), world=world, model_json=other)
    assert "WARNING" in lines[-1]
    assert "num_heads is 2 in the checkpoint and 4 here" in lines[-1] and "rope_theta is 10000.0" in lines[-1]
    assert "vocab_size" not in lines[-1]


def test_weights_of_another_type_are_cast_and_the_report_says_so(tmp_path, world):
    source = build(1, dtype=torch.bfloat16).state_dict()
    save_foreign(tmp_path, source)
    model = build(2)
    lines = init_from(tmp_path, model, world=world)
    assert_equal(model.state_dict(), {name: tensor.float() for name, tensor in source.items()})
    assert lines[1].startswith("init_from cast to this model's type: tok_embeddings.weight")


def test_a_damaged_source_is_refused(ours, world, tmp_path):
    foreign = save_foreign(tmp_path / "foreign", build(1).state_dict())
    shard = foreign / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(ValueError, match="its files do not hold all of"):
        init_from(foreign, build(2), world=world)
    content = bytearray((ours / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (ours / "__0_0.distcp").write_bytes(content)
    with pytest.raises(ValueError, match="__0_0.distcp has changed"):
        init_from(ours, build(2), world=world)


def test_a_folder_that_is_no_checkpoint_is_named_with_what_to_give_instead(ours, world, tmp_path):
    with pytest.raises(ValueError, match="name one of them, such as .*step-00000005"):
        init_from(ours.parent, build(2), world=world)
    for absent in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"{absent} is not a DCP checkpoint"):
            init_from(absent, build(2), world=world)


def test_a_pickle_in_a_foreign_checkpoint_is_never_opened(tmp_path, world):
    foreign = save_foreign(tmp_path / "foreign", build(1).state_dict() | {"extra": Payload(tmp_path / "touched")})
    init_from(foreign, build(2), world=world)
    index = dcp.read_metadata(foreign)
    index.planner_data = Payload(tmp_path / "touched")
    (foreign / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="is refused: it asks for io.open"):
        init_from(foreign, build(2), world=world)
    assert not (tmp_path / "touched").exists()


def test_a_payload_in_the_place_of_a_tensor_is_one_line_and_not_run(tmp_path, world):
    foreign = save_foreign(tmp_path / "foreign", build(1).state_dict())
    index, shard = dcp.read_metadata(foreign), foreign / "__0_0.distcp"
    torch.save(Payload(tmp_path / "touched"), tmp_path / "payload")
    [place] = [place for key, place in index.storage_data.items() if key.fqn == "layers.0.weight"]
    place.offset, place.length = shard.stat().st_size, (tmp_path / "payload").stat().st_size
    shard.write_bytes(shard.read_bytes() + (tmp_path / "payload").read_bytes())
    (foreign / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match=r"cannot be read: it asks for io.open, which no tensor needs \(of .*none was run$"):
        init_from(foreign, build(2), world=world)
    assert not (tmp_path / "touched").exists()


def test_a_source_without_an_embedding_says_nothing_of_the_vocabulary(tmp_path, world):
    source = save_foreign(tmp_path / "source", {"layers.0.weight": torch.ones(4, 4), "layers.1.weight": torch.ones(4, 4)})
    numbers = MODEL_JSON["architecture"]
    (source / "model.json").write_text(json.dumps(MODEL_JSON | {"architecture": numbers | {"tie_embeddings": True}}))
    here = MODEL_JSON | {"architecture": numbers | {"tie_embeddings": False, "vocab_size": 9}}
    ends = ["tok_embeddings.weight", "output.weight"]
    assert "WARNING" not in "".join(init_from(source, build(2), allow_missing=ends, world=world, model_json=here))


def warm_start_on_rank(rank, folder):
    from torch.distributed.fsdp import fully_shard

    world = distributed.start()
    model = build(2, vocab_size=9)
    fully_shard(model, mesh=world.mesh["shard"])
    lines = init_from(folder, model, allow_missing=["tok_embeddings.*", "output.*"], world=world)
    try:
        init_from(folder, model, world=world)
        refusal = "nothing"
    except (ValueError, CheckpointError) as error:
        refusal = str(error)
    return [layer.weight.full_tensor().detach().numpy() for layer in model.layers], lines, refusal


def test_two_ranks_start_from_what_one_rank_saved_and_refuse_alike(ours):
    (layers, lines, refusal), other = on_ranks(2, warm_start_on_rank, ours)
    assert all((mine == theirs.weight.detach().numpy()).all() for mine, theirs in zip(layers, build(1).layers, strict=True))
    assert other[1:] == (lines, refusal) and refusal.count("mis-shaped") == 1
