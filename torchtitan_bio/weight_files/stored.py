"""A tensor that lies in files, and how its bytes come into memory.

They are read into the tensor's own memory. No file is mapped: its pages would count as memory in use, and pile up.
"""

import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

DOWNLOAD = "download it again"
HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Where a tensor, or one shard's share of it, lies. Strides count elements, as torch's do."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """From the first element to the last, which is more than the elements where the strides leave gaps."""
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (span if math.prod(self.shape) else 0) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        data = allocate(self.num_bytes)
        rest = memoryview(data.numpy())
        with naming(self.path), self.path.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            while rest:
                if not (count := stream.readinto(rest)):
                    raise ValueError(f"{self.path} has become {len(rest)} bytes too short since it was opened: {DOWNLOAD}")
                rest = rest[count:]
        return data.view(self.dtype).as_strided(self.shape, self.stride).contiguous()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in files: cut along split_dim into equal pieces, or (None) whole in its only piece or the same in each."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    split_dim: int | None = None


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Tensors in files, known by their headers. No file stays open."""

    tensors: dict[str, Entry]
    largest_file_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of all tensors as `read` gives them."""
        return sum(count_bytes(entry.shape, entry.dtype) for entry in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU in memory of its own. ValueError where shards differ in what should be the same in all."""
        entry = self.tensors[name]
        if entry.split_dim is None:
            tensor = entry.pieces[0].read()
            for piece in entry.pieces[1:]:
                if view_bytes(piece.read()) != view_bytes(tensor):  # as bytes, since a NaN equals nothing
                    both = f"{entry.pieces[0].path} and {piece.path.name}"
                    raise ValueError(f"{both} differ in {name}, which is the same in all shards of a model: {DOWNLOAD}")
            return tensor
        tensor = allocate(count_bytes(entry.shape, entry.dtype)).view(entry.dtype).view(entry.shape)
        for piece, share in zip(entry.pieces, tensor.chunk(len(entry.pieces), entry.split_dim), strict=True):
            share.copy_(piece.read())
        return tensor


def allocate(num_bytes: int) -> torch.Tensor:
    """New memory as a tensor of bytes, which goes back to the system with the tensor.

    The C library keeps freed blocks of up to 32 MB and breaks them up: ten tensors' worth after twenty of 10 MB. And reading
    into fresh pages of 4 KB runs at a third of the speed of reading into huge ones (1.3 and 4 GB/s of processor time).
    """
    if num_bytes < HUGE_PAGE_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with suppress(OSError):  # a kernel without them has small ones
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError from inside names the file, which those of read, write and fsync leave out."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def count_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def view_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def describe(error: Exception) -> str:
    """The first line of what a library has to say."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
