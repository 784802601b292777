"""What one process knows of the others: its place, the mesh, and the few things that are said between ranks.

One process is a group of one, so there is one code path from a laptop to a cluster. Plain numbers and messages travel over gloo
on the CPU, which costs the accelerator no synchronisation; messages are JSON, never pickles.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from torchtitan_bio import exits


class FailedElsewhere(RuntimeError):
    """What failed on another rank, which keeps its own error."""


class RefusedElsewhere(ValueError):
    """What other ranks have refused, each of them as something that a user can mend."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    """Two dimensions, "replicate" and "shard", over all ranks: those that share sequences share parameters too."""
    sequence: DeviceMesh
    """Two dimensions, "data" and "context": data is split over the first, each sequence over the second, by neighbours."""

    @property
    def data_rank(self) -> int:
        return self.rank // self.context_size

    @property
    def data_size(self) -> int:
        return self.size // self.context_size

    @property
    def context_rank(self) -> int:
        return self.rank % self.context_size

    @property
    def context_size(self) -> int:
        return self.sequence["context"].size()

    def sum(self, numbers: dict[str, float]) -> dict[str, float]:
        """The sum over ranks under each key; all ranks hold the same keys. Exact for integers below 2^53."""
        names = sorted(numbers)
        totals = self.sum_array(np.array([numbers[name] for name in names], dtype=np.float64))
        return dict(zip(names, totals.tolist(), strict=True))

    def sum_of_data(self, numbers: dict[str, float]) -> dict[str, float]:
        """As sum, of what ranks that share a sequence all know of it: each sequence counts once."""
        return self.sum({name: number if self.context_rank == 0 else 0 for name, number in numbers.items()})

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

    def exchange(self, value) -> list:
        """Each rank's JSON-able value, in rank order, on every rank."""
        return exchange(value)

    @contextmanager
    def together(self, what: str):
        """Run the body; if it fails on any rank, every rank raises, so that none waits for one that has left.

        The body itself must not communicate. A rank that failed keeps its own exception; the others' is one that a user can
        mend only where that of each failed rank is.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        report = {"error": str(failure), "is_of_the_input": exits.is_of_the_input(failure)} if failure else None
        reports = self.exchange(report)
        if failure:
            raise failure
        failed = [(report["is_of_the_input"], rank, report["error"]) for rank, report in enumerate(reports) if report]
        if failed:
            can_be_mended, rank, error = min(failed)
            raise (RefusedElsewhere if can_be_mended else FailedElsewhere)(f"{what} failed on rank {rank}: {error}")


def exchange(value, group: dist.ProcessGroup | None = None) -> list:
    """The JSON-able value of each rank of a group (None: all ranks), in rank order, on every one of them."""
    message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(message)]), group=group)
    padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
    padded[: len(message)] = message
    buffers = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(buffers, padded, group=group)
    return [json.loads(buffer[: int(length)].numpy().tobytes()) for buffer, length in zip(buffers, lengths, strict=True)]


def degrees(size: int, shard_degree: int | str, replicate_degree: int, context_degree: int = 1) -> tuple[int, int]:
    """(replicate, shard) for so many ranks. "auto" shards over all ranks of a replica."""
    if shard_degree == "auto":
        if size % (replicate_degree * context_degree):
            divisors = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
            raise ValueError(
                f"data_parallel_replicate_degree * context_parallel_degree = {replicate_degree} * {context_degree} does not "
                f"divide the number of ranks, {size}; what does is {divisors}"
            )
        shard_degree = size // (replicate_degree * context_degree)
    if replicate_degree * shard_degree * context_degree != size:
        raise ValueError(
            f"data_parallel_replicate_degree * data_parallel_shard_degree * context_parallel_degree = "
            f"{replicate_degree} * {shard_degree} * {context_degree} is not the number of ranks, {size}"
        )
    return replicate_degree, shard_degree


def local_rank() -> int:
    """This process's number on its node, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", 0))


def own_device() -> torch.device:
    """The accelerator that this process takes, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def start(
    *,
    shard_degree: int | str = "auto",
    replicate_degree: int = 1,
    context_degree: int = 1,
    init_timeout_s: float = 600,
    flight_folder: Path | None = None,
) -> World:
    """Join the process group that torchrun's environment describes (none: a world of one) and lay out the mesh.

    A group that exists already is used as it is. flight_folder: where NCCL's flight recorder leaves what it knows of a
    collective that timed out.
    """
    size, device = int(os.environ.get("WORLD_SIZE", 1)), own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if flight_folder:
            record_flights(flight_folder, os.environ)
    if not dist.is_initialized():
        settings = {"backend": "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"}
        timeout = timedelta(seconds=init_timeout_s)
        if "WORLD_SIZE" not in os.environ:
            settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # One torchrun has one store for all its restarts, where gloo would find addresses of ranks that are dead and wait
            # for them. Several (one a node) count restarts each for itself: train.sh has them make a new store every time.
            store, rank, _ = next(rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            settings |= {"store": store, "rank": rank, "world_size": size}
        dist.init_process_group(timeout=timeout, **settings)
    replicate, shard = degrees(size, shard_degree, replicate_degree, context_degree)
    world = World(
        rank=dist.get_rank(),
        size=size,
        local_rank=local_rank(),
        device=device,
        mesh=init_device_mesh(device.type, (replicate, shard * context_degree), mesh_dim_names=("replicate", "shard")),
        sequence=init_device_mesh(device.type, (replicate * shard, context_degree), mesh_dim_names=("data", "context")),
    )
    set_timeout(world, init_timeout_s)  # groups of a mesh are made with torch's own
    return world


def record_flights(folder: Path, environment: dict[str, str]):
    """Have torch keep the last collectives in memory, and write them into the folder when one times out.

    Settings that a user has made in the environment stay, under their older names too.
    """
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in environment:
        environment.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environment:
        environment.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / "nccl-rank-"))  # the rank is appended
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def is_of_another_rank(error: BaseException | None) -> bool:
    """Whether an error only tells that another rank failed, went away or did not answer in time."""
    while error is not None:
        # What gloo says of a lost or silent peer is a plain RuntimeError that begins with a place in its sources.
        if isinstance(error, FailedElsewhere | RefusedElsewhere | dist.DistError):
            return True
        if isinstance(error, RuntimeError) and "gloo/" in str(error):
            return True
        error = error.__cause__
    return False


def set_timeout(world: World, timeout_s: float):
    """From now on a collective may take so long: the first step compiles and warms up, later ones do not."""
    for group in (dist.group.WORLD, *world.mesh.get_all_groups(), *world.sequence.get_all_groups()):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def stop():
    """Leave the process group, with all ranks. One that has failed must not wait for the others: it exits."""
    dist.destroy_process_group()


def print_on_rank_0(world: World):
    """say(line), which one rank prints, and at once."""

    def say(line: str):
        if world.rank == 0:
            print(line, flush=True)

    return say
