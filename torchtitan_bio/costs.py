"""What a run costs before it runs: parameters, FLOPs, memory and seconds, by formulas that read no device and take no time.

plan.py prints them, train.py refuses by them what cannot fit, and the log sets them beside what was measured. Plain numbers in,
plain numbers out. A rank is one GPU, bytes are of one rank, and a step is one optimizer step.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from torchtitan_bio.chips import Chip

GIB = 2**30
CONTEXT_BYTES = 3 * GIB
"""CUDA's context, cuBLAS and NCCL buffers, and what the allocator loses between blocks of unlike size."""
HOST_BYTES = 6 * GIB
"""Host memory of a process beside what is offloaded to it: Python, libraries, data workers, pinned batches."""
LOGITS_AT_ONCE = 2**27
"""Logits that the loss keeps at a time, as in models/layers.py."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What decides the cost of a run; numbers of the architecture are Llama's."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    tie_embeddings: bool = False
    seq_len: int
    local_batch_size: int = 1
    microbatches: int = 1
    """Forward and backward passes of a rank in a step."""
    replicate: int = 1
    shard: int = 1
    context: int = 1
    """Ranks that share one sequence. Parameters are sharded over shard * context ranks."""
    context_method: str = "ulysses"
    """ulysses or ring."""
    recompute: str = "full"
    """none, full or keep_attention."""
    keep_on: str = "device"
    """Where keep_attention keeps attention's output: device or host."""
    ffn_tiles: int = 1
    offload_inputs: bool = False
    offload_states: bool = False
    adam_bytes: int = 4
    """Bytes of each of Adam's two moments, a parameter."""
    trained_share: float = 1.0
    """Of the parameters; the others are frozen."""
    async_save: bool = False
    """Checkpoints are copied to the host, and written from there while training goes on."""
    compute_bytes: int = 2
    reduce_bytes: int = 4
    reshard: bool = True

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def tokens(self) -> int:
        """Tokens that a rank holds in one forward pass."""
        return self.local_batch_size * self.seq_len // self.context

    @property
    def sequences(self) -> int:
        """Sequences of a step over all ranks: the global batch."""
        return self.local_batch_size * self.microbatches * self.replicate * self.shard

    @property
    def kv_dim(self) -> int:
        return self.dim // self.num_heads * self.num_kv_heads


ARCHITECTURE = ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size", "tie_embeddings")


def describes(architecture) -> bool:
    """Whether these formulas are those of the architecture's family."""
    return {field.name for field in fields(architecture)} >= set(ARCHITECTURE)


def job(
    architecture,
    training,
    optimizer,
    parallelism,
    activation_checkpoint,
    *,
    replicate: int,
    shard: int,
    param_dtype: str,
    ffn_tiles: int,
    trained_share: float = 1.0,
    async_save: bool = False,
) -> Job:
    """The job of a checked configuration, from its sections; the other arguments are what their "auto" came to."""
    at_once = training.local_batch_size * replicate * shard
    return Job(
        **{name: getattr(architecture, name) for name in ARCHITECTURE},
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        microbatches=1 if training.global_batch_size == "auto" else training.global_batch_size // at_once,
        replicate=replicate,
        shard=shard,
        context=parallelism.context_parallel_degree,
        context_method=parallelism.context_parallel_method,
        recompute=activation_checkpoint.mode,
        keep_on=activation_checkpoint.keep_on,
        ffn_tiles=ffn_tiles,
        offload_inputs=activation_checkpoint.offload_inputs,
        offload_states=parallelism.offload_states,
        trained_share=trained_share,
        async_save=async_save,
        adam_bytes=2 if optimizer.state_dtype == "bfloat16" else 4,
        compute_bytes=4 if param_dtype == "float32" else 2,
        reduce_bytes=4 if training.mixed_precision_reduce == "float32" else 2,
        reshard=parallelism.fsdp_reshard_after_forward == "always",
    )


# ---- parameters and FLOPs ----


def block_parameters(job: Job) -> int:
    return 2 * job.dim * (job.dim + job.kv_dim) + 3 * job.dim * job.ffn_dim + 2 * job.dim


