"""One run folder, one run: who holds it stands in its file `lock`, whose time of change is the holder's heartbeat.

A holder that died leaves the file behind. It is taken over when its process is gone from this host, when it belongs to an
earlier start of this very job (a requeue), or when its heart has not beaten for too long.
"""

import errno
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

BEAT_S = 10
MISSED_BEATS = 6  # however short the limits of a run are: one that misses fewer may be alive
TRIES = 20


class Lock:
    """Held from its making, by `take`, until release(). A thread touches the file, so that long saves look alive."""

    def __init__(self, path: Path, descriptor: int, content: bytes):
        self.path, self._descriptor, self._content = path, descriptor, content
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def check(self):
        """RuntimeError if someone else has the folder by now: this process stood still for so long that it seemed dead."""
        content = _read(self.path)
        if content is None and not self.path.parent.is_dir():
            return  # the whole folder is away: nobody took it, and what is to be written into it will fail in its own words
        if content != self._content:
            now = "is gone" if content is None else f"was taken over by {name(_parse(content))}"
            raise RuntimeError(f"{self.path} {now}; this run saves nothing more in a folder that it does not hold")

    def release(self):
        """Give the folder back."""
        self._ended.set()
        if _read(self.path) == self._content:
            self.path.unlink(missing_ok=True)

    def _beat(self):
        while not self._ended.wait(BEAT_S):
            try:
                os.utime(self._descriptor)  # not by its name, which may be another's by now
            except OSError:
                continue  # the disk is away for a moment


def take(folder: Path, *, stale_s: float, say: Callable[[str], None] = print) -> Lock:
    """Hold the run folder, which is made if need be; ValueError that names the holder if there is one. One rank does this.

    stale_s: a heart that has not beaten for so long is dead, if that is a minute at least.
    """
    path, own, stale_s = folder / "lock", describe_self(), max(stale_s, MISSED_BEATS * BEAT_S)
    content = json.dumps(own).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for _ in range(TRIES):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                _clear(path, own, stale_s, say)
                continue
            try:
                if os.write(descriptor, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:  # a lock without a name would keep everyone out
                os.close(descriptor)
                path.unlink()
                raise
            return Lock(path, descriptor, content)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error}") from error
    raise ValueError(
        f"{path} could not be taken in {TRIES} tries, because others try too; give this run another job.dump_folder. Where no "
        f"other run is left, delete {path} and {path}.claim-*"
    )


def describe_self() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "token": secrets.token_hex(8),
    }


def why_dead(holder: dict, own: dict, age_s: float, stale_s: float) -> str | None:
    """Why what a lock says is no longer true; None where it is."""
    if age_s > stale_s:
        return f"no sign of life for {age_s:.0f} s"
    # Of an equal count it may be another run of the same allocation. torchrun's count says nothing here: a second torchrun,
    # refused because the first one's run lives, restarts its ranks too.
    if own["job"] and holder.get("job") == own["job"] and holder["restarts"] < own["restarts"]:
        return "this job was started again"
    if holder.get("host") == own["host"] and not _is_alive(holder["pid"]):
        return "its process is gone"
    return None


def name(holder: dict) -> str:
    """A holder as a person looks for it."""
    if not holder:
        return "a process that has not said its name"
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"


def _clear(path: Path, own: dict, stale_s: float, say):
    """Remove a lock that nobody holds; ValueError if somebody does."""
    try:
        content, age_s = path.read_bytes(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return  # given back just now
    holder = _parse(content)
    reason = why_dead(holder, own, age_s, stale_s)
    if reason is None:
        raise ValueError(
            f"{path.parent} is in use by {name(holder)}; its last sign of life was {max(age_s, 0):.0f} s ago. Stop it first, "
            f"or give this run another job.dump_folder. After {stale_s:.0f} s without a sign it counts as dead; who knows that "
            f"it is deletes {path}"
        )
    # Whoever makes this file may remove that lock, and no other: without it, of two that judge the same lock the slower one
    # would remove what the quicker one has put in its place.
    claim = path.with_name(f"lock.claim-{hashlib.sha256(content).hexdigest()[:16]}")
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        time.sleep(0.1)
        return
    try:
        if _read(path) == content:
            path.unlink()
            say(f"lock: taken over from {name(holder)}: {reason}")
    finally:
        claim.unlink()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> dict:
    """{} for a lock that was never written to its end, or not by us."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and holder.keys() >= {"host", "pid", "job", "restarts", "since"} else {}


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():  # of an earlier life of this container
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
