"""What a run writes beside its weights so that it can go on as if it had never stopped, and what it refuses to go on with.

The whole state of the data is one integer: step s has used samples [0, s * global_batch_size).
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path


def train_state(
    step: int, *, global_batch_size: int, seq_len: int, skipped_in_a_row: int, fingerprint: dict, config: dict
) -> dict:
    return {
        "step": step,
        "next_sample": step * global_batch_size,
        "global_batch_size": global_batch_size,
        "tokens": step * global_batch_size * seq_len,
        "skipped_in_a_row": skipped_in_a_row,
        "fingerprint": fingerprint,
        "config": config,
        "config_sha256": sha256(config),
    }


def sha256(document: dict) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def check(path: Path, state: dict, now: dict, *, steps: int, accept_changed: bool, say: Callable[[str], None]):
    """ValueError if this run cannot go on from the state at path; `now` is what it would write itself at that step.

    Settings that may change are told one by one.
    """
    problems = []
    if state["step"] > steps:
        problems.append(
            f"training.steps={steps}, but {path} is already at step {state['step']}: raise it, or take another job.dump_folder"
        )
    if (state["global_batch_size"], state["next_sample"]) != (now["global_batch_size"], now["next_sample"]):
        problems.append(
            f"global_batch_size is {now['global_batch_size']} here and {state['global_batch_size']} in {path}: samples would "
            f"repeat or be lost; set training.global_batch_size={state['global_batch_size']} or another job.dump_folder"
        )
    difference = f"the data is not that of {path}: {'; '.join(changes(state['fingerprint'], now['fingerprint']))}"
    if state["fingerprint"] != now["fingerprint"] and not accept_changed:
        problems.append(f"{difference}; mend it, take another job.dump_folder, or set data.accept_changed=true")
    if problems:
        raise ValueError("\n".join(problems))
    if state["fingerprint"] != now["fingerprint"]:
        say(f"warning: {difference} (data.accept_changed)")
    for change in changes(state["config"], now["config"]):
        say(f"changed since {path.name}: {change}")


def changes(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Each value that differs, by its dotted name: "optimizer.lr: 0.001 -> 0.0005"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found