def root_parameters(job: Job) -> int:
    """Embedding, last norm and output."""
    return (1 if job.tie_embeddings else 2) * job.vocab_size * job.dim + job.dim


def parameters(job: Job) -> int:
    return job.num_layers * block_parameters(job) + root_parameters(job)


def mean_length(documents: Iterable[int]) -> float:
    """The length whose tokens cost what the tokens of these documents cost on average: FLOPs of a token are linear in it."""
    lengths = list(documents)
    return sum(length * length for length in lengths) / sum(lengths)


def attention_flops_per_token(job: Job, length: float | None = None) -> float:
    """Training FLOPs of scores and mixing, forward and backward, of a token in a document of this length (None: the row's).

    Causal: it meets half of them.
    """
    return 3 * 2 * 2 * job.num_layers * job.dim * (job.seq_len if length is None else length) / 2


def flops_per_token(job: Job, length: float | None = None) -> float:
    """Training FLOPs that the mathematics needs: 6 a weight that multiplies, and attention."""
    weights = job.num_layers * (block_parameters(job) - 2 * job.dim) + job.vocab_size * job.dim
    return 6.0 * weights + attention_flops_per_token(job, length)


def attention_share(job: Job, length: float | None = None) -> float:
    """Of the FLOPs that the mathematics needs."""
    return attention_flops_per_token(job, length) / flops_per_token(job, length)


def hfu_factor(job: Job, length: float | None = None) -> float:
    """FLOPs that the device performs for each that the mathematics needs: what is computed again in backward counts too.

    The scores that every fused kernel computes again in its own backward are left out, as is usual.
    """
    attention = attention_flops_per_token(job, length) / 3 if job.recompute == "full" else 0.0
    return 1 + (products_again_per_token(job) + attention) / flops_per_token(job, length)


def products_again_per_token(job: Job) -> float:
    """FLOPs of matrix products that backward computes a second time."""
    if job.recompute != "none":  # tiles cost no more: a recomputed block stops before them
        return 2.0 * job.num_layers * (block_parameters(job) - 2 * job.dim)
    return 6.0 * job.num_layers * job.dim * job.ffn_dim if job.ffn_tiles > 1 else 0.0


# ---- memory ----


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which a rank holds most, and what it holds then: term -> bytes."""

    moment: str
    terms: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.terms.values())


def states(job: Job) -> dict[str, float]:
    """Bytes of a rank's shards that live from step to step, wherever they are; gradients until the optimizer has read them."""
    share = parameters(job) / (job.shard * job.context)
    trained = share * job.trained_share
    return {"parameters": 4 * share, "optimizer": 2 * job.adam_bytes * trained, "gradients": 4 * trained}


def checkpoint_bytes(job: Job) -> float:
    """Of one checkpoint, all ranks together."""
    return parameters(job) * (4 + 2 * job.adam_bytes * job.trained_share)


def block_input(job: Job) -> float:
    return job.tokens * job.dim * job.compute_bytes


def kept_attention(job: Job) -> float:
    """Attention's output and the fp32 log-sum-exp of one block."""
    return job.tokens * (job.dim * job.compute_bytes + 4 * job.num_heads)


def saved_by_block(job: Job) -> float:
    """What one block's forward leaves for its backward beside its input."""
    d, f, kv, c = job.dim, job.ffn_dim, job.kv_dim, job.compute_bytes
    feed_forward = 0 if job.ffn_tiles > 1 else d + 4 * f  # norm; both projections, silu, product
    # Norm, q, k, v, attention's output, the sum with the input; log-sum-exp and the norms' scales.
    return job.tokens * (c * (d + 2 * d + 2 * kv + d + feed_forward) + 4 * (job.num_heads + 2))


