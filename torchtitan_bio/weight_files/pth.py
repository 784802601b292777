"""torch's .pth: a zip of a pickle, which says how each tensor lies in its storage, and an uncompressed record per storage."""

import io
import math
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from torchtitan_bio.weight_files.hashed import HashedFile, largest_tensor_bytes, write_tensor
from torchtitan_bio.weight_files.stored import (
    DOWNLOAD,
    Entry,
    Piece,
    WeightFiles,
    contiguous_stride,
    count_bytes,
    describe,
    naming,
)

# A storage's class names its dtype. Those that came later have none, and are stored as bytes beside a dtype.
STORAGES = {
    torch.bool: torch.BoolStorage,
    torch.uint8: torch.ByteStorage,
    torch.int8: torch.CharStorage,
    torch.int16: torch.ShortStorage,
    torch.int32: torch.IntStorage,
    torch.int64: torch.LongStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.complex64: torch.ComplexFloatStorage,
}
ALIGNMENT_BYTES = 64  # of a storage in the file, as torch.save keeps it


def open_meta(folder: Path, split_dim: Callable[[str], int | None]) -> WeightFiles:
    """The weights of a Meta folder: consolidated.00.pth, or the model-parallel shards 00, 01, ... joined tensor by tensor.

    split_dim(name): the dimension along which the shards cut a tensor, None where each holds all of it. rope.freqs is left out:
    it follows from params.json.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("consolidated.[0-9][0-9].pth"))
    if not paths:
        raise ValueError(f"{folder} holds no consolidated.00.pth; is it a folder of Meta's original weights?")
    for number, path in enumerate(paths):
        if path.name != f"consolidated.{number:02d}.pth":
            raise ValueError(f"{folder} holds {path.name} but no consolidated.{number:02d}.pth: {DOWNLOAD}")
    shards = [read_header(path) for path in paths]
    first = shards[0]
    for path, shard in zip(paths, shards, strict=True):
        if unshared := first.keys() ^ shard.keys():
            raise ValueError(f"{paths[0]} and {path.name} do not both hold {min(unshared)}; are they shards of one model?")
        for name, piece in shard.items():
            if (piece.shape, piece.dtype) != (first[name].shape, first[name].dtype):
                both = (
                    f"{first[name].shape} of {first[name].dtype} in {paths[0]}, {piece.shape} of {piece.dtype} in {path.name}"
                )
                raise ValueError(f"{name} is {both}; are they shards of one model?")
    entries = {}
    for name, piece in first.items():
        dim = split_dim(name) if len(shards) > 1 else None
        if dim is not None and dim >= len(piece.shape):
            raise ValueError(f"{paths[0]}: {name} has shape {piece.shape}; shards of it are cut along dimension {dim}")
        shape = tuple(size * len(shards) if dim == axis else size for axis, size in enumerate(piece.shape))
        pieces = tuple(shard[name] for shard in shards)
        entries[name] = Entry(shape=shape, dtype=piece.dtype, pieces=pieces, split_dim=dim)
    return WeightFiles(tensors=entries, largest_file_bytes=max(path.stat().st_size for path in paths))


def read_header(path: Path) -> dict[str, Piece]:
    """Where the tensors of a state dict lie in its file. Only torch's weights-only reader gets to see the pickle."""
    try:
        records = find_records(path)
    except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is truncated, or not of torch.save since 1.6 ({describe(error)}): {DOWNLOAD}") from error
    state = load_mapped(path)
    state.pop("rope.freqs", None)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{path}: {name} is no plain tensor; is it a file of Meta's original weights?")
    # The file is mapped in one stretch, so storages lie as far apart in memory as their records do in the file.
    addresses = [tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()]
    start = min(addresses, default=0) - min(records, default=0)
    pieces = {}
    for name, tensor in state.items():
        offset, storage = 0, tensor.untyped_storage()
        if tensor.numel():
            if records.get(storage.data_ptr() - start) != storage.nbytes():
                raise ValueError(f"{path}: the bytes of {name} are no plain record of the file; save it anew with torch.save")
            offset = tensor.data_ptr() - start
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        pieces[name] = Piece(path=path, offset=offset, shape=shape, stride=stride, dtype=tensor.dtype)
    return pieces


