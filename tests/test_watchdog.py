"""A process that stands still is ended from outside Python, and its stacks are left beside the place where it stood."""

import re
import subprocess
import sys
import time

import pytest

from torchtitan_bio import watchdog

BEGIN = """
import ctypes, os, pathlib, sys, time
from torchtitan_bio import watchdog
watchdog.GRACE_S = 0.5
folder = pathlib.Path(sys.argv[1])
watch = watchdog.Watch(folder / "x-rank-3.txt", rank=3, limit_s=0.5, told=lambda words: print(words, flush=True))
"""


def run(folder, text):
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", BEGIN + text, str(folder)], capture_output=True, text=True, timeout=60)
    return result, time.monotonic() - began, folder / "x-rank-3.txt"


def test_a_hang_is_told_with_what_was_done_and_ended_and_its_file_names_rank_step_and_phase(tmp_path):
    text = """
def read_a_sample():
    time.sleep(50)
watch.enter("data", 7)
watch.tell(lambda: "reading sample 8")
watch.tell(lambda: "reading sample 9")
read_a_sample()
"""
    result, seconds, path = run(tmp_path, text)
    assert result.returncode == 1 and 1 < seconds < 10
    assert f"no progress for 0.5 s or more in step 7, data, reading sample 9; the stacks will be in {path}" in result.stdout
    head, _, stacks = path.read_text().partition("\n")
    assert head.rstrip() == "rank 3, step 7, data" and "read_a_sample" in stacks and "Timeout" in stacks
    assert watchdog.dumps(tmp_path) == [path]


def test_a_library_that_never_lets_python_run_again_is_ended_too(tmp_path):
    text = 'def inside_a_library():\n    ctypes.PyDLL(None).sleep(50)\nwatch.enter("backward", 2)\ninside_a_library()'
    result, seconds, path = run(tmp_path, text)
    assert result.returncode == 1 and seconds < 10
    assert "step 2, backward" in path.read_text() and "inside_a_library" in path.read_text()


def test_a_crash_in_native_code_leaves_its_stacks(tmp_path):
    result, _, path = run(tmp_path, 'def crash():\n    os.abort()\nwatch.enter("forward", 4)\ncrash()')
    assert result.returncode < 0
    assert (
        re.search(r"rank 3, step 4, forward *\nFatal Python error: Aborted", path.read_text()) and "crash" in path.read_text()
    )


def test_what_is_over_or_cannot_be_put_in_words_is_left_out(tmp_path):
    text = """
def begin():
    watch = watchdog.Watch(folder / "x-rank-3.txt", rank=3, limit_s=0.5, told=lambda words: print(words, flush=True))
    watch.enter("data", 7)
    watch.tell(lambda: "reading sample 9")
    return watch
begin().tell(None)
begin().enter("data", 7)
begin().tell(lambda: 1 / 0)
time.sleep(50)
"""
    result, _, _ = run(tmp_path, text)
    assert result.stdout.count("in step 7, data; the stacks") == 3 and "Error" not in result.stderr


@pytest.mark.slow
def test_progress_keeps_a_process_alive_and_patience_and_rest_outlive_the_limit(tmp_path):
    text = """
for step in range(5):
    watch.enter("forward", step)
    time.sleep(0.25)
watch.enter("save", patient=True)
time.sleep(1.3)
watch.enter("optimizer")
watch.rest()
time.sleep(1.3)
print((folder / "x-rank-3.txt").read_text())
watch.end()
print(sorted(folder.iterdir()) if folder.exists() else "no folder")
"""
    result, _, _ = run(tmp_path / "stacks", text)
    assert result.returncode == 0 and result.stderr == ""
    assert "rank 3, step 4, optimizer" in result.stdout and "no progress" not in result.stdout and "no folder" in result.stdout


def test_a_killed_process_leaves_only_its_place_which_goes_at_the_next_start(tmp_path):
    result, _, path = run(tmp_path, 'watch.enter("data", 7)\nos.kill(os.getpid(), 9)')
    assert result.returncode == -9
    assert path.read_text().strip() == "rank 3, step 7, data"
    assert watchdog.dumps(tmp_path) == [] and not path.exists()


@pytest.mark.parametrize(
    ("step", "place"), [(None, "before the first step, reading the data"), (0, "step 0, reading the data")]
)
def test_a_place_names_the_step_once_there_is_one(step, place, tmp_path):
    result, _, _ = run(tmp_path, f'watch.enter("reading the data", {step})\nprint(watch.place)\nwatch.end()')
    assert result.stdout.strip() == place
