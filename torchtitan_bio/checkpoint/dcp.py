"""torch.distributed.checkpoint behind a wall: it stores `.metadata` and every value as pickles, and a pickle can run code.

`.metadata` goes through an unpickler that knows a dozen harmless classes; values are tensors, which torch's reader loads with
weights_only=True; anything else is never asked for.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    filesystem,
    metadata,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchtitan_bio.checkpoint.peers import Peers
from torchtitan_bio.checkpoint.tensors import dtype_name


def strided(name: str) -> torch.layout:
    """Stands in for torch's look-up of a layout by name."""
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"layout {name!r}: only torch.strided is supported")
    return torch.strided


ALLOWED = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): strided,
    ("collections", "OrderedDict"): OrderedDict,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    **{
        (metadata.__name__, each): getattr(metadata, each)
        for each in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    },
    # Where the checkpoint was written. Python 3.13 calls the module pathlib._local.
    **{(module, each): PurePosixPath for module in ("pathlib", "pathlib._local") for each in ("PosixPath", "PurePosixPath")},
}


class MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


class TensorReader(FileSystemReader):
    """Reads from what has been unpickled safely; never opens `.metadata` itself."""

    def __init__(self, folder: Path, index: Metadata):
        super().__init__(folder)
        self.index = index

    def read_metadata(self) -> Metadata:
        return self.index


class TensorPlanner(DefaultLoadPlanner):
    def load_bytes(self, read_item, value):
        raise ValueError(f"{read_item.storage_index.fqn} is not a tensor; its pickle is not opened")


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a DCP folder. ValueError where it is absent, damaged or wants to run code."""
    path = folder / ".metadata"
    if not path.is_file():
        raise ValueError(f"{folder} is not a DCP checkpoint: it has no .metadata")
    try:
        with path.open("rb") as stream:
            index = MetadataUnpickler(stream).load()
    except OSError:
        raise
    except Exception as error:  # damaged pickles fail in every way there is
        raise ValueError(f"{path} is refused: {error}") from error
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise ValueError(f"{path} is refused: it holds no DCP metadata")
    return index


def stored_tensors(index: Metadata) -> dict[str, dict]:
    """{name: {"shape", "dtype"}} of what is a tensor; other values are as good as absent."""
    return {
        name: {"shape": list(entry.size), "dtype": dtype_name(entry.properties.dtype)}
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def uncovered(index: Metadata, names, file_sizes: dict[str, int]) -> list[str]:
    """Which of these tensors the files cannot give back in full. The planner has checked that chunks do not overlap."""
    broken = []
    places = index.storage_data
    for name in names:
        entry = index.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            broken.append(name)
            continue
        found = [places.get(metadata.MetadataIndex(name, chunk.offsets)) for chunk in entry.chunks]
        in_files = all(place and place.offset + place.length <= file_sizes.get(place.relative_path, -1) for place in found)
        if not in_files or sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            broken.append(name)
    return broken


class LazyPlanner(DefaultSavePlanner):
    """Asks for each tensor when its turn to be written comes; what was planned with may be on the meta device."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.read = read

    def lookup_object(self, index):
        return self.read(index.fqn)


def write(folder: Path, tensors: dict[str, torch.Tensor], peers: Peers, read: Callable[[str], torch.Tensor] | None = None):
    """The tensors into DCP files. With `read` their values are asked for one by one, and only one is in memory at a time."""
    # More than one writer thread swallows a full disk (pytorch #191391). Copying ahead would use a CUDA stream in the thread of
    # an asynchronous save, where the current device is the first one whatever the rank.
    one_file = read is None  # torch's writer holds all tensors of a file until it is closed
    writer = FileSystemWriter(folder, single_file_per_rank=one_file, thread_count=1, sync_files=True, per_thread_copy_ahead=0)
    planner = None if read is None else LazyPlanner(read)
    with without_crc32():
        dcp.save(tensors, storage_writer=writer, planner=planner, process_group=peers.group)


@contextmanager
def without_crc32():
    """torch.save leaves out its CRC-32, which takes two thirds of its time and which torch.load does not look at.

    The manifest's sha256 covers every byte.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def read_in_place(folder: Path, index: Metadata, tensors: dict[str, torch.Tensor], peers: Peers):
    """Fill the tensors with what is stored under their names, whatever number of ranks wrote it."""
    outside = {
        place.relative_path for place in index.storage_data.values() if Path(place.relative_path).name != place.relative_path
    }
    if outside:
        raise ValueError(f"{folder / '.metadata'} is refused: it names files outside its folder, {sorted(outside)[0]}")
    planner = TensorPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(dict(tensors), storage_reader=TensorReader(folder, index), planner=planner, process_group=peers.group)
