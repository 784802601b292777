"""What one process knows of the others: its place, the mesh, and the few things that are said between ranks.

One process is a group of one, so there is one code path from a laptop to a cluster. Plain numbers and messages travel over gloo
on the CPU, which costs the accelerator no synchronisation; messages are JSON, never pickles.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """Two dimensions, "replicate" and "shard"; data is split over both."""

    def sum(self, numbers: dict[str, float]) -> dict[str, float]:
        """The sum over ranks under each key; all ranks hold the same keys. Exact for integers below 2^53."""
        names = sorted(numbers)
        totals = self.sum_array(np.array([numbers[name] for name in names], dtype=np.float64))
        return dict(zip(names, totals.tolist(), strict=True))

    def sum_array(self, array: np.ndarray) -> np.ndarray:
        """The elementwise sum over ranks, in float64."""
        total = torch.from_numpy(np.array(array, dtype=np.float64))
        dist.all_reduce(total)
        return total.numpy()

    def sum_on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over ranks of a tensor that lives on the device."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def all_true(self, flag: bool) -> bool:
        return self.sum({"true": float(flag)})["true"] == self.size

    def any_true(self, flag: bool) -> bool:
        return self.sum({"true": float(flag)})["true"] > 0

    def broadcast(self, value=None):
        """Rank 0's JSON-able value on every rank."""
        message = bytearray(json.dumps(value).encode()) if self.rank == 0 else bytearray()
        length = torch.tensor([len(message)])
        dist.broadcast(length, src=0)
        buffer = torch.frombuffer(message, dtype=torch.uint8) if message else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(buffer, src=0)
        return json.loads(buffer.numpy().tobytes())

    def gather(self, value) -> list | None:
        """Each rank's JSON-able value, in rank order, on rank 0; None on the others."""
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(message)] = message
        received = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, received, dst=0)
        if received is None:
            return None
        return [json.loads(buffer[: int(length)].numpy().tobytes()) for buffer, length in zip(received, lengths, strict=True)]

    def barrier(self):
        self.sum({})

    @contextmanager
    def together(self, what: str):
        """Run the body; if it fails on any rank, every rank raises, so that none waits for one that has left.

        The body itself must not communicate. A rank that failed keeps its own exception.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        reports = self.broadcast(self.gather(f"{failure}" if failure else None))
        if failure:
            raise failure
        failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None]
        if failed:
            raise ValueError(f"{what} failed on {failed[0]}")


def degrees(size: int, shard_degree: int | str, replicate_degree: int) -> tuple[int, int]:
    """(replicate, shard) for so many ranks. "auto" shards over all ranks of a replica."""
    if shard_degree == "auto":
        shard_degree = max(1, size // replicate_degree)
    if replicate_degree * shard_degree != size:
        raise ValueError(
            f"data_parallel_replicate_degree * data_parallel_shard_degree = {replicate_degree} * {shard_degree} "
            f"is not the number of ranks, {size}"
        )
    return replicate_degree, shard_degree


def start(*, shard_degree: int | str = "auto", replicate_degree: int = 1, init_timeout_s: float = 600) -> World:
    """Join the process group that torchrun's environment describes (none: a world of one) and lay out the mesh.

    A group that exists already is used as it is.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        settings = {"backend": "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"}
        if "WORLD_SIZE" not in os.environ:
            settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(timeout=timedelta(seconds=init_timeout_s), **settings)
    shape = degrees(size, shard_degree, replicate_degree)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    return World(rank=dist.get_rank(), size=size, device=device, mesh=mesh)


def set_timeout(world: World, timeout_s: float):
    """From now on a collective may take so long: the first step compiles and warms up, later ones do not."""
    for group in (dist.group.WORLD, *world.mesh.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
