"""The calls a run makes: preflight, latest, load, save, wait."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from torchtitan_bio.checkpoint import commit, load
from torchtitan_bio.checkpoint.peers import CheckpointError, meet
from torchtitan_bio.checkpoint.tensors import copy_to_cpu, local, model_tensors, optimizer_tensors, refuse_non_finite


@dataclass(frozen=True)
class Pending:
    """A save that is being written while training goes on."""

    step: int
    is_last: bool
    outcome: Future


class Checkpointer:
    """The checkpoints of one run. Every method is called by all ranks together; an error on one is raised on all.

    keep_latest_k: a number, or "all". on_error: "stop" raises when a save fails, "continue" makes a warning of it on all ranks
    alike. say: gets each line for the log, on rank 0.
    """

    def __init__(
        self,
        folder,
        *,
        world,
        keep_latest_k: int | str = "all",
        asynchronous: bool = False,
        on_error: str = "stop",
        say: Callable[[str], None] = print,
    ):
        if keep_latest_k != "all" and not (isinstance(keep_latest_k, int) and keep_latest_k >= 1):
            raise ValueError(f'keep_latest_k={keep_latest_k!r}; it is "all" or a number from 1 up')
        if on_error not in ("stop", "continue"):
            raise ValueError(f'on_error={on_error!r}; it is "stop" or "continue"')
        self.folder = Path(folder)
        self.keep_latest_k = keep_latest_k
        self.asynchronous = asynchronous
        self.on_error = on_error
        self.say = say if world.rank == 0 else lambda line: None
        self._peers = meet(world)
        self._refused: dict[str, str] = {}  # names of newer ones than the latest that verifies, with the reason
        self._why: dict[Path, str] = {}  # of each path that this object has verified, why it was chosen
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Pending | None = None
        self.last_save_s: float | None = None
        self._copies: dict[str, torch.Tensor] = {}  # what asynchronous saves are written from
        self._was_there = False  # the folder, when this object last used it

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

        own = self.folder / f"{probe}-{self._peers.rank}"
        try:
            self._peers.each("preflight", write_probe)
            self._peers.first("preflight", see_all_probes)
        finally:
            if own.exists():
                own.unlink()
        self._peers.first("preflight", lambda: refuse_full_disk(self.folder, bytes_needed, saves_ahead, self.keep_latest_k))
        self._was_there = True

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

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_state: dict,
        model_json: dict,
        *,
        documents: dict[str, dict] | None = None,
        is_last: bool = False,
    ):
        """Commit step-%08d, or leave nothing under that name. Returns once it is on disk, or copied where asynchronous.

        documents: more JSON by file name. is_last: of this run, so that its failure is an error whatever on_error says. Values
        that are not finite are one in any case.
        """
        self.wait()
        started = time.monotonic()

        def prepare():
            tensors = model_tensors(model) | optimizer_tensors(model, optimizer)
            refuse_non_finite(tensors)
            named = (documents or {}) | {"train_state.json": train_state, "model.json": model_json}
            return tensors, {name: as_json(content) for name, content in named.items()}

        tensors, written = self._peers.each(f"preparing step {step}", prepare)
        with self._answering_for(step, is_last):
            if self._saved_already(step):
                return
            if self.asynchronous:
                tensors = self._copy(tensors)
            staging = self._stage(step)

            def write() -> tuple[Path, float]:
                return commit.write(staging, tensors, written, self._peers), time.monotonic() - started

            if self.asynchronous:
                self._pending = Pending(step, is_last, self._thread.submit(write))
            else:
                self._committed(*write())

    def wait(self):
        """Until what was begun is committed. An error of an asynchronous save appears here, and nothing older is deleted."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._answering_for(pending.step, pending.is_last):
            self._committed(*pending.outcome.result())

    @contextmanager
    def _answering_for(self, step: int, is_last: bool):
        # Only what all ranks have agreed upon is a CheckpointError: a collective that broke ends the run in any case.
        try:
            yield
        except CheckpointError as error:
            if is_last or self.on_error == "stop":
                raise
            self.say(f"warning: saving step {step}: {error}; training goes on (checkpoint.on_save_error)")

    def _copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Into memory that the saves of a run share. It is free: wait() has returned since it was last written from."""
        is_first = not self._copies
        self._copies = self._peers.each("copying to the CPU", lambda: copy_to_cpu(tensors, self._copies))
        if is_first:
            held = in_units(sum(local(copy).nbytes for copy in self._copies.values()))
            self.say(f"checkpoint: asynchronous saves keep {held} of host memory in this process")
        return self._copies

    def _stage(self, step: int) -> Path:
        def look():
            if self._was_there and not self.folder.is_dir():  # a new one would be empty, and perhaps on another disk
                raise FileNotFoundError(f"{self.folder} has vanished; is its file system still mounted?")

        try:
            self._peers.first(f"looking for {self.folder}", look)
            return commit.stage(self.folder, step, self._peers)
        except CheckpointError as error:
            free = self._peers.first("measuring", lambda: free_bytes(self.folder))
            target = self.folder / commit.step_name(step)
            raise CheckpointError(f"{target} was not saved: {error} ({free} bytes free)") from error

    def _committed(self, path: Path, seconds: float):
        self._was_there, self.last_save_s = True, seconds
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


def refuse_full_disk(folder: Path, bytes_needed: int, saves_ahead: int, keep_latest_k: int | str):
    """ValueError where fewer bytes are free than the checkpoints take that are to lie there at once."""
    free, there = free_bytes(folder), len(commit.names_like(folder, commit.STEP))
    at_once = 2 if keep_latest_k == "all" else keep_latest_k + 1  # the newest beside those that it replaces
    more = min(saves_ahead, max(1, at_once - there))
    if free < more * bytes_needed:
        raise ValueError(
            f"{folder} has {in_units(free)} free, and {more} more checkpoint(s) of {in_units(bytes_needed)} each will be "
            "written. Free space, or lower checkpoint.keep_latest_k"
        )


def newest_step(folder: Path) -> int:
    """The highest step that a folder in this place has the name of, whether or not it verifies; 0 where there is none."""
    return max((int(name.removeprefix("step-")) for name in commit.names_like(folder, commit.STEP)), default=0)


def free_bytes(folder: Path) -> int:
    """On the disk where the folder lies, or would lie."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def in_units(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def as_json(document: dict) -> dict:
    """What the document will be when it is read back. A NaN or an object in it is an error now rather than at resume."""
    return json.loads(json.dumps(document, allow_nan=False))
