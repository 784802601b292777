"""How fast recordings become batches, on one core, beside the predecessor's way of doing it and a plain copy of memory.

    python benchmarks/data.py [--megabytes 256] [--repeats 5] [--seconds 1]

The file is Arrow as the hub has it, made in a temporary folder, and lies in the page cache; so does the store that prepare.py
makes of it. Rows have 10 to 2,000 neurons and up to 5 M counts. Rates are tokens a second of processor time, so that a busy
machine does not blur them, and the median of the repeats, in which the ways take turns; waits are by the clock. Only ratios
travel between machines.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torchtitan_bio.data import conversion, rows, spikes

NEURONS = (10, 40, 96, 192, 700, 2000)
ROW_COUNTS = 5_000_000
COPY_BYTES = 128 * 2**10


def write_recordings(path, megabytes):
    """Poisson counts, 90% of them zero, in the Pile's schema."""
    rng = np.random.default_rng(0)
    pool = rng.poisson(0.105, ROW_COUNTS).astype(np.uint8)
    schema = pa.schema({"spike_counts": pa.list_(pa.list_(pa.uint8())), "segment_id": pa.string()})
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, schema) as writer:
        for row in range(megabytes * 10**6 // ROW_COUNTS):
            n = NEURONS[row % len(NEURONS)]
            bins = ROW_COUNTS // n
            counts = np.roll(pool, row)[: n * bins]
            inner = pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * bins), pa.array(counts))
            outer = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), inner)
            writer.write_batch(pa.record_batch([outer, pa.array([str(row)])], schema=schema))


def read_table(path):
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def predecessor_windows(path, seq_len):
    """The predecessor's loop, re-told: a row becomes Python lists, then an array, then a list of tokens; a window is sliced off
    the front of one long list."""
    tokens = []
    for row in range((table := read_table(path)).num_rows):
        counts = np.array(table["spike_counts"][row].as_py(), dtype=np.uint8)
        separator = np.full((1, counts.shape[1]), 255, dtype=np.uint8)
        tokens.extend(np.concatenate([separator, counts]).T.flatten().tolist())
        while len(tokens) > seq_len:
            window = np.array(tokens[: seq_len + 1])
            tokens = tokens[seq_len + 1 :]
            yield window[:-1], window[1:]


def our_windows(dataset):
    return (dataset.sample(i) for i in range(len(dataset)))


def our_batches(dataset):
    """With what the trainer needs on top: shifted labels, boundaries of documents, tensors."""
    return (dataset.collate([dataset.sample(i)]) for i in range(len(dataset)))


def rate(windows, tokens_each, seconds):
    """(tokens a second of processor time, longest wait for a window) over `seconds`, from a standing start."""
    done, worst, begin = 0, 0.0, time.process_time()
    last = time.perf_counter()
    for _ in windows:
        now = time.perf_counter()
        done, worst, last = done + tokens_each, max(worst, now - last), now
        if time.process_time() - begin > seconds:
            break
    return done / (time.process_time() - begin), worst


def copy_rate(path, seconds):
    """Bytes a second from the mapped file into one buffer, by blocks of a window's size."""
    source, block = np.memmap(path, np.uint8, mode="r"), np.empty(COPY_BYTES, np.uint8)

    def blocks():
        while True:
            for at in range(0, len(source) - COPY_BYTES, COPY_BYTES):
                block[:] = source[at : at + COPY_BYTES]
                yield

    return rate(blocks(), COPY_BYTES, seconds)


def first_and_resume_s(path, folder, seq_len):
    """Median times to the first window of a fresh dataset, which opens the file, and then to one anywhere in later epochs."""
    first, resume = [], []
    for i in np.random.default_rng(1).integers(0, 10**9, 20).tolist():
        dataset = open_dataset(path, folder, seq_len)
        times = [time.perf_counter()]
        for sample in (0, len(dataset) + i % (10 * len(dataset))):
            dataset.sample(sample)
            times.append(time.perf_counter())
        first.append(times[1] - times[0])
        resume.append(times[2] - times[1])
    return statistics.median(first), statistics.median(resume)


def open_dataset(path, folder, seq_len):
    return spikes.build(source=str(path), mode="stream", seq_len=seq_len, index_folder=folder)


def memory(key):
    """RssAnon or RssFile of this process, in MB: what it holds, and what of mapped files it has touched."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1000


def measure(path, prepared, folder, seq_len, repeats, seconds):
    """({way: its (rate, worst wait) of each repeat}, MB that this process came to hold beyond mapped pages)."""
    dataset, of_store = (open_dataset(source, folder, seq_len) for source in (path, prepared))
    ways = {
        "copy of memory": lambda: copy_rate(path, seconds),
        "samples": lambda: rate(our_windows(dataset), seq_len, seconds),
        "batches": lambda: rate(our_batches(dataset), seq_len, seconds),
        "samples, store": lambda: rate(our_windows(of_store), seq_len, seconds),
        "batches, store": lambda: rate(our_batches(of_store), seq_len, seconds),
        "predecessor": lambda: rate(predecessor_windows(path, seq_len), seq_len, 4 * seconds),
    }
    held = memory("RssAnon")
    for name in ("samples", "batches", "samples, store", "batches, store"):
        ways[name]()  # so that the pages are mapped, as they are after the first epoch
    grown = memory("RssAnon") - held
    turns = [{name: run() for name, run in ways.items()} for _ in range(repeats)]
    return {name: [turn[name] for turn in turns] for name in ways}, grown


def main(megabytes, repeats, seconds):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path, prepared = Path(folder) / "pile.arrow", Path(folder) / "store"
        write_recordings(path, megabytes)
        begin = time.perf_counter()
        open_dataset(path, folder, 2048)
        megabytes = path.stat().st_size / 1e6
        print(f"index of {megabytes:.0f} MB: {1000 * (time.perf_counter() - begin):.0f} ms")
        begin = time.perf_counter()
        conversion.convert(rows.find(str(path)), prepared, conversion.Settings())
        print(f"conversion into a prepared store: {megabytes / (time.perf_counter() - begin):.0f} MB/s")
        for seq_len in (131_072, 8_192):
            results, grown = measure(path, prepared, folder, seq_len, repeats, seconds)
            medians = {name: statistics.median(found for found, _ in runs) for name, runs in results.items()}
            print(f"\nwindows of {seq_len:,} tokens")
            print(f"  {'':16}{'Mtok/s':>10}{'of a copy':>11}{'x predecessor':>15}{'worst wait, ms':>16}")
            for name, median in medians.items():
                worst = statistics.median(worst for _, worst in results[name])
                shares = f"{median / medians['copy of memory']:>11.2%}{median / medians['predecessor']:>15.1f}"
                print(f"  {name:16}{median / 1e6:>10.2f}{shares}{1000 * worst:>16.2f}")
            for source in (path, prepared):
                first, resume = (1000 * seconds_to for seconds_to in first_and_resume_s(source, folder, seq_len))
                print(f"  {source.name}: first window {first:.2f} ms, with opening it; resume anywhere {resume:.2f} ms")
            print(f"  memory grew by {grown:.1f} MB beyond mapped pages")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement; four times that for the predecessor")
    main(**vars(parser.parse_args()))
