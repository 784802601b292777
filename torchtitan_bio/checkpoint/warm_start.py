"""Start from another run's weights: renamed, partly, and never silently so."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from torchtitan_bio.checkpoint import commit, dcp
from torchtitan_bio.checkpoint.load import differences, examine, words
from torchtitan_bio.checkpoint.peers import meet
from torchtitan_bio.checkpoint.tensors import enumerate_names, layout, model_tensors
from torchtitan_bio.checkpoint.weights import check_is_step, left_aside, model_names


@dataclass(frozen=True)
class Match:
    """Names here: loaded (some cast to another type), kept fresh with the reason; and names there that nobody wants."""

    loaded: list[str]
    cast: list[str]
    fresh: list[str]
    unused: list[str]


def init_from(
    path,
    model: nn.Module,
    *,
    rename: dict[str, str] | None = None,
    allow_missing: Iterable[str] = (),
    world,
    model_json: dict | None = None,
) -> list[str]:
    """Copy the weights of a DCP folder (ours, or one with bare or "model." names) into the model; a report in lines.

    rename: glob over names in the source -> name here, each * carried over; the first that matches counts. allow_missing: globs
    of names that the source need not hold or holds in another shape (they keep their fresh values), or holds and nobody wants.
    model_json: of this model, to name the numbers that shapes cannot show, such as rope_theta. ValueError, before anything is
    copied, when anything else does not fit or a pattern matches nothing.
    """
    path, peers, allowed = Path(path), meet(world), list(allow_missing)

    def plan():
        index = dcp.read_metadata(path)
        names, renamed = rename_all(model_names(index), rename or {})
        wanted = {name.removeprefix("model."): tensor for name, tensor in model_tensors(model).items()}
        numbers = different_numbers(path, model_json, "tok_embeddings.weight" in names)
        match = compare(path, names, dcp.stored_tensors(index), layout(wanted), allowed, numbers)
        sizes = {file.name: file.stat().st_size for file in path.iterdir()}
        broken = dcp.uncovered(index, [names[name] for name in match.loaded], sizes)
        if broken:
            raise ValueError(f"{path} is incomplete: its files do not hold all of {enumerate_names(broken)}")
        targets = {names[name]: wanted[name] for name in match.loaded}
        aside = "" if is_ours else left_aside(index)
        return index, targets, report(path, match, renamed, numbers, aside)

    is_ours = peers.first(f"looking at {path}", lambda: check_is_step(path))
    if is_ours:
        examine(path, peers)
    index, targets, lines = peers.each(f"comparing {path}", plan)
    peers.each(f"loading {path}", lambda: dcp.read_in_place(path, index, targets, peers))
    return lines


def rename_all(names: dict[str, str], patterns: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """({name here: stored name}, {name here: name there} of those that changed)."""
    for pattern, replacement in patterns.items():
        if pattern.count("*") != replacement.count("*"):
            raise ValueError(
                f"rename {pattern!r} -> {replacement!r}: both sides need the same number of *, each is carried over"
            )
    unused = [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
    if unused:
        raise ValueError(
            f"rename patterns that match no name in the source: {enumerate_names(unused)}; it has {enumerate_names(names)}"
        )
    result, changed = {}, {}
    for name, stored in names.items():
        pattern = next((pattern for pattern in patterns if matches(pattern, name)), None)
        new = carry_over(pattern, patterns[pattern], name) if pattern else name
        if new in result:
            raise ValueError(f"after renaming, two tensors of the source are called {new}: {result[new]} and {stored}")
        result[new] = stored
        if pattern:
            changed[new] = name
    return result, changed


def matches(pattern: str, name: str) -> re.Match | None:
    """A glob where * stands for any text, dots included."""
    return re.fullmatch("(.*)".join(re.escape(part) for part in pattern.split("*")), name)


def carry_over(pattern: str, replacement: str, name: str) -> str:
    pieces = replacement.split("*")
    return pieces[0] + "".join(text + piece for text, piece in zip(matches(pattern, name).groups(), pieces[1:], strict=True))


def compare(path: Path, names: dict[str, str], stored: dict, wanted: dict, allowed: list[str], numbers: list[str]) -> Match:
    """ValueError with all that is neither loaded nor allowed. names: name here -> stored name; numbers: different_numbers."""
    idle = [pattern for pattern in allowed if not any(matches(pattern, name) for name in wanted.keys() | names)]
    if idle:
        raise ValueError(
            f"allow_missing patterns that match no name: {enumerate_names(idle)}; there is {enumerate_names(wanted)}"
        )
    loaded, cast, fresh, refused = [], [], [], {"missing": [], "mis-shaped": [], "unexpected": []}
    for name, here in wanted.items():
        there = stored.get(names.get(name))
        if there and there["shape"] == here["shape"]:
            loaded.append(name)
            if there["dtype"] != here["dtype"]:
                cast.append(name)
            continue
        detail = f"{name} ({words(there)} there, {words(here)} here)" if there else name
        if any(matches(pattern, name) for pattern in allowed):
            fresh.append(detail)
        else:
            refused["mis-shaped" if there else "missing"].append(detail)
    unused = [name for name in names if name not in wanted]
    refused["unexpected"] = [name for name in unused if not any(matches(pattern, name) for pattern in allowed)]
    problems = [f"{kind}: {enumerate_names(found)}" for kind, found in refused.items() if found]
    if problems:
        problems += [f"the architectures differ: {', '.join(numbers)}"] if numbers else []
        raise ValueError(f"{path} does not fit the model, and allow_missing does not cover it: {'; '.join(problems)}")
    if not loaded:
        raise ValueError(
            f"{path} holds nothing that the model wants: it has {enumerate_names(names)}, wanted {enumerate_names(wanted)}"
        )
    return Match(loaded, cast, fresh, unused)


def different_numbers(path: Path, model_json: dict | None, has_embedding: bool) -> list[str]:
    """In what the architectures differ. A source without an embedding leaves open what is at both ends of the model."""
    if model_json is None or not (path / "model.json").exists():
        return []
    found = differences(commit.read_json(path / "model.json"), model_json)
    at_the_ends = ("architecture.vocab_size ", "architecture.tie_embeddings ")
    return [each for each in found if has_embedding or not each.startswith(at_the_ends)]


def report(path: Path, match: Match, renamed: dict[str, str], numbers: list[str], aside: str) -> list[str]:
    counts = f"{len(match.loaded)} tensors loaded, {len(match.fresh)} keep fresh values, {len(match.unused)} there left unused"
    sections = {
        "renamed": [f"{renamed[name]} -> {name}" for name in match.loaded if name in renamed],
        "fresh": match.fresh,
        "unused": match.unused,
        "cast to this model's type": match.cast,
    }
    lines = [f"init_from {path}: {counts}"]
    lines += [f"init_from {kind}: {enumerate_names(found)}" for kind, found in sections.items() if found]
    if aside:
        lines.append(f"init_from left aside: {aside}")
    if numbers:
        lines.append(f"init_from WARNING, the architectures differ, which shapes may not show: {'; '.join(numbers)}")
    return lines
