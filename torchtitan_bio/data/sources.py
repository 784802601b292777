"""From the name of a data source to the files that hold it, split by split. Nothing here opens a network connection."""

import hashlib
import json
import logging
import os
import re
import secrets
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".arrow", ".npz")
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
IN_MEMORY_BYTES = 64 * 2**20  # a larger Parquet file is turned into Arrow once, because only Arrow can be mapped

log = logging.getLogger(__name__)


def find_files(source, split):
    """{split: files} of an embedded recording, a file or folder, or a Hugging Face data set in the local cache."""
    if source.startswith("embedded:"):
        return _embedded(source)
    if Path(source).exists():
        return _local(Path(source), split)
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


def _local(path, split):
    """A file belongs to the split whose name is a word of its path below the folder (train-00000-of-00004.parquet,
    test/data.arrow), as on the Hugging Face hub; one that names no split is training data."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
    if not files or files[0].suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected {', '.join(SUFFIXES)} files")
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


def key_of(files):
    """A name for the files' content that does not depend on where they lie: names, sizes and times of change.

    A file replaced by another of the same size under the same time (by cp -p or rsync -t of a doctored copy) keeps its key, and
    an index that was kept is not made anew: its checksums are then the old file's. Looking closer would mean reading it all.
    """
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def write_whole(path, write):
    """`write(temporary path)`, then rename: whoever finds `path` finds all of it, also when two processes make it at once.

    A folder that cannot be written is found out before `write` begins its work.
    """
    temporary = path.with_name(f"{path.stem}-{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # not by tempfile, whose files only their owner may read: others share this one
    except OSError as error:
        raise ValueError(
            f"{path.parent} cannot be written ({error}), and {path.name} is not in it yet. "
            f"Set data.index_folder to a folder that can be written"
        ) from error
    try:
        write(str(temporary))
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())  # or a power cut could leave the final name on an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def record_batches(file, cache_folder):
    """The record batches of a Parquet or Arrow file; Arrow is mapped, not read."""
    if file.suffix == ".parquet":
        if file.stat().st_size <= IN_MEMORY_BYTES:
            return pq.read_table(file, partitioning=None).to_batches()
        file = _as_arrow(file, cache_folder)
    mapped = pa.memory_map(str(file))
    try:
        reader = pa.ipc.open_file(mapped)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except pa.ArrowInvalid:  # what `datasets` writes is the stream format, which has no footer
        mapped.seek(0)
        return list(pa.ipc.open_stream(mapped))


def _as_arrow(file, cache_folder):
    arrow = Path(cache_folder) / f"{key_of([file])}.arrow"
    if not arrow.exists():
        log.info("turning %s into %s, once", file, arrow)

        def write(temporary):
            parquet = pq.ParquetFile(file)
            with pa.OSFile(temporary, "wb") as out, pa.ipc.new_file(out, parquet.schema_arrow) as writer:
                # A few rows at a time: a row of the Pile is 10 MB, and an offset of Arrow's lists has 31 bits.
                for batch in parquet.iter_batches(batch_size=8):
                    writer.write_batch(batch)

        write_whole(arrow, write)
    return arrow
