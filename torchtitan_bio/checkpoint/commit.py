"""How a step folder comes to be: written aside, hashed, checked, and only then given its name by one rename.

At every instant the name `step-00000500` stands for nothing or for a whole checkpoint, and a verified older one lies beside it.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from torchtitan_bio.checkpoint import dcp
from torchtitan_bio.checkpoint.peers import CheckpointError, Peers
from torchtitan_bio.checkpoint.tensors import enumerate_names, layout

STEP = re.compile(r"step-(\d{8})")
PARTIAL = re.compile(r"step-\d{8}\.partial-[0-9a-f]{8}")
TRASH = re.compile(r"step-\d{8}\.trash-[0-9a-f]{8}")
INVALID = re.compile(r"step-\d{8}\.invalid-\d+")
HASHING_THREADS = 4


def step_name(step: int) -> str:
    if not 0 <= step < 10**8:
        raise ValueError(f"step {step} has no folder name; steps are numbered from 0 to 99999999")
    return f"step-{step:08d}"


def names_like(folder: Path, pattern: re.Pattern) -> list[str]:
    """Folders of exactly this pattern, highest step first."""
    if not folder.is_dir():
        return []
    return sorted((entry.name for entry in folder.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir()), reverse=True)


def stage(folder: Path, step: int, peers: Peers) -> Path:
    """An empty folder to write a step in, its name chosen by rank 0."""
    return stage_as(folder / step_name(step), peers)


def stage_as(target: Path, peers: Peers) -> Path:
    """An empty folder beside the target, to write in."""

    def make() -> str:
        staging = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
        staging.mkdir(parents=True)
        return staging.name

    return target.with_name(peers.first(f"making a folder in {target.parent}", make))


def write(
    staging: Path,
    tensors: dict[str, torch.Tensor],
    documents: dict[str, dict],
    peers: Peers,
    *,
    step: int | None = None,
    read: Callable[[str], torch.Tensor] | None = None,
) -> Path:
    """Fill the staging folder and commit it; the committed path. On failure all ranks raise and the staging folder is removed.

    documents: JSON files to lie beside the tensors. step: where the folder's name does not tell. read: see dcp.write. Safe in a
    second thread: it speaks only on the peers' own group.
    """
    target = staging.with_name(staging.name.rpartition(".partial-")[0])
    step = int(STEP.fullmatch(target.name)[1]) if step is None else step
    planned = layout(tensors)

    def write_documents():
        for name, content in documents.items():
            write_json(staging / name, content)

    try:
        peers.first("writing", write_documents)
        peers.each("writing", lambda: dcp.write(staging, tensors, peers, read))
        shares = peers.exchange(peers.each("hashing", lambda: fingerprint_own_files(staging, documents, peers.rank)))
        files = {name: entry for share in shares for name, entry in share.items()}
        peers.first("the commit", lambda: commit(staging, target, step, planned, files))
    except (CheckpointError, ValueError) as error:  # not the failure of a collective: others may be writing still
        free = peers.first("discarding", lambda: discard(staging))
        raise CheckpointError(f"{target} was not saved: {error} (writing {staging}, {free} bytes free)") from error
    return target


def discard(staging: Path) -> int:
    """Remove what was written in vain (the rest of it is a leftover, no second error); how many bytes were free before."""
    there = next(path for path in staging.parents if path.exists())
    free = shutil.disk_usage(there).free
    shutil.rmtree(staging, ignore_errors=True)
    return free


def fingerprint_own_files(staging: Path, documents: dict, rank: int) -> dict[str, dict]:
    """Size and sha256 of what this rank wrote, flushed to disk: torch leaves the end of `.metadata` in a buffer."""
    own = [path for path in staging.iterdir() if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        own += [staging / name for name in (".metadata", *documents)]
    for path in own:
        flush(path)
    return fingerprint(own)


def fingerprint(paths: list[Path]) -> dict[str, dict]:
    """{file name: {"bytes", "sha256"}}. Hashing leaves Python's lock alone, so threads help (about 1 GB/s a core)."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = list(pool.map(sha256, paths))
    return {path.name: {"bytes": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests, strict=True)}


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def commit(staging: Path, target: Path, step: int, planned: dict[str, dict], files: dict[str, dict]):
    """Rank 0's part: everything planned is there, the manifest says so, the folder gets its name."""
    check_sizes(staging, files)
    index = dcp.read_metadata(staging)
    stored = dcp.stored_tensors(index)
    broken = [name for name in planned if stored.get(name) != planned[name]]
    broken += dcp.uncovered(index, planned, {name: entry["bytes"] for name, entry in files.items()})
    if broken:
        raise CheckpointError(f"{enumerate_names(broken)} did not reach the files in full")
    body = {"format": 1, "step": step, "torch": torch.__version__, "files": files, "tensors": planned}
    write_json(staging / "manifest.json.new", body | {"sha256": seal(body)})
    os.rename(staging / "manifest.json.new", staging / "manifest.json")
    flush(staging)
    os.rename(staging, target)
    flush(target.parent)


