"""From a dataset's samples to the microbatches of a rank: which samples, in what order, and who reads them.

Step s trains on samples [s * G, (s + 1) * G), and a rank on its contiguous slice of them. So the order is the same for every
number of ranks and workers and after every resume, and the state of the data is one integer. Workers only run ahead.
"""

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from torchtitan_bio.data import keyed
from torchtitan_bio.data.batch import IGNORED, Batch

SUBSET = 16  # names the random stream of `subset`; data/packing.py numbers its own from 1
ENDLESS = 2**40


@dataclass(frozen=True)
class Microbatches:
    """Microbatch j of one rank, counted from the run's first step: what a worker is asked for, by number alone."""

    dataset: object
    global_batch_size: int
    local_batch_size: int
    rank: int
    world_size: int

    @property
    def per_step(self) -> int:
        return self.global_batch_size // (self.world_size * self.local_batch_size)

    def samples(self, j: int) -> range:
        step, part = divmod(j, self.per_step)
        first = step * self.global_batch_size + (self.rank * self.per_step + part) * self.local_batch_size
        return range(first, first + self.local_batch_size)

    def __getitem__(self, j: int) -> Batch:
        return read(self.dataset, self.samples(j))


def say_nothing(doing: Callable[[], str] | None):
    """For who does not ask what is being read."""


def read(dataset, numbers: Iterable[int], tell=say_nothing) -> Batch:
    """The batch of these samples. A sample that cannot be read is an error that names it and the cause.

    tell: is given, before each sample, what would name it in words, and None when all are read (watchdog.Watch.tell).
    """
    samples = []
    for i in numbers:
        tell(partial(_name_read, dataset, i))
        try:
            samples.append(dataset.sample(i))
        except Exception as error:
            raise RuntimeError(f"reading {name_sample(dataset, i)} failed: {type(error).__name__}: {error}") from error
    tell(None)
    return dataset.collate(samples)


def name_sample(dataset, i: int) -> str:
    """Sample i with where it lies, for datasets that can tell this without reading it (`origin(i)`)."""
    if not hasattr(dataset, "origin"):
        return f"sample {i}"
    return f"sample {i} ({dataset.describe(dataset.origin(i))})"


def _name_read(dataset, i: int) -> str:
    return f"reading {name_sample(dataset, i)}"


def build(
    dataset,
    *,
    start_step: int,
    global_batch_size: int,
    local_batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    num_steps: int | None = None,
    timeout_s: float = 600,
    tell=say_nothing,
) -> Iterator[list[Batch]]:
    """This rank's microbatches of each step from `start_step` until step `num_steps` of the run (for ever if None).

    With workers, a dead one is an error within seconds, and one that is silent for `timeout_s` is an error too; both name the
    samples that were awaited. tell: see `read`; without workers a hang is the caller's, and this is who can name the sample.
    """
    at_once = local_batch_size * world_size
    if global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of local_batch_size * ranks = "
            f"{local_batch_size} * {world_size}; give {max(1, global_batch_size // at_once) * at_once}"
        )
    source = Microbatches(dataset, global_batch_size, local_batch_size, rank, world_size)
    last_step = ENDLESS if num_steps is None else num_steps
    numbers = range(start_step * source.per_step, last_step * source.per_step)
    if num_workers:
        batches = _read_in_workers(source, numbers, num_workers, timeout_s)
    else:
        batches = (read(dataset, source.samples(j), tell) for j in numbers)
    # Pinned here and not by the loader's own thread, which would open a context on the first GPU in every rank; a microbatch of
    # 131k tokens is 0.4 MB.
    batches = map(pin, batches) if torch.cuda.is_available() else batches
    return _in_groups(batches, source.per_step)


def _in_groups(batches, size):
    while group := list(itertools.islice(batches, size)):
        yield group


