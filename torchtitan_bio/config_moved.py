"""What the keys of torchtitan's and gpt-neuro-arch's TOML files are called here: the errors of an old file carry it over."""

MOVED = {
    "training.batch_size": "training.local_batch_size",
    "training.gradient_accumulation_steps": "training.global_batch_size",
    "training.enable_cpu_offload": "parallelism.offload_states",
    "training.dataset": "data.source",
    "training.dataset_path": "data.source",
    "training.n_fixed": "data.num_neurons",
    "training.vocab_size": "model.overrides.vocab_size",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.lr": "optimizer.lr",
    "training.shuffle_seed": "training.seed",
    "training.compile": "compile.enable",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "debug.seed": "training.seed",
    "model.vocab_size": "model.overrides.vocab_size",
    "model.rope_theta": "model.overrides.rope_theta",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "lr_scheduler.total_steps": "training.steps",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_path": "checkpoint.init_from",
    "checkpoint.exclude_from_loading": "checkpoint.init_allow_missing",
    "validation.enabled": "validation.enable",
    "validation.dataset": "validation.source",
    "validation.dataset_path": "validation.source",
    "validation.steps": "validation.max_windows",
}
"""Old name -> new name."""

OTHER_UNIT = {
    "training.gradient_accumulation_steps": "which counts sequences: local_batch_size * ranks * accumulation steps",
    "training.batch_size": "sequences of one rank in one forward",
    "validation.steps": "which counts windows over all ranks: steps * batch size * ranks",
    "lr_scheduler.lr_min": "a share of optimizer.lr",
}
"""Old name -> how a number under the new name is counted, where the old number would mean something else."""

GONE = {
    "job.print_*": "--print-config prints every value and where it came from",
    "model.norm_type": "RMSNorm is the only norm",
    "model.tokenizer_path": "a spike count is its own token",
    "model.hf_assets_path": "a spike count is its own token",
    "model.attn_*": "model.attention chooses the kernel",
    "model.use_flex_attn": "model.attention chooses the kernel",
    "model.converters": "float8 and other conversions of the model are not offered",
    "optimizer.name": "AdamW is the only optimizer",
    "optimizer.fused": "AdamW is always fused",
    "optimizer.implementation": "AdamW is always fused",
    "optimizer.early_step_in_backward": "it cannot clip by the global norm",
    "training.enable_loss_parallel": "tensor parallelism is not offered",
    "training.deterministic": "a run on the CPU repeats itself exactly",
    "*.tensor_parallel_degree": "tensor parallelism is not offered; FSDP shards over all ranks",
    "*.pipeline_parallel_*": "pipeline parallelism is not offered; FSDP shards over all ranks",
    "*.context_parallel_rotate_method": "parallelism.context_parallel_method is ulysses or ring",
    "*.expert_parallel_*": "expert parallelism is not offered",
    "*.enable_async_tensor_parallel": "tensor parallelism is not offered",
    "*.enable_compiled_autograd": "compile.enable compiles each block",
    "compile.*": "compile.enable compiles each block",
    "activation_checkpoint.*": "activation_checkpoint.mode is none, full or keep_attention",
    "checkpoint.folder": "checkpoints lie in checkpoint/ of the run folder, job.dump_folder",
    "checkpoint.interval_type": "checkpoint.interval counts optimizer steps",
    "checkpoint.model_weights_only": "every checkpoint can be resumed",
    "checkpoint.last_save_*": "every checkpoint can be resumed",
    "checkpoint.export_dtype": "every checkpoint can be resumed, in fp32",
    "checkpoint.initial_load_*": "checkpoint.init_from takes the weights alone, from a DCP folder",
    "checkpoint.create_seed_checkpoint": "initial weights are the same on any number of ranks",
    "checkpoint.load_step": "a run resumes from its newest valid checkpoint; checkpoint.init_from starts from any other",
    "metrics.save_tb_folder": "TensorBoard events lie in tb/ of the run folder, job.dump_folder",
    "metrics.enable_wandb": "metrics.jsonl has every step, and metrics.enable_tensorboard is the one extra",
    "metrics.rank_0_only": "values are global, and rank 0 writes them",
    "metrics.save_for_all_ranks": "values are global, and rank 0 writes them",
    "metrics.*color_printing": "the console is plain",
    "profiling.save_*_folder": "traces and snapshots lie in profile/ of the run folder, job.dump_folder",
    "validation.seq_len": "windows are scored at training.seq_len",
    "comm.trace_buf_size": "the flight recorder is on; TORCH_FR_BUFFER_SIZE sets its length",
    "comm.save_traces_*": "the flight recorder writes into stacks/ of the run folder",
}
"""Old name (a glob pattern) -> why it is not needed, or what serves instead. The first that matches is told."""

GONE_SECTIONS = {
    "experimental": "none of its settings is offered: no tensor or pipeline parallelism, no custom imports",
    "float8": "float8 is not offered; training.mixed_precision_param is bfloat16 or float32",
    "quantize": "float8 and MX are not offered; training.mixed_precision_param is bfloat16 or float32",
    "mx": "MX types are not offered; training.mixed_precision_param is bfloat16 or float32",
    "memory_estimation": "plan.py says what a config will cost",
    "fault_tolerance": "a run that stops is started again, and resumes from its newest valid checkpoint",
    "debug": "none of its settings is offered",
}
"""Old section -> why it is not needed, or what serves instead."""

REWORDED = {
    ("model.name", "llama"): 'is written "llama3" here',
    ("model.flavor", "debugmodel"): 'is written "debug" here',
    ("training.global_batch_size", -1): 'is written "auto" here',
    ("parallelism.data_parallel_shard_degree", -1): 'is written "auto" here',
    ("parallelism.fsdp_reshard_after_forward", "default"): 'is written "always" or "never" here',
    ("activation_checkpoint.mode", "selective"): 'is not offered; "keep_attention" keeps what is worth keeping, exactly',
    ("activation_checkpoint.mode", "memory_budget"): 'is not offered; write "keep_attention", "full" or "none"',
    ("lr_scheduler.decay_type", "sqrt"): 'is not offered; write "linear" or "cosine"',
    ("checkpoint.keep_latest_k", 0): 'is written "all" here',
    ("checkpoint.async_mode", "async_with_pinned_mem"): 'is written "async" here',
    ("validation.max_windows", -1): 'is written "all" here',
}
"""(Key, old value) -> what to write for it: the rest of the sentence "key=value ..."."""