def check_sizes(folder: Path, files: dict[str, dict]):
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; do all ranks see the same {folder.parent}?")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; {entry['bytes']} were written")


def seal(body: dict) -> str:
    """A manifest's own sha256, so that a flipped bit in it is seen like one in a shard."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder whose files have the sizes it names; ValueError says what does not fit."""
    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
        body = {key: value for key, value in content.items() if key != "sha256"}
        intact = content["sha256"] == seal(body) and body["format"] == 1 and folder.is_dir()
        files = body["files"]
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not intact:
        raise ValueError(f"{path} is damaged: it does not agree with its own sha256")
    check_sizes(folder, files)
    return body


def inspect(folder: Path) -> dict:
    """All checks but the hashes of the files; the manifest."""
    manifest = read_manifest(folder)
    index = dcp.read_metadata(folder)
    stored = dcp.stored_tensors(index)
    if stored != manifest["tensors"]:
        different = sorted(
            name for name in stored.keys() | manifest["tensors"] if stored.get(name) != manifest["tensors"].get(name)
        )
        raise ValueError(f"{folder}: .metadata and manifest.json disagree about {enumerate_names(different)}")
    for name in manifest["files"]:
        if name.endswith(".json"):
            read_json(folder / name)
    return manifest


def check_hashes(folder: Path, files: dict[str, dict]):
    found = fingerprint([folder / name for name in files])
    for name, entry in files.items():
        if found[name] != entry:
            raise ValueError(f"{folder / name} has changed since it was written: its sha256 is not the manifest's")


def verify(folder: Path) -> list[str]:
    """What is wrong with a committed step folder, every byte of it read; empty where nothing is."""
    try:
        check_hashes(Path(folder), inspect(Path(folder))["files"])
    except ValueError as error:
        return [str(error)]
    return []


def retire(folder: Path, keep: int, committed: Path, say: Callable[[str], None]):
    """Delete all but the newest `keep` checkpoints, after one has been committed. Rank 0 only.

    What does not verify (manifest and sizes) neither counts nor goes, nor does a folder into which someone has put files.
    """
    for name in names_like(folder, TRASH):
        shutil.rmtree(folder / name)
    sound = []
    for name in names_like(folder, STEP):
        try:
            sound.append((name, read_manifest(folder / name)["files"]))
        except ValueError as error:
            say(f"checkpoint: neither counted nor deleted: {error}")
    for name, files in sound[keep:]:
        path = folder / name
        foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in files and entry.name != "manifest.json")
        if foreign:
            say(f"checkpoint: {path} is kept because it holds {enumerate_names(foreign)}")
        elif path != committed and not path.is_symlink():
            trash = folder / f"{name}.trash-{secrets.token_hex(4)}"
            os.rename(path, trash)
            shutil.rmtree(trash)


def set_aside(path: Path) -> Path:
    """Rename what is no checkpoint, so that its step can be saved again and a person can look at it."""
    number = next(n for n in range(1, 10**6) if not path.with_name(f"{path.name}.invalid-{n}").exists())
    aside = path.with_name(f"{path.name}.invalid-{number}")
    os.rename(path, aside)
    return aside


def write_json(path: Path, content: dict):
    with path.open("w") as stream:
        json.dump(content, stream, indent=1, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def flush(path: Path):
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
