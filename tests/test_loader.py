"""The order of samples: the same for any number of ranks and workers and after any resume. A reader that fails is named."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from torchtitan_bio.data import loader, spikes
from torchtitan_bio.data.batch import IGNORED, Batch


@dataclass(frozen=True)
class Numbers:
    """Sample i is the number i. `trouble` is what happens when sample 20 is read."""

    length: int = 50
    trouble: str = "none"

    def __len__(self):
        return self.length

    def sample(self, i):
        if i == 20 and self.trouble == "raise":
            raise OSError("block 7 is unreadable")
        if i == 20 and self.trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 20 and self.trouble == "hang":
            time.sleep(60)
        return i

    def origin(self, i):
        return i // 10, i % 10

    def describe(self, origin):
        return f"row-{origin[0]} at {origin[1]}"

    def collate(self, samples):
        labels = torch.tensor(samples, dtype=torch.int16)[:, None]
        return Batch({"labels": labels, "cu_seqlens": None}, {"next_token": len(samples)}, [self.origin(i) for i in samples])


def build(dataset=None, **changes):
    settings = {"start_step": 0, "global_batch_size": 28, "local_batch_size": 1, "rank": 0, "world_size": 1}
    return loader.build(dataset or Numbers(), **(settings | {"num_workers": 0, "num_steps": 3} | changes))


def numbers_of(microbatches):
    return [number for batch in microbatches for number in batch.inputs["labels"].flatten().tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("local", [1, 2])
def test_the_ranks_slices_of_each_step_joined_are_the_samples_in_order(world_size, local):
    size = 28 * local
    ranks = [
        build(rank=rank, world_size=world_size, local_batch_size=local, global_batch_size=size) for rank in range(world_size)
    ]
    steps = [sum(map(numbers_of, slices), []) for slices in zip(*ranks, strict=True)]
    assert steps == [list(range(step * size, (step + 1) * size)) for step in range(3)]


def test_a_run_resumed_at_any_step_reads_what_the_uninterrupted_run_reads():
    whole = [numbers_of(step) for step in build(rank=1, world_size=2, num_steps=6)]
    for step in range(7):
        assert [numbers_of(rest) for rest in build(rank=1, world_size=2, num_steps=6, start_step=step)] == whole[step:]


def test_a_run_without_a_last_step_reads_on_at_step_900():
    assert numbers_of(next(build(num_steps=None, start_step=900))) == list(range(28 * 900, 28 * 901))


@pytest.mark.slow
def test_two_workers_read_what_none_reads_also_after_a_resume():
    def steps(workers):
        return [numbers_of(step) for step in build(num_workers=workers, local_batch_size=2, start_step=1, num_steps=5)]

    assert steps(2) == steps(0)


def test_no_worker_means_no_torchdata(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdata", None)  # importing it now raises
    assert numbers_of(next(build())) == list(range(28))


def test_a_global_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match=r"global_batch_size=28 is not a multiple of .* = 2 \* 4; give 24"):
        build(local_batch_size=2, world_size=4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named_with_its_row(workers):
    batches = build(Numbers(trouble="raise"), num_workers=workers)
    with pytest.raises(RuntimeError, match=r"sample 20 \(row-2 at 0\) failed: OSError: block 7 is unreadable"):
        next(batches)


def test_a_sample_is_named_while_it_is_read_and_no_longer():
    told = []

    class Asked(Numbers):
        def sample(self, i):
            assert told[-1]() == f"reading sample {i} (row-{i // 10} at {i % 10})"
            return i

        def collate(self, samples):
            assert told[-1] is None
            return super().collate(samples)

    steps = build(Asked(), rank=1, world_size=2, local_batch_size=7, tell=told.append)
    assert numbers_of(next(steps)) == list(range(14, 28)) and len(told) == 16
    assert list(loader.finite(Asked(), local_batch_size=3, rank=1, world_size=7, tell=told.append))


@pytest.mark.slow
def test_a_killed_worker_is_an_error_that_names_the_awaited_row():
    batches = build(Numbers(trouble="die"), num_workers=1, timeout_s=60)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"worker died while rank 0 awaited sample (1\d|20) \(row-[12] at \d\).* up to 2\d"):
        next(batches)
    assert time.monotonic() - start < 30


@pytest.mark.slow
def test_workers_of_a_killed_rank_end_by_themselves():
    code = (
        "import os, signal; from test_loader import Numbers, build; batches = build(Numbers(), num_workers=1); next(batches); "
        "print('killed', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    # Reads to the end of the output, which comes when the last process that holds it open has ended.
    rank = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=45)
    assert rank.returncode == -signal.SIGKILL and rank.stdout == "killed\n"


@pytest.mark.slow
def test_a_silent_worker_is_an_error_after_the_time_limit():
    batches = build(Numbers(trouble="hang"), num_workers=1, timeout_s=5)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"was silent for 5 s while rank 0 awaited sample 20 \(row-2 at 0\)"):
        next(batches)
    assert 5 < time.monotonic() - start < 30


@pytest.mark.parametrize("world_size", [1, 2, 4, 7])
@pytest.mark.parametrize("subset", [None, [3, 4, 8, 40]])
def test_a_finite_pass_shows_each_sample_once_in_equally_many_batches_a_rank(world_size, subset):
    ranks = [
        list(loader.finite(Numbers(), local_batch_size=3, rank=r, world_size=world_size, subset=subset))
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for batches in ranks for batch in batches]
    labels = [number for number in numbers_of(batches) if number != IGNORED]
    assert sorted(labels) == (list(range(50)) if subset is None else subset)
    assert sum(batch.counts["next_token"] for batch in batches) == len(labels) == sum(len(batch.origins) for batch in batches)


def test_the_subset_is_sorted_fixed_and_of_the_asked_size():
    chosen = loader.subset(1000, 64)
    assert chosen == sorted(set(chosen)) and len(chosen) == 64 and 0 <= chosen[0] and chosen[-1] < 1000
    assert chosen == loader.subset(1000, 64) != loader.subset(1000, 64, seed=1)
    assert set(loader.subset(1000, 32)) < set(chosen)
    assert loader.subset(10, 64) == list(range(10))


def test_recordings_arrive_in_the_same_order_on_any_number_of_ranks_and_workers_and_after_a_resume():
    dataset = spikes.build(source="embedded:a2929", split="train", mode="stream", seq_len=128, seed=3)

    def tokens(step):
        return torch.cat([batch.inputs["tokens"] for batch in step])

    whole = [tokens(step) for step in build(dataset, local_batch_size=4)]
    assert torch.equal(whole[0], torch.stack([torch.from_numpy(dataset.sample(i).tokens[:-1]) for i in range(28)]))
    for world_size in (2, 7):
        ranks = [build(dataset, rank=rank, world_size=world_size, local_batch_size=2) for rank in range(world_size)]
        for step, slices in enumerate(zip(*ranks, strict=True)):
            assert torch.equal(torch.cat([tokens(part) for part in slices]), whole[step])
    resumed = [tokens(step) for step in build(dataset, num_workers=2, local_batch_size=4, start_step=1)]
    assert len(resumed) == 2 and all(map(torch.equal, resumed, whole[1:]))
