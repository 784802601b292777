"""What each technique for long context buys, beside the predecessor and transformers: seconds, memory, the longest sequence.

    python benchmarks/long_context.py [--repeats 5] [--json outputs/long_context.json]

The model is the 8B at 131,072 tokens made sixteen times narrower and shorter: attention has the same share of FLOPs. Time is
that of one block, memory that of four, which keep more than one. All contestants have the same weights and batches, are
sharded over this one process, and take train.train_step in fp32. Before anything is measured their logits and their losses over
three steps must agree.

Seconds are of the processor and one thread, so that a busy machine does not blur them: the fastest of the repeats, in which the
contestants take turns. Memory is that of tensors, parameters, gradients and Adam's moments included: what a caching allocator
would have to give out. On a CPU the host is the device; what waits in host memory for a backward pass is counted apart.
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import preflight
import train
from benchmarks import peers
from torchtitan_bio import assembly, config_loader, costs, distributed, optimizer, parallelize
from torchtitan_bio.data.batch import Batch
from torchtitan_bio.live_memory import LiveMemory, fused_norms
from torchtitan_bio.models.llama3 import Architecture, Model

BLOCK = Architecture(dim=256, num_layers=1, num_heads=4, num_kv_heads=1, ffn_dim=896)
DEEP = replace(BLOCK, num_layers=4)
TIMED_LENGTHS, HELD_LENGTHS = (2048, 4096, 8192), (512, 1024, 2048)
BUDGET_MIB = 128
TOLERANCE = 1e-5
"""Of logits and losses, relative to the largest."""
MIB = 2**20


@dataclass(frozen=True)
class Contestant:
    name: str
    build: Callable
    """(architecture, world) -> (sharded model with lively_weights, its host memories, its costs.Job or None)"""


def ours(name: str, *settings: str) -> Contestant:
    def build(architecture, world):
        sections = [setting if "." in setting else f"activation_checkpoint.{setting}" for setting in settings]
        config = config_loader.load([f"--{setting}" for setting in sections]).config
        job = preflight.job_of(config, architecture, world.size, world.device)
        built = assembly.build_model(config, architecture, job, world, lambda line: None)
        weights = lively_weights(architecture)
        with torch.no_grad():
            for parameter_name, parameter in built.model.named_parameters():
                parameter.to_local().copy_(weights[parameter_name])
        return built.model, built.host_memories, job

    return Contestant(name, build)


def peer(name: str, make: Callable, rename: Callable = lambda weights, architecture: weights, recompute="none") -> Contestant:
    def build(architecture, world):
        model = make(architecture)
        model.load_state_dict(rename(lively_weights(architecture), architecture))
        fp32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
        parallelize.parallelize(
            model, world.mesh, **fp32, recompute=recompute, compile_blocks=False, reshard_after_forward=True
        )
        return model, [], None

    return Contestant(name, build)


TRANSFORMERS, PLAIN, PREDECESSOR, FULL, KEPT = "transformers", "plain", "predecessor", "full", "keep_attention"
TOGETHER = "keep_attention, tiles"
CONTESTANTS = [
    peer(TRANSFORMERS, lambda a: peers.Transformers(a, checkpointed=False), peers.transformers_names),
    peer("transformers, checkpointed", lambda a: peers.Transformers(a, checkpointed=True), peers.transformers_names),
    peer(PREDECESSOR, peers.Predecessor, recompute="full"),
    ours(PLAIN, "mode=none"),
    ours(FULL, "mode=full"),
    ours(KEPT, "mode=keep_attention"),
    ours("full, tiles", "mode=full", "ffn_tiles=8"),
    ours("full, inputs on host", "mode=full", "offload_inputs=true"),
    ours("keep_attention on host", "mode=keep_attention", "keep_on=host"),
    ours(TOGETHER, "mode=keep_attention", "ffn_tiles=8"),
    ours(
        "keep_attention on host, tiles, inputs on host",
        "mode=keep_attention",
        "keep_on=host",
        "ffn_tiles=8",
        "offload_inputs=true",
    ),
]


class Runner:
    """A contestant with its optimizer, ready to take steps."""

    def __init__(self, contestant: Contestant, architecture: Architecture, world):
        self.name, self.world = contestant.name, world
        self.model, self.host_memories, self.job = contestant.build(architecture, world)
        self.adamw = optimizer.build(self.model, lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)

    def step(self, batch: Batch) -> float:
        loss, _, taken = train.train_step(self.model, self.adamw, [batch], self.world, max_norm=1.0)
        assert taken
        return loss

    @property
    def host_bytes(self) -> int:
        return sum(host.allocated_bytes for host in self.host_memories)


def lively_weights(architecture: Architecture) -> dict[str, torch.Tensor]:
    """With which no norm is 1 and attention is far from uniform, so that an error in either shows."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, parameter in Model(architecture).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        weights[name] = noise * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1 + 0.3 * noise
    return weights


