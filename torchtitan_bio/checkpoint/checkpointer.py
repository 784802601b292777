"""The calls a run makes: preflight, latest, load, save, wait."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from torchtitan_bio.checkpoint import commit, load
from torchtitan_bio.checkpoint.peers import meet
from torchtitan_bio.checkpoint.tensors import copy_to_cpu, model_tensors, optimizer_tensors, refuse_non_finite


class Checkpointer:
    """The checkpoints of one run. Every method is called by all ranks together; an error on one is raised on all.

    keep_latest_k: a number, or "all". say: gets each line for the log, on rank 0.
    """

    def __init__(
        self,
        folder,
        *,
        world,
        keep_latest_k: int | str = "all",
        asynchronous: bool = False,
        say: Callable[[str], None] = print,
    ):
        if keep_latest_k != "all" and not (isinstance(keep_latest_k, int) and keep_latest_k >= 1):
            raise ValueError(f'keep_latest_k={keep_latest_k!r}; it is "all" or a number from 1 up')
        self.folder = Path(folder)
        self.keep_latest_k = keep_latest_k
        self.asynchronous = asynchronous
        self.say = say if world.rank == 0 else lambda line: None
        self._peers = meet(world)
        self._refused: dict[str, str] = {}  # names of newer ones than the latest that verifies, with the reason
        self._why: dict[Path, str] = {}  # of each path that this object has verified, why it was chosen
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def preflight(self, bytes_needed: int, saves_ahead: int):
        """Refuse before step 1 what would fail later. bytes_needed: of each of the checkpoints ahead, see tensors.num_bytes."""
        probe = self._peers.first("preflight", lambda: f".preflight-{secrets.token_hex(4)}")

        def write_probe():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / f"{probe}-{self._peers.rank}").write_text("")
            except OSError as error:
                raise ValueError(f"{self.folder} cannot be written: {error}") from error

        def see_all_probes():
            unseen = [rank for rank in range(self._peers.size) if not (self.folder / f"{probe}-{rank}").exists()]
            if unseen:
                raise ValueError(
                    f"rank 0 does not see what rank {unseen[0]} writes in {self.folder}; give a folder that all hosts share"
                )

        def measure():
            free = shutil.disk_usage(self.folder).free
            there = len(commit.names_like(self.folder, commit.STEP))
            at_once = 2 if self.keep_latest_k == "all" else self.keep_latest_k + 1  # the newest beside those that it replaces
            more = min(saves_ahead, max(1, at_once - there))
            if free < more * bytes_needed:
                raise ValueError(
                    f"{self.folder} has {in_units(free)} free, and {more} more checkpoint(s) of {in_units(bytes_needed)} each "
                    "will be written. Free space, or lower checkpoint.keep_latest_k"
                )

        own = self.folder / f"{probe}-{self._peers.rank}"
        try:
            self._peers.each("preflight", write_probe)
            self._peers.first("preflight", see_all_probes)
        finally:
            if own.exists():
                own.unlink()
        self._peers.first("preflight", measure)

    def latest(self) -> tuple[Path, dict] | None:
        """The newest checkpoint that verifies and its train state; None where a run has not saved yet.

        Newer ones that do not verify are set aside under another name once this one is loaded. ValueError where there are only
        such.
        """
        self.wait()
        result = load.search(self.folder, self._peers)
        for name in result.leftovers:
            self.say(f"checkpoint: {self.folder / name} is left over from an interrupted save and ignored")
        if result.found is None and (result.refused or result.aside):
            reasons = [*result.refused.values(), *(f"{self.folder / name} was set aside earlier" for name in result.aside)]
            raise ValueError(
                f"{self.folder} holds checkpoints but none that verifies; repair one, or move them away to start at step 0:"
                + "".join(f"\n  {each}" for each in reasons)
            )
        if result.found is None:
            self.say(f"checkpoint: none in {self.folder}, starting at step 0")
            return None
        self._refused = result.refused
        self._why[result.found] = load.reason(result)
        return result.found, result.train_state

    def load(self, path, model: nn.Module, optimizer: torch.optim.Optimizer, model_json: dict):
        """Continue from a step folder: all of the model and of the optimizer, or nothing."""
        path = Path(path)
        if path not in self._why:
            load.examine(path, self._peers)
            self._why[path] = "named"
        loaded = load.load(path, model, optimizer, as_json(model_json), self._peers)
        refused, self._refused = self._refused, {}
        self._peers.first("setting aside", lambda: [self._set_aside(name, problem) for name, problem in refused.items()])
        self.say(f"checkpoint: loaded {path} ({self._why[path]}): {loaded}")

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, train_state: dict, model_json: dict):
        """Commit step-%08d, or leave nothing under that name. Returns once it is on disk, or copied where asynchronous."""
        self.wait()
        started = time.monotonic()

        def prepare():
            tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
            refuse_non_finite(tensors)
            return tensors, {"train_state.json": as_json(train_state), "model.json": as_json(model_json)}

        tensors, documents = self._peers.each(f"preparing step {step}", prepare)
        if self._saved_already(step):
            return
        if self.asynchronous:
            tensors = self._peers.each("copying to the CPU", lambda: copy_to_cpu(tensors))
        staging = commit.stage(self.folder, step, self._peers)

        def write() -> tuple[Path, float]:
            return commit.write(staging, tensors, documents, self._peers), time.monotonic() - started

        if self.asynchronous:
            self._pending = self._thread.submit(write)
        else:
            self._committed(*write())

    def wait(self):
        """Until what was begun is committed. An error of an asynchronous save is raised here, and nothing older is deleted."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._committed(*pending.result())

    def _committed(self, path: Path, seconds: float):
        self.say(f"checkpoint: saved {path} in {seconds:.1f} s")
        if self.keep_latest_k != "all":
            self._peers.first("retention", lambda: commit.retire(self.folder, self.keep_latest_k, path, self.say))

    def _saved_already(self, step: int) -> bool:
        path = self.folder / commit.step_name(step)
        if not self._peers.first("looking", lambda: os.path.lexists(path)):
            return False
        try:
            load.examine(path, self._peers)
        except ValueError as error:
            problem = str(error)
            self._peers.first("setting aside", lambda: self._set_aside(path.name, problem))
            return False
        self.say(f"checkpoint: {path} is there and verifies; not saved again")
        return True

    def _set_aside(self, name: str, problem: str):
        aside = commit.set_aside(self.folder / name)
        self.say(f"checkpoint: {problem}; set aside as {aside.name}")


def in_units(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def as_json(document: dict) -> dict:
    """What the document will be when it is read back. A NaN or an object in it is an error now rather than at resume."""
    return json.loads(json.dumps(document, allow_nan=False))