def load_mapped(path: Path) -> dict:
    """The dict in a .pth; its tensors' bytes stay in the file."""
    try:
        with naming(path):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        wanted = f"wants to run code when it is loaded ({named[1]})" if named else f"holds no weights ({describe(error)})"
        raise ValueError(f"{path} {wanted}. Nothing was run; take weights from a source that you trust") from error
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(f"{path} is damaged ({describe(error)}): {DOWNLOAD}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, no dict of tensors; is it a file of Meta's original weights?")
    return state


def find_records(path: Path) -> dict[int, int]:
    """{offset: bytes} of the storages in a .pth, without those that are empty or compressed."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        for info in archive.infolist():
            if "/data/" in info.filename and info.file_size and info.compress_type == zipfile.ZIP_STORED:
                stream.seek(info.header_offset + 26)  # where a record's own header tells the lengths of its last two fields
                records[info.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))] = info.file_size
    return records


def write_pth(
    path: Path,
    entries: dict[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], torch.Tensor],
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Write {name: tensor} for torch.load, weights_only and mmap if you like: {"bytes", "sha256"}, all on disk.

    entries, read, progress: see write_safetensors. Each record has its CRC-32 for unzip to check; torch does not.
    """
    with HashedFile(Path(path), lag_bytes=largest_tensor_bytes(entries)) as out:
        # To a file that cannot seek, zipfile writes sizes and CRCs behind the bytes and never goes back: the hash holds.
        with zipfile.ZipFile(out, "w") as archive:

            def record(name: str):
                return open_record(archive, f"archive/{name}", out.num_bytes)

            with record("data.pkl") as stream:
                stream.write(pickle_state_dict(entries))
            with record("byteorder") as stream:
                stream.write(sys.byteorder.encode())
            for number, (name, entry) in enumerate(entries.items()):
                tensor = read(name)
                with record(f"data/{number}") as stream:
                    num_bytes = write_tensor(stream, name, entry, tensor)
                if progress:
                    progress(num_bytes)
            with record("version") as stream:
                stream.write(b"3\n")  # of torch's zip format
        return out.finish()


def open_record(archive: zipfile.ZipFile, name: str, position: int):
    """A stream into a new record, which stands at `position` and whose bytes begin at a multiple of 64."""
    info = zipfile.ZipInfo(name)
    # Ahead of the bytes: 30 fixed ones, the name, the padding (a field, whose head takes 4), the 64-bit sizes (20).
    num_padding = -(position + 30 + len(name) + 4 + 20) % ALIGNMENT_BYTES
    info.extra = b"FB" + num_padding.to_bytes(2, "little") + bytes(num_padding)
    return archive.open(info, "w", force_zip64=True)


@dataclass(frozen=True)
class Storage:
    """What a pickle of torch.save says of a storage, whose bytes are a record beside it."""

    kind: type
    key: str
    num_elements: int


@dataclass(frozen=True)
class Tensor:
    """Pickles as a tensor of this storage would."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __reduce__(self):
        layout = (0, tuple(self.shape), contiguous_stride(self.shape), False, OrderedDict())  # offset ... gradient, hooks
        if kind := STORAGES.get(self.dtype):
            return torch._utils._rebuild_tensor_v2, (Storage(kind, self.key, math.prod(self.shape)), *layout)
        storage = Storage(torch.UntypedStorage, self.key, count_bytes(self.shape, self.dtype))
        return torch._utils._rebuild_tensor_v3, (storage, *layout, self.dtype)


class StateDictPickler(pickle.Pickler):
    """Writes the references to storages that torch.load resolves."""

    def persistent_id(self, value):
        if isinstance(value, Storage):
            return "storage", value.kind, value.key, "cpu", value.num_elements
        return None


def pickle_state_dict(entries: dict[str, tuple]) -> bytes:
    """What torch.save would pickle for tensors of these shapes and dtypes."""
    text = io.BytesIO()
    state = {name: Tensor(str(number), *entry) for number, (name, entry) in enumerate(entries.items())}
    StateDictPickler(text, protocol=2).dump(state)
    return text.getvalue()
