"""One start of a run, from the moment it takes the run folder: whatever happens to it, exit.json says how it ended.

"running" (it is, or it died without a word), "finished", "preempted", "interrupted" or "failed". The same failure at the same
step twice in a row is a crash loop: then a machine must not start the run again, while a person may. A run that is refused
before its training begins leaves all as it was.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torchtitan_bio import distributed, run_lock, watchdog
from torchtitan_bio.config import ConfigError

LAUNCH = "TRAIN_SH_LAUNCH"  # of a SLURM job under train.sh: the second it began in, a dot, and what makes it unique
GRACE_S = 1.0  # what ranks notice of a failure waits so long for the words of the rank that failed


class Attempt:
    """A context manager around the run: it watches over its phases, records a failure, and gives the run folder back.

    watch: is to be told each phase. check_lock(): before anything is written that another run could have begun to write too.
    """

    def __init__(
        self,
        folder: Path,
        world,
        *,
        started: str,
        is_new: bool,
        last_failure: dict | None,
        lock: run_lock.Lock | None,
        limit_s: float,
    ):
        self.folder, self.rank, self.started = folder, world.rank, started
        self._world, self._lock, self._is_new, self._last_failure = world, lock, is_new, last_failure
        path = folder / "stacks" / f"{started}-rank-{world.rank}.txt"
        self.watch = watchdog.Watch(path, rank=world.rank, limit_s=limit_s, told=self._hang)
        self._earlier: bytes | None = None  # what exit.json said before
        self._begun_at: int | None = None  # steps that were done when training began

    def __enter__(self):
        if self.rank == 0:
            with suppress(OSError):
                self._earlier = (self.folder / "exit.json").read_bytes()
            self._write_or_say("running", None, previous=self._last_failure)  # killed from here on, it did not finish
        return self

    def __exit__(self, kind, error, trace):
        self.watch.rest()
        if isinstance(error, KeyboardInterrupt):
            self._write_or_say("interrupted", self.watch.step)
        elif error is not None and not isinstance(error, ConfigError):
            self._fail(error)
        self.watch.end()
        with suppress(OSError):  # of a disk that is away; that is told already
            if self.rank == 0 and isinstance(error, ConfigError) and self._begun_at is None:
                self._put_back()
            if self._lock:
                self._lock.release()
            if self._is_new:
                self.folder.rmdir()  # made for a run that is refused: the last rank finds it empty. Not empty: it stays

    def runs(self, step: int):
        """Training begins after so many steps. Rank 0 alone writes."""
        self._begun_at = step
        if self.rank == 0:
            self._write("running", step, previous=self._last_failure)

    def leave(self, step: int | None, why: str | None, *, is_saved: bool = True):
        """The run is finished, or `why` stopped it; what a file STOP asked for is done. All ranks part.

        step: None where it stopped before it had read how many were done. Where nothing is saved a run that was stopped is
        "interrupted": started again and again by a machine, it would begin at step 0 for ever. `steps_here` are those of this
        start: one that never comes to its first step must not be started for ever either.
        """
        self.watch.enter("leaving")
        if self.rank == 0:
            reason = "finished" if not why else "preempted" if is_saved else "interrupted"
            steps_here = 0 if self._begun_at is None else step - self._begun_at
            self._write(reason, step, steps_here=steps_here, why=why)
            (self.folder / "STOP").unlink(missing_ok=True)
            print(*([f"stopped by {why}"] if why else []), f"run folder: {self.folder}", sep="\n", flush=True)
        if why:
            self._world.exchange(None)  # told to stop, a launcher may end rank 0 once another rank has left
        distributed.stop()

    def check_lock(self):
        """All ranks raise if another run has taken the folder, because this one seemed dead."""
        with self._world.together("keeping the run folder"):
            if self._lock:
                self._lock.check()

    def _fail(self, error: BaseException):
        words = f"{type(error).__name__}: {error}".split("\n")[0]
        if distributed.is_of_another_rank(error):
            where = f"rank {self.rank} was in {self.watch.place} when another rank failed, went away or fell silent"
            self._record(words, others=True)
        else:
            where = f"rank {self.rank} failed in {self.watch.place}"
            self._record(words)
        print(f"{where}: {words}", file=sys.stderr, flush=True)

    def _hang(self, words: str):
        print(f"rank {self.rank}: {words}", file=sys.stderr, flush=True)
        self._record(words)

    def _record(self, error: str, *, others: bool = False):
        """The first cause stays: what a rank has done itself comes before what others have noticed of it."""
        deadline = time.monotonic() + GRACE_S
        while not (there := self._end_of_this_start()) and others and time.monotonic() < deadline:
            time.sleep(0.02)
        if there and (others or not there.get("noticed")):
            return
        failure = {"rank": self.rank, "phase": self.watch.phase, "error": error} | ({"noticed": True} if others else {})
        if is_same(self._last_failure, failure | {"step": self.watch.step}):
            failure["crash_loop"] = True
        self._write_or_say("failed", self.watch.step, **failure)

    def _end_of_this_start(self) -> dict:
        """The record of what has ended it, by whichever rank; {} as long as there is none."""
        there = read(self.folder)
        is_one = there.get("reason") in ("failed", "interrupted") and there.get("started") == self.started
        return there if is_one else {}

    def _write_or_say(self, reason: str, step: int | None, **facts):
        """As _write, but an error here (the disk is full, say) does not take the place of the one that ends the run."""
        try:
            self._write(reason, step, **facts)
        except OSError as error:
            print(f"rank {self.rank} could not write exit.json: {error}", file=sys.stderr, flush=True)

    def _write(self, reason: str, step: int | None, **facts):
        record = {"reason": reason, "step": step, "attempt": number(), "started": self.started, "job": job()}
        record |= {"launch": os.environ.get(LAUNCH)} | facts
        record = {key: value for key, value in record.items() if value is not None or key == "step"}
        self._replace(json.dumps(record, indent=1).encode() + b"\n")

    def _put_back(self):
        if self._end_of_this_start():
            return  # while this rank was refused, another one failed
        if self._earlier is None:
            (self.folder / "exit.json").unlink(missing_ok=True)
        else:
            self._replace(self._earlier)

    def _replace(self, content: bytes):
        path = self.folder / "exit.json"
        written = path.with_name(f"exit.json.{self.rank}.new")
        try:
            written.write_bytes(content)
            os.replace(written, path)
        except OSError:
            with suppress(OSError):
                written.unlink()
            raise


def begin(folder: Path, world, *, limit_s: float, stale_s: float, say: Callable[[str], None]) -> Attempt:
    """Take the run folder, with all ranks together, or ValueError on all: another run holds it, or it is in a crash loop.

    limit_s: of the first phases. stale_s: how long a lock outlives its holder's last sign of life.
    """
    lock, agreed = None, None
    with world.together("taking the run folder"):
        if world.rank == 0:
            last, is_new = read(folder), not folder.exists()
            if last.get("crash_loop") and (number() > 1 or is_element_of(last.get("job"))):
                raise ValueError(
                    f"{folder} failed twice in a row at step {last['step']} with the same error: {last['error']}. Mend the "
                    "cause and start it by hand, or submit it anew: a machine would only repeat it"
                )
            lock = run_lock.take(folder, stale_s=stale_s, say=say)
            remove_old_stop(folder)
            stacks = watchdog.dumps(folder / "stacks")
            if stacks and last.get("started") and stacks[-1].name.startswith(last["started"]):
                say(f"warning: the last start of this run ended with stacks: {stacks[-1]}")
            agreed = {
                "started": time.strftime("%Y%m%d-%H%M%S"),
                "is_new": is_new,
                "last_failure": last if last.get("reason") == "failed" else last.get("previous"),
            }
    agreed = world.exchange(agreed)[0]
    try:
        with world.together("opening a file for stacks"):
            return Attempt(folder, world, **agreed, lock=lock, limit_s=limit_s)
    except BaseException:
        if lock:
            lock.release()
        raise


def remove_old_stop(folder: Path):
    """In a SLURM job a STOP from before train.sh began was meant for another start. For who holds the folder alone."""
    began_s, file = os.environ.get(LAUNCH, "").partition(".")[0], folder / "STOP"
    with suppress(FileNotFoundError):
        if began_s and file.stat().st_mtime < int(began_s):
            file.unlink()


def number() -> int:
    """1, and one more for each restart by SLURM or torchrun."""
    return 1 + sum(int(os.environ.get(name) or 0) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def job() -> str | None:
    """The SLURM job of this process; of an element of an array, the array's, which all its elements share."""
    return os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID") or None


def is_element_of(array: str | None) -> bool:
    """Whether Slurm started this process as a part of that array. Within any other job a person may start a run again."""
    return array is not None and os.environ.get("SLURM_ARRAY_JOB_ID") == array


def read(folder: Path) -> dict:
    """What exit.json says; {} where it is missing or no JSON."""
    try:
        record = json.loads((folder / "exit.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_same(before: dict | None, now: dict) -> bool:
    """Whether two failures are one and the same: at one step, in the same words but for numbers such as addresses and ports."""

    def essence(failure):
        return failure.get("step"), re.sub(r"0x[0-9a-f]+|\d+", "#", failure.get("error", ""))

    return before is not None and essence(before) == essence(now)
