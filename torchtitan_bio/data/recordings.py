"""Recordings on disk, read without copying: an index of their shapes, and views of their counts.

Arrow stores a (neurons, bins) recording as one run of integers with two levels of offsets, so a recording that is not ragged is
a plain view of the mapped file. The index is made in one pass over the data, which also finds what no offset can tell (counts
that are negative or too large for a token, and a checksum), and is kept on disk: one process makes it, the others read it.
"""

import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchtitan_bio.data import sources

LARGEST_COUNT = 254  # 255 is the separator
METADATA = ("source_dataset", "subject_id", "session_id", "segment_id")
INDEX_VERSION = 2
CHECKSUM_COUNTS = 2**20  # decoded at a time, so that eight threads over int64 rows hold megabytes and not gigabytes


@dataclass(frozen=True, kw_only=True)
class Index:
    """What is known of each recording without its counts; entry i of every column is recording i."""

    id: list[str]
    source_dataset: list[str]
    subject_id: list[str]
    session_id: list[str]
    segment_id: list[str]
    n: np.ndarray
    """Neurons."""
    t: np.ndarray
    """Bins."""
    clipped: np.ndarray
    """Counts above 254, which are read as 254."""
    checksum: np.ndarray
    """crc32 of the counts as they are read; of the whole row, also where this is a part of it."""
    fault: list[str]
    """Why a row cannot be read; empty for a good one."""
    chunk: np.ndarray
    """Where it is stored: in which run of counts, at which offset, with how many bins a neuron, from which of these bins on."""
    offset: np.ndarray
    stored_bins: np.ndarray
    first_bin: np.ndarray

    def __len__(self):
        return len(self.id)

    def take(self, rows):
        rows = np.asarray(rows, dtype=np.int64)
        chosen = {}
        for field in fields(self):
            column = getattr(self, field.name)
            chosen[field.name] = column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows]
        return Index(**chosen)

    def between(self, begin, end):
        """The rows cut to their bins [begin, end), arrays of one entry a row; rows of which nothing remains are left out."""
        cut = replace(self, first_bin=self.first_bin + begin, t=end - begin)
        return cut.take(np.flatnonzero(cut.t > 0))


class Recordings:
    """The recordings of some Parquet, Arrow or npz files. Pickled by the files' names: a copy elsewhere maps them anew.

    heed: called before each row while an index is made, which can take an hour; what it raises ends that.
    """

    def __init__(self, files, cache_folder=None, heed=lambda: None):
        self.heed = heed
        self.files, self.cache_folder = list(files), Path(cache_folder or sources.default_cache())
        self.keep_index = bool(cache_folder) or sources.total_size(files) > sources.IN_MEMORY_BYTES
        self._counts = None

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "heed"} | {"_counts": None}

    def block(self, index, row, begin, end):
        """Counts (n, end - begin) of bins [begin, end): a view of what is stored, of whatever integer type that has."""
        if self._counts is None:
            self._counts = [chunk.counts for chunk in self._chunks()]
        n, bins, offset = int(index.n[row]), int(index.stored_bins[row]), int(index.offset[row])
        first = int(index.first_bin[row])
        counts = self._counts[index.chunk[row]]
        return counts[offset : offset + n * bins].reshape(n, bins)[:, first + begin : first + end]

    @property
    def index_path(self):
        """Where an index that is kept lies, or will lie once a process has made it."""
        return self.cache_folder / f"index-v{INDEX_VERSION}-{sources.key_of(self.files)}.parquet"

    def index(self):
        """Of every row in the order of the files; read from the cache folder if a process has left it there."""
        if not self.keep_index:
            return self._scan_all()
        path = self.index_path
        if not path.exists():
            sources.write_whole(path, lambda temporary: write_index(self._scan_all(), temporary))
        with sources.reading(path):
            return read_index(path)

    def count_clipped(self, index):
        """Counts above 254 in what `index` keeps of each row. Only rows that hold one anywhere are read."""
        clipped = np.zeros_like(index.clipped)
        for row in np.flatnonzero(index.clipped).tolist():
            clipped[row] = np.count_nonzero(self.block(index, row, 0, int(index.t[row])) > LARGEST_COUNT)
        return clipped

    def _scan_all(self):
        return _concatenate([_scan(number, chunk, self.heed) for number, chunk in enumerate(self._chunks())])

    def _chunks(self):
        for file in self.files:
            with sources.reading(file):
                if file.suffix == ".npz":
                    chunks = [_npz_chunk(file)]
                else:
                    chunks = [_arrow_chunk(batch) for batch in sources.record_batches(file, self.cache_folder)]
            yield from chunks


