"""The model tensors of a DCP folder, ours or another trainer's, read one by one."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from torchtitan_bio.checkpoint import commit, dcp
from torchtitan_bio.checkpoint.load import examine
from torchtitan_bio.checkpoint.peers import Peers, meet
from torchtitan_bio.checkpoint.tensors import enumerate_names, plain_name

# What torchtitan and its kin store beside the model, which has bare names there; the last is a table made from the config.
TRAINING_STATE = ("optimizer", "optimizers", "lr_scheduler", "lr_schedulers", "dataloader", "train_state", "freqs_cis")


@dataclass(frozen=True, kw_only=True)
class Weights:
    path: Path
    index: Metadata
    names: dict[str, str]
    """Name of a parameter -> the name it is stored under."""
    manifest: dict | None
    """Of a committed folder of ours."""
    peers: Peers

    @property
    def tensors(self) -> dict[str, dict]:
        """{name: {"shape", "dtype"}}"""
        stored = dcp.stored_tensors(self.index)
        return {name: stored[there] for name, there in self.names.items()}

    def check(self):
        """ValueError unless every byte is as it was written, as far as the folder tells. May run in a second thread."""
        if self.manifest:
            commit.check_hashes(self.path, self.manifest["files"])

    def document(self, name: str) -> dict | None:
        """A JSON file that was written beside the tensors."""
        path = self.path / name
        return commit.read_json(path) if path.exists() else None

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor in its own type or in another, to which it is rounded as it is read."""
        entry = self.index.state_dict_metadata[self.names[name]]
        tensor = torch.empty(entry.size, dtype=dtype or entry.properties.dtype)
        target = {self.names[name]: tensor}
        self.peers.each(f"reading {self.path}", lambda: dcp.read_in_place(self.path, self.index, target, self.peers))
        return tensor


def open_weights(path, *, world, check: bool = True) -> Weights:
    """Verify a DCP folder as far as it can be and read what it says of itself; ValueError where it is damaged or no checkpoint.

    One of ours has a sha256 for each file; of another only the sizes can be checked. Without `check` the caller calls check()
    before it trusts what it has read.
    """
    path, peers = Path(path), meet(world)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    manifest = (examine(path, peers) if check else commit.inspect(path)) if check_is_step(path) else None
    index = dcp.read_metadata(path)
    names = model_names(index)
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    if broken := dcp.uncovered(index, names.values(), sizes):
        raise ValueError(f"{path} is incomplete: its files do not hold all of {enumerate_names(broken)}")
    return Weights(path=path, index=index, names=names, manifest=manifest, peers=peers)


def write_weights(
    target: Path, layout: dict[str, torch.Tensor], documents: dict[str, dict], *, read: Callable[[str], torch.Tensor], world
):
    """Make the target a committed folder of these tensors, or leave nothing.

    layout: on the meta device, under stored names. read is asked for each tensor once, when its turn comes.
    """
    peers = meet(world)
    staging = commit.stage_as(target, peers)
    try:
        commit.write(staging, layout, documents, peers, step=0, read=read)
    except BaseException:  # KeyboardInterrupt too
        commit.discard(staging)
        raise


def check_is_step(path: Path) -> bool:
    """Whether the folder carries a manifest of ours; ValueError where it holds step folders instead of being one."""
    folders = [folder for folder in (path, path / "checkpoint") if commit.names_like(folder, commit.STEP)]
    if folders:
        newest = folders[0] / commit.names_like(folders[0], commit.STEP)[0]
        raise ValueError(f"{path} is a folder of checkpoints; name one of them, such as {newest}")
    if commit.PARTIAL.fullmatch(path.name):
        raise ValueError(f"{path} is left over from an interrupted save; name a folder that was committed")
    return (path / "manifest.json").exists()


def model_names(index: Metadata) -> dict[str, str]:
    """{name without "model.": stored name} of the weights in a DCP folder, leaving out its training state."""
    stored = [name for name in dcp.stored_tensors(index) if not is_training_state(name)]
    prefix = "model." if stored and all(name.startswith("model.") for name in stored) else ""
    return {plain_name(name.removeprefix(prefix)): name for name in stored}


def is_training_state(name: str) -> bool:
    return name.removeprefix("model.").split(".")[0] in TRAINING_STATE


def left_aside(index: Metadata) -> str:
    """What a folder holds beside the model's tensors, in a line; empty where it holds nothing else."""
    tensors = dcp.stored_tensors(index)
    aside = Counter(
        f"{'tensors' if name in tensors else 'pickled values'} of {name.removeprefix('model.').split('.')[0]}"
        for name in index.state_dict_metadata
        if name not in tensors or is_training_state(name)
    )
    return ", ".join(f"{count} {what}" for what, count in aside.items())
