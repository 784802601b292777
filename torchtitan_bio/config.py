"""Every setting of a run, on one page that can be read as the manual.

A TOML file, then `--section.key value` arguments, fill these dataclasses (`config_loader.py` does it, strictly). They are
frozen: what a run was asked to do is settled before the first process group exists, and written beside the run.
A section checks what it alone can know and reports every problem at once; what needs the model, the data or the number of
ranks is checked by train.py.
"""

from dataclasses import dataclass, field, fields
from math import inf
from typing import Literal


class ConfigError(ValueError):
    """What a user can mend in a configuration; `problems` holds one line for each."""

    def __init__(self, *problems: str):
        self.problems = [line for problem in problems for line in str(problem).split("\n")]
        super().__init__("\n".join(self.problems))


def _refuse(section, **requirements: tuple[bool, str]):
    """Raise one ConfigError that lists each key whose requirement does not hold."""
    name = SECTION_OF[type(section).__name__]
    bad = [f"{name}.{key}={getattr(section, key)!r} {wish}" for key, (holds, wish) in requirements.items() if not holds]
    if bad:
        raise ConfigError(*bad)


def _at_least(number, low) -> bool:
    """Words such as "auto" pass: their meaning is settled where they are used."""
    return isinstance(number, str) or number >= low


@dataclass(frozen=True, kw_only=True)
class Job:
    config_file: str = ""
    """The TOML file of this run. Empty: every value is a default or comes from the command line."""
    dump_folder: str = ""
    """The run folder. checkpoint/, metrics.jsonl, config.toml and tb/ lie directly in it. Empty: outputs/<name of the TOML>."""
    description: str = ""
    """One line about the run, printed at its start."""
    must_fit: bool = True
    """Refuse to start what, by plan.py's formulas, the device or the host cannot hold. false: warn and try."""
    max_wall_s: float | Literal["auto"] = "auto"
    """Seconds that this start of the run may take; it saves and leaves in time before they are over, and the same command goes
    on. auto: until SLURM ends the job (SLURM_JOB_END_TIME), which bounds a number too; without SLURM there is no limit."""

    def __post_init__(self):
        _refuse(self, max_wall_s=(isinstance(self.max_wall_s, str) or self.max_wall_s > 0, 'must be positive, or "auto"'))


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = "llama3"
    """The model family: a row of the table in torchtitan_bio/models/__init__.py."""
    flavor: str = "debug"
    """A named size of the family."""
    overrides: dict = field(default_factory=dict)
    """Architecture numbers that differ from the flavor's, by name: dim, num_layers, rope_theta, ..."""
    attention: Literal["auto", "fa3", "cudnn", "flash", "efficient", "math"] = "auto"
    """The attention kernel. "auto" takes the fastest one that this device runs; a named one that cannot run is an error."""
    freeze: list[str] = field(default_factory=list)
    """Glob patterns of parameter names that are not trained. A pattern that matches nothing is an error."""

    def __post_init__(self):
        _refuse(
            self,
            name=(self.name != "", "must name a model family"),
            flavor=(self.flavor != "", "must name a size of the family"),
            freeze=("" not in self.freeze, "has an empty pattern"),
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    source: str = "embedded:a2929"
    """Where recordings come from: embedded:a2929, a Hugging Face data set (eminorhan/neural-pile-primate), a folder or file of
    Parquet, Arrow or npz, a store that prepare.py made, or ring-hmm:key=value,... for synthetic populations with a known
    limit."""
    split: str = "train"
    """Which split is trained on."""
    split_by: Literal["given", "session", "time"] = "given"
    """How train and test are told apart. given: as the files or a store's index say; session: by a hash of subject and session,
    1% is test; time: the last 20% of each row is test."""
    mode: Literal["stream", "aligned", "legacy"] = "stream"
    """How windows are cut. stream: shuffled recordings end to end; aligned: from a separator, inside one recording; legacy: the
    predecessor's windows, bit for bit, on one rank."""
    shuffle_rows: int = 256
    """stream and aligned: windows are shuffled inside consecutive buffers of this many recordings."""
    cross_recordings: bool = False
    """Let attention cross from one recording into the next. Legacy windows always do."""
    include_sources: list[str] = field(default_factory=list)
    """Glob patterns of source_dataset to keep. Empty: all."""
    exclude_sources: list[str] = field(default_factory=list)
    """Glob patterns of source_dataset to leave out."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """How often each source_dataset is drawn, relative to its natural share; a source not named has weight 1."""
    num_neurons: int | Literal["all"] = "all"
    """Keep this many neurons of each recording, drawn anew each epoch; recordings with fewer are kept whole."""
    max_malformed_rows: int = 0
    """Rows that are ragged, negative or empty are listed; more than this many of them stop the run."""
    num_workers: int = 0
    """Processes that read ahead (needs torchdata). 0: batches are made by the training process itself."""
    index_folder: str = ""
    """Where the index and an Arrow copy of large Parquet files are kept; on a cluster a folder that all nodes share. Empty: the
    user's cache, and no index of small files."""
    accept_changed: bool = False
    """Go on from a checkpoint although the data's fingerprint differs. The change is logged."""

    def __post_init__(self):
        _refuse(
            self,
            source=(self.source != "", "must say where recordings come from, such as embedded:a2929"),
            split=(self.split != "", "must name a split"),
            shuffle_rows=(self.shuffle_rows >= 1, "must be at least 1"),
            source_weights=(all(0 <= weight < inf for weight in self.source_weights.values()), "must be finite, 0 or more"),
            num_neurons=(_at_least(self.num_neurons, 1), 'must be at least 1, or "all"'),
            max_malformed_rows=(self.max_malformed_rows >= 0, "must be 0 or more"),
            num_workers=(self.num_workers >= 0, "must be 0 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    seq_len: int = 2048
    """Tokens a sequence."""
    local_batch_size: int = 1
    """Sequences a rank takes in one forward and backward."""
    global_batch_size: int | Literal["auto"] = "auto"
    """Sequences in one step over all ranks; more than the ranks hold at once are accumulated. auto: as many as they hold."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    max_norm: float = 1.0
    """Gradients are scaled down to this global norm. inf: never."""
    seed: int = 42
    """The seed of the initial weights and of the order of the data."""
    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite is skipped by all ranks; more than this many in a row stop the run."""
    gc_freq: int = 50
    """Python's garbage is collected on all ranks at once, every so many steps."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """The type in which blocks compute; parameters and optimizer stay fp32. auto: bfloat16 on a GPU, float32 on CPU."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """The type in which gradients are summed over ranks."""

    def __post_init__(self):
        _refuse(
            self,
            seq_len=(self.seq_len >= 1, "must be at least 1"),
            local_batch_size=(self.local_batch_size >= 1, "must be at least 1"),
            global_batch_size=(_at_least(self.global_batch_size, 1), 'must be at least 1, or "auto"'),
            steps=(self.steps >= 1, "must be at least 1"),
            max_norm=(self.max_norm > 0, "must be positive"),
            seed=(0 <= self.seed < 2**32, "must lie in 0 .. 2^32 - 1"),
            max_skipped_steps=(self.max_skipped_steps >= 0, "must be 0 or more"),
            gc_freq=(self.gc_freq >= 1, "must be at least 1"),
        )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    lr: float = 3e-4
    """The peak learning rate of AdamW."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and embeddings are never decayed."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """The type in which AdamW's two moments rest. bfloat16 halves their memory and rounds them every step."""

    def __post_init__(self):
        _refuse(
            self,
            lr=(0 < self.lr < inf, "must be positive and finite"),
            beta1=(0 <= self.beta1 < 1, "must lie in [0, 1)"),
            beta2=(0 <= self.beta2 < 1, "must lie in [0, 1)"),
            eps=(0 < self.eps < inf, "must be positive and finite"),
            weight_decay=(0 <= self.weight_decay < inf, "must be finite, 0 or more"),
        )


@dataclass(frozen=True, kw_only=True)
class LRScheduler:
    warmup_steps: int = 200
    """Steps of linear warm-up. Longer than the run: shortened to it, with a warning."""
    decay_type: Literal["constant", "linear", "cosine"] = "cosine"
    """The shape of the fall after warm-up and plateau."""
    decay_ratio: float | Literal["auto"] = "auto"
    """The share of the run that decays; before it the rate stays at its peak (warmup-stable-decay). auto: all that follows
    warm-up."""
    min_lr_factor: float = 0.1
    """The floor of the decay, as a share of the peak."""

    def __post_init__(self):
        ratio = self.decay_ratio
        _refuse(
            self,
            warmup_steps=(self.warmup_steps >= 0, "must be 0 or more"),
            decay_ratio=(isinstance(ratio, str) or 0 <= ratio <= 1, 'must lie in [0, 1], or be "auto"'),
            min_lr_factor=(0 <= self.min_lr_factor <= 1, "must lie in [0, 1]"),
        )


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    data_parallel_shard_degree: int | Literal["auto"] = "auto"
    """Ranks that share one copy of parameters, gradients and optimizer (FSDP2). auto: all ranks of a replica."""
    data_parallel_replicate_degree: int = 1
    """Copies of the sharded model (HSDP): usually the number of nodes."""
    context_parallel_degree: int = 1
    """Ranks that share each sequence; parameters are sharded over shard degree times this."""
    context_parallel_method: Literal["ulysses", "ring"] = "ulysses"
    """ulysses exchanges tokens for heads around attention: its degree divides the key-value heads. ring passes keys and values
    around: any degree of which twice divides the sequence."""
    fsdp_reshard_after_forward: Literal["always", "never"] = "always"
    """Whether a block's gathered parameters are freed between forward and backward: memory against a second gather."""
    offload_states: bool = False
    """Keep parameters, gradients and optimizer in host memory, where the optimizer also runs (CPUOffloadPolicy)."""

    def __post_init__(self):
        _refuse(
            self,
            data_parallel_shard_degree=(_at_least(self.data_parallel_shard_degree, 1), 'must be at least 1, or "auto"'),
            data_parallel_replicate_degree=(self.data_parallel_replicate_degree >= 1, "must be at least 1"),
            context_parallel_degree=(self.context_parallel_degree >= 1, "must be at least 1"),
        )


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpoint:
    mode: Literal["none", "full", "keep_attention"] = "none"
    """none keeps all activations; full keeps only each block's input and computes the block again in backward; keep_attention
    keeps attention's output and log-sum-exp too, so that the attention kernel runs forward once."""
    keep_on: Literal["device", "host"] = "device"
    """Where keep_attention keeps them: on the device, or in pinned host memory."""
    offload_inputs: bool = False
    """Block inputs wait in pinned host memory from forward to backward. Needs mode full or keep_attention."""
    ffn_tiles: int | Literal["auto"] = 1
    """The feed-forward half of a block is computed, and computed again in backward, in so many tiles of tokens; its working set
    shrinks as their number grows. 1: all at once; auto: as many as bring it under a sixteenth of the device's memory."""

    def __post_init__(self):
        _refuse(
            self,
            keep_on=(
                self.keep_on == "device" or self.mode == "keep_attention",
                'needs activation_checkpoint.mode="keep_attention"',
            ),
            offload_inputs=(
                not self.offload_inputs or self.mode != "none",
                'needs activation_checkpoint.mode "full" or "keep_attention"',
            ),
            ffn_tiles=(_at_least(self.ffn_tiles, 1), 'must be at least 1, or "auto"'),
        )


@dataclass(frozen=True, kw_only=True)
class Compile:
    enable: bool = False
    """Compile each block with torch.compile."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    enable: bool = True
    """Save checkpoints, and resume from the newest valid one in the run folder."""
    interval: int = 500
    """Optimizer steps between saves. The last step is always saved."""
    keep_latest_k: int | Literal["all"] = 3
    """Older verified checkpoints are deleted after a newer one is committed."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async writes to disk while training goes on; the save before is awaited first."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What a save that fails does to the run, on a full disk for instance. continue: a warning, and the next interval tries
    again; the last save of a run must succeed in any case."""
    init_from: str = ""
    """A step folder whose model weights start this run (no optimizer, no data position). Ignored once the run has checkpoints
    of its own."""
    init_rename: dict[str, str] = field(default_factory=dict)
    """Glob patterns of names in init_from -> names here; each * is carried over."""
    init_allow_missing: list[str] = field(default_factory=list)
    """Glob patterns of parameters that init_from need not hold, or holds in another shape; they keep their fresh values."""

    def __post_init__(self):
        _refuse(
            self,
            interval=(self.interval >= 1, "must be at least 1"),
            keep_latest_k=(_at_least(self.keep_latest_k, 1), 'must be at least 1, or "all"'),
            init_rename=(bool(self.init_from) or not self.init_rename, "needs checkpoint.init_from"),
            init_allow_missing=(bool(self.init_from) or not self.init_allow_missing, "needs checkpoint.init_from"),
        )


@dataclass(frozen=True, kw_only=True)
class Validation:
    enable: bool = True
    """Score the held-out split before the first step, every freq steps, and after the last."""
    freq: int = 500
    """Optimizer steps between validations."""
    source: str = ""
    """Where held-out recordings come from. Empty: data.source."""
    split: str = "test"
    """The split that is held out."""
    local_batch_size: int | Literal["auto"] = "auto"
    """Windows a rank scores at once. auto: training.local_batch_size."""
    max_windows: int | Literal["all"] = "all"
    """Score this many windows, a fixed subset chosen by hash, or the exact finite set once."""
    generate_every: int | Literal["never"] = "never"
    """Optimizer steps between rasters of what the model makes of one held-out prompt, always the same: pictures in samples/ of
    the run folder, and in TensorBoard. The last step has one too. Each takes up to a thousand passes of a token; without
    validation there are none."""
    baselines: bool = False
    """After the last step fit the classical baselines on the training split and print the ladder. They are scored on all
    held-out counts, whatever max_windows says."""

    def __post_init__(self):
        _refuse(
            self,
            freq=(self.freq >= 1, "must be at least 1"),
            local_batch_size=(_at_least(self.local_batch_size, 1), 'must be at least 1, or "auto"'),
            max_windows=(_at_least(self.max_windows, 1), 'must be at least 1, or "all"'),
            generate_every=(_at_least(self.generate_every, 1), 'must be at least 1, or "never"'),
        )


@dataclass(frozen=True, kw_only=True)
class Metrics:
    log_freq: int = 10
    """Optimizer steps between lines on the console. metrics.jsonl has every step."""
    enable_tensorboard: bool = False
    """Write TensorBoard events to tb/ in the run folder."""

    def __post_init__(self):
        _refuse(self, log_freq=(self.log_freq >= 1, "must be at least 1"))


@dataclass(frozen=True, kw_only=True)
class Profiling:
    enable_profiling: bool = False
    """Write a trace of one step in profile_freq to profile/ in the run folder."""
    profile_freq: int = 100
    """Optimizer steps between traces."""
    enable_memory_snapshot: bool = False
    """Write a CUDA memory snapshot beside each trace, and one when memory runs out."""

    def __post_init__(self):
        _refuse(self, profile_freq=(self.profile_freq >= 4, "must be at least 4: a trace takes wait, warm-up and one step"))


@dataclass(frozen=True, kw_only=True)
class Comm:
    init_timeout_seconds: int = 600
    """How long ranks wait for one another, and a process stays in one phase of its work, until its first step is done."""
    train_timeout_seconds: int = 300
    """How long a collective, or a phase such as reading data or one backward, may take after the first step. A process that
    takes longer is ended, and its stacks are written. Reading an index and saving or loading checkpoints have an hour."""

    def __post_init__(self):
        _refuse(
            self,
            init_timeout_seconds=(self.init_timeout_seconds >= 1, "must be at least 1"),
            train_timeout_seconds=(self.train_timeout_seconds >= 1, "must be at least 1"),
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    job: Job = field(default_factory=Job)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)


SECTION_OF = {entry.type.__name__: entry.name for entry in fields(Config)}