def read_rows(file):
    """(index, row of it, counts (n, t) as they are stored or None where it has a fault), row by row, holding a few at a time.

    For what goes through everything once: it leaves no index, and of a large Parquet file no Arrow copy.
    """
    with sources.reading(file):
        for chunk in [_npz_chunk(file)] if file.suffix == ".npz" else map(_arrow_chunk, sources.stream_batches(file)):
            index = _scan(0, chunk)
            for row in range(len(index)):
                n, t, offset = int(index.n[row]), int(index.t[row]), int(index.offset[row])
                yield index, row, None if index.fault[row] else chunk.counts[offset : offset + n * t].reshape(n, t)


def decode(counts, clipped):
    """Counts as they are read, uint8 and at most 254: a view of uint8 that hold nothing to clip.

    Wider integers are copied in any case, and are clipped whatever is known of them: no mistake may wrap them modulo 256.
    """
    if counts.dtype.itemsize > 1:
        return np.clip(counts, 0, LARGEST_COUNT, out=np.empty(counts.shape, np.uint8), casting="unsafe")
    return (np.minimum(counts, LARGEST_COUNT) if clipped else counts).astype(np.uint8, copy=False)


def write_index(index, path):
    pq.write_table(pa.table(vars(index)), path)


def read_index(path):
    table = pq.read_table(path)
    texts = {field.name for field in table.schema if pa.types.is_string(field.type)}
    return Index(**{name: table[name].to_pylist() if name in texts else table[name].to_numpy() for name in table.column_names})


@dataclass(frozen=True)
class _Chunk:
    """Rows in one run of counts: row r is neurons rows[r] to rows[r + 1], neuron i is counts neurons[i] to neurons[i + 1]."""

    counts: np.ndarray
    rows: np.ndarray
    neurons: np.ndarray
    missing: np.ndarray
    metadata: dict[str, list[str]]
    fault: str = ""


def _npz_chunk(file):
    with file.open("rb") as opened:
        if not zipfile.is_zipfile(opened):  # np.load would take it for a pickle, and advise to trust it
            raise ValueError("it is not a zip archive, as an npz file is")
        opened.seek(0)
        with np.load(opened, allow_pickle=False) as archive:
            wanted = ("spike_counts", *METADATA) if "spike_counts" in archive else archive.files
            arrays = {name: _npz_array(archive, name) for name in wanted if name in archive}
            present = ", ".join(archive.files) or "nothing"
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    name = "spike_counts" if "spike_counts" in arrays else matrices[0] if len(matrices) == 1 else None
    if name is None:
        raise ValueError(f"expected an array spike_counts (neurons, bins); it holds {present}")
    counts = arrays[name]
    metadata = {key: [str(arrays[key])] for key in METADATA if key in arrays and not arrays[key].ndim}
    metadata["identifier"] = [file.stem]
    none = np.zeros(1, bool)
    if counts.ndim != 2 or counts.dtype.kind not in "iu":
        fault = (
            f"not a matrix of integers: {name} is {counts.dtype} {counts.shape}, expected (neurons, bins){_cast(name, counts)}"
        )
        return _Chunk(np.empty(0, np.uint8), np.zeros(2, int), np.zeros(1, int), none, metadata, fault)
    n, t = counts.shape
    return _Chunk(np.ascontiguousarray(counts).reshape(-1), np.array([0, n]), np.arange(n + 1) * t, none, metadata)


def _npz_array(archive, name):
    try:
        return np.asarray(archive[name])
    except ValueError as error:  # not in NumPy's words, which advise to trust a pickle
        raise ValueError(f"its array {name} is damaged, or holds Python objects and not plain numbers") from error


def _cast(name, counts):
    """What makes integers of counts that are stored as another type, if they are whole numbers."""
    if (
        counts.dtype.kind not in "fb"
        or not counts.size
        or not ((counts >= 0) & (counts < 2**16) & (counts == np.floor(counts))).all()
    ):
        return ""
    return f". They are whole numbers: save {name}.astype(np.{np.min_scalar_type(int(counts.max()))})"


