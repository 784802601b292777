"""How a checkpoint is trusted again: found, verified byte by byte, compared name by name, and only then copied in."""

from dataclasses import dataclass
from pathlib import Path

from torchtitan_bio.checkpoint import commit, dcp
from torchtitan_bio.checkpoint.peers import Peers, meet
from torchtitan_bio.checkpoint.tensors import enumerate_names, layout, model_tensors, optimizer_tensors


@dataclass(frozen=True)
class Search:
    """What a folder of checkpoints was found to hold; the same on every rank."""

    found: Path | None
    train_state: dict | None
    num_steps: int
    refused: dict[str, str]
    """Why each step folder newer than `found` is no checkpoint."""
    aside: list[str]
    leftovers: list[str]


def search(folder: Path, peers: Peers) -> Search:
    """The newest checkpoint that verifies. Changes nothing."""

    def names() -> dict:
        leftovers = commit.names_like(folder, commit.PARTIAL) + commit.names_like(folder, commit.TRASH)
        return {
            "steps": commit.names_like(folder, commit.STEP),
            "aside": commit.names_like(folder, commit.INVALID),
            "leftovers": leftovers,
        }

    seen = peers.first(f"listing {folder}", names)
    refused, found, train_state = {}, None, None
    for name in seen["steps"]:
        try:
            examine(folder / name, peers)
        except ValueError as error:
            refused[name] = str(error)
            continue
        found = folder / name
        break
    if found:
        train_state = peers.first("reading train_state.json", lambda: commit.read_json(found / "train_state.json"))
    return Search(found, train_state, len(seen["steps"]), refused, seen["aside"], seen["leftovers"])


def examine(path: Path, peers: Peers) -> dict:
    """The manifest of a step folder, every byte of which is as written (each rank hashes a share), or ValueError."""
    manifest = peers.first(f"reading {path}", lambda: commit.inspect(path))
    files = manifest["files"]
    share = {name: files[name] for name in sorted(files)[peers.rank :: peers.size]}
    peers.each(f"verifying {path}", lambda: commit.check_hashes(path, share))
    return manifest


def load(path: Path, model, optimizer, model_json: dict, peers: Peers) -> str:
    """Copy a verified step folder into the model and, unless it is None, the optimizer; what was loaded, in words.

    Strict: nothing is copied before all names, shapes, types and numbers of the architecture agree.
    """

    def compare():
        difference = differences(commit.read_json(path / "model.json"), model_json)
        if difference:
            raise ValueError(f"{path} holds another model: {'; '.join(difference)}")
        wanted = model_tensors(model) | (optimizer_tensors(model, optimizer) if optimizer else {})
        index = dcp.read_metadata(path)
        compare_names(path, dcp.stored_tensors(index), layout(wanted), with_optimizer=optimizer is not None)
        return index, wanted

    index, wanted = peers.each(f"comparing {path}", compare)
    peers.each(f"loading {path}", lambda: dcp.read_in_place(path, index, wanted, peers))
    num_model = sum(name.startswith("model.") for name in wanted)
    return f"{num_model} model and {len(wanted) - num_model} optimizer tensors"


def load_model(path, model, model_json: dict, *, world) -> str:
    """Weights of one step folder, or of the newest good one in a folder of them, to evaluate. Strict; the disk stays as it is.

    Returns one line that says what was loaded, from where and why.
    """
    path, peers = Path(path), meet(world)
    if (path / "manifest.json").exists() or commit.STEP.fullmatch(path.resolve().name):
        examine(path, peers)
        why = "named"
    else:
        result = search(path, peers)
        if not result.found:
            reasons = "".join(f"\n  {reason}" for reason in result.refused.values())
            raise ValueError(f"{path} holds no checkpoint that verifies" + reasons)
        path, why = result.found, reason(result)
    return f"loaded {path} ({why}): {load(path, model, None, model_json, peers)}"


def reason(result: Search) -> str:
    why = f"newest of {result.num_steps} that verifies"
    return why + "".join(f"; refused: {problem}" for problem in result.refused.values())


def differences(stored, expected, name: str = "") -> list[str]:
    """Each number or word in which two descriptions of a model differ. A flavor is only a name for numbers."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        found = []
        for key in sorted(stored.keys() | expected.keys()):
            if not (key == "flavor" and not name):
                found += differences(stored.get(key, "absent"), expected.get(key, "absent"), f"{name}.{key}" if name else key)
        return found
    if isinstance(expected, tuple):
        expected = list(expected)
    return [] if stored == expected else [f"{name} is {stored} in the checkpoint and {expected} here"]


def compare_names(path: Path, stored: dict[str, dict], wanted: dict[str, dict], *, with_optimizer: bool):
    """ValueError that lists what is missing, unexpected or of another shape or type."""
    if not with_optimizer:
        stored = {name: entry for name, entry in stored.items() if not name.startswith("optimizer.")}
    elif not any(name.startswith("optimizer.") for name in stored):
        raise ValueError(
            f"{path} holds no optimizer state, so training cannot continue from it; checkpoint.init_from takes its weights"
        )
    missing = sorted(wanted.keys() - stored.keys())
    unexpected = sorted(stored.keys() - wanted.keys())
    misshaped = [
        f"{name} ({words(stored[name])} stored, {words(wanted[name])} here)"
        for name in sorted(wanted.keys() & stored.keys())
        if stored[name] != wanted[name]
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)]
    if missing or unexpected or misshaped:
        lists = "; ".join(f"{kind}: {enumerate_names(names)}" for kind, names in problems if names)
        raise ValueError(f"{path} does not fit the model: {lists}")


def words(entry: dict) -> str:
    return f"{tuple(entry['shape'])} {entry['dtype']}"