def _read_in_workers(source, numbers, num_workers, timeout_s):
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(
        source,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        # A fork would copy the locks of torch's, Arrow's and NCCL's threads, held or not. Workers of a forkserver
        # outlive a rank that is killed, because it is not their parent.
        multiprocessing_context="spawn",
        worker_init_fn=_leave_group,
        # Resuming never asks the loader for its state, so it need not collect any.
        snapshot_every_n_steps=ENDLESS,
    )
    ready, ended = queue.Queue(maxsize=1), threading.Event()
    threading.Thread(target=_receive, args=(loader, ready, ended), daemon=True).start()
    num_ahead = num_workers * loader.prefetch_factor + 2
    try:
        for j in numbers:
            try:
                received = ready.get(timeout=timeout_s)
            except queue.Empty:
                raise RuntimeError(
                    f"a data worker was silent for {timeout_s} s while {_name_awaited(source, j, num_ahead)}"
                ) from None
            if isinstance(received, Exception):
                if str(received).startswith("Caught "):
                    raise received  # by the dataset in a worker; `read` has named the sample
                raise RuntimeError(
                    f"a data worker died while {_name_awaited(source, j, num_ahead)}: {received or type(received).__name__}. "
                    "Killed workers often mean that memory ran out; with data.num_workers=0 a reader shows its own error"
                ) from received
            yield received
    finally:
        ended.set()


def _leave_group(worker: int):
    """A SIGTERM that torchrun sends to a rank reaches its whole group; a worker must live until the rank has saved."""
    os.setpgid(0, 0)


def _receive(loader, ready, ended):
    """Pass on what the loader yields or raises, until `ended`.

    On the main thread the loader would set a SIGCHLD handler, which raises a worker's death in whatever line of the training
    step happens to run, and the samples would be unknown. Here the loader itself finds a dead worker, within 5 s.
    """
    try:
        for batch in loader:
            while not ended.is_set():
                try:
                    ready.put(batch, timeout=1)
                    break
                except queue.Full:
                    continue
            if ended.is_set():
                return
    except Exception as error:  # a dataset's, or of a dead worker anything that fetching its shared memory raises
        ready.put(error)


def _name_awaited(source, j, num_ahead):
    awaited, last = source.samples(j)[0], source.samples(j + num_ahead)[-1]
    return f"rank {source.rank} awaited {name_sample(source.dataset, awaited)} (samples up to {last} may have been in flight)"


def pin(batch: Batch) -> Batch:
    """The batch in page-locked memory, from which a copy to a GPU does not wait."""
    return replace(batch, inputs={name: value if value is None else value.pin_memory() for name, value in batch.inputs.items()})


def finite(
    dataset, *, local_batch_size: int, rank: int, world_size: int, subset: Iterable[int] | None = None, tell=say_nothing
) -> Iterator[Batch]:
    """Each sample of a finite dataset (or of `subset`) exactly once over all ranks.

    The batches do not depend on the number of ranks. Ranks take turns, and all get equally many, because a sharded model cannot
    run on one rank alone: the last turn is filled up with batches that hold no label. tell: see `read`.
    """
    numbers = range(len(dataset)) if subset is None else list(subset)
    starts = range(0, len(numbers), local_batch_size)
    for turn in range(0, len(starts), world_size):
        if turn + rank < len(starts):
            start = starts[turn + rank]
            yield read(dataset, numbers[start : start + local_batch_size], tell)
        else:
            yield without_labels(read(dataset, numbers[:local_batch_size], tell))


def without_labels(batch: Batch) -> Batch:
    """The same inputs with nothing to predict and nothing to count."""
    inputs = batch.inputs | {"labels": torch.full_like(batch.inputs["labels"], IGNORED)}
    return Batch(inputs, {term: 0 for term in batch.counts}, [])


def subset(num_total: int, max_windows: int, seed: int = 0) -> list[int]:
    """At most `max_windows` of the numbers below `num_total`, in order: those with the smallest hashes, the same everywhere."""
    if max_windows >= num_total:
        return list(range(num_total))
    hashes = keyed.bits(num_total, seed, SUBSET)
    return sorted(np.argpartition(hashes, max_windows)[:max_windows].tolist())
