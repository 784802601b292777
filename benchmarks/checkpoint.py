"""What a checkpoint costs: how long training stands still, how fast bytes are written and hashed, how long a resume takes.

    python benchmarks/checkpoint.py [--layers 8] [--repeats 5] [--folder FOLDER]

One process and a Llama whose state (weights and Adam's moments) is a few hundred MB; --layers makes it larger. The ways of
saving take turns at the same state, which training changes in between. "stall" is how long the call keeps the training loop,
"done" when all has happened that the way promises: torch.save leaves the bytes to the page cache, DCP flushes them to the disk,
ours hashes them as well, reads the index again and commits by a rename. Memory is the most that this process holds during the
first save of a way beyond the most that it held in training before any. Medians of the repeats; the first asynchronous save,
which allocates, has a row of its own. A resume reads from the page cache: the fastest of the repeats.
"""

import argparse
import gc
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch
import torch.distributed.checkpoint as torch_dcp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from benchmarks.train_step import random_batch
from torchtitan_bio import assembly, checkpoint, config_loader, distributed, metrics, models, optimizer
from torchtitan_bio.checkpoint import commit, dcp
from torchtitan_bio.checkpoint.peers import meet
from torchtitan_bio.checkpoint.tensors import local, model_tensors, optimizer_tensors
from torchtitan_bio.data import loader

SEQ_LEN = 128
RESUME_STEPS = (10, 1_000, 100_000, 10_000_000)
DEBUG = str(Path(train.__file__).parent / "train_configs/debug.toml")


class Memory:
    """The most MB that this process holds while the body runs, files' pages not counted."""

    def __init__(self):
        self.peak_mb, self._done = held_mb(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        while not self._done.wait(0.005):
            self.peak_mb = max(self.peak_mb, held_mb())

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *reason):
        self._done.set()
        self._thread.join()


def held_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1000


