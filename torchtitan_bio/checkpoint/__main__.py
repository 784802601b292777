"""Look at checkpoints, ours or another trainer's, without a model and without trusting them.

python -m torchtitan_bio.checkpoint inspect DIR [--hash]
python -m torchtitan_bio.checkpoint diff A B [--values]

inspect reads metadata only, unless --hash asks for every byte. Exit status of inspect: 0 sound, 1 damaged; of diff: 0 the same,
1 different; of both: 2 no checkpoint.
"""

import math
import sys
from pathlib import Path

import torch

from torchtitan_bio import command_line, distributed
from torchtitan_bio.checkpoint import commit, dcp
from torchtitan_bio.checkpoint.load import differences, words
from torchtitan_bio.checkpoint.peers import CheckpointError
from torchtitan_bio.checkpoint.tensors import enumerate_names
from torchtitan_bio.checkpoint.weights import TRAINING_STATE, check_is_step, left_aside, open_weights


def main(arguments: list[str]) -> int:
    parser = command_line.Parser(prog="python -m torchtitan_bio.checkpoint", description="Look at checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="tensors, bytes, step, config, and whether it verifies")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--hash", action="store_true", help="read every byte and compare it with the manifest's sha256")
    diff = commands.add_parser("diff", help="in what two checkpoints differ")
    diff.add_argument("folders", type=Path, nargs=2, metavar="FOLDER")
    diff.add_argument("--values", action="store_true", help="read the model's tensors too")
    asked = parser.parse_args(arguments)
    try:
        return show(asked.folder, asked.hash) if asked.command == "inspect" else compare(*asked.folders, asked.values)
    except (ValueError, OSError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2


def show(folder: Path, with_hash: bool) -> int:
    check_is_step(folder)
    index = dcp.read_metadata(folder)
    tensors = dcp.stored_tensors(index)
    print(*table(tensors), sep="\n")
    for part in ("model", "optimizer"):
        sizes = [num_bytes(entry) for name, entry in tensors.items() if group(name) == part]
        print(f"{part}: {len(sizes)} tensors, {in_units(sum(sizes))}")
    try:
        verdict = verify(folder, index, with_hash)
    except ValueError as error:
        print(f"DAMAGED: {error}")
        return 1
    if (folder / "manifest.json").exists():
        state = commit.inspect(folder) | read_if_there(folder / "train_state.json")
        print(f"step {state['step']}, saved with torch {state['torch']}", end="")
        print(f", {state['tokens']:,} tokens seen" if "tokens" in state else "")
        for section, settings in state.get("config", {}).items():
            print(f"config {section}: " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    if (model := read_if_there(folder / "model.json")).keys() >= {"family", "flavor", "architecture"}:
        numbers = ", ".join(f"{key}={value}" for key, value in model["architecture"].items())
        print(f"model.json: {model['family']} {model['flavor']}: {numbers}")
    print(verdict)
    return 0


def verify(folder: Path, index, with_hash: bool) -> str:
    """How far the folder is known to be whole; ValueError where it is not."""
    if not (folder / "manifest.json").exists():
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
        if broken := dcp.uncovered(index, dcp.stored_tensors(index), sizes):
            raise ValueError(f"the files do not hold all of {enumerate_names(broken)}")
        return f"no manifest of torchtitan_bio; files are as long as .metadata says. Beside the model: {left_aside(index)}"
    manifest = commit.inspect(folder)
    if with_hash:
        commit.check_hashes(folder, manifest["files"])
        return "verifies: every byte is as written"
    return "verifies by manifest and sizes; --hash reads every byte"


def compare(left: Path, right: Path, with_values: bool) -> int:
    for folder in (left, right):
        check_is_step(folder)
    indexes = [dcp.read_metadata(folder) for folder in (left, right)]
    one, other = (dcp.stored_tensors(index) for index in indexes)
    found = [f"only in {left}: {enumerate_names(sorted(one.keys() - other))}"] if one.keys() - other else []
    found += [f"only in {right}: {enumerate_names(sorted(other.keys() - one))}"] if other.keys() - one else []
    common = [name for name in one if name in other]
    found += [f"{name}: {words(one[name])} and {words(other[name])}" for name in common if one[name] != other[name]]
    for document in ("model.json", "train_state.json"):
        here, there = (read_if_there(folder / document) for folder in (left, right))
        found += [
            f"{document}: {each.replace(' in the checkpoint', '').replace(' here', '')}" for each in differences(here, there)
        ]
    if with_values:
        found += different_values(left, right)
    print(
        *(found or [f"the same {len(common)} tensors" + (" to the last bit" if with_values else ", names and shapes")]),
        sep="\n",
    )
    return 1 if found else 0


def different_values(left: Path, right: Path) -> list[str]:
    """A line for each of the model's tensors that differs, with the largest difference."""
    world, found = distributed.start(), []
    one, other = (open_weights(folder, world=world) for folder in (left, right))
    for name, entry in one.tensors.items():
        if other.tensors.get(name, {}).get("shape") != entry["shape"]:
            continue
        here, there = one.read(name), other.read(name)
        if not torch.equal(here.to(torch.float64), there.to(torch.float64)):
            gap = (here.double() - there.double()).abs().max().item()
            found.append(f"{name}: values differ by up to {gap:.3g} (largest {here.abs().max().item():.3g})")
    distributed.stop()
    return found


def table(tensors: dict[str, dict]) -> list[str]:
    """A row a tensor; those of like shape in all layers share one."""
    rows = {}
    for name, entry in tensors.items():
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        rows.setdefault((pattern, words(entry)), []).append(num_bytes(entry))
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {shape:<28} {len(sizes):>4} x {in_units(sizes[0]):>10}" for (name, shape), sizes in rows.items()]


def group(name: str) -> str:
    first = name.removeprefix("model.").split(".")[0]
    return "model" if first not in TRAINING_STATE else "optimizer" if first.startswith("optimizer") else first


def num_bytes(entry: dict) -> int:
    return math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize


def in_units(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


def read_if_there(path: Path) -> dict:
    return commit.read_json(path) if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
