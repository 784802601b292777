"""A file hashed while it is written."""

import hashlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from torchtitan_bio.weight_files.stored import count_bytes, naming, view_bytes

WRITEBACK_BYTES = 1 << 20


class HashedFile:
    """A new file whose sha256 a second thread takes while the caller makes the next bytes. It cannot seek.

    At most lag_bytes of what was written wait to be hashed. They are kept alive for it and must not change.
    """

    def __init__(self, path: Path, *, lag_bytes: int):
        self.path, self.lag_bytes, self.num_bytes = path, lag_bytes, 0
        self.digest, self.waiting = hashlib.sha256(), deque()

    def __enter__(self) -> "HashedFile":
        self.stream = self.path.open("wb", buffering=0)
        self.hasher = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_):
        self.hasher.shutdown()
        self.stream.close()

    def write(self, data: bytes | memoryview) -> int:
        self.waiting.append((len(data), self.hasher.submit(self.digest.update, data)))
        rest = memoryview(data)
        with naming(self.path):
            while rest:
                rest = rest[self.stream.write(rest) :]
        if len(data) >= WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            # The disk starts on these bytes now, and flush finds little left to wait for: a sixth to a half of the time saved.
            with suppress(OSError):  # only advice
                os.posix_fadvise(self.stream.fileno(), self.num_bytes, len(data), os.POSIX_FADV_DONTNEED)
        self.num_bytes += len(data)
        while sum(size for size, _ in self.waiting) > self.lag_bytes:
            self.waiting.popleft()[1].result()
        return len(data)

    def flush(self):
        """Bring what was written to the disk."""
        with naming(self.path):
            os.fsync(self.stream.fileno())

    def finish(self) -> dict:
        """Flush; {"bytes", "sha256"}."""
        self.flush()
        for _, update in self.waiting:
            update.result()
        return {"bytes": self.num_bytes, "sha256": self.digest.hexdigest()}


def write_tensor(out, name: str, declared: tuple, tensor: torch.Tensor) -> int:
    """Write the bytes of a tensor, which must be as its header says; how many."""
    found, declared = (tuple(tensor.shape), tensor.dtype), (tuple(declared[0]), declared[1])
    assert found == declared, f"{name} was declared as {declared} and read as {found}"
    return out.write(view_bytes(tensor))


def largest_tensor_bytes(entries: dict[str, tuple]) -> int:
    return max((count_bytes(*entry) for entry in entries.values()), default=0)
