"""Where the time goes and where the memory goes: files that Perfetto and PyTorch's memory viewer open."""

from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile, schedule


@contextmanager
def trace(
    folder: str | Path,
    *,
    rank: int,
    enable_profiling: bool,
    profile_freq: int,
    enable_memory_snapshot: bool,
    start_step: int = 0,
):
    """Yield an object whose step() is called after every optimizer step; each profile_freq-th leaves what is asked for.

    Steps are counted from start_step, where a resumed run goes on, so that it does not write over its own files.
    """
    recorders = []
    with ExitStack() as stack:
        if enable_profiling or enable_memory_snapshot:
            Path(folder).mkdir(parents=True, exist_ok=True)
        if enable_profiling:
            recorders.append(stack.enter_context(_chrome_trace(Path(folder), profile_freq, rank, start_step)))
        if enable_memory_snapshot:
            recorders.append(stack.enter_context(_memory_snapshot(Path(folder), profile_freq, rank, start_step)))

        def step():
            for recorder in recorders:
                recorder.step()

        yield SimpleNamespace(step=step)


def _chrome_trace(folder: Path, freq: int, rank: int, start_step: int):
    """One step in freq. The one before it warms the profiler up, whose own start would be the longest event of the trace."""

    def write(profiler):
        path = folder / f"step-{start_step + profiler.step_num:08d}-rank-{rank}.json.gz"
        try:
            profiler.export_chrome_trace(str(path))
        except OSError as error:  # a trace is not worth a run: the disk is full, say
            path.unlink(missing_ok=True)
            print(f"warning: no trace {path}: {error}", flush=True)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    plan = schedule(wait=freq - 2, warmup=1, active=1)
    return profile(activities=activities, schedule=plan, on_trace_ready=write, record_shapes=True)


@contextmanager
def _memory_snapshot(folder: Path, freq: int, rank: int, start_step: int):
    """A snapshot each freq steps and one when memory runs out: the last 100,000 allocations and frees with their stacks.

    It is a pickle, which is what PyTorch's viewer reads: load only those that you made.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "a memory snapshot needs a CUDA device and there is none; set profiling.enable_memory_snapshot = false"
        )
    steps = start_step

    def write(name: str):
        torch.cuda.memory._dump_snapshot(str(folder / f"{name}-rank-{rank}-memory.pickle"))

    def step():
        nonlocal steps
        steps += 1
        if (steps - start_step) % freq == 0:
            write(f"step-{steps:08d}")

    torch.cuda.memory._record_memory_history(max_entries=100_000)
    try:
        yield SimpleNamespace(step=step)
    except torch.OutOfMemoryError:
        write(f"step-{steps + 1:08d}-out-of-memory")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
