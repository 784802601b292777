"""What a run writes down is complete, exact, and each step once."""

import contextlib
import gzip
import json
import re
import resource
import threading
import time

import numpy as np
import pytest
import torch

from torchtitan_bio import metrics, profiling


def entries(folder) -> list[dict]:
    refuse = {"parse_constant": lambda word: pytest.fail(f"{word} is not JSON")}
    return [json.loads(line, **refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder) -> list[tuple[str, int]]:
    return [(entry["kind"], entry["step"]) for entry in entries(folder)]


def run(folder, first: int, last: int, **settings):
    """The lines of a run with a validation at 0 and at every fourth step, after the step itself."""
    file = metrics.MetricsFile(folder, enabled=True, resumed_from=first, **settings)
    if first == 0:
        file.write("validation", 0, nll=1.0)
    for step in range(first + 1, last + 1):
        file.write("train", step, loss=1 / step)
        if step % 4 == 0:
            file.write("validation", step, nll=1 / step)
    file.close()


def test_a_float_comes_back_with_every_bit(tmp_path):
    numbers = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308]
    file = metrics.MetricsFile(tmp_path, enabled=True)
    for step, number in enumerate(numbers):
        file.write("train", step, loss=number)
    file.close()
    assert [entry["loss"] for entry in entries(tmp_path)] == numbers


def test_every_line_is_json_whatever_the_number_is(tmp_path):
    file = metrics.MetricsFile(tmp_path, enabled=True)
    values = {"nan": float("nan"), "numpy": np.float32(0.5), "torch": torch.tensor(3), "sources": {"a": [np.nan, 1.0]}}
    file.write("validation", 1, **values, minus_infinity=-np.inf, none=None, words="x\ny", flag=True)
    file.close()
    expected = {"nan": None, "numpy": 0.5, "torch": 3, "sources": {"a": [None, 1.0]}}
    expected |= {"minus_infinity": None, "none": None, "words": "x\ny", "flag": True}
    assert entries(tmp_path) == [{"kind": "validation", "step": 1, **expected}]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    file = metrics.MetricsFile(tmp_path, enabled=True)
    file.write("train", 1, loss=2.0)
    assert steps_of(tmp_path) == [("train", 1)]
    file.close()


def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(tmp_path):
    run(tmp_path / "straight", 0, 12)
    run(tmp_path / "resumed", 0, 11)  # saved at 8 and killed at 11
    run(tmp_path / "resumed", 8, 12)
    assert entries(tmp_path / "resumed") == entries(tmp_path / "straight")


