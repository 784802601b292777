"""train.main on a standing group of ranks: a whole run of the debug TOML in a second or two, bent by a test as it needs."""

import contextlib
import io
import json
import signal
from pathlib import Path

import pytest
from ranks import on_ranks

TOML = str(Path(__file__).parents[1] / "train_configs" / "debug.toml")


@contextlib.contextmanager
def deaf_again():
    """Afterwards signals end this process as before, which is how a group of ranks is ended."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train_main(rank, folder, arguments, bend=None) -> str:
    """What one rank of a run prints. bend(patch, rank) may replace parts of it, as pytest's monkeypatch does."""
    import train
    from torchtitan_bio import config_loader, distributed

    out = io.StringIO()
    with deaf_again(), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(distributed, "stop", lambda: None)  # the group is used again
        if bend:
            bend(patch, rank)
        train.main(config_loader.load(["--job.config_file", TOML, "--job.dump_folder", str(folder), *arguments]))
    return out.getvalue()


def outcome(rank, folder, arguments, bend) -> tuple[str, str, str]:
    """What a run raised, in words ("" where it ended well); what it printed, to stdout and to stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            return "", train_main(rank, folder, arguments, bend), err.getvalue()
        except Exception as error:
            return f"{type(error).__name__}: {error}", "", err.getvalue()


def start(folder, *arguments, bend=None, ranks=1) -> list[tuple[str, str, str]]:
    """The outcome of each rank of a whole run."""
    return on_ranks(ranks, outcome, folder, arguments, bend)


def before_step(patch, step, task):
    """Have a run call task() before the mathematics of this step (counted from its own start)."""
    import train

    calls, original = [], train.train_step

    def train_step(*settings):
        calls.append(None)
        if len(calls) == step:
            task()
        return original(*settings)

    patch.setattr(train, "train_step", train_step)


def exit_json(folder) -> dict:
    return json.loads((folder / "exit.json").read_text())


def lines(folder, kind) -> list[dict]:
    """Of metrics.jsonl."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def losses(folder) -> list[float]:
    steps = lines(folder, "train")
    assert [entry["step"] for entry in steps] == list(range(1, len(steps) + 1)), "a step is missing or doubled"
    return [entry["loss"] for entry in steps]


def saved_steps(folder) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoint").glob("step-????????"))
