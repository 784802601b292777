"""How fast, how good, how full: what a run says about itself.

`Metrics` is what the training loop talks to; `MetricsFile` keeps the record: JSON lines with every digit. MFU counts the FLOPs
that the mathematics needs, half of them for causal attention and none across documents; HFU counts those that the device
performs, recomputation included. Both are shares of the device's dense peak.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

# Dense bfloat16 FLOP/s as the makers state them, without sparsity, of what torch counts as one device (one die of an MI250X).
# The first name that the device's name contains as whole words decides.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "MI355X": 2.5e15,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,
}

UNWRITTEN = "unwritten_metrics.json"


def peak_flops(device_name: str) -> float | None:
    """The device's peak; None for one that is not in the table or a part of one, since a guess would make every MFU a lie."""
    words = f" {device_name.replace('-', ' ')} "
    if " MIG " in words or " Laptop " in words:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


def mfu(flops: float, seconds: float, peak: float | None) -> float | None:
    """The share of one device's peak that its FLOPs in so many seconds come to; None on unknown hardware."""
    return None if peak is None else flops / seconds / peak


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held so far: tensors on an accelerator, all of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB elsewhere


def reserved_memory_gib(device: torch.device) -> float | None:
    """What the accelerator's allocator has taken at most, fragments included; None on a CPU, which has no such thing."""
    return torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else None


def device_memory_bytes(device: torch.device) -> int:
    """All the memory there is: the accelerator's, or the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory_bytes()


def host_memory_bytes() -> int:
    """What the machine has, or what a container or a SLURM job may take of it (control groups, version 2)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        folder = Path("/sys/fs/cgroup") / own.removeprefix("0::/")
        for limit in (each / "memory.max" for each in (folder, *folder.parents)):
            if limit.is_file() and limit.read_text().strip().isdecimal():
                limits.append(int(limit.read_text()))
    except (OSError, StopIteration):
        pass
    return min(limits)


def peak_memory_line(device: torch.device, predicted_bytes: float | None) -> str:
    """The measured peak beside the predicted one, where there is a prediction."""
    measured, predicted = peak_memory_gib(device), (predicted_bytes or math.nan) / 2**30
    if predicted_bytes is None:
        return f"peak memory: {measured:.2f} GiB"
    if device.type == "cpu":
        return f"peak memory: {measured:.2f} GiB of the whole process; predicted for its tensors: {predicted:.2g} GiB"
    return f"peak memory: {measured:.2f} GiB, predicted {predicted:.2f} GiB ({measured / predicted - 1:+.1%})"


def _plain(value):
    """As JSON has it: numbers of numpy and torch become Python's, and what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(entry: dict, prefix: str):
    """(path, number) of everything in a nested entry that a curve can be drawn of."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{key}", value


def _supersede(path: Path, resumed_from: int):
    """Keep the lines of steps that will not run again, and replace the file in one move.

    A run saves after it has validated, so both lines of the step that it resumes from are there to stay. The last line of a run
    that died may be torn: its step runs again.
    """
    kept = path.with_suffix(".kept")
    try:
        with path.open(encoding="utf-8") as lines, kept.open("w", encoding="utf-8") as out:
            for number, line in enumerate(lines, start=1):
                if not line.endswith("\n"):
                    break
                try:
                    step = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number} is not a line of metrics ({error}); delete it, or move the file"
                    ) from error
                if step <= resumed_from:
                    out.write(line)
            out.flush()
            os.fsync(out.fileno())
        kept.replace(path)
    finally:
        kept.unlink(missing_ok=True)


def _set_aside(path: Path) -> Path:
    """Rename the metrics of a run that left no checkpoint: they are no part of the run that starts, and not ours to delete."""
    number = next(n for n in range(1, 10**6) if not path.with_name(f"metrics.before-{n}.jsonl").exists())
    return path.rename(path.with_name(f"metrics.before-{number}.jsonl"))