def test_a_run_that_starts_over_keeps_no_line_of_its_first_try(tmp_path):
    run(tmp_path, 0, 3)
    run(tmp_path, 0, 2)
    assert steps_of(tmp_path) == [("validation", 0), ("train", 1), ("train", 2)]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path):
    run(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    run(tmp_path, 3, 4)
    assert steps_of(tmp_path) == [("validation", 0), ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("validation", 4)]


def test_a_line_that_is_not_of_metrics_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 "):
        metrics.MetricsFile(tmp_path, enabled=True, resumed_from=1)
    assert path.read_text() == '{"kind": "train", "step": 1}\n[1]\n' and list(tmp_path.iterdir()) == [path]


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """As on a disk that is nearly full, the last write that fits in part does so, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_that_a_full_disk_refuses_are_written_in_order_once_there_is_room(tmp_path):
    told = []
    file = metrics.MetricsFile(tmp_path, enabled=True, say=told.append)
    file.write("train", 1, loss=1.0)
    with files_of_at_most(100):
        for step in (2, 3, 4):
            file.write("train", step, loss=1 / step)
        torn = (tmp_path / "metrics.jsonl").read_text()
        assert len(torn) == 100 and not torn.endswith("\n")
        assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2]
    assert len(told) == 1 and "File too large; its lines are kept in memory until there is room" in told[0]
    file.write("train", 5, loss=0.2)
    assert told[1:] == [f"{tmp_path / 'metrics.jsonl'} is whole again"]
    file.close()
    assert [(entry["step"], entry["loss"]) for entry in entries(tmp_path)] == [(step, 1 / step) for step in range(1, 6)]


def test_lines_for_which_there_is_no_room_to_the_end_are_counted_and_go_on_from_a_checkpoint(tmp_path):
    told = []
    file = metrics.MetricsFile(tmp_path, enabled=True, say=told.append)
    file.write("train", 1, loss=1.0)
    with files_of_at_most(80):
        file.write("train", 2, loss=0.5)
        taken_along = file.unwritten()
        file.write("train", 3, loss=0.25)
        file.close()
    assert "lacks its last 2 lines (File too large)" in told[-1]
    for _ in range(2):  # the second time they are there
        file = metrics.MetricsFile(tmp_path, enabled=True, resumed_from=2, unwritten=taken_along, say=told.append)
        file.close()
        assert [(entry["step"], entry["loss"]) for entry in entries(tmp_path)] == [(1, 1.0), (2, 0.5)]


def test_a_disk_too_full_for_tensorboard_costs_its_curves_and_not_the_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(threading, "excepthook", lambda raised: None)  # TensorBoard writes in a thread, which dies of it
    told, values = [], {f"score_{number}": 1.0 for number in range(40)}
    with files_of_at_most(2**16):  # enough for the lines
        file = metrics.MetricsFile(tmp_path, enabled=True, tensorboard=True, say=told.append)
        for step in range(60):
            file.write("train", step, **values)
        file.close()
    assert [line["step"] for line in metrics.read(tmp_path)] == list(range(60))
    assert len(told) == 1 and "in TensorBoard" in told[0] and "metrics.jsonl has all of them" in told[0]


def test_other_ranks_write_nothing(tmp_path):
    file = metrics.MetricsFile(tmp_path / "run", enabled=False)
    file.write("train", 1, loss=1.0)
    file.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, 0, 6, tensorboard=True)
    run(tmp_path, 4, 8, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("validation/nll")] == [0, 4, 8]


def make_log(folder, **settings) -> metrics.Metrics:
    plain = {"enabled": True, "resume_step": 0, "steps": 8, "tokens_per_step": 1000, "log_freq": 4, "tensorboard": False}
    return metrics.Metrics(folder, **(plain | {"device": torch.device("cpu")} | settings))


def take_steps(log, first: int, last: int, *, data_s=0.0, step_s=0.0, pause_s=0.0):
    for step in range(first, last + 1):
        log.start_step()
        time.sleep(data_s)
        log.data_ready()
        time.sleep(step_s)
        log.train(step, 2.5, 0.5, 1e-3, flops=1e9)
        time.sleep(pause_s)


SCORES = {"nll": 0.75, "bits_per_spike": 0.25, "null_nll": 0.75, "windows": 7}


def test_the_record_has_every_step_and_the_console_some(tmp_path, capsys):
    log = make_log(tmp_path)
    log.validation(0, SCORES, headline="bits_per_spike")
    take_steps(log, 1, 8)
    log.close()
    first, *lines = entries(tmp_path)
    assert first == {"kind": "validation", "step": 0, "headline": "bits_per_spike", **SCORES}
    assert [line["step"] for line in lines] == list(range(1, 9))
    promised = "loss grad_norm lr tokens tokens_per_s data_wait_s mfu peak_memory_gib".split()
    assert all(key in line for line in lines for key in promised)
    assert [line["tokens"] for line in lines] == [1000 * step for step in range(1, 9)]
    validation, *shown = capsys.readouterr().out.splitlines()
    assert validation == "step 0/8  validation: bits/spike 0.2500"
    pattern = r"step (\d)/8  loss 2\.5000  bits/spike 0\.2500  [\d,]+ tokens/s  MFU n/a  ETA \d+:\d\d"
    assert [re.fullmatch(pattern, line)[1] for line in shown] == ["1", "4", "8"]


def test_a_resumed_log_counts_the_whole_run_and_remembers_its_headline(tmp_path):
    log = make_log(tmp_path)
    take_steps(log, 1, 6)
    log.validation(6, SCORES, headline="bits_per_spike")
    take_steps(log, 7, 7)
    log.validation(7, SCORES | {"bits_per_spike": 9.0}, headline="bits_per_spike")  # after a step that runs again
    log.close()
    log = make_log(tmp_path, resume_step=6)
    assert (log.last_validation["step"], log.last_validation["bits_per_spike"]) == (6, 0.25)
    take_steps(log, 7, 8)
    log.close()
    assert [line["tokens"] for line in entries(tmp_path) if line["kind"] == "train"] == [1000 * step for step in range(1, 9)]
    assert log.steps_here == 2


def test_saving_and_validation_are_in_no_rate_but_in_the_eta(tmp_path, capsys):
    log = make_log(tmp_path, steps=1000, log_freq=1)
    take_steps(log, 1, 3, data_s=0.01, step_s=0.02, pause_s=0.3)
    log.close()
    for line in entries(tmp_path):
        # A sleep may last longer than asked, but by less than the pause on any machine.
        assert 0.03 <= line["step_s"] < 0.3
        assert 0.01 <= line["data_wait_s"] <= line["step_s"] - 0.02
        assert line["tokens_per_s"] == 1000 / line["step_s"]
    minutes, seconds = re.search(r"step +3/1000 .* ETA (\d+):(\d+)", capsys.readouterr().out).groups()
    assert int(minutes) * 60 + int(seconds) > 997 * 0.2  # three steps had two pauses of 0.3 s between them


def test_a_skipped_step_is_marked_and_its_loss_is_null(tmp_path, capsys):
    log = make_log(tmp_path)
    log.start_step()
    log.data_ready()
    log.train(1, float("nan"), float("inf"), 1e-3, flops=1e9, skipped=True)
    log.close()
    (line,) = entries(tmp_path)
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (None, None, True)
    assert "loss nan" in capsys.readouterr().out


def test_other_ranks_print_and_leave_nothing(tmp_path, capsys):
    log = make_log(tmp_path / "run", enabled=False)
    log.validation(0, SCORES, headline="nll")
    take_steps(log, 1, 4)
    log.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_durations_are_told_as_on_a_clock():
    assert [metrics.clock_time(seconds) for seconds in (0, 59.4, 59.6, 3723.4)] == ["0:00", "0:59", "1:00", "1:02:03"]


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI250X", 191.5),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H1000", None),
        ("Tesla V100-SXM2-32GB", None),
        ("CPU", None),
    ],
)
def test_the_peak_is_the_makers_dense_figure_or_unknown(name, teraflops):
    assert metrics.peak_flops(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_the_shares_of_a_known_peak_count_recomputation_in_hfu_only(tmp_path, monkeypatch):
    monkeypatch.setitem(metrics.PEAK_FLOPS, "CPU", 1e12)
    log = make_log(tmp_path, ranks=4)
    log.start_step()
    log.data_ready()
    time.sleep(0.01)
    log.train(1, 2.5, 0.5, 1e-3, flops=1e9, hfu_factor=4 / 3, attention_share=0.7, moved_bytes=10**6)
    (line,) = entries(tmp_path)
    assert line["attention_share"] == 0.7 and line["reserved_memory_gib"] is None
    assert line["offload_gb_per_s"] == pytest.approx(1e-3 / line["step_s"], rel=1e-12)
    assert line["tokens_per_s_per_device"] == pytest.approx(line["tokens_per_s"] / 4, rel=1e-12)
    assert line["mfu"] == pytest.approx(1e9 / line["step_s"] / 1e12, rel=1e-12)
    assert line["hfu"] == pytest.approx(line["mfu"] * 4 / 3, rel=1e-12)
    log.close()


def test_peak_memory_grows_by_what_is_allocated():
    before = metrics.peak_memory_gib(torch.device("cpu"))
    block = np.ones(int(before * 2**30) // 8 + 2**23)  # more than the peak by 64 MiB, whatever is freed
    assert metrics.peak_memory_gib(torch.device("cpu")) - before >= 2**-4
    del block


def work(folder, num_steps: int, **settings):
    plain = {"rank": 3, "enable_profiling": True, "profile_freq": 4, "enable_memory_snapshot": False}
    with profiling.trace(folder, **(plain | settings)) as profiler:
        for step in range(num_steps):
            with torch.profiler.record_function(f"work {step}"):
                torch.ones(8).sum()
            profiler.step()


def test_each_fourth_step_leaves_a_trace_of_itself_alone(tmp_path):
    work(tmp_path / "profile", 9, start_step=100)
    files = sorted((tmp_path / "profile").iterdir())
    assert [file.name for file in files] == ["step-00000104-rank-3.json.gz", "step-00000108-rank-3.json.gz"]
    for file, expected in zip(files, ("work 3", "work 7"), strict=True):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        assert {event["name"] for event in events if event.get("name", "").startswith("work")} == {expected}


def test_without_profiling_no_folder_is_made(tmp_path):
    work(tmp_path / "profile", 9, enable_profiling=False)
    assert not (tmp_path / "profile").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_memory_snapshot_without_a_cuda_device_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"enable_memory_snapshot = false"):
        work(tmp_path, 1, enable_memory_snapshot=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_memory_snapshot_is_left_each_fourth_step_and_when_memory_runs_out(tmp_path):
    work(tmp_path, 5, enable_profiling=False, enable_memory_snapshot=True)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000004-rank-3-memory.pickle"]
    settings = {"rank": 0, "enable_profiling": False, "profile_freq": 4, "enable_memory_snapshot": True}
    with pytest.raises(torch.OutOfMemoryError), profiling.trace(tmp_path, **settings):
        torch.empty(2**50, device="cuda")
    assert (tmp_path / "step-00000001-out-of-memory-rank-0-memory.pickle").exists()
