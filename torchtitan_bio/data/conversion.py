"""From recordings of any kind to a prepared store (data/store.py). A conversion that is killed goes on where it was.

On its way a store has a journal, rows.jsonl: a line for each row whose bytes are in a shard, and for each file that is done.
Going on means to keep the lines whose bytes hash to what they say, to cut off what comes after, and to read on from there; so a
store has the same bytes whether or not its conversion was interrupted.
"""

import fcntl
import hashlib
import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from torchtitan_bio.data import rows, sources, store
from torchtitan_bio.data.recordings import LARGEST_COUNT, METADATA, checksum_counts, decode

JOURNAL = "rows.jsonl"
BLOCK_COUNTS = 2**18  # transposed and written at a time
READ_BYTES = 2**20
SHARDS = "shard-*.u8"
ORDERS = ("given", "original", "rate")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What, beside the files, decides how a store comes out."""

    bin_width_s: float | None = None
    interval: str = ""
    source_dataset: str = ""
    order: str = "given"
    """Of neurons: given, original (as before any reordering), rate (most active first), or a file with a permutation."""
    shard_bytes: int = 2**30


def convert(files: list[rows.File], folder, settings: Settings, *, made_by="", tell=lambda row: None) -> dict:
    """Make `folder` the store of all rows of the files, or go on with the one that was begun there. What provenance.json says.

    `tell` is called with each row as it is written, and at first with those that an earlier start has written. A folder that
    holds anything else, or the store of other files or settings, is refused untouched.
    """
    folder = Path(folder)
    choose = _Orders(settings.order)
    with _writing(folder), _holding(folder, _describe(files, settings)):
        if (folder / sources.STORE_INDEX).exists():
            (folder / JOURNAL).unlink(missing_ok=True)
            return json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        with _Begun(folder, settings.shard_bytes) as begun:
            for entry in begun.rows:
                tell(entry)
                choose.remember(entry)
            for number in range(len(begun.files), len(files)):
                _convert_file(files[number], number, begun, settings, choose, tell)
            return begun.finish({"format": store.FORMAT, "made_by": made_by, **_provenance(files, begun, settings)})


def _convert_file(file, number, begun, settings, choose, tell):
    read, notes = rows.read(
        file, bin_width_s=settings.bin_width_s, interval=settings.interval, source_dataset=settings.source_dataset
    )
    written = sum(entry["file"] == number for entry in begun.rows)
    for place, row in enumerate(read):
        if place >= written:
            tell(begun.add(row, number, choose(row)))
    with sources.reading(file.bytes_file), file.bytes_file.open("rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(READ_BYTES):
            digest.update(block)
    begun.end_file(sha256=digest.hexdigest(), num_bytes=file.bytes_file.stat().st_size, notes=notes)


def _provenance(files, begun, settings):
    """Where the rows come from, for anyone to read: no path of this machine."""
    listed = []
    for number, (file, done) in enumerate(zip(files, begun.files, strict=True)):
        mine = [entry for entry in begun.rows if entry["file"] == number]
        listed.append(
            {
                "source": file.source,
                "file": file.name,
                "split": file.split,
                "bytes": done["num_bytes"],
                "sha256": done["sha256"],
                "rows": len(mine),
                "clipped": sum(len(entry["clipped_at"]) for entry in mine),
                "malformed": [[entry["name"], entry["fault"]] for entry in mine if entry["fault"]],
                "notes": done["notes"],
            }
        )
    widths = sorted({entry["bin_width_s"] for entry in begun.rows if entry["bin_width_s"] is not None})
    return {
        "rows": len(begun.rows),
        "counts": sum(entry["n"] * entry["t"] for entry in begun.rows if not entry["fault"]),
        "clipped_to": LARGEST_COUNT,
        "clipped": sum(of_file["clipped"] for of_file in listed),
        "bin_width_s": widths[0] if len(widths) == 1 else widths or None,
        "interval": settings.interval or None,
        "order": _shown_order(settings.order),
        "files": listed,
    }


class _Begun:
    """A store on its way. `rows` and `files` are the journal's lines, in order."""

    def __init__(self, folder, shard_bytes):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.rows, self.files, self.shard, self.end = [], [], 0, 0
        kept = self._recover()
        self.journal = _cut(folder / JOURNAL, kept)
        self.out = _cut(store.shard_path(folder, self.shard), self.end)
        for path in folder.glob(SHARDS):
            if path.name > store.shard_path(folder, self.shard).name:
                path.unlink()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.journal.close()
        self.out.close()

    def add(self, row, file_number, order):
        """Write a row, its neurons taken in this order where it is not None. The journal's line."""
        entry = {name: getattr(row, name) for name in ("name", *METADATA, "split", "n", "t", "fault")}
        entry |= {"file": file_number, "shard": self.shard, "offset": -1, "sha256": "", "checksum": row.checksum}
        entry |= {"clipped_at": row.clipped_at, "origin_s": row.origin_s, "bin_width_s": row.bin_width_s}
        final = row.order if order is None else order if row.order is None else row.order[order]
        is_original = final is None or (final == np.arange(row.n)).all()
        entry["order"] = None if is_original else final
        if not row.fault:
            size = row.n * row.t
            if self.end and self.end + size > self.shard_bytes:
                self._next_shard()
            entry |= {"shard": self.shard, "offset": self.end}
            counts = row.counts if order is None else row.counts[order]
            if order is not None:
                entry["checksum"] = checksum_counts(np.ascontiguousarray(counts).reshape(-1), len(row.clipped_at))
            entry["sha256"] = self._write(counts, len(row.clipped_at))
            self.end += size
            self.out.flush()
        self._note(entry)
        self.rows.append(entry)
        return entry

    def end_file(self, **facts):
        self._note(facts)
        self.files.append(facts)

    def finish(self, provenance):
        if not self.rows:
            raise ValueError("the files hold no row")
        self._close_shard()
        text = json.dumps(provenance, indent=1) + "\n"
        sources.write_whole(self.folder / "provenance.json", lambda path: Path(path).write_text(text, encoding="utf-8"))
        columns = {name: [entry[name] for entry in self.rows] for name in store.SCHEMA.names}
        store.write_table(pa.table(columns, store.SCHEMA), self.folder)
        (self.folder / JOURNAL).unlink()
        return provenance

    def _write(self, counts, clipped):
        """The row's bytes, bins one after another; their hash."""
        digest, (n, t) = hashlib.sha256(), counts.shape
        step = max(1, BLOCK_COUNTS // n)
        for begin in range(0, t, step):
            block = decode(counts[:, begin : begin + step], clipped)
            # Two contiguous copies are faster than one that jumps from neuron to neuron.
            block = np.ascontiguousarray((block if block.flags.f_contiguous else np.ascontiguousarray(block)).T)
            digest.update(block)
            self.out.write(block)
        return digest.hexdigest()

    def _note(self, entry):
        self.journal.write(json.dumps(entry, default=np.ndarray.tolist).encode() + b"\n")
        self.journal.flush()

    def _next_shard(self):
        self._close_shard()
        self.shard, self.end = self.shard + 1, 0
        self.out = _cut(store.shard_path(self.folder, self.shard), 0)

    def _close_shard(self):
        self.out.flush()
        os.fsync(self.out.fileno())
        self.out.close()

    def _recover(self):
        """Take over the journal's lines that are whole; how many bytes they are. A kill cuts the last line short, and a power
        cut may leave lines without the bytes that they speak of."""
        path, kept = self.folder / JOURNAL, 0
        if not path.exists():
            return 0
        with path.open("rb") as lines:
            for line in lines:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if entry is None or not self._take(entry):
                    break
                kept += len(line)
        return kept

    def _take(self, entry):
        """Count a line of the journal as done, if its bytes are there."""
        if "offset" not in entry:
            self.files.append(entry)
            return True
        if not entry["fault"]:
            end = entry["offset"] + entry["n"] * entry["t"]
            if _hash_of(store.shard_path(self.folder, entry["shard"]), entry["offset"], end) != entry["sha256"]:
                return False
            self.shard, self.end = entry["shard"], end
        entry["clipped_at"] = np.array(entry["clipped_at"], np.int64)
        entry["order"] = entry["order"] and np.array(entry["order"])
        self.rows.append(entry)
        return True


def _cut(path, size):
    """The file, made if need be, open for writing after its first `size` bytes, with nothing beyond."""
    opened = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=2**20)
    opened.truncate(size)
    opened.seek(size)
    return opened


