"""The ladder: a model's held-out score among the baselines, which are fitted once for a run and kept beside it."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torchtitan_bio import resume
from torchtitan_bio.science import baselines

VERSION = 1  # of ladder.json; raise it when a baseline gives another figure than before
UNIT = "bits_per_spike"
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Ladder:
    rungs: list  # of [baseline, held-out bits/spike]
    left_out: dict[str, list[str]]  # by reason, the held-out recordings on which no baseline is scored
    num_recordings: int  # that are held out and fit a window


def print_at_once(line: str):
    print(line, flush=True)


def show(path, train_data, held_out, score, say=print_at_once):
    """Say the baselines with this model among them, fitting them first unless `path` has them of just this data.

    `score` is the last validation as metrics.jsonl has it, or None. Its "held_out" is the sha256 of the fingerprint of what it
    was taken on; where there is none, `held_out` is believed to be that.
    """
    headline = getattr(held_out, "headline", None)
    if headline != UNIT:
        return say(f"no ladder: baselines are scored in bits/spike, and the held-out data's headline is {headline}")
    if score is None:
        return say("no ladder: this run has not been validated")
    if score.get(UNIT) is None:
        return say("no ladder: the last validation has no bits/spike, as of held-out data without a spike")
    now = resume.sha256(held_out.fingerprint)
    if score.get("held_out", now) != now:
        return say(f"no ladder: the last validation, at step {score['step']}, was on other held-out data than there is now")
    ladder = kept_or_fitted(Path(path), train_data, held_out, say)
    label, part = "this model", score["windows"] < len(held_out)
    if part:
        label += f" ({score['windows']:,} of {len(held_out):,} windows)"
    for line in [*table(ladder, [label, score[UNIT]]), *verdict(ladder, score[UNIT], part)]:
        say(line)


def table(ladder: Ladder, *models) -> list[str]:
    """A title and a line a rung, the best one last."""
    rungs = sorted([*ladder.rungs, *models], key=lambda rung: rung[1])
    return ["", "held-out bits/spike", *(f"  {name:<44}{value:8.3f}" for name, value in rungs)]


def verdict(ladder: Ladder, value: float, part: bool) -> list[str]:
    """How the model stands to the best baseline, or why that cannot be told."""
    lines = []
    name, best = max(ladder.rungs, key=lambda rung: rung[1], default=("", 0.0))
    if ladder.rungs and ladder.left_out:
        lines.append(
            f"this model's {value:.3f} bits/spike and the {best:.3f} of the best baseline, {name}, are of other recordings, "
            "and do not tell which is better: evaluate.py compares them on the same"
        )
    elif ladder.rungs:
        side = "above" if value > best else "below"
        lines.append(f"this model is {abs(value - best):.3f} bits/spike {side} the best baseline, {name}")
    if ladder.rungs and part:
        lines.append("it was scored on these windows alone (validation.max_windows), and baselines on all that is held out")
    return lines + unmatched(ladder)


def unmatched(ladder: Ladder) -> list[str]:
    """What is to be said of held-out recordings that no baseline could be fitted for."""
    return [
        f"{reason}: {len(names):,} of {ladder.num_recordings:,} held-out recordings "
        f"({', '.join(names[:NAMES_SHOWN])}{', ...' if len(names) > NAMES_SHOWN else ''}); "
        "baselines leave them out, a model's score does not"
        for reason, names in ladder.left_out.items()
    ]


def kept_or_fitted(path: Path, train_data, held_out, say) -> Ladder:
    """The ladder that `path` holds for this data; otherwise it is fitted and written there."""
    # As they come back from a file, so that a tuple equals its list
    data = json.loads(json.dumps({"train": train_data.fingerprint, "held_out": held_out.fingerprint}))
    if path.exists():
        try:
            return read(path, data)
        except ValueError as why:
            say(f"baselines: {path} {why}; fitting them again")
    else:
        say("baselines: fitting them to the training data")
    started = time.monotonic()
    ladder = fit(train_data, held_out, say)
    say(f"baselines: fitted in {time.monotonic() - started:.0f} s")
    try:
        write(path, {"version": VERSION, **data, **asdict(ladder)})
    except OSError as error:  # the figures are there: a full disk must not take them away at the end of a run
        say(f"baselines: {path} could not be written, so they will be fitted again the next time: {error}")
    return ladder


def fit(train_data, held_out, say) -> Ladder:
    """The baselines of this data, scored on whole recordings."""
    _, left_out = baselines.match(train_data, held_out)
    num_recordings = len(held_out.index.id) - len(held_out.not_scored)
    return Ladder([list(rung) for rung in baselines.ladder(train_data, held_out, say)], left_out, num_recordings)


def read(path: Path, data: dict) -> Ladder:
    """The ladder in a file. ValueError, which goes on after the file's name, if it is of other data or no ladder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, old = found["version"], {split: dict(found[split]) for split in data}
        rungs = [[str(name), float(value)] for name, value in found["rungs"]]
        left_out = {reason: list(map(str, names)) for reason, names in found["left_out"].items()}
        ladder = Ladder(rungs, left_out, int(found["num_recordings"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"is not a ladder of this version ({type(error).__name__}: {error})") from error
    if version != VERSION:
        raise ValueError(f"is of version {version}, not {VERSION}")
    changes = [
        f"{split} {key}: {old[split].get(key)} -> {data[split].get(key)}"
        for split in data
        for key in sorted(old[split].keys() | data[split].keys())
        if old[split].get(key) != data[split].get(key)
    ]
    if changes:
        raise ValueError(f"is of other data ({'; '.join(changes)})")
    return ladder


def write(path: Path, value: dict):
    """As a whole or not at all: whoever finds `path` can read it."""
    partial_file = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial_file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(partial_file, path)
    finally:
        partial_file.unlink(missing_ok=True)