def _arrow_chunk(batch):
    if "spike_counts" not in batch.schema.names:
        raise ValueError(f"it has no column spike_counts; its columns are {', '.join(batch.schema.names)}")
    metadata = {
        name: ["" if value is None else str(value) for value in batch.column(name).to_pylist()]
        for name in (*METADATA, "identifier")
        if name in batch.schema.names
    }
    outer = batch.column("spike_counts")
    if isinstance(outer, pa.ExtensionArray):
        outer = outer.storage
    inner = outer.values if _is_list(outer) else None
    if inner is None or not _is_list(inner) or not pa.types.is_integer(inner.type.value_type):
        shape = "1-D" if inner is not None and not _is_list(inner) else "not a matrix of integers"
        fault = f"{shape}: spike_counts is {outer.type}, expected list<list<uint8>>"
        nothing = np.zeros(len(outer) + 1, int)
        return _Chunk(np.empty(0, np.uint8), nothing, np.zeros(1, int), nothing[1:].astype(bool), metadata, fault)
    rows, neurons, flat = outer.offsets.to_numpy(), inner.offsets.to_numpy(), inner.values
    missing = np.asarray(outer.is_null()) | _any_null(inner, rows) | _any_null(flat, neurons[rows])
    if flat.null_count:
        flat = flat.fill_null(0)
    return _Chunk(flat.to_numpy(zero_copy_only=True), rows, neurons, missing, metadata)


def _is_list(array):
    return isinstance(array, (pa.ListArray, pa.LargeListArray))


def _any_null(values, offsets):
    """Whether each stretch [offsets[i], offsets[i + 1]) of the values holds a null."""
    if not values.null_count:
        return np.zeros(len(offsets) - 1, bool)
    nulls_before = np.concatenate([[0], np.cumsum(np.asarray(values.is_null()))])
    return nulls_before[offsets[1:]] > nulls_before[offsets[:-1]]


def _scan(number, chunk, heed=lambda: None):
    """The index of one chunk."""
    n = np.diff(chunk.rows).astype(np.int64)
    bins = np.diff(chunk.neurons[: chunk.rows[-1] + 1]).astype(np.int64)
    shortest, longest, some = np.zeros_like(n), np.zeros_like(n), n > 0
    if some.any():
        shortest[some] = np.minimum.reduceat(bins, chunk.rows[:-1][some])
        longest[some] = np.maximum.reduceat(bins, chunk.rows[:-1][some])
    offset = chunk.neurons[chunk.rows[:-1]].astype(np.int64)

    def look(row):
        heed()
        if chunk.fault:
            return 0, 0, chunk.fault
        if chunk.missing[row]:
            return 0, 0, "missing: a null where counts should be"
        if shortest[row] != longest[row]:
            return 0, 0, f"ragged: its neurons have from {shortest[row]} to {longest[row]} bins"
        if not longest[row]:
            return 0, 0, f"empty: {n[row]} neurons x {longest[row]} bins"
        counts = chunk.counts[offset[row] : offset[row] + n[row] * longest[row]]
        if counts.dtype.kind == "i" and (least := counts.min()) < 0:
            return 0, 0, f"negative: a count of {least}"
        # Finding the largest takes a tenth of the time of comparing each, and nearly no row holds one that is too large.
        clipped = int(np.count_nonzero(counts > LARGEST_COUNT)) if counts.max() > LARGEST_COUNT else 0
        return clipped, checksum_counts(counts, clipped), ""

    with ThreadPoolExecutor(max_workers=8) as pool:  # NumPy lets go of the interpreter, and a network disk likes company
        clipped, checksum, fault = zip(*pool.map(look, range(len(n))), strict=True) if len(n) else ((), (), ())
    texts = {name: chunk.metadata.get(name) or [""] * len(n) for name in (*METADATA, "identifier")}
    names = zip(texts.pop("identifier"), *texts.values(), strict=True)
    return Index(
        id=[identifier or "/".join(part for part in parts if part) for identifier, *parts in names],
        **texts,
        n=n,
        t=longest,
        clipped=np.array(clipped, np.int64),
        checksum=np.array(checksum, np.int64),
        fault=list(fault),
        chunk=np.full(len(n), number),
        offset=offset,
        stored_bins=longest,
        first_bin=np.zeros_like(n),
    )


def checksum_counts(counts, clipped):
    """crc32 of a flat run of counts as they are read."""
    checksum = 0
    for at in range(0, len(counts), CHECKSUM_COUNTS):
        checksum = zlib.crc32(decode(counts[at : at + CHECKSUM_COUNTS], clipped), checksum)
    return checksum


def _concatenate(parts):
    """One index of many."""
    columns = {}
    for field in fields(Index):
        pieces = [getattr(part, field.name) for part in parts]
        numeric = bool(pieces) and isinstance(pieces[0], np.ndarray)
        columns[field.name] = np.concatenate(pieces) if numeric else [text for piece in pieces for text in piece]
    return Index(**columns | {"id": name_rows(columns["id"])})


def name_rows(names):
    return [name or f"row {row}" for row, name in enumerate(names)]
