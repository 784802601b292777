"""What converting weights costs beside copying their files, beside transformers, and beside the predecessor's way.

    python benchmarks/convert.py [--gigabytes 1.2] [--repeats 3]

Each way runs in a process of its own, in turns; figures are the median time and the largest memory (peak RSS) of the repeats.
Times include hashing and flushing to disk where the way does either; a plain copy flushes too. The model is a Llama of random
weights: in as a Hugging Face folder of bfloat16 shards, out from a checkpoint of this trainer, float32 with AdamW's state
beside it, every byte of which is hashed before it is trusted. Only ratios travel between machines.
"""

import argparse
import dataclasses
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARD = "300MB"


def make_inputs(folder: Path, gigabytes: float):
    """hf/: a folder of bfloat16 shards; run/: a checkpoint with model and optimizer in float32, half as many parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchtitan_bio import checkpoint, convert, distributed, models, resume
    from torchtitan_bio.config import Config
    from torchtitan_bio.models import llama3

    def architecture(num_parameters):
        embeddings, layer = 2 * 32000 * 2048, 2048 * 2048 * 5 // 2 + 3 * 2048 * 7168
        layers = max(1, round((num_parameters - embeddings) / layer))
        return llama3.Architecture(
            dim=2048, num_layers=layers, num_heads=32, num_kv_heads=8, ffn_dim=7168, vocab_size=32000, norm_eps=1e-5
        )

    a = architecture(gigabytes * 1e9 / 2)
    config = LlamaConfig(**convert.hf_config(vars(a), dtype="bfloat16", context=8192))
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder / "hf", max_shard_size=SHARD)
    del model
    a = architecture(gigabytes * 1e9 / 4)
    with torch.device("meta"):
        model = models.build("llama3", a)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    optimizer = torch.optim.AdamW(model.parameters())
    saver = checkpoint.Checkpointer(folder / "run" / "checkpoint", world=distributed.start())
    identity = {"family": "llama3", "flavor": "custom", "architecture": vars(a)}
    state = resume.train_state(
        1, global_batch_size=1, seq_len=8192, skipped_in_a_row=0, fingerprint={}, config=dataclasses.asdict(Config())
    )
    saver.save(1, model, optimizer, state, identity)


def copy(source: Path, target: Path, pattern: str):
    target.mkdir(parents=True)
    for path in sorted(source.glob(pattern)):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as stream:
            os.fsync(stream.fileno())


def script(name: str, *arguments):
    import importlib

    from torchtitan_bio import bridge

    module = importlib.import_module(name)
    assert bridge.run(lambda: module.main(module.parse(list(map(str, arguments))))) == 0


def through_transformers(source: Path, target: Path):
    import torch
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target, max_shard_size=SHARD)


def as_the_predecessor(source: Path, target: Path):
    """All of the checkpoint into one file, loaded again for its model, saved again."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target.mkdir(parents=True)
    dcp_to_torch_save(source, target / "all.pth")
    state = torch.load(target / "all.pth", weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if name.startswith("model.")}, target / "consolidated.00.pth")


WAYS = {
    "in: plain copy of the files": lambda folder, out: copy(folder / "hf", out, "*"),
    "in: llama_to_dcp.py": lambda folder, out: script(
        "llama_to_dcp", "--input_dir", folder / "hf", "--output_dir", out, "--vocab", "keep"
    ),
    "in: transformers, load and save": lambda folder, out: through_transformers(folder / "hf", out),
    "out: plain copy of an export": lambda folder, out: copy(folder / "export", out, "*"),
    "out: dcp_to_llama.py": lambda folder, out: export(folder, out, "hf"),
    "out: dcp_to_llama.py --format pth": lambda folder, out: export(folder, out, "pth"),
    "out: dcp_to_torch_save and torch.save": lambda folder, out: as_the_predecessor(
        folder / "run" / "checkpoint" / "step-00000001", out
    ),
}


def export(folder: Path, out: Path, format: str):
    step = folder / "run" / "checkpoint" / "step-00000001"
    options = ("--dtype", "float32", "--format", format, "--max_shard_size", SHARD)
    script("dcp_to_llama", "--input_dir", step, "--output_dir", out, *options)


def run_way(folder: Path, way: str):
    """One way in this very process: "seconds MiB" on the last line. Libraries are loaded before the clock starts."""
    import torch.distributed.checkpoint.format_utils  # noqa: F401

    if "transformers" in way:
        from transformers import LlamaForCausalLM  # noqa: F401
    else:
        import dcp_to_llama  # noqa: F401
        import llama_to_dcp  # noqa: F401
    before = peak_mib()
    started = time.perf_counter()
    WAYS[way](folder, folder / "out")
    seconds = time.perf_counter() - started
    print(f"\n{seconds} {before} {peak_mib()}")


def peak_mib() -> float:
    """Of this process. getrusage would count the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(folder: Path, way: str) -> tuple[float, float, float]:
    """(seconds, MiB before, MiB at most)"""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(float(number) for number in output.splitlines()[-1].split())


def num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        return run_way(asked.folder, asked.way)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'benchmarks')]!r}; import convert, pathlib; "
                f"convert.make_inputs(pathlib.Path({str(folder)!r}), {asked.gigabytes})",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        export(folder, folder / "export", "hf")
        figures = {way: [] for way in WAYS}
        for _ in range(asked.repeats):
            for way in WAYS:
                figures[way].append(measure(folder, way))
        sizes = {"in": num_bytes(folder / "hf"), "out": num_bytes(folder / "export")}
        print(f"in: {sizes['in'] / 1e9:.2f} GB of bfloat16; out: {sizes['out'] / 1e9:.2f} GB of float32; shards of {SHARD}\n")
    print("| way | s | GB/s | of the copy's time | MiB above the imports |\n|---|---|---|---|---|")
    for way, found in figures.items():
        direction = way.partition(":")[0]
        seconds = statistics.median(each[0] for each in found)
        copied = statistics.median(each[0] for each in figures[next(name for name in WAYS if name.startswith(direction))])
        memory = max(each[2] - each[1] for each in found)
        print(f"| {way} | {seconds:.2f} | {sizes[direction] / 1e9 / seconds:.2f} | {seconds / copied:.2f} | {memory:,.0f} |")


if __name__ == "__main__":
    sys.exit(main())