def _hash_of(path, begin, end):
    """sha256 of bytes [begin, end) of a file, as far as it goes."""
    digest = hashlib.sha256()
    if path.exists():
        with path.open("rb") as opened:
            opened.seek(begin)
            while begin < end and (block := opened.read(min(READ_BYTES, end - begin))):
                digest.update(block)
                begin += len(block)
    return digest.hexdigest()


# ---- whose folder it is ----


def _describe(files, settings):
    """What makes two conversions the same."""
    asked = asdict(settings) | {"order": _shown_order(settings.order)}
    listed = [[file.source, file.split, file.name, sources.key_of([file.bytes_file])] for file in files]
    return {"format": store.FORMAT, **asked, "files": listed}


@contextmanager
def _holding(folder, description):
    """Alone in the folder, which is or becomes that of the store described."""
    mark = folder / sources.STORE_MARK
    if not mark.exists():
        if folder.exists() and (others := [path.name for path in folder.iterdir() if path.suffix != ".partial"]):
            raise ValueError(f"{folder} holds something else, {sorted(others)[0]} for instance; name a new folder")
        text = json.dumps(description, indent=1) + "\n"
        sources.write_whole(mark, lambda path: Path(path).write_text(text, encoding="utf-8"), "Name another folder")
    with mark.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is making {folder}; wait for it, or stop it and give the command again"
            ) from None
        _compare(folder, json.loads(opened.read()), description)
        yield


