"""Who wants this run to stop, and how all ranks come to know it after the same step.

A signal sets a flag and nothing else, so it may come at any moment, twice, or in the middle of a save. What a rank knows rides
as zeros and ones in a sum over ranks that each step makes anyway; what the sum shows, all ranks see alike.
"""

import os
import signal
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager, suppress
from pathlib import Path

SIGNALS = ("SIGTERM", "SIGUSR1")
SOURCES = (*SIGNALS, "STOP", "wall clock", "launcher gone")
LAUNCHER = os.getppid()  # who imports this before torch, which takes seconds to load, knows it though it be killed meanwhile


class Stopped(Exception):
    """This process is to leave what it is doing."""


class Stops:
    """Listens from its making on. `why` is the source that stops the run, None until all ranks know of one.

    folder: where a file STOP is a wish to stop. max_wall_s: seconds from now on, or "auto", which knows only of the limit that
    SLURM tells. `save_s` is to be told how long the last save took.
    """

    def __init__(self, folder: Path, max_wall_s: float | str = "auto"):
        self.why: str | None = None
        self.save_s: float | None = None
        self.file = folder / "STOP"
        self._received: set[str] = set()
        self._looks = os.environ.get("RANK", "0") == "0"  # one rank for the disk and the clock
        self._whole_s = seconds_left(max_wall_s) if self._looks else None
        self._started = time.monotonic()
        self._step_ends = deque(maxlen=3)
        # Ranks whose torchrun was killed would train on unseen; a process without one may outlive its shell (nohup).
        self._launcher = LAUNCHER if "TORCHELASTIC_RUN_ID" in os.environ else None
        for name in SIGNALS:
            signal.signal(getattr(signal, name), lambda number, frame: self._received.add(signal.Signals(number).name))

    def wishes(self) -> dict[str, int]:
        """For each source whether it wants the run to stop, as far as this rank knows: to be summed over ranks. Once a step."""
        self._step_ends.append(time.monotonic())
        return self._wanted()

    def hear(self, totals: dict[str, float]):
        """The sum of all ranks' wishes, under the same keys."""
        self.why = self.why or next((source for source in SOURCES if totals[source]), None)

    def poll(self, world) -> bool:
        """Whether the run is to stop: asked of all ranks together, where no sum of a step can carry it."""
        self.hear(world.sum(self._wanted()))
        return self.why is not None

    def heed(self):
        """Stopped if this rank knows of a wish: in the middle of what it does alone, while the others wait to poll."""
        if any(self._wanted().values()):
            raise Stopped

    @contextmanager
    def alone(self):
        """Around the wait for the other ranks: a signal, or the end of the launcher, ends this process there and then.

        Nothing can be said to the others yet, and some may never come. Inside a library Python runs no handler of a signal.
        """
        handlers = {name: signal.signal(getattr(signal, name), signal.SIG_DFL) for name in SIGNALS}
        for name in self._received:
            signal.raise_signal(getattr(signal, name))
        met = threading.Event()
        threading.Thread(target=self._end_without_launcher, args=(met,), name="launcher", daemon=True).start()
        try:
            yield
        finally:
            met.set()
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)

    def end(self):
        """The run is over: a signal ends this process again."""
        for name in SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_DFL)

    def margin_s(self) -> float:
        """How long before its time is up the run leaves: the last save and two steps, but a minute at least.

        Before a save was timed it is taken for five minutes. A tenth of the whole time limits both guesses.
        """
        tenth = self._whole_s / 10
        durations = [later - earlier for earlier, later in zip(self._step_ends, list(self._step_ends)[1:], strict=False)]
        # The smaller of two: the other one may hold a validation or a save.
        step_s = min(durations, default=0.0)
        save_s = min(300.0, tenth) if self.save_s is None else self.save_s
        return max(save_s + 2 * step_s, min(60.0, tenth))

    def _wanted(self) -> dict[str, int]:
        found = set(self._received)
        if self._looks and self.file.exists():
            found.add("STOP")
        if self._lost_launcher():
            found.add("launcher gone")
        if self._looks and self._whole_s is not None:
            left_s = self._started + self._whole_s - time.monotonic()
            found |= {"wall clock"} if left_s < self.margin_s() else set()
        return {source: int(source in found) for source in SOURCES}

    def _lost_launcher(self) -> bool:
        return self._launcher not in (None, os.getppid())

    def _end_without_launcher(self, met: threading.Event):
        while not met.wait(0.2):
            if self._lost_launcher():
                with suppress(OSError):  # where its output went to may be gone too
                    print("torchrun is gone, and the ranks had not met: this one ends", file=sys.stderr, flush=True)
                os._exit(1)


def seconds_left(max_wall_s: float | str) -> float | None:
    """Until the earlier of two limits: the one of the configuration, and the one that SLURM tells. None: there is neither.

    A SLURM_JOB_END_TIME that is no time is a warning: what a site sets does not end a run.
    """
    limits = [] if max_wall_s == "auto" else [float(max_wall_s)]
    told = os.environ.get("SLURM_JOB_END_TIME")
    try:
        limits += [int(told) - time.time()] if told else []
    except ValueError:
        print(
            f"warning: SLURM_JOB_END_TIME={told} is no time in seconds since 1970, so SLURM's limit is not known to this run; "
            "job.max_wall_s can say it",
            file=sys.stderr,
            flush=True,
        )
    return min(limits, default=None)