def working_set(job: Job) -> dict[str, float]:
    """The most that the backward of one block needs at once beside the block's input: two halves compete.

    The feed-forward half is fullest while gradients of silu's factors exist; tiles sum the gradients of its weights in fp32.
    The attention half finds these waiting for the rest of the block: in attention's backward, or with q rotated in fp32.
    """
    d, f, kv, c = job.dim, job.ffn_dim, job.kv_dim, job.compute_bytes
    attention = d + 2 * d + 2 * kv
    tile = (d + 6 * f) / job.ffn_tiles  # norm; both projections, silu, and the gradients of product, silu and second projection
    whole = d if job.ffn_tiles > 1 else 0  # the gradient that the tiles are written into
    backward, rotation = attention + 3 * d + 2 * kv, 2 * d + d + 2 * kv + 8 * d / c
    exchanged = 2 * (d + kv) if job.context > 1 else 0  # q, k, v and the output once more, as they travel
    halves = (
        (attention + 2 * d + whole + tile, 3 * d * f * (4 + c) if job.ffn_tiles > 1 else d * f * c),
        (max(backward, rotation), 3 * d * f * c),
    )
    places = [
        {
            "working set of one block": job.tokens * (c * (values + exchanged) + 4 * (job.num_heads + 2)),
            "gradients of its weights": gradients,
        }
        for values, gradients in halves
    ]
    return max(places, key=lambda place: sum(place.values()))


def logits(job: Job) -> float:
    """In backward of the loss: log-softmax, its gradient and that of the logits, in fp32, and the last hidden states.

    In chunks, the gradient of the output's weight is summed in fp32 too.
    """
    all_at_once = job.tokens * job.vocab_size
    chunked = 8 * job.vocab_size * job.dim if all_at_once > LOGITS_AT_ONCE else 0
    return 12 * min(all_at_once, LOGITS_AT_ONCE) + chunked + 2 * job.tokens * job.dim * job.compute_bytes


def peak(job: Job) -> Peak:
    """The fullest moment of a step, in tensors: what max_memory_allocated tells after it."""
    moments = [Peak("the loss", held_in_backward(job, None))]
    # From the last block on, inputs go and gradients come.
    for done in range(job.num_layers):
        moments.append(Peak(f"backward of block {job.num_layers - done} of {job.num_layers}", held_in_backward(job, done)))
    return max(moments, key=lambda moment: moment.bytes)


def held_in_backward(job: Job, done: int | None) -> dict[str, float]:
    """Bytes by term in the backward of a block after `done` others, or of the loss (None)."""
    in_block, done = done is not None, done or 0
    left, block = job.num_layers - done, block_parameters(job)
    is_recomputed, is_kept = job.recompute != "none", job.recompute == "keep_attention"
    saved = block_input(job) + (0 if is_recomputed else saved_by_block(job))
    held = (min(2, left) if job.offload_inputs else left) * saved
    kept = (min(2, left) if job.keep_on == "host" else left) * kept_attention(job) if is_kept else 0
    if in_block:  # this block's own are in the working set
        held -= 0 if is_recomputed else saved_by_block(job)
        kept -= kept_attention(job) if is_kept else 0
    gathered = (min(2, left) if job.reshard else left) * block + root_parameters(job)
    states_here = dict.fromkeys(states(job), 0.0) if job.offload_states else states(job)
    if job.offload_states and job.replicate > 1 and job.microbatches > 1:  # until replicas meet, sums stay on the device
        states_here["gradients"] = job.reduce_bytes / 4 * states(job)["gradients"]
    states_here["gradients"] *= 1 if job.microbatches > 1 else done / job.num_layers
    terms = states_here | {
        "gathered parameters": job.compute_bytes * gathered,
        "gradients on their way": job.reduce_bytes * block if done else 0,  # of the block before
        "block inputs" if is_recomputed else "activations": held,
        "attention kept": kept,
        **(working_set(job) if in_block else {"logits and loss": logits(job)}),
        "rotary table": 4 * job.seq_len // job.context * job.dim // job.num_heads,
    }
    return {term: size for term, size in terms.items() if size}


def device_bytes(job: Job) -> float:
    """Bytes that a GPU must have: the peak, the context and what fragmentation wastes."""
    return peak(job).bytes + CONTEXT_BYTES


def offloaded(job: Job) -> dict[str, float]:
    """Bytes of one rank that wait in host memory, by term."""
    terms = {}
    if job.offload_states:
        terms["parameters, gradients, optimizer"] = sum(states(job).values())
    if job.offload_inputs and job.recompute != "none":
        terms["block inputs"] = job.num_layers * block_input(job)
    if job.recompute == "keep_attention" and job.keep_on == "host":
        terms["attention kept"] = job.num_layers * kept_attention(job)
    if job.async_save:
        terms["copy for an asynchronous save"] = checkpoint_bytes(job) / (job.shard * job.context)
    return terms


