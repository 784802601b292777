"""From the name of a data source to the files that hold it, split by split. Nothing here opens a network connection."""

import hashlib
import json
import logging
import os
import re
import secrets
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".arrow", ".npz")
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
IN_MEMORY_BYTES = 64 * 2**20  # a larger Parquet file is turned into Arrow once, because only Arrow can be mapped
STORE_MARK, STORE_INDEX = "prepared.json", "index.parquet"  # in a folder that prepare.py made
END_BYTES, INNER_BYTES, INNER_BLOCKS = 2**16, 2**12, 16  # of a file, looked at for its key
BATCH_ROWS = 8  # of Parquet at a time: a row of the Pile is 10 MB, and an offset of Arrow's lists has 31 bits

# What .map() and a download that was cut short leave beside the data.
LEFTOVER = re.compile(r"(cache-[0-9a-f]{8,}(_\d+_of_\d+)?|tmp\w{8})\.arrow|.*\.incomplete")

log = logging.getLogger(__name__)


@contextmanager
def reading(file):
    """What a library or the system has to say against a file becomes a ValueError that names it."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, pa.ArrowException, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def find_files(source, split):
    """{split: files} of an embedded recording, a file or folder, or a Hugging Face data set in the local cache; of a prepared
    store the one file that is its index."""
    if source.startswith("embedded:"):
        return _embedded(source)
    with reading(source):
        is_local = Path(source).exists()
    if is_local:
        return _of_store(Path(source)) if is_store(source) else _local(Path(source), split)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(SUFFIXES):
        return _hub_cache(source)
    raise ValueError(
        f"data source {source!r} is neither an existing file or folder, nor a Hugging Face name (org/name), nor "
        f"embedded:a2929, nor ring-hmm:..."
    )


def _embedded(source):
    folder = Path(__file__).parent / source.removeprefix("embedded:")
    names = sorted(path.parent.name for path in Path(__file__).parent.glob("*/train.parquet"))
    if folder.name not in names:
        raise ValueError(f"no embedded recording {source!r}; there is {', '.join('embedded:' + name for name in names)}")
    return {split: [folder / f"{split}.parquet"] for split in ("train", "test")}


def is_store(source):
    """Whether it is a folder that prepare.py made or began."""
    return (Path(source) / STORE_MARK).is_file()


def _of_store(folder):
    index = folder / STORE_INDEX
    if not index.exists():
        raise ValueError(
            f"{folder} is not finished: prepare.py stopped before its last row. The same command as before goes on with it"
        )
    with reading(index):
        splits = pq.read_table(index, columns=["split"], partitioning=None)["split"].unique().to_pylist()
    return {split: [index] for split in splits}


def _local(path, split):
    """A file belongs to the split whose name is a word of its path below the folder (train-00000-of-00004.parquet,
    test/data.arrow), as on the Hugging Face hub; one that names no split is training data."""
    files, skipped = _files_below(path) if path.is_dir() else ([path], [])
    if not files or files[0].suffix not in SUFFIXES:
        beside = "".join(f"; {file} is not read: {reason}" for file, reason in skipped[:3])
        if path.suffix == ".nwb" or (path.is_dir() and any(path.rglob("*.nwb"))):
            beside += f"; of NWB files prepare.py spikes {path} --out FOLDER makes a store, to be named instead"
        raise ValueError(f"{path}: expected {', '.join(SUFFIXES)} files{beside}")
    if len(suffixes := {file.suffix for file in files}) > 1:
        raise ValueError(
            f"{path} mixes {' and '.join(sorted(suffixes))}: if that is the same data twice, name one file or folder"
        )
    splits = {}
    for file in files:
        words = [] if file == path else re.split(r"[^a-z]+", str(file.relative_to(path).with_suffix("")).lower())
        named = next((word for word in words if word in (split, *SPLITS)), "train")
        splits.setdefault(named, []).append(file)
    return splits


def data_files(folder):
    """The files of a folder that are read."""
    return _files_below(Path(folder))[0]


def skipped_files(source):
    """(file, reason) of the files of a folder that would be data by their names, and are not."""
    return _files_below(Path(source))[1] if Path(source).is_dir() and not is_store(source) else []


def _files_below(path):
    """(data files, (file, reason) of what is left out). A folder saved by save_to_disk() says in its state.json which files it
    is made of; .map() leaves others beside them, which hold the same rows again."""

    def refuse(error):  # os.walk would pass over a folder that cannot be listed
        raise error

    files, skipped = [], []
    with reading(path):
        folders = list(os.walk(path, onerror=refuse))
    for folder, _, names in folders:
        folder = Path(folder)
        if STORE_MARK in names:
            raise ValueError(f"{folder} is a prepared store inside {path}; name it itself, or convert both into one")
        candidates = [folder / name for name in names if Path(name).suffix in SUFFIXES]
        saved = _saved_files(folder / "state.json") if "state.json" in names else None
        if saved is None:
            left_out = [file for file in candidates if any(map(LEFTOVER.fullmatch, file.relative_to(path).parts))]
            reason = "by its name a leftover of the package datasets; name the file itself to read it"
        else:
            left_out, reason = sorted(set(candidates) - set(saved)), "not among the files in state.json"
        skipped += [(file, reason) for file in left_out]
        files += sorted(set(candidates) - set(left_out)) if saved is None else saved
    return sorted(files), sorted(skipped)


def _saved_files(state_file):
    """The files that a state.json of save_to_disk() lists; None where it is another program's."""
    with reading(state_file):
        state = json.loads(state_file.read_text())
        if not isinstance(state, dict) or "_data_files" not in state:
            return None
        return [state_file.parent / entry["filename"] for entry in state["_data_files"]]


