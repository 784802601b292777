"""Where this process is, and an end to it when it stays there too long.

Each rank's place (its step and phase) stands at the head of a file of its own. When a phase outlives its limit, the stacks of
all threads follow it there and the process exits, also out of a collective or a library that never returns to Python. A crash
in native code leaves its stacks there too.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

GRACE_S = 5.0  # a collective has the same limit, and its error says more: it may speak first
PATIENCE_S = 3600.0  # of phases that read or write much, as checkpoint/peers.py has it
HEAD_BYTES = 128


class Watch:
    """enter() says what comes next. `limit_s`, of a phase, may be set anew at any time.

    told: called once, by a thread, shortly before the process ends because of this.
    """

    def __init__(self, path: Path, *, rank: int, limit_s: float, told: Callable[[str], None]):
        self.path, self.rank, self.limit_s = path, rank, limit_s
        self.step: int | None = None
        self.phase = "start"
        self._told = told
        self._doing: Callable[[], str] | None = None
        self._allowed_s, self._armed, self._deadline = 0.0, 0.0, float("inf")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self._file.seek(HEAD_BYTES)
        self._ended = threading.Event()
        faulthandler.enable(self._file)
        threading.Thread(target=self._look, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int | None = None, *, patient: bool = False):
        """From now on this process is in this phase (of the same step as before, where none is given)."""
        self.phase, self.step, self._doing = phase, self.step if step is None else step, None
        allowed_s, now = max(self.limit_s, PATIENCE_S) if patient else self.limit_s, time.monotonic()
        head = f"rank {self.rank}, {self.place}".encode()[: HEAD_BYTES - 1].ljust(HEAD_BYTES - 1) + b"\n"
        try:
            os.pwrite(self._file.fileno(), head, 0)
        except OSError:
            pass  # a full disk ends no training; the stacks are written without a head
        self._deadline = now + allowed_s + GRACE_S / 2
        if allowed_s != self._allowed_s or now > self._armed + GRACE_S / 5:  # takes 0.1 ms: it starts a thread
            faulthandler.dump_traceback_later(allowed_s + GRACE_S, exit=True, file=self._file)
            self._allowed_s, self._armed = allowed_s, now

    def tell(self, doing: Callable[[], str] | None):
        """What this process does in its phase just now, put in words only if it stays there too long. None: nothing special."""
        self._doing = doing

    def rest(self):
        """What comes next may take any time."""
        self._allowed_s, self._deadline = 0.0, float("inf")
        faulthandler.cancel_dump_traceback_later()

    @property
    def place(self) -> str:
        return f"before the first step, {self.phase}" if self.step is None else f"step {self.step}, {self.phase}"

    def end(self):
        """Watch no longer, and leave no file behind."""
        self._ended.set()
        self.rest()
        faulthandler.disable()
        self._file.close()
        try:
            self.path.unlink()
            self.path.parent.rmdir()
        except OSError:  # other ranks' files lie there still
            pass

    def _look(self):
        """faulthandler ends the process without a word, so a thread says why, if Python lets it."""
        while not self._ended.wait(GRACE_S / 10):
            if time.monotonic() > self._deadline:
                where = f"{self.place}{self._in_words()}"
                self._told(f"no progress for {self._allowed_s:g} s or more in {where}; the stacks will be in {self.path}")
                return

    def _in_words(self) -> str:
        doing = self._doing
        try:
            return f", {doing()}" if doing else ""
        except Exception:  # what the process stands in may be what was asked; the place alone is worth telling
            return ""


def dumps(folder: Path) -> list[Path]:
    """The files of earlier processes that hold stacks. Those of processes that were killed hold only a place, and go."""
    found = []
    for path in sorted(folder.glob("*rank-*.txt")):
        if path.stat().st_size > HEAD_BYTES:
            found.append(path)
        else:
            path.unlink()
    return found