class _Lines:
    """A file to append lines to. What a full disk refuses waits for the next line, and is told once."""

    def __init__(self, path: Path, say: Callable):
        self._path, self._say, self._is_told = path, say, False
        self._file, self._waiting, self._begun = path.open("ab", buffering=0), deque(), 0

    def write(self, line: str):
        self._waiting.append(line.encode() + b"\n")
        try:
            self._write_waiting()
        except OSError as error:
            if not self._is_told:
                self._say(f"warning: {self._path}: {error.strerror}; its lines are kept in memory until there is room")
            self._is_told = True

    def _write_waiting(self):
        while self._waiting:
            self._begun += self._file.write(self._waiting[0][self._begun :])  # of a disk that is nearly full a part
            if self._begun == len(self._waiting[0]):
                self._waiting.popleft()
                self._begun = 0
        if self._is_told:
            self._say(f"{self._path} is whole again")
        self._is_told = False

    def waiting(self) -> list[str]:
        return [line.decode().rstrip("\n") for line in self._waiting]

    def close(self):
        with self._file:
            try:
                self._write_waiting()
            except OSError as error:
                self._say(
                    f"warning: {self._path} lacks its last {len(self._waiting)} lines ({error.strerror}); those that the "
                    "newest checkpoint holds are added when the run is started again"
                )


