"""torch.distributed.checkpoint behind a wall: it stores `.metadata` and every value as pickles, and a pickle can run code.

`.metadata` goes through an unpickler that knows a dozen harmless classes; values are tensors, which torch's reader loads with
weights_only=True; anything else is never asked for.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    CheckpointException,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    filesystem,
    metadata,
)
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from torchtitan_bio.checkpoint.peers import Peers
from torchtitan_bio.checkpoint.tensors import dtype_name, enumerate_names


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
        if not isinstance(index, Metadata):
            raise ValueError("it holds no DCP metadata")
        check(index)
    except OSError:
        raise
    except Exception as error:  # damaged pickles fail in every way there is
        raise ValueError(f"{path} is refused: {' '.join(str(error).split())}") from error
    return index


def check(index: Metadata):
    """An error of some kind unless all is of the types that torch writes: a pickle may leave out or replace any field."""
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, (TensorStorageMetadata, BytesStorageMetadata)):
            raise ValueError(f"{name!r} is neither a tensor nor a value")
        if isinstance(entry, TensorStorageMetadata) and not is_sound(entry):
            raise ValueError(f"what it says of {name} cannot be")
    for key, place in index.storage_data.items():
        if not isinstance(key, MetadataIndex) or not isinstance(place, filesystem._StorageInfo):
            raise ValueError("it does not say where its tensors lie")
        if PurePosixPath(place.relative_path).name != place.relative_path:
            raise ValueError(f"it names files outside its folder, {place.relative_path}")
        if not (type(place.offset) is type(place.length) is int and place.offset >= 0 and place.length >= 0):
            raise ValueError(f"{key.fqn} lies at bytes {place.offset!r} and on, {place.length!r} of them")


def is_sound(entry: TensorStorageMetadata) -> bool:
    """Whether a tensor has a type and a shape, and its chunks lie inside it."""
    boxes = [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
    sizes = [entry.size, *(size for box in boxes for size in box)]
    if not isinstance(entry.properties.dtype, torch.dtype) or not all(isinstance(size, torch.Size) for size in sizes):
        return False
    if any(len(size) != len(entry.size) or min(size, default=0) < 0 for size in sizes):
        return False
    return all(first + count <= whole for box in boxes for first, count, whole in zip(*box, entry.size, strict=True))


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
    with without_crc32(), heeding_interrupts():
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
    planner = TensorPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with heeding_interrupts():
        try:
            dcp.load(dict(tensors), storage_reader=TensorReader(folder, index), planner=planner, process_group=peers.group)
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if not isinstance(cause, Exception) or isinstance(cause, OSError | MemoryError):
                raise
            where = f", on rank {rank}" if peers.size > 1 else ""
            raise ValueError(
                f"{folder} cannot be read{where}: {describe(cause)} (of {enumerate_names(list(tensors))}); it is damaged, or "
                "was made to run code, and none was run"
            ) from error


def describe(cause: Exception) -> str:
    """What the bytes of a file did to their reader, in a line. Of a pickle torch would advise to trust it."""
    if isinstance(cause, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(cause))
        return f"it asks for {named[1]}, which no tensor needs" if named else "what lies there is no tensor"
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """KeyboardInterrupt instead of torch's report that a rank failed because of it. All ranks have the same report."""
    try:
        yield
    except CheckpointException as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
            raise KeyboardInterrupt from error
        raise
