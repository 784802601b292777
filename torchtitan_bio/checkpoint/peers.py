"""How ranks agree about a checkpoint: a task either succeeds on all of them, or all raise the same error.

Messages are JSON over a gloo group of their own, because an asynchronous save speaks from a second thread while training speaks
on the default group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from torchtitan_bio import distributed


class CheckpointError(RuntimeError):
    """A save or load that failed on some rank. Every rank raises it, with the same words."""


@dataclass(frozen=True)
class Peers:
    rank: int
    size: int
    group: dist.ProcessGroup

    def exchange(self, value) -> list:
        """Each rank's JSON-able value, in rank order, on every rank."""
        return distributed.exchange(value, self.group)

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
    """A group for checkpoints, made by all ranks together.

    It waits for the slowest writer, so its patience is an hour, whatever the config's [comm] says of training's collectives. A
    rank that dies is noticed at once all the same: torchrun ends the others.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return Peers(rank=world.rank, size=world.size, group=group)


def describe(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {describe(cause)}" for rank, (cause, _) in sorted(error.failures.items()))
    if isinstance(error, (ValueError, CheckpointError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
