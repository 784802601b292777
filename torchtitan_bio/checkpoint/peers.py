"""How ranks agree about a checkpoint: a task either succeeds on all of them, or all raise the same error.

Messages are JSON over a gloo group of their own, because an asynchronous save speaks from a second thread while training speaks
on the default group.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException


class CheckpointError(RuntimeError):
    """A save or load that failed on some rank. Every rank raises it, with the same words."""


@dataclass(frozen=True)
class Peers:
    rank: int
    size: int
    group: dist.ProcessGroup

    def exchange(self, value) -> list:
        """Each rank's JSON-able value, in rank order, on every rank."""
        message = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self.group)
        padded = torch.zeros(max(int(length) for length in lengths), dtype=torch.uint8)
        padded[: len(message)] = message
        buffers = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(buffers, padded, group=self.group)
        return [json.loads(buffer[: int(length)].numpy().tobytes()) for buffer, length in zip(buffers, lengths, strict=True)]

    def each(self, what: str, task: Callable):
        """This rank's task(). If it fails on any rank, all raise: ValueError where input was refused, else CheckpointError."""
        result = failure = None
        report = {}
        try:
            result = task()
        except (Exception, CheckpointException) as error:  # CheckpointException of torch is a BaseException
            failure = error
            report = {"words": describe(error), "refused": isinstance(error, ValueError)}
        reports = self.exchange(report)
        failed = {rank: each for rank, each in enumerate(reports) if each}
        if not failed:
            return result
        ranks_by_words = {}
        for rank, each in failed.items():
            ranks_by_words.setdefault(each["words"], []).append(rank)
        words = "; ".join(text if len(who) == self.size else f"rank {who[0]}: {text}" for text, who in ranks_by_words.items())
        if all(each["refused"] for each in failed.values()):
            raise ValueError(words) from failure
        raise CheckpointError(f"{what} failed: {words}") from failure

    def first(self, what: str, task: Callable):
        """What task() of rank 0 alone returns, JSON-able, on every rank."""
        result = self.each(what, task if self.rank == 0 else lambda: None)
        return self.exchange(result)[0]


def meet(world, timeout_s: float = 3600) -> Peers:
    """A group for checkpoints, made by all ranks together. It waits for the slowest writer, so its patience is long."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return Peers(rank=world.rank, size=world.size, group=group)


def describe(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {describe(cause)}" for rank, (cause, _) in sorted(error.failures.items()))
    if isinstance(error, (ValueError, CheckpointError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
