"""What would make a job fit: every set of switches, judged by the formulas of costs.py, and the cheapest that does it.

A switch is a function of a job: the changes that it offers, none where the job has it already.
"""

import itertools
import math
from dataclasses import dataclass, replace

from torchtitan_bio import costs
from torchtitan_bio.chips import Chip
from torchtitan_bio.costs import Job

STATE_DTYPE = "optimizer.state_dtype"
"""The one setting here after which a run's digits are others."""


@dataclass(frozen=True)
class Change:
    settings: dict[str, str]
    """Value by key of the configuration."""
    job: Job
    """What they make of the job before."""


@dataclass(frozen=True)
class Remedy:
    changes: list[Change]
    seconds: list[float]
    """What each change adds to a step, after those before it."""

    @property
    def job(self) -> Job:
        return self.changes[-1].job

    @property
    def settings(self) -> dict[str, str]:
        """Of all changes together."""
        return {key: value for change in self.changes for key, value in change.settings.items()}


def remedy(job: Job, chip: Chip, device_gib: float, host_gib: float, kernel: str | None = None) -> Remedy | None:
    """The changes that cost least time and make a job fit that does not; None when none do.

    Sets that leave every digit as it is come before those with bf16 moments; of equal ones the smallest.
    """
    best, least = None, (math.inf,)
    for changes in every_set(job):
        changed = changes[-1].job if changes else job
        is_inexact = any(STATE_DTYPE in change.settings for change in changes)
        cost = (is_inexact, round(costs.step_time(changed, chip, kernel), 3), len(changes))
        if cost < least and not costs.check(changed, device_gib, host_gib):
            best, least = changes, cost
    if not best:
        return None
    times = [costs.step_time(each, chip, kernel) for each in (job, *(change.job for change in best))]
    return Remedy(best, [after - before for before, after in itertools.pairwise(times)])


def every_set(job: Job, position: int = 0):
    """All sets of changes, at most one of each switch from this position on."""
    if position == len(SWITCHES):
        yield []
        return
    yield from every_set(job, position + 1)
    for change in SWITCHES[position](job):
        for further in every_set(change.job, position + 1):
            yield [change, *further]


# ---- the switches ----


def recomputation(job: Job) -> list[Change]:
    changes = []
    for mode, place in (("full", "device"), ("keep_attention", "device"), ("keep_attention", "host")):
        changed = replace(job, recompute=mode, keep_on=place)
        settings = {"activation_checkpoint.mode": mode}
        if place != job.keep_on:
            settings["activation_checkpoint.keep_on"] = place
        changes += [Change(settings, changed)] if changed != job else []
    return changes


def tiles(job: Job) -> list[Change]:
    numbers = [number for number in (4, 8, 16) if job.ffn_tiles < number <= job.tokens]
    return [Change({"activation_checkpoint.ffn_tiles": str(number)}, replace(job, ffn_tiles=number)) for number in numbers]


def inputs_on_host(job: Job) -> list[Change]:
    if job.offload_inputs or job.recompute == "none":
        return []
    return [Change({"activation_checkpoint.offload_inputs": "true"}, replace(job, offload_inputs=True))]


def resharding(job: Job) -> list[Change]:
    return [] if job.reshard else [Change({"parallelism.fsdp_reshard_after_forward": "always"}, replace(job, reshard=True))]


def smaller_microbatches(job: Job) -> list[Change]:
    if job.local_batch_size == 1:
        return []
    changed = replace(job, local_batch_size=1, microbatches=job.microbatches * job.local_batch_size)
    return [Change({"training.local_batch_size": "1", "training.global_batch_size": str(job.sequences)}, changed)]


def shared_sequences(job: Job) -> list[Change]:
    """Larger context degrees, on the same ranks and with the same global batch."""
    sharing, changes = job.shard * job.context, []
    for degree in range(2 * job.context, sharing + 1, job.context):
        method = "ring" if job.num_kv_heads % degree else "ulysses"
        if sharing % degree or job.seq_len % (2 * degree if method == "ring" else degree):
            continue
        microbatches = job.microbatches * degree // job.context
        parts = {"context": degree, "context_method": method, "shard": sharing // degree, "microbatches": microbatches}
        settings = {
            "parallelism.context_parallel_degree": str(degree),
            "parallelism.context_parallel_method": method,
            "parallelism.data_parallel_shard_degree": str(sharing // degree),
            "training.global_batch_size": str(job.sequences),
        }
        changes.append(Change(settings, replace(job, **parts)))
    return changes


def states_on_host(job: Job) -> list[Change]:
    return [] if job.offload_states else [Change({"parallelism.offload_states": "true"}, replace(job, offload_states=True))]


def rounded_moments(job: Job) -> list[Change]:
    return [Change({STATE_DTYPE: "bfloat16"}, replace(job, adam_bytes=2))] if job.adam_bytes > 2 else []


SWITCHES = (
    recomputation,
    tiles,
    inputs_on_host,
    resharding,
    smaller_microbatches,
    shared_sequences,
    states_on_host,
    rounded_moments,
)