class Trained:
    """A model in training, and the files that its saves make."""

    def __init__(self, num_layers: int, folder: Path, world):
        architecture = replace(models.resolve("llama3", "debug", {}), dim=512, num_heads=8, num_kv_heads=4, ffn_dim=1536)
        self.architecture = replace(architecture, num_layers=num_layers)
        self.folder, self.world, self.step_number = folder, world, 0
        config = config_loader.load([]).config
        self.model = assembly.build_model(config, self.architecture, None, world, lambda line: None).model
        self.adamw = optimizer.build(self.model, lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        self.batch = random_batch(1, SEQ_LEN)
        self.identity = {"family": "llama3", "flavor": "debug", "architecture": asdict(self.architecture)}

    def step(self) -> float:
        started = time.perf_counter()
        train.train_step(self.model, self.adamw, [self.batch], self.world, max_norm=1.0)
        self.step_number += 1
        return time.perf_counter() - started

    def state(self) -> dict[str, torch.Tensor]:
        return model_tensors(self.model) | optimizer_tensors(self.model, self.adamw)

    def checkpoints(self, asynchronous: bool) -> checkpoint.Checkpointer:
        return checkpoint.Checkpointer(self.folder, world=self.world, asynchronous=asynchronous, say=lambda line: None)

    def save(self, checkpoints, step: int | None = None):
        step = self.step_number if step is None else step
        checkpoints.save(step, self.model, self.adamw, {"step": step}, self.identity)

    def tidy(self):
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure(trained: Trained, begin, in_training_mb: float) -> dict:
    """One save. begin() returns how to ask whether it is done, or None; until it is, training goes on."""
    gc.collect()
    quiet = statistics.median(trained.step() for _ in range(3))
    with Memory() as saving:
        started = time.perf_counter()
        is_done = begin()
        stall = done = time.perf_counter() - started
        beside = []
        if is_done:
            with ThreadPoolExecutor(1) as watch:
                end = watch.submit(wait_until, is_done)
                while not end.done():
                    beside.append(trained.step())
            done = end.result() - started
    num_bytes = sum(path.stat().st_size for path in trained.folder.rglob("*") if path.is_file())
    trained.tidy()
    slower = statistics.median(beside) / quiet if beside else None
    more_mb = max(0.0, saving.peak_mb - in_training_mb)
    return {"stall": stall, "done": done, "bytes": num_bytes, "more_mb": more_mb, "slower": slower}


def wait_until(is_done) -> float:
    while not is_done():
        time.sleep(0.005)
    return time.perf_counter()


def ways(trained: Trained) -> dict:
    """{name: a function that begins a save}."""
    folder, synchronous, asynchronous = trained.folder, trained.checkpoints(False), trained.checkpoints(True)

    def ours_async():
        trained.save(asynchronous)
        return (folder / commit.step_name(trained.step_number)).exists

    return {
        "torch.save": lambda: torch.save({name: local(each) for name, each in trained.state().items()}, folder / "state.pt"),
        "dcp.save": lambda: torch_dcp.save(trained.state(), checkpoint_id=folder / "sync") and None,
        "ours": lambda: trained.save(synchronous),
        "dcp.async_save": lambda: torch_dcp.async_save(trained.state(), checkpoint_id=folder / "async").done,
        "ours, async, first": ours_async,
        "ours, async": ours_async,
    }


def rates(trained: Trained) -> tuple[float, float]:
    """GB a second that a save writes and flushes, and that its hashing reads."""
    peers = meet(trained.world)
    staging = commit.stage(trained.folder, 1, peers)
    started = time.perf_counter()
    dcp.write(staging, trained.state(), peers)
    written = time.perf_counter()
    files = commit.fingerprint(list(staging.iterdir()))
    hashed = time.perf_counter()
    num_bytes = sum(entry["bytes"] for entry in files.values())
    trained.tidy()
    return num_bytes / (written - started) / 1e9, num_bytes / (hashed - written) / 1e9


def resume_times(trained: Trained, dataset, step: int) -> tuple[float, float]:
    """Seconds of the processor for model and optimizer of this step, and then seconds by the clock for its first batch."""
    trained.save(trained.checkpoints(False), step)
    checkpoints = trained.checkpoints(False)
    started = time.process_time()
    path, state = checkpoints.latest()
    checkpoints.load(path, trained.model, trained.adamw, trained.identity)
    load, started = time.process_time() - started, time.perf_counter()
    batches = loader.build(
        dataset, start_step=state["step"], global_batch_size=8, local_batch_size=8, rank=0, world_size=1, num_workers=0
    )
    next(batches)
    read = time.perf_counter() - started
    trained.tidy()
    return load, read


def report_saves(runs: dict[str, list[dict]]) -> dict[str, float]:
    """Print the table; the median stall of each way."""
    print("\n| way | stall, s | / ours | done after, s | MB written | MB held beyond training | a step beside it |")
    print("|---|---|---|---|---|---|---|")
    stalls = {name: statistics.median(row["stall"] for row in rows) for name, rows in runs.items()}
    for name, rows in runs.items():
        done = statistics.median(row["done"] for row in rows)
        slower = f"x {statistics.median(row['slower'] for row in rows):.2f}" if rows[0]["slower"] else ""
        print(
            f"| {name} | {stalls[name]:.3f} | {stalls[name] / stalls['ours']:.3f} | {done:.2f} | {rows[0]['bytes'] / 1e6:.0f} "
            f"| {rows[0]['more_mb']:.0f} | {slower} |"
        )
    return stalls


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to be measured; default: a temporary one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of DCP about itself
    torch.set_num_threads(1)
    world = distributed.start()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        trained = Trained(arguments.layers, Path(folder), world)
        trained.step()
        num_bytes = sum(local(tensor).nbytes for tensor in trained.state().values())
        print(
            f"{date.today()}, {metrics.device_name(world.device)}, torch {torch.__version__}: {num_bytes / 1e6:.0f} MB of state"
        )
        with Memory() as training:
            trained.step(), trained.step()
        begin = ways(trained)
        runs = {name: [] for name in begin}
        for repeat in range(arguments.repeats):
            for name, start in begin.items():
                if name != "ours, async, first" or repeat == 0:
                    runs[name].append(measure(trained, start, training.peak_mb))
        stalls = report_saves(runs)
        written, hashed = (
            statistics.median(each) for each in zip(*(rates(trained) for _ in range(arguments.repeats)), strict=True)
        )
        print(f"\nwritten and flushed {written:.2f} GB/s, hashed {hashed:.2f} GB/s")

        config = config_loader.load(["--job.config_file", DEBUG]).config
        dataset, _ = assembly.build_data(config, models.resolve("llama3", "debug", {}), world, lambda line: None)
        loader.read(dataset, range(1))  # the file is open from here on
        turns = [{step: resume_times(trained, dataset, step) for step in RESUME_STEPS} for _ in range(arguments.repeats)]
        resumes = {step: [min(each) for each in zip(*(turn[step] for turn in turns), strict=True)] for step in RESUME_STEPS}
        print("\n| resume at step | verified and loaded, s of processor | first batch, ms |\n|---|---|---|")
        for step, (load, data) in resumes.items():
            print(f"| {step:,} | {load:.3f} | {1000 * data:.2f} |")
    loads, datas = zip(*resumes.values(), strict=True)
    bars = [
        ("stall, asynchronous / synchronous", stalls["ours, async"] / stalls["ours"], 0.1),
        ("load, slowest step / fastest", max(loads) / min(loads), 1.25),
        ("first batch at the slowest step, ms", 1000 * max(datas), 10),
    ]
    print("\n| bar | figure | at most | |\n|---|---|---|---|")
    for name, figure, limit in bars:
        print(f"| {name} | {figure:.3f} | {limit} | {'met' if figure <= limit else 'MISSED'} |")
    distributed.stop()


if __name__ == "__main__":
    main()
