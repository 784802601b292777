"""A trained model from whatever holds one: a run folder, a step folder, a converted folder, a folder of Hugging Face."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from torchtitan_bio import checkpoint, convert, models, parallelize, weight_files
from torchtitan_bio.checkpoint import commit, dcp
from torchtitan_bio.models import layers


@dataclass(frozen=True, kw_only=True)
class Trained:
    path: Path
    """Where the weights lie: a step folder, a folder of them (the newest that verifies is meant), or Hugging Face's."""
    family: str
    flavor: str
    architecture: object
    is_hf: bool
    dtype: torch.dtype
    """In which the weights are stored; of Hugging Face's, float32 whatever they are."""
    config: dict | None
    """Of the run that made it, as plain tables, where that is known."""
    seq_len: int | None
    """The longest sequence that it was trained on, where that is known."""


def find(path) -> Trained:
    """What a folder holds, without its weights; ValueError where it holds no model."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; a model lies in a run folder, or one like checkpoint/step-00000500 in it")
    folder = next((folder for folder in (path, path / "checkpoint") if commit.names_like(folder, commit.STEP)), None)
    steps = [folder / name for name in commit.names_like(folder, commit.STEP)] if folder else [path]
    if not any((step / "model.json").is_file() for step in steps):
        if (path / "config.json").is_file():
            return _hugging_face(path)
        if (path / "config.toml").is_file():
            raise ValueError(f"the run {path} has no checkpoint yet: none was saved to its end (checkpoint.interval)")
        raise ValueError(f"{path} holds no model: no model.json (of ours), no config.json (of Hugging Face's)")
    problems = []
    for step in steps:  # those of a run agree about its model, so any that can be read tells
        try:
            return _described(folder or path, step)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError("\n".join(problems))


def _described(path: Path, step: Path) -> Trained:
    identity = commit.read_json(step / "model.json")
    state = commit.read_json(step / "train_state.json") if (step / "train_state.json").is_file() else {}
    config = state.get("config")
    return Trained(
        path=path,
        family=identity["family"],
        flavor=identity["flavor"],
        architecture=models.restore(identity["family"], identity["architecture"]),
        is_hf=False,
        dtype=_stored_dtype(step),
        config=config,
        seq_len=config["training"]["seq_len"] if config else None,
    )


def _hugging_face(path: Path) -> Trained:
    config = commit.read_json(path / "config.json")
    return Trained(
        path=path,
        family="llama3",
        flavor=path.name,
        architecture=models.restore("llama3", convert.numbers_of_hf(config)),
        is_hf=True,
        dtype=torch.float32,
        config=None,
        seq_len=config.get("max_position_embeddings"),
    )


def _stored_dtype(step: Path) -> torch.dtype:
    stored = dcp.stored_tensors(dcp.read_metadata(step))
    dtypes = {entry["dtype"] for name, entry in stored.items() if name.startswith("model.")}
    if len(dtypes) != 1:
        raise ValueError(
            f"{step} stores its weights in {' and '.join(sorted(dtypes)) or 'no type at all'}; one type is expected"
        )
    return getattr(torch, dtypes.pop())


def load(trained: Trained, *, world, param_dtype: torch.dtype, attend=None) -> tuple[torch.nn.Module, str]:
    """(the model, on this rank's device, to be used without gradients; a line that says what was loaded and why).

    param_dtype: in which it computes. One process holds all of it in that type; several share it by FSDP2.
    """
    with torch.device("meta"):
        model = models.build(trained.family, trained.architecture, attend=attend).to(trained.dtype)
    if world.size > 1:
        parallelize.parallelize(
            model,
            world.mesh,
            param_dtype=param_dtype,
            reduce_dtype=torch.float32,
            recompute="none",
            compile_blocks=False,
            reshard_after_forward=True,
        )
    model.to_empty(device=world.device)
    if trained.is_hf:
        with world.together(f"reading {trained.path}"):
            line = _read_hf(trained, model)
    else:
        identity = {"family": trained.family, "flavor": trained.flavor, "architecture": asdict(trained.architecture)}
        line = checkpoint.load_model(trained.path, model, identity, world=world)
    if world.size == 1:
        model.to(param_dtype)
    return model.eval().requires_grad_(False), line


@torch.no_grad()
def _read_hf(trained: Trained, model: torch.nn.Module) -> str:
    stored = weight_files.open_safetensors(trained.path)
    parameters = dict(model.named_parameters())
    missing = [there for name in parameters if (there := convert.hf_name(name)) not in stored.tensors]
    if missing:
        raise ValueError(f"{trained.path} lacks {len(missing)} of {len(parameters)} tensors, {missing[0]} among them")
    for name, parameter in parameters.items():
        tensor = stored.read(convert.hf_name(name))
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{trained.path}: {convert.hf_name(name)} is {tuple(tensor.shape)}, and by config.json {tuple(parameter.shape)}"
            )
        tensor = convert.from_hf(name, tensor, trained.architecture.head_dim)
        own, first = parallelize.own_rows(parameter) if hasattr(parameter, "placements") else layers.whole(parameter)
        row = first // math.prod(parameter.shape[1:])
        own.copy_(tensor[row : row + len(own)])
    return f"loaded {trained.path}: {len(parameters)} tensors of Hugging Face's, for a {trained.family}"