def host_bytes(job: Job) -> float:
    return HOST_BYTES + sum(offloaded(job).values())


def check(job: Job, device_gib: float, host_gib: float) -> list[str]:
    """A line for each memory that is too small: the device's, and a rank's share of the host's where it is used."""
    problems = []
    needed, host = device_bytes(job) / GIB, host_bytes(job) / GIB
    if needed > device_gib:
        fullest = peak(job)
        largest = sorted(fullest.terms.items(), key=lambda entry: -entry[1])[:3]
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
        problems.append(f"a GPU needs {needed:.1f} GiB and has {device_gib:.1f}: in {fullest.moment} it holds {shown}, ...")
    if offloaded(job) and host > host_gib:
        shown = ", ".join(f"{name} {size / GIB:.1f}" for name, size in offloaded(job).items())
        problems.append(f"a process needs {host:.1f} GiB of host memory ({shown}) and its share is {host_gib:.1f}")
    return problems


# ---- time ----


def step_seconds(job: Job, chip: Chip, kernel: str | None = None) -> dict[str, float]:
    """Seconds of one step by what they are spent on; kernel None: the chip's best.

    Traffic to the host is counted as if nothing hid it, traffic between ranks only where it outlasts the computation.
    """
    forward, backward = chip.attention[kernel or next(iter(chip.attention))]
    tokens = job.tokens * job.microbatches
    attention = attention_flops_per_token(job) / 3 * tokens
    products = flops_per_token(job) - attention_flops_per_token(job) + products_again_per_token(job)
    forwards = 2 if job.recompute == "full" else 1
    seconds = {
        "matrix products": products * tokens / (chip.peak * chip.matmul),
        # A fused backward computes the scores again: 2.5 forwards' work.
        "attention": attention * (forwards / forward + 2.5 / backward),
    }
    links = {True: chip.peer_link, False: chip.network}
    if job.context > 1:
        seconds["context exchange"] = _exchanged_bytes(job) * job.microbatches / links[job.context <= chip.gpus_per_node]
    if job.shard * job.context > 1:
        gathers = 2 if job.reshard else 1
        sent = parameters(job) * (gathers * job.compute_bytes + job.reduce_bytes) * job.microbatches
        sharding = sent / links[job.shard * job.context <= chip.gpus_per_node]
        seconds["sharding not hidden"] = max(0.0, sharding - sum(seconds.values()))
    waiting = sum(size for name, size in offloaded(job).items() if name in ("block inputs", "attention kept"))
    seconds["activations to the host and back"] = 2 * waiting * job.microbatches / chip.host_link
    if job.offload_states:
        share = parameters(job) / (job.shard * job.context)
        moved = share * 4 * ((2 if job.reshard else 1) + 1) * job.microbatches
        update = share * (16 + 4 * job.adam_bytes) / chip.host_memory  # weights and moments in and out, gradients in
        seconds["states on the host"] = moved / chip.host_link + update
    return {name: value for name, value in seconds.items() if value}


def _exchanged_bytes(job: Job) -> float:
    """What a rank sends for the attention of one forward and backward pass, recomputation included."""
    away = job.tokens * job.num_layers
    if (
        job.context_method == "ulysses"
    ):  # q, k, v, and back the output: all but the rank's own part, each time attention's neighbours run
        passes = 2 if job.recompute == "none" else 3
        return passes * away * 2 * (job.dim + job.kv_dim) * job.compute_bytes * (1 - 1 / job.context)
    # Keys and values go around in every forward and backward of attention, in backward their fp32 gradients too.
    passes = 3 if job.recompute == "full" else 2
    return away * 2 * job.kv_dim * (passes * job.compute_bytes * (job.context - 1) + 4 * job.context)


def step_time(job: Job, chip: Chip, kernel: str | None = None) -> float:
    return sum(step_seconds(job, chip, kernel).values())


def mfu(job: Job, chip: Chip, seconds: float) -> float:
    """The share of the chip's peak that the mathematics of a step comes to."""
    return flops_per_token(job) * job.tokens * job.microbatches / seconds / chip.peak
