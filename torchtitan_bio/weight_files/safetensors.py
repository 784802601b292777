"""safetensors: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without a gap."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from torchtitan_bio.weight_files.hashed import HashedFile, largest_tensor_bytes, write_tensor
from torchtitan_bio.weight_files.stored import DOWNLOAD, Entry, Piece, WeightFiles, contiguous_stride, count_bytes, describe

# The dtypes that torch has too. Those of 4 and 6 bits share a byte among elements, and have no twin.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # what the safetensors package accepts


def open_safetensors(folder: Path) -> WeightFiles:
    """The weights of a Hugging Face folder: model.safetensors, or the shards that model.safetensors.index.json names."""
    folder = Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    if not single.exists() and not index.exists():
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; is it a model's folder from the Hub?")
    promised = read_index(index) if index.exists() else {}
    shards = sorted(set(promised.values())) or [SINGLE]
    if single.exists() and SINGLE not in shards:
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}, two sets of weights: remove the one you do not mean")
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"{index} names {len(shards)} shards, of which {', '.join(absent)} are not there: download them again")
    tensors, homes = {}, {}
    for shard in shards:
        for name, entry in read_header(folder / shard).items():
            if name in tensors:
                raise ValueError(f"{name} lies both in {folder / homes[name]} and in {shard}: download both again")
            tensors[name], homes[name] = entry, shard
    for name, shard in promised.items():
        if homes.get(name) != shard:
            raise ValueError(f"{index} says that {name} lies in {shard}, which does not hold it: download both again")
    return WeightFiles(tensors=tensors, largest_file_bytes=max((folder / shard).stat().st_size for shard in shards))


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file name}, as the index promises."""
    try:
        promised = json.loads(path.read_bytes())["weight_map"]
        sound = bool(promised) and all(isinstance(shard, str) and Path(shard).name == shard for shard in promised.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({describe(error)}): {DOWNLOAD}") from error
    if not sound:
        raise ValueError(f"{path} is damaged (its weight_map is empty, or names what is no file of the folder): {DOWNLOAD}")
    return promised


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file in the order of their bytes, which fill it exactly."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        start = 8 + int.from_bytes(first, "little")
        if size < 10 or not 10 <= start <= MAX_HEADER_BYTES:
            remedy = f"{DOWNLOAD}, with `git lfs pull` if it is a pointer of git-lfs"
            raise ValueError(f"{path} is no safetensors file (it has {size} bytes and begins with {first!r}): {remedy}")
        if start > size:
            raise ValueError(f"{path} is truncated inside its header; at least {start - size} bytes are missing: {DOWNLOAD}")
        text = stream.read(start - 8)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        claims = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({describe(error)}): {DOWNLOAD}") from error
    entries, end = {}, 0
    for name, claim in claims:
        entries[name] = entry_of(path, name, claim, start, end)
        end = claim["data_offsets"][1]
    if start + end > size:
        raise ValueError(f"{path} is truncated; {start + end - size} of its {start + end} bytes are missing: {DOWNLOAD}")
    if start + end < size:
        raise ValueError(f"{path} has {size} bytes; its header accounts for {start + end}: {DOWNLOAD}")
    return entries


def entry_of(path: Path, name: str, claim: dict, start: int, expected: int) -> Entry:
    """What the header claims of a tensor, checked. expected: where in the data, which begin at `start`, it has to begin."""
    dtype, shape, offsets = DTYPES.get(str(claim.get("dtype"))), claim.get("shape"), claim["data_offsets"]
    if dtype is None:
        raise ValueError(f"{path}: {name} has dtype {claim.get('dtype')!r}; those that can be read are {', '.join(DTYPES)}")
    if not are_counts(shape) or not are_counts(offsets) or len(offsets) != 2 or math.prod(n or 1 for n in shape) >= 2**63:
        raise ValueError(f"{path}: {name} has shape {shape!r} and data_offsets {offsets!r}, as no tensor has: {DOWNLOAD}")
    begin, end = offsets
    if begin != expected:
        raise ValueError(f"{path}: {name} begins at byte {begin} of the data; what is before it ends at {expected}: {DOWNLOAD}")
    if end - begin != count_bytes(shape, dtype):
        needed = count_bytes(shape, dtype)
        raise ValueError(f"{path}: {name} has {end - begin} bytes; shape {shape} of {dtype} has {needed}: {DOWNLOAD}")
    shape = tuple(shape)
    piece = Piece(path=path, offset=start + begin, shape=shape, stride=contiguous_stride(shape), dtype=dtype)
    return Entry(shape=shape, dtype=dtype, pieces=(piece,))


def are_counts(values) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def write_safetensors(
    folder: Path,
    entries: dict[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], torch.Tensor],
    *,
    max_shard_bytes: int,
    metadata: dict[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict]:
    """Write one file, or shards and their index, as transformers reads them: {file name: {"bytes", "sha256"}}, all on disk.

    entries: {name: (shape, dtype)}. Each tensor is asked for once, in this order, in which they also fill the shards. A shard's
    limit counts tensors alone; one larger than it has a shard of its own. progress: called with the bytes of each when written.
    """
    folder = Path(folder)
    shards, room = [{}], max_shard_bytes
    for name, entry in entries.items():
        if count_bytes(*entry) > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = entry
        room -= count_bytes(*entry)
    files, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        file_name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file_name] = write_file(folder / file_name, shard, read, metadata or {}, progress)
        weight_map |= dict.fromkeys(shard, file_name)
    if len(shards) > 1:
        total_size = sum(count_bytes(*entry) for entry in entries.values())
        totals = {"total_size": total_size, "total_parameters": sum(math.prod(shape) for shape, _ in entries.values())}
        with HashedFile(folder / INDEX, lag_bytes=0) as out:
            out.write(json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2).encode())
            files[INDEX] = out.finish()
    return files


def write_file(path: Path, entries: dict[str, tuple], read, metadata: dict[str, str], progress) -> dict:
    header, end = {"__metadata__": {"format": "pt"} | metadata}, 0
    for name, (shape, dtype) in entries.items():
        begin, end = end, end + count_bytes(shape, dtype)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin at a multiple of 8
    with HashedFile(path, lag_bytes=largest_tensor_bytes(entries)) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, entry in entries.items():
            num_bytes = write_tensor(out, name, entry, read(name))
            if progress:
                progress(num_bytes)
        return out.finish()