def batch_of(seq_len: int) -> Batch:
    drawn = torch.randint(0, 256, (1, seq_len + 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(seq_len))
    inputs = {"tokens": drawn[:, :-1], "labels": drawn[:, 1:].to(torch.int16), "cu_seqlens": None}
    return Batch(inputs, {"next_token": seq_len}, [(0, 0)])


# ---- the gate


def check_parity(world) -> dict[str, dict[str, float]]:
    """The largest differences from the predecessor, relative; SystemExit where one is too large."""
    batch, results = batch_of(512), {}
    for contestant in CONTESTANTS:
        runner = Runner(contestant, DEEP, world)
        with torch.no_grad():
            logits = runner.model.logits(batch.inputs)
        results[contestant.name] = logits, torch.tensor([runner.step(batch) for _ in range(3)])
    differences = {}
    for name, values in results.items():
        pairs = zip(("logits", "losses"), values, results[PREDECESSOR], strict=True)
        differences[name] = {what: ((a - b).abs().max() / b.abs().max()).item() for what, a, b in pairs}
        if max(differences[name].values()) > TOLERANCE:
            raise SystemExit(f"{name} computes something else than {PREDECESSOR}: {differences[name]}")
    return differences


# ---- memory


def measure_memory(contestant: Contestant, world, lengths) -> list[dict[str, float]]:
    """Of each length, what a step holds at most, and what of the contestant's tensors waits in host memory beside it."""
    measured = []
    with LiveMemory() as memory:
        runner = Runner(contestant, DEEP, world)
        runner.step(batch_of(256))  # from here on there are moments
        for seq_len in lengths:
            before = runner.host_bytes
            memory.peak = memory.live
            runner.step(batch_of(seq_len))
            host = runner.host_bytes
            measured.append({"tokens": seq_len, "peak_mib": (memory.peak - host) / MIB, "host_mib": (host - before) / MIB})
    return measured


def measure_plan(contestant: Contestant, world, seq_len: int) -> dict[str, float] | None:
    """plan.py's formula beside a real step, whose norms here hold what an accelerator's do."""
    _, _, job = contestant.build(DEEP, world)
    if job is None:
        return None
    with fused_norms():
        (measured,) = measure_memory(contestant, world, [seq_len])
    predicted = costs.peak(replace(job, seq_len=seq_len)).bytes / MIB
    return {"predicted_mib": predicted, "measured_mib": measured["peak_mib"], "error": predicted / measured["peak_mib"] - 1}


def find_longest(contestant: Contestant, world, memory: list[dict[str, float]]) -> dict[str, float]:
    """The growth between the two longest lengths, and the longest sequence that a line through them puts within the budget.

    That one is run to see that it is. Another place in a block may have become the fullest by then: the line is drawn anew.
    """
    growth = growth_between(*memory[-2:])
    left, right, longest = memory[-2], memory[-1], {"peak_mib": math.inf}
    while longest["peak_mib"] > BUDGET_MIB:
        tokens = int(left["tokens"] + (BUDGET_MIB - left["peak_mib"]) / growth_between(left, right)) // 64 * 64
        (longest,) = measure_memory(contestant, world, [tokens])
        left, right = memory[-1], longest
    return {"growth_kib": growth * 1024, "longest": longest}


def growth_between(shorter: dict[str, float], longer: dict[str, float]) -> float:
    """MiB a token."""
    return (longer["peak_mib"] - shorter["peak_mib"]) / (longer["tokens"] - shorter["tokens"])


# ---- time


def measure_seconds(world, repeats: int) -> dict[str, dict[int, list[float]]]:
    """Of each contestant and length, the processor's seconds of each repeat."""
    torch.set_num_threads(1)
    runners = [Runner(contestant, BLOCK, world) for contestant in CONTESTANTS]
    seconds = {runner.name: {seq_len: [] for seq_len in TIMED_LENGTHS} for runner in runners}
    for seq_len in TIMED_LENGTHS:
        batch = batch_of(seq_len)
        for _ in range(repeats):
            for runner in runners:
                gc.collect()
                started = time.process_time()
                runner.step(batch)
                seconds[runner.name][seq_len].append(time.process_time() - started)
    return seconds


# ---- the report


def judge(rows: dict[str, dict]) -> list[tuple[str, float, float, bool]]:
    """(what is compared, the figure, its bar, whether it is met); lower is better in all."""
    fastest = {name: row["seconds"][TIMED_LENGTHS[-1]]["fastest"] for name, row in rows.items()}
    growth = {name: row["growth_kib"] for name, row in rows.items()}
    errors = [abs(row["plan"]["error"]) for row in rows.values() if row["plan"]]
    bars = [
        (f"growth of memory, {TOGETHER} / {PLAIN}", growth[TOGETHER] / growth[PLAIN], 0.5),
        (f"growth of memory, {TOGETHER} / {TRANSFORMERS}", growth[TOGETHER] / growth[TRANSFORMERS], 0.5),
        (f"seconds at {TIMED_LENGTHS[-1]:,}, {FULL} / {PREDECESSOR}", fastest[FULL] / fastest[PREDECESSOR], 1.05),
        (f"seconds at {TIMED_LENGTHS[-1]:,}, {KEPT} / {FULL}", fastest[KEPT] / fastest[FULL], 0.88),
        (f"largest error of plan.py's memory at {HELD_LENGTHS[-1]:,}", max(errors), 0.10),
    ]
    return [(what, figure, bar, figure <= bar) for what, figure, bar in bars]


def print_tables(rows: dict[str, dict], bars):
    print(f"\n{date.today()}, {processor()}, torch {torch.__version__}: `python {' '.join(sys.argv)}`\n")
    timed, held = (" / ".join(f"{length:,}" for length in lengths) for lengths in (TIMED_LENGTHS, HELD_LENGTHS))
    columns = [
        "",
        f"seconds of one block at {timed} tokens, fastest (median)",
        f"/ {PREDECESSOR}'s",
        f"MiB of four blocks at {held} tokens",
        f"waiting on the host at {HELD_LENGTHS[-1]:,}",
        "KiB a token",
        f"longest in {BUDGET_MIB} MiB",
        "plan.py's error",
    ]
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    base = rows[PREDECESSOR]["seconds"][TIMED_LENGTHS[-1]]["fastest"]
    for name, row in rows.items():
        times = [row["seconds"][length] for length in TIMED_LENGTHS]
        cells = [
            name,
            " / ".join(f"{each['fastest']:.2f} ({each['median']:.2f})" for each in times),
            f"{times[-1]['fastest'] / base:.2f}",
            " / ".join(f"{entry['peak_mib']:.0f}" for entry in row["memory"]),
            f"{row['memory'][-1]['host_mib']:.0f} MiB",
            f"{row['growth_kib']:.1f}",
            f"{row['longest']['tokens']:,}",
            f"{row['plan']['error']:+.1%}" if row["plan"] else "",
        ]
        print(f"| {' | '.join(cells)} |")
    print("\n| bar | figure | at most | |", "|---|---|---|---|", sep="\n")
    for what, figure, bar, is_met in bars:
        print(f"| {what} | {figure:.3f} | {bar} | {'met' if is_met else '**missed**'} |")


def processor() -> str:
    """Its name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("outputs/long_context.json"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    world = distributed.start()
    parity = check_parity(world)
    print(f"parity: {max(max(found.values()) for found in parity.values()):.1e} at most, {TOLERANCE:.0e} allowed", flush=True)
    rows = {}
    for contestant in CONTESTANTS:
        memory = measure_memory(contestant, world, HELD_LENGTHS)
        rows[contestant.name] = {
            "parity": parity[contestant.name],
            "memory": memory,
            "plan": measure_plan(contestant, world, HELD_LENGTHS[-1]),
            **find_longest(contestant, world, memory),
        }
        print(f"{time.perf_counter() - started:4.0f} s: memory of {contestant.name}", flush=True)
    for name, by_length in measure_seconds(world, arguments.repeats).items():
        rows[name]["seconds"] = {
            length: {"fastest": min(each), "median": statistics.median(each), "all": each} for length, each in by_length.items()
        }
    distributed.stop()
    bars = judge(rows)
    print_tables(rows, bars)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    facts = {"date": str(date.today()), "processor": processor(), "torch": torch.__version__, "budget_mib": BUDGET_MIB}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(facts | {"rows": rows, "bars": bars}, indent=1))


if __name__ == "__main__":
    main()
