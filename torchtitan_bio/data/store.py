"""Prepared recordings, as prepare.py makes them: bins one after another, so that a window is one stretch of a file.

prepared.json     what was asked for; written first, and what makes a folder a store
shard-00000.u8    rows one after another, each (bins, neurons) uint8, at most 254; no row spans two files
index.parquet     a line for each row, malformed ones included; written last: without it the store is not finished
provenance.json   which files the rows come from, their hashes, and what was not as it should be
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchtitan_bio.data import selection, sources
from torchtitan_bio.data.recordings import METADATA, Index, name_rows

FORMAT = "torchtitan_bio store 1"
SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # empty where the source gives a row none
        *((key, pa.string()) for key in METADATA),
        ("split", pa.string()),
        ("n", pa.int64()),
        ("t", pa.int64()),
        ("shard", pa.int64()),
        ("offset", pa.int64()),  # bytes; -1 for a malformed row, of which nothing is stored
        ("sha256", pa.string()),  # of the row's bytes in its shard
        ("checksum", pa.int64()),  # as Index has it, and so the same for a row as for the file that it came from
        ("fault", pa.string()),
        ("clipped_at", pa.list_(pa.int64())),  # the bins of counts that were above 254, ascending, an entry for each
        ("origin_s", pa.float64()),  # of bin 0, on the clock of the session
        ("bin_width_s", pa.float64()),
        ("order", pa.list_(pa.int32())),  # neuron i of the row is neuron order[i] of its source; null: the source's order
    ]
)


def shard_path(folder, number) -> Path:
    return Path(folder) / f"shard-{number:05d}.u8"


def read_table(folder, columns=None) -> pa.Table:
    path = Path(folder) / sources.STORE_INDEX
    with sources.reading(path):
        return pq.read_table(path, columns=columns, partitioning=None)


def divide(folder, by, *, test, validation=0.0) -> pa.Table:
    """Give each row of a store its split anew, by a hash of its session, subject or name. The new index file."""
    if not sources.is_store(folder):
        raise ValueError(f"{folder} is not a prepared store: prepare.py spikes {folder} --out FOLDER makes one of it")
    sources.find_files(str(folder), "train")  # refuses one that is not finished
    whole = Store(folder)
    splits = selection.draw_splits(whole.index(), by, test=test, validation=validation)
    table = read_table(folder)
    table = table.set_column(table.schema.get_field_index("split"), SCHEMA.field("split"), [splits])
    rule = {"by": by, "test": test, "validation": validation}
    table = table.replace_schema_metadata({"split": json.dumps(rule)})
    write_table(table, folder)
    return table


def write_table(table, folder):
    sources.write_whole(
        Path(folder) / sources.STORE_INDEX, lambda temporary: pq.write_table(table, temporary), "Make it writable"
    )


class Store:
    """The rows of one split of a prepared store, or all of them. Pickled by its name: a copy elsewhere maps it anew."""

    def __init__(self, folder, split=None):
        self.folder, self.split = Path(folder), split
        about = self.folder / sources.STORE_MARK
        with sources.reading(about):
            found = json.loads(about.read_text(encoding="utf-8")).get("format")
            if found != FORMAT:
                raise ValueError(f"its format is {found!r}, and this version reads {FORMAT!r}")
        self._shards, self._clipped_at = {}, None

    def __getstate__(self):
        return {**self.__dict__, "_shards": {}, "_clipped_at": None}

    def index(self):
        """ValueError if a shard has not the size that the rows need."""
        columns = [name for name in SCHEMA.names if name not in ("clipped_at", "order")]
        table = self.rows(columns)
        texts = {name: table[name].to_pylist() for name in ("name", *METADATA, "fault")}
        numbers = {name: table[name].to_numpy() for name in ("n", "t", "shard", "offset", "checksum")}
        clipped = np.array([len(bins) for bins in self._clips()], np.int64)
        self._check_sizes(numbers, np.array([not fault for fault in texts["fault"]], bool))
        return Index(
            id=name_rows(texts.pop("name")),
            **texts,
            n=numbers["n"],
            t=numbers["t"],
            clipped=clipped,
            checksum=numbers["checksum"],
            chunk=numbers["shard"],
            offset=numbers["offset"],
            stored_bins=numbers["t"],
            first_bin=np.zeros_like(numbers["t"]),
        )

    def rows(self, columns=None) -> pa.Table:
        """The index file's lines of this split."""
        table = read_table(self.folder, columns)
        return table if self.split is None else table.filter(pc.equal(table["split"], self.split))

    def block(self, index, row, begin, end):
        """Counts (n, end - begin) of bins [begin, end): a transposed view of what is stored."""
        n, offset, first = int(index.n[row]), int(index.offset[row]), int(index.first_bin[row])
        number = int(index.chunk[row])
        if number not in self._shards:
            path = shard_path(self.folder, number)
            with sources.reading(path):
                self._shards[number] = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        begin, end = offset + (first + begin) * n, offset + (first + end) * n
        return self._shards[number][begin:end].reshape(-1, n).T

    def count_clipped(self, index):
        """Counts that were above 254 in what `index` keeps of each row."""
        if self._clipped_at is None:
            table = self.rows(["split", "shard", "offset"])
            places = zip(table["shard"].to_pylist(), table["offset"].to_pylist(), strict=True)
            self._clipped_at = dict(zip(places, self._clips(), strict=True))
        bins = [self._clipped_at[place] for place in zip(index.chunk.tolist(), index.offset.tolist(), strict=True)]
        kept = zip(bins, index.first_bin.tolist(), (index.first_bin + index.t).tolist(), strict=True)
        return np.array([np.subtract(*np.searchsorted(at, (last, first))) for at, first, last in kept], np.int64)

    @property
    def bin_width_s(self) -> float | None:
        """Of all rows; None where they differ or it is not known."""
        widths = self.rows(["split", "bin_width_s"])["bin_width_s"].unique().to_pylist()
        return widths[0] if len(widths) == 1 else None

    def _clips(self):
        """The bins of clipped counts, an array for each row."""
        column = self.rows(["split", "clipped_at"])["clipped_at"].combine_chunks()
        ends = np.cumsum(column.value_lengths().to_numpy())
        return np.split(column.flatten().to_numpy(), ends)[:-1]

    def _check_sizes(self, numbers, good):
        ends = numbers["offset"] + numbers["n"] * numbers["t"]
        for number in np.unique(numbers["shard"][good]).tolist():
            path, needed = shard_path(self.folder, number), int(ends[good & (numbers["shard"] == number)].max())
            with sources.reading(path):
                size = path.stat().st_size
                if size < needed:
                    raise ValueError(f"it has {size:,} bytes and its rows need {needed:,}; copy the store again, all of it")