def _hub_cache(name):
    try:
        from datasets.packaged_modules.cache.cache import Cache
    except ImportError as error:
        raise ValueError(f"reading {name} from the Hugging Face cache needs `pip install datasets`") from error
    try:
        splits = Cache(repo_id=name, dataset_name=name.split("/")[1], hash="auto", version="auto").as_dataset()
    except (ValueError, FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{name} is not in the Hugging Face cache ({error}). Download it once, where there is a network:\n"
            f"  python -c \"from datasets import load_dataset; load_dataset('{name}')\""
        ) from error
    return {split: [Path(file["filename"]) for file in dataset.cache_files] for split, dataset in splits.items()}


def default_cache():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchtitan_bio"


def total_size(files):
    """Bytes."""
    total = 0
    for file in files:
        with reading(file):
            total += file.stat().st_size
    return total


def key_of(files):
    """A name for the files' content that does not depend on where they lie: names, sizes, times of change, and a checksum of
    both ends and sixteen places between.

    A file that differs from one of the same name, size and time elsewhere only keeps its key, and an index that was kept is not
    made anew: its checksums are then the old file's. Looking closer would mean reading it all.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:  # a folder may hold thousands of files, and a network disk likes company
        facts = list(pool.map(_facts, files))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _facts(file):
    with reading(file), file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        size, checksum = status.st_size, 0
        inner = [(size * place // (INNER_BLOCKS + 1), INNER_BYTES) for place in range(1, INNER_BLOCKS + 1)]
        for begin, length in [(0, END_BYTES), *inner, (max(0, size - END_BYTES), END_BYTES)]:
            opened.seek(begin)
            checksum = zlib.crc32(opened.read(length), checksum)
        return file.name, size, status.st_mtime_ns, checksum


def write_whole(path, write, remedy="Set data.index_folder to a folder that can be written"):
    """`write(temporary path)`, then rename: whoever finds `path` finds all of it, also when two processes make it at once.

    A folder that cannot be written is found out before `write` begins its work.
    """
    temporary = path.with_name(f"{path.stem}-{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # not by tempfile, whose files only their owner may read: others share this one
    except OSError as error:
        raise ValueError(f"{path.parent} cannot be written ({error}), and {path.name} is not in it yet. {remedy}") from error
    try:
        write(str(temporary))
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())  # or a power cut could leave the final name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder, remedy="Name another folder"):
    """Make a folder, or find that of its name, in which files can be written; ValueError before there is any work to lose."""
    probe = Path(folder) / f".{secrets.token_hex(8)}.partial"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error}. {remedy}") from error


def record_batches(file, cache_folder):
    """The record batches of a Parquet or Arrow file; Arrow is mapped, not read."""
    if file.suffix == ".arrow":
        return _mapped_batches(file)
    if file.stat().st_size <= IN_MEMORY_BYTES:
        return pq.read_table(file, partitioning=None).to_batches()
    arrow = _as_arrow(file, cache_folder)
    with reading(arrow):
        return _mapped_batches(arrow)


def stream_batches(file):
    """The record batches of a Parquet or Arrow file, one after another, without a copy on disk or in memory."""
    if file.suffix == ".arrow":
        return iter(_mapped_batches(file))
    return pq.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS)


def num_rows(file):
    """As the file says, without reading them."""
    with reading(file):
        if file.suffix == ".npz":
            return 1
        if file.suffix == ".arrow":
            return sum(batch.num_rows for batch in _mapped_batches(file))
        return pq.read_metadata(file).num_rows


def _mapped_batches(file):
    mapped = pa.memory_map(str(file))
    is_stream = mapped.read(6) != b"ARROW1"  # `datasets` writes the stream format, which has no footer
    mapped.seek(0)
    if is_stream:
        return list(pa.ipc.open_stream(mapped))
    reader = pa.ipc.open_file(mapped)
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def _as_arrow(file, cache_folder):
    arrow = Path(cache_folder) / f"{key_of([file])}.arrow"
    if not arrow.exists():
        log.info("turning %s into %s, once", file, arrow)

        def write(temporary):
            parquet = pq.ParquetFile(file)
            with pa.OSFile(temporary, "wb") as out, pa.ipc.new_file(out, parquet.schema_arrow) as writer:
                for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                    writer.write_batch(batch)

        write_whole(arrow, write)
    return arrow
