"""Milliseconds a generated token with and without the cache, by how many tokens came before; both ways draw the same counts.

    python benchmarks/generate.py                                       # the quickstart's architecture, a minute on a CPU
    python benchmarks/generate.py --flavor 8B --neurons 192 --lengths 4096 32768 131072

Weights are fresh: what a token costs does not depend on what it says. Of bins and tokens timed the fastest counts, as a busy
machine slows some. Then rollouts of one prompt together, and what its keys and values would weigh if each had a copy of them.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from torchtitan_bio import attention, distributed, metrics, models
from torchtitan_bio.science import sampling


def build(flavor: str, device, dtype):
    architecture = models.resolve("llama3", flavor, {})
    uncached = attention.choose("auto", device=device, dtype=dtype, head_dim=architecture.head_dim)
    with torch.device("meta"):
        model = models.build("llama3", architecture, attend=uncached)
    model.to_empty(device=device).init_weights(0)
    model = model.to(dtype).requires_grad_(False)
    kernel = sampling.choose_kernel(device, dtype, architecture.head_dim)
    return sampling.Sampler(model=model, kernel=kernel, dtype=dtype, device=device)


class Watch:
    """Seconds between the bins of a rollout: of a GPU those that pass, on a CPU those that one thread works."""

    def __init__(self, device):
        self.device, self.times = device, []

    def note(self, num_tokens: int = 0):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter() if self.device.type == "cuda" else time.thread_time())

    @property
    def fastest_s(self) -> float:
        return float(np.diff(self.times).min())


def cached(sampler, counts, bins: int) -> tuple[np.ndarray, float]:
    """(counts drawn, milliseconds a token), reading the prompt left out."""
    watch, prompt = Watch(sampler.device), sampler.read(sampling.encode(counts[None]), len(counts))
    watch.note()
    drawn = sampler.roll_out(prompt, bins=bins, rollouts=[0], tell=watch.note)[0]
    return drawn, 1000 * watch.fastest_s / (len(counts) + 1)


@torch.no_grad()
def uncached(sampler, counts, num_counts: int) -> tuple[list[int], float]:
    """The first counts of the same rollout, each by a pass of the whole sequence through the model."""
    n, watch, drawn = len(counts), Watch(sampler.device), []
    chance = torch.from_numpy(sampling.keyed.uniform(num_counts, sampler.seed, sampling.ROLLOUTS, 0)).to(sampler.device)
    tokens = sampling.encode(counts[None])[0].tolist()
    watch.note()
    for place in range(num_counts):
        tokens += [sampling.SEPARATOR] if place % n == 0 else []
        inputs = torch.tensor([tokens], dtype=torch.uint8, device=sampler.device)
        drawn.append(int(sampler._draw(sampler.model.logits({"tokens": inputs})[:, -1], chance[place : place + 1])))
        tokens.append(drawn[-1])
        watch.note()
    return drawn, 1000 * watch.fastest_s


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", default="quickstart")
    parser.add_argument("--neurons", type=int, default=15)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096], help="tokens of the prompt"
    )
    parser.add_argument("--bins", type=int, default=12, help="generated with the cache")
    parser.add_argument("--tokens", type=int, default=6, help="generated without it")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1, 4, 16, 64])
    asked = parser.parse_args()
    device = distributed.own_device()
    torch.set_num_threads(1)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    sampler, n = build(asked.flavor, device, dtype), asked.neurons
    generator = np.random.default_rng(0)
    recording = generator.poisson(0.1, (n, max(asked.lengths) // (n + 1))).astype(np.uint8)
    cached(sampler, recording[:, :4], 2)  # warms up
    print(f"{metrics.device_name(device)}, torch {torch.__version__}: {asked.flavor}, {n} neurons")
    print("\n| tokens before | uncached, ms a token | cached, ms a token | uncached / cached | the same counts |")
    print("|---|---|---|---|---|")
    for length in asked.lengths:
        counts = recording[:, : length // (n + 1)]
        with_cache, fast = cached(sampler, counts, asked.bins)
        without, slow = uncached(sampler, counts, asked.tokens)
        same = with_cache.T.reshape(-1)[: len(without)].tolist() == without
        print(f"| {length:,} | {slow:.2f} | {fast:.2f} | {slow / fast:,.1f} | {'yes' if same else 'NO'} |", flush=True)
    report_rollouts(sampler, recording[:, : min(4096, max(asked.lengths)) // (n + 1)], asked)


def report_rollouts(sampler, counts, asked):
    prompt = sampler.read(sampling.encode(counts[None]), len(counts))
    print(f"\nrollouts of one prompt of {prompt.cache.length:,} tokens, {asked.bins} bins each\n")
    print("| rollouts at once | tokens/s | keys and values | if each had its own prompt |")
    print("|---|---|---|---|")
    of_prompt = prompt.cache.memory.nbytes / 2**20
    for number in asked.rollouts:
        watch = Watch(sampler.device)
        watch.note()
        sampler.roll_out(prompt, bins=asked.bins, rollouts=list(range(number)), tell=watch.note)
        speed = number * (len(counts) + 1) / watch.fastest_s
        own = of_prompt / prompt.cache.length * asked.bins * (len(counts) + 1)
        shared, copied = of_prompt + number * own, number * (of_prompt + own)
        print(f"| {number} | {speed:,.0f} | {shared:,.1f} MiB | {copied:,.1f} MiB |", flush=True)


if __name__ == "__main__":
    main()
