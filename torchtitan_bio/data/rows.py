"""Rows of any source one at a time, each with its counts: for what goes through everything once, such as prepare.py."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from torchtitan_bio.data import nwb, recordings, ring_hmm, sources, store, summary

DEFAULT_BIN_WIDTH_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    source_dataset: str
    subject_id: str
    session_id: str
    segment_id: str
    split: str
    n: int
    t: int
    fault: str
    """Why it cannot be read; empty for a good one."""
    counts: np.ndarray | None
    """(n, t), of whatever integer type it is stored in; None where there is a fault."""
    checksum: int
    """As recordings.Index has it."""
    clipped_at: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The bins of counts that are read as 254 because they are above, ascending, an entry for each."""
    origin_s: float | None = None
    bin_width_s: float | None = None
    order: np.ndarray | None = None
    """Neuron i is neuron order[i] of the original; None: they are as they were."""


@dataclass(frozen=True)
class File:
    """A part of a source that is read on its own: a file, a prepared store, or a generator. `source` may be shown to anyone."""

    source: str
    split: str
    path: Path | ring_hmm.RingHMM | store.Store

    @property
    def name(self) -> str:
        """What it is called, without its place."""
        if isinstance(self.path, ring_hmm.RingHMM):
            return str(self.path)
        return self.path.folder.resolve().name if isinstance(self.path, store.Store) else self.path.name

    @property
    def is_nwb(self) -> bool:
        return isinstance(self.path, Path) and self.path.suffix == ".nwb"

    @property
    def bytes_file(self) -> Path | None:
        """The file whose bytes vouch for the rows; of a store its index, which has a hash of each."""
        if isinstance(self.path, ring_hmm.RingHMM):
            return None
        return self.path.folder / sources.STORE_INDEX if isinstance(self.path, store.Store) else self.path


def find(source: str) -> list[File]:
    """What is to be read of whatever training reads, or of NWB files, in order, train before test."""
    shown = summary.public_name(source)
    if source.startswith("ring-hmm"):
        return [File(source, split, ring_hmm.parse(source, split)) for split in ring_hmm.SPLITS]
    with sources.reading(source):
        of_nwb = sorted(Path(source).rglob("*.nwb")) if Path(source).is_dir() else [Path(source)]
    if of_nwb and source.endswith(".nwb") and not of_nwb[0].exists():
        raise ValueError(f"{source} does not exist")
    if of_nwb and of_nwb[0].suffix == ".nwb":
        if Path(source).is_dir() and (others := sources.data_files(source)):
            raise ValueError(f"{source} mixes .nwb and {others[0].suffix}: name one file or folder at a time")
        return [File(shown, "train", path) for path in of_nwb]
    splits = sources.find_files(source, "train")
    if sources.is_store(source):
        return [File(shown, "", store.Store(source))]
    return [File(shown, split, path) for split in sorted(splits, reverse=True) for path in splits[split]]


def count(file: File, interval: str = "") -> int:
    """How many rows `read` will find at most, without reading them."""
    if isinstance(file.path, ring_hmm.RingHMM):
        return file.path.rows if file.split == "train" else file.path.test_rows
    if isinstance(file.path, store.Store):
        return file.path.rows(["split"]).num_rows
    if file.is_nwb:
        return nwb.count_recordings(file.path, interval)
    return sources.num_rows(file.path)


def read(file: File, *, bin_width_s: float | None = None, interval: str = "", source_dataset: str = ""):
    """(an iterator of the rows of a file, notes on what in it was not as it should be).

    bin_width_s: of spike times; of counts what is known of them, which a store may know already.
    source_dataset: of rows whose file names none.
    """
    if isinstance(file.path, store.Store):
        return _of_store(file.path, bin_width_s), []
    if isinstance(file.path, ring_hmm.RingHMM):
        return _of_generator(file), []
    if file.is_nwb:
        width = bin_width_s or DEFAULT_BIN_WIDTH_S
        session = nwb.read_session(file.path, bin_width_s=width, interval=interval)
        return _of_session(session, file, width, source_dataset), session.notes
    return _of_file(file, bin_width_s, source_dataset), []


def _of_file(file, bin_width_s, source_dataset):
    bin_width_s = bin_width_s or summary.provenance(file.source).get("bin_width_s")
    for index, row, counts in recordings.read_rows(file.path):
        named = {key: getattr(index, key)[row] for key in recordings.METADATA}
        yield Row(
            name=index.id[row],
            **named | {"source_dataset": named["source_dataset"] or source_dataset},
            split=file.split,
            n=int(index.n[row]),
            t=int(index.t[row]),
            fault=index.fault[row],
            counts=counts,
            checksum=int(index.checksum[row]),
            clipped_at=_clipped_at(counts, index.clipped[row]),
            bin_width_s=bin_width_s,
        )


def _of_session(session, file, bin_width_s, source_dataset):
    for segment, origin_s, bins in session.stretches:
        counts = nwb.count_spikes(session.times, origin_s, bins, bin_width_s)
        clipped_at = _clipped_at(counts, counts.max() > recordings.LARGEST_COUNT)
        named = (source_dataset, session.subject_id, session.session_id, segment)
        yield Row(
            name="/".join(part for part in named if part),
            **dict(zip(recordings.METADATA, named, strict=True)),
            split=file.split,
            n=len(counts),
            t=bins,
            fault="",
            counts=counts,
            checksum=recordings.checksum_counts(counts.reshape(-1), len(clipped_at)),
            clipped_at=clipped_at,
            origin_s=origin_s,
            bin_width_s=bin_width_s,
        )


def _of_store(prepared, bin_width_s):
    index, table = prepared.index(), prepared.rows()
    for row, entry in enumerate(line for batch in table.to_batches(max_chunksize=100) for line in batch.to_pylist()):
        counts, fault = None, entry["fault"]
        if not fault:
            counts = prepared.block(index, row, 0, entry["t"])
            if hashlib.sha256(counts.T).hexdigest() != entry["sha256"]:
                counts, fault = None, "damaged: its bytes are not those that were written"
        yield Row(
            **{name: entry[name] for name in ("name", *recordings.METADATA, "split", "n", "t")},
            **{name: entry[name] for name in ("checksum", "origin_s")},
            bin_width_s=entry["bin_width_s"] or bin_width_s,
            fault=fault,
            counts=counts,
            clipped_at=np.array(entry["clipped_at"], np.int64),
            order=None if entry["order"] is None else np.array(entry["order"]),
        )


def _of_generator(file):
    index = file.path.index()
    for row in range(len(index)):
        counts = file.path.block(index, row, 0, int(index.t[row]))
        yield Row(
            name=index.id[row],
            **{key: getattr(index, key)[row] for key in recordings.METADATA},
            split=file.split,
            n=int(index.n[row]),
            t=int(index.t[row]),
            fault="",
            counts=counts,
            checksum=recordings.checksum_counts(np.ascontiguousarray(counts).reshape(-1), 0),
        )


def _clipped_at(counts, clipped):
    """The bins of the counts above 254, of which there are `clipped`."""
    return np.sort(np.nonzero(counts > recordings.LARGEST_COUNT)[1]) if clipped else np.zeros(0, np.int64)
