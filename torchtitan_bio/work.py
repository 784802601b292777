"""What a step asks of the devices: floating-point operations to count, memory to expect."""

import importlib

from torchtitan_bio import costs, models


def count(family: str, architecture, job, microbatches, world) -> dict[str, float]:
    """The FLOPs that a step asks of this rank, to be summed over ranks: each document costs what its own length costs."""
    per_token = importlib.import_module(models.FAMILIES[family]).flops_per_token
    lengths = []
    for batch in microbatches:
        num_rows, seq_len = batch.inputs["tokens"].shape
        bounds = batch.inputs["cu_seqlens"]
        lengths += [seq_len] * num_rows if bounds is None else bounds.diff().tolist()
    flops = sum(length * per_token(architecture, length) for length in lengths) / world.context_size
    if job is None:
        return {"flops": flops}
    length = costs.mean_length(lengths)
    performed, of_attention = flops * costs.hfu_factor(job, length), flops * costs.attention_share(job, length)
    return {"flops": flops, "performed": performed, "of_attention": of_attention}


def mean(total: dict[str, float], world) -> dict[str, float]:
    """A rank's part of the sums, as the log has it."""
    work = {"flops": total["flops"] / world.size}
    if "performed" in total:
        work |= {"hfu_factor": total["performed"] / total["flops"], "attention_share": total["of_attention"] / total["flops"]}
    return work


def predict_peak(job, *, is_first: bool) -> float | None:
    """Bytes of tensors in one step; a run's very first knows no moments of AdamW while memory is at its fullest."""
    if job is None:
        return None
    missing = costs.states(job)["optimizer"] if is_first and not job.offload_states else 0
    return costs.peak(job).bytes - missing
