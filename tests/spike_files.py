"""Small recordings, written as the files that people have."""

import numpy as np
import pyarrow as pa

from torchtitan_bio.data import spikes

LISTS = pa.list_(pa.list_(pa.uint8()))


def recordings(num=6, seed=0, high=5):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, high, (int(rng.integers(1, 9)), int(rng.integers(1, 60)))) for _ in range(num)]


def table(matrices, kind=LISTS, **columns):
    num = len(matrices)
    named = {
        "source_dataset": [f"lab{i % 3}" for i in range(num)],
        "subject_id": [f"mouse{i % 2}" for i in range(num)],
        "session_id": ["1"] * num,
        "segment_id": [f"s{i}" for i in range(num)],
        **columns,
    }
    counts = pa.array([matrix.tolist() if isinstance(matrix, np.ndarray) else matrix for matrix in matrices], kind)
    return pa.table({"spike_counts": counts, **{name: column for name, column in named.items() if column is not None}})


def write_arrow(path, data, form=pa.ipc.new_stream, max_rows=4):
    with pa.OSFile(str(path), "wb") as out, form(out, data.schema) as writer:
        writer.write_table(data, max_chunksize=max_rows)


def build(source, **settings):
    return spikes.build(source=str(source), **{"seq_len": 32, "mode": "stream", "seed": 1, **settings})


def same_samples(one, other):
    return len(one) == len(other) and all(
        (one.sample(i).tokens == other.sample(i).tokens).all() and one.sample(i).origin == other.sample(i).origin
        for i in range(2 * len(one))
    )