class MetricsFile:
    """metrics.jsonl in the run folder, one object a line, and TensorBoard's tb/ if asked for. Other ranks than 0 write nothing.

    `resumed_from`: the step whose checkpoint this run goes on from, 0 for a fresh start. Lines of steps that run again go, and
    those of an earlier run in the same folder are set aside. `unwritten`: lines that its checkpoint holds, since there was no
    room for them here. A full disk costs a run its curves in TensorBoard.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        enabled: bool,
        resumed_from: int = 0,
        unwritten: Sequence[str] = (),
        tensorboard: bool = False,
        say: Callable = print,
    ):
        self._lines = self._board = None
        self._say = say
        if not enabled:
            return
        path = Path(folder) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and resumed_from:
            _supersede(path, resumed_from)
        elif path.exists() and path.stat().st_size:
            say(f"metrics of an earlier run are kept as {_set_aside(path)}")
        self._lines = _Lines(path, say)
        if unwritten:
            there = set(path.read_text(encoding="utf-8").splitlines())  # room may have been found after that checkpoint
            for line in unwritten:
                if line not in there:
                    self._lines.write(line)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path.parent / "tb"), purge_step=resumed_from and resumed_from + 1)

    def write(self, kind: str, step: int, **values):
        if self._lines is None:
            return
        entry = _plain(values)
        self._lines.write(json.dumps({"kind": kind, "step": step, **entry}, allow_nan=False))
        if self._board is not None:
            try:
                for path, number in _numbers(entry, kind):
                    self._board.add_scalar(path, number, step)
            except OSError as error:
                self._drop_the_board(step, error)

    def _drop_the_board(self, step: int, error: OSError):
        self._say(f"warning: the curves in TensorBoard end before step {step} ({error}); metrics.jsonl has all of them")
        board, self._board = self._board, None
        with suppress(OSError):
            board.close()

    def unwritten(self) -> list[str]:
        """Lines that wait for room."""
        return self._lines.waiting() if self._lines else []

    def close(self):
        """Whatever is missing then is told."""
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._say(f"warning: the last curves in TensorBoard are missing ({error}); metrics.jsonl has all of them")
        lines, self._lines, self._board = self._lines, None, None
        if lines is not None:
            lines.close()


class Metrics:
    """What the training loop tells: all of it goes to metrics.jsonl; validations and each log_freq-th step to the console too.

    A step lasts from start_step() to train(): saving and validation are in no rate, but in the ETA. The loop has read the loss
    by then, so the device is done too. `ranks`: how many devices share tokens_per_step.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        enabled: bool,
        resume_step: int,
        unwritten: Sequence[str] = (),
        steps: int,
        tokens_per_step: int,
        log_freq: int,
        tensorboard: bool,
        device: torch.device,
        ranks: int = 1,
        say: Callable = print,
    ):
        self._file = MetricsFile(
            folder, enabled=enabled, resumed_from=resume_step, unwritten=unwritten, tensorboard=tensorboard, say=say
        )
        self._enabled, self._device, self._ranks = enabled, device, ranks
        self._steps, self._tokens_per_step, self._log_freq = steps, tokens_per_step, log_freq
        self._peak = peak_flops(device_name(device))
        self._first_start, self._training_s, self._moved_bytes = None, 0.0, 0
        self._unlogged = []  # (seconds, FLOPs) of the steps since the last line on the console
        self.steps_here = 0  # steps that this process has done
        validations = [entry for entry in (read(folder) if enabled else []) if entry["kind"] == "validation"]
        self.last_validation = validations[-1] if validations else None  # also of the run that this one resumes

    def has_validation(self, step: int, held_out: str) -> bool:
        """Whether the last validation was after this step, on held-out data of this digest. Rank 0 alone can know."""
        last = self.last_validation or {}
        return (last.get("step"), last.get("held_out")) == (step, held_out)

    def start(self, step: int, **facts):
        """The run starts or goes on, after so many steps, under these circumstances."""
        self._file.write("start", step, device=device_name(self._device), **facts)

    def start_step(self):
        self._started = time.perf_counter()
        self._first_start = self._first_start or self._started

    def data_ready(self):
        self._data_wait_s = time.perf_counter() - self._started

    def train(
        self,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        *,
        flops: float,
        hfu_factor: float | None = None,
        attention_share: float | None = None,
        moved_bytes: int | None = None,
        skipped: bool = False,
    ):
        """Step number `step` is done.

        flops: what the mathematics of a rank's part of it needs; hfu_factor: FLOPs performed for each of them;
        attention_share: attention's part of them; moved_bytes: of activations, to host memory and back so far, or None.
        """
        now = time.perf_counter()
        seconds = now - self._started
        self._training_s += seconds
        self._unlogged.append((seconds, flops))
        self.steps_here += 1
        share = mfu(flops, seconds, self._peak)
        self._file.write(
            "train",
            step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            skipped=skipped,
            tokens=step * self._tokens_per_step,
            tokens_per_s=self._tokens_per_step / seconds,
            tokens_per_s_per_device=self._tokens_per_step / seconds / self._ranks,
            step_s=seconds,
            data_wait_s=self._data_wait_s,
            mfu=share,
            hfu=None if share is None or hfu_factor is None else share * hfu_factor,
            attention_share=attention_share,
            offload_gb_per_s=None if moved_bytes is None else (moved_bytes - self._moved_bytes) / seconds / 1e9,
            peak_memory_gib=peak_memory_gib(self._device),
            reserved_memory_gib=reserved_memory_gib(self._device),
        )
        self._moved_bytes = moved_bytes or 0
        if self.steps_here == 1 or step % self._log_freq == 0 or step == self._steps:
            self._print_step(step, loss, now)

    def _print_step(self, step: int, loss: float, now: float):
        """The rates are means over the steps since the line before."""
        seconds, flops = (sum(column) / len(self._unlogged) for column in zip(*self._unlogged, strict=True))
        self._unlogged = []
        pauses = (now - self._first_start) / self._training_s  # as long and as frequent as they have been
        self._print(
            f"step {step:>{len(str(self._steps))}}/{self._steps}",
            f"loss {loss:.4f}",
            *([readable(self.last_validation)] if self.last_validation else []),
            f"{self._tokens_per_step / seconds:,.0f} tokens/s",
            f"MFU {mfu(flops, seconds, self._peak):.1%}" if self._peak else "MFU n/a",
            f"ETA {clock_time((self._steps - step) * seconds * pauses)}",
        )

    def skip(self, step: int, rows: list[str]):
        """The recordings that a step had read which no rank took."""
        self._file.write("skip", step, rows=rows)

    def validation(self, step: int, scores: dict, *, headline: str):
        """The scores of the held-out set after so many steps; `headline` names the one that the console repeats."""
        self._file.write("validation", step, **scores, headline=headline)
        self.last_validation = {"step": step, **scores, "headline": headline}
        self._print(f"step {step:>{len(str(self._steps))}}/{self._steps}", f"validation: {readable(self.last_validation)}")

    def _print(self, *words: str):
        if self._enabled:
            print("  ".join(words), flush=True)

    def documents(self) -> dict[str, dict]:
        """What a checkpoint takes along: lines that a full disk keeps waiting. A run that goes on from it writes them."""
        lines = self._file.unwritten()
        return {UNWRITTEN: {"lines": lines}} if lines else {}

    def close(self):
        self._file.close()


def unwritten(step_folder: Path) -> list[str]:
    """The lines that a checkpoint has taken along."""
    path = step_folder / UNWRITTEN
    return json.loads(path.read_bytes())["lines"] if path.exists() else []


def read(folder: str | Path) -> list[dict]:
    """All lines of a run folder's metrics.jsonl, but for a last one that is still being written."""
    with (Path(folder) / "metrics.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def readable(validation: dict) -> str:
    """The headline of a validation: bits/spike 1.2345"""
    name, value = validation["headline"], validation[validation["headline"]]
    return f"{name.replace('_per_', '/')} {'n/a' if value is None else f'{value:.4f}'}"


def clock_time(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