def _compare(folder, found, description):
    differing = [key for key in description if found.get(key) != description[key]]
    if differing:
        sides = [
            f"{key} was {_brief(found.get(key))} and is now {_brief(description[key])}" for key in differing if key != "files"
        ]
        if "files" in differing:
            old, new = ({tuple(file) for file in side["files"]} for side in (found, description))
            examples = [
                f"{file[2]} {which}" for which, some in (("is gone", old - new), ("is new", new - old)) for file in some
            ]
            sides.append(f"its files differ: {'; '.join(sorted(examples)[:4]) or 'their order'}")
        raise ValueError(f"{folder} is a store of something else: {'; '.join(sides)}. Name a new folder for this")


def _brief(value):
    return "nothing" if value in (None, "") else str(value)


@contextmanager
def _writing(folder):
    """What the system has to say against a folder becomes a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written: {error}. What is whole of it stays: once there is room, the same command goes on"
        ) from error


# ---- the order of neurons ----


class _Orders:
    """Which neuron of a row goes where. By rate, the first row of a session decides for all: a neuron keeps its place."""

    def __init__(self, wanted):
        self.wanted, self.of_session = wanted, {}
        self.listed = None if wanted in ORDERS else _read_order(wanted)

    def __call__(self, row):
        """The order in which the row's neurons are to be taken; None: as they are."""
        if row.fault or self.wanted == "given":
            return None
        present = np.arange(row.n) if row.order is None else row.order
        order = np.argsort(present)[self._original_numbers(row, present)]
        return None if (order == np.arange(row.n)).all() else order

    def remember(self, entry):
        """A row that an earlier start has written."""
        if not entry["fault"] and (key := self._session(entry)):
            self.of_session.setdefault(key, np.arange(entry["n"]) if entry["order"] is None else entry["order"])

    def _original_numbers(self, row, present):
        """Of the neurons in the wanted order."""
        if self.wanted == "original":
            return np.arange(row.n)
        if self.listed is not None:
            if len(self.listed) != row.n:
                raise ValueError(f"{row.name or 'a row'} has {row.n} neurons, and {self.wanted} orders {len(self.listed)}")
            return self.listed
        by_rate = present[np.argsort(-row.counts.sum(1, dtype=np.int64), kind="stable")]
        key = self._session(vars(row))
        return self.of_session.setdefault(key, by_rate) if key else by_rate

    def _session(self, row):
        """What the rows of one session have in common, as selection.number_sessions has it; None for a row that names none."""
        key = row["source_dataset"], row["subject_id"], row["session_id"], row["n"]
        return key if key[1] or key[2] else None


def _read_order(path):
    with sources.reading(path):
        try:
            words = re.split(r"[\s,]+", Path(path).read_text(encoding="utf-8").strip())
        except UnicodeDecodeError as error:
            raise ValueError(
                "it is not a text file; save the order as text, such as numpy.savetxt with fmt='%d' does"
            ) from error
        if sorted(words) != sorted(map(str, range(len(words)))):
            raise ValueError(
                f"expected the whole numbers 0 to {len(words) - 1} in any order, separated by spaces, commas or lines"
            )
    return np.array(words, np.int64)


def _shown_order(wanted):
    """An order as it can be compared and shown."""
    if wanted in ORDERS:
        return wanted
    return f"{Path(wanted).name}, sha256 {hashlib.sha256(_read_order(wanted)).hexdigest()[:16]}"
