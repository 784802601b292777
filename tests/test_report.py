"""The page says what the run folder says, whatever is missing there, and nothing private; it needs nothing beside it."""

import json
import re
import time
from dataclasses import replace
from math import log

import numpy as np
import pytest
from report_folders import HELD_OUT, RUNGS, Reader, losses, read_page, start, train, validation, write_run

from torchtitan_bio import resume
from torchtitan_bio.config import Config
from torchtitan_bio.data import spikes
from torchtitan_bio.science import disclosure, rasters, report, report_parts, ring_hmm_floor


def test_the_numbers_on_the_page_are_those_of_the_folder(tmp_path):
    _, page = read_page(write_run(tmp_path / "run"))
    assert page.row("bits/spike")[0] == "1.234" and page.row("nats/count")[0] == "0.300"  # 1.2345 is a float below its half
    assert page.row("spikes scored")[0] == "1,234" and page.row("windows scored")[0] == "12 (all)"
    assert page.row("own-history n-gram") == ["0.900", "+0.334"] and page.row("pooled") == ["-3.000", "+4.234"]
    assert page.row("held-out score") == ["1.234 bits/spike after step 40"]
    assert page.row("best baseline") == ["0.900 bits/spike, own-history n-gram; the model is 0.334 above"]
    assert page.row("ended") == ["finished, step 40"]
    assert page.row("steps done") == ["40"] and page.row("most memory") == ["1.25 GiB a process"]
    assert page.row("speed, median") == ["5,000 tokens/s"] and page.row("waiting for data") == ["10.0% of it"]
    assert ["training.steps", "40", "1000"] in next(table for table in page.tables if table[0] == ["", "run", "default"])
    assert "Below the frame: pooled -3.00; run -60.0 at step 0." in page.text


def test_a_score_of_some_windows_says_so_beside_baselines_of_all(tmp_path):
    lines = [start(0), train(1, 2.0), validation(1, 1.2345, windows=16, subset="16 of 2998 windows, by hash")]
    _, page = read_page(write_run(tmp_path / "run", lines, steps=1))
    assert page.row("held-out score") == ["1.234 bits/spike after step 1, on 16 of 2998 windows, by hash"]
    assert "bits/spike on held-out activity after 1 steps, on 16 of 2998 windows, by hash" in page.text
    assert "run was scored on 16 of 2998 windows, by hash (validation.max_windows), and its baselines on all" in page.text
    assert "and its baselines on all" not in read_page(write_run(tmp_path / "whole"))[1].text


def test_the_scores_of_a_model_that_has_learnt_little_are_inside_the_frame(tmp_path):
    lines = [start(0), validation(0, -60.0), train(1, 2.0), validation(1, -17.0)]
    html, page = read_page(write_run(tmp_path / "run", lines, steps=1))
    assert "Below the frame" not in page.text
    assert "run, step 0: -60.0000 bits/spike" in html and "run, step 1: -17.0000 bits/spike" in html


def test_the_longest_name_of_a_level_has_room_beside_the_chart(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("pooled token 3-gram (the predecessor's)", "short"):
        (folder / "ladder.json").write_text(json.dumps({"held_out": HELD_OUT, "rungs": [[name, 0.5]]}))
        html, _ = read_page(folder)
        svg = html[html.rindex("viewBox", 0, html.index("bits per spike by step")) :].partition("</figure>")[0]
        width, begin = int(svg.split()[2]), float(re.search(r'<text x="([\d.]+)"[^>]*text-anchor="start"', svg)[1])
        assert width - begin > len(name) * 0.57 * 12.5  # letters of DejaVu Sans, the widest of the usual fonts
        assert begin > 500  # and the chart keeps its size


def test_on_a_narrow_screen_each_number_has_its_head_beside_it():
    found = Reader(report_parts.table(["", "bits/spike", ""], [["a", 1.5, "words"]], words=(0, 2)))
    assert found.tags[1] == ("table", {"class": "tall"})
    assert [each for each in found.of("td")] == [{"class": "w"}, {"data-head": "bits/spike"}, {"class": "w"}]
    assert Reader(report_parts.table([], [["a", 1.5]])).of("table") == [{}]


def test_a_dot_lies_where_the_axes_say_its_value_is(tmp_path):
    html, _ = read_page(write_run(tmp_path / "run"))
    svg = html[html.index('aria-label="bits per spike by step"') :].partition("</figure>")[0]
    ticks = re.findall(r'<text x="63.0" y="([\d.]+)" text-anchor="end"[^>]*>([\d.-]+)</text>', svg)
    (low_at, low), (high_at, high) = [(float(at) - 4, float(value)) for at, value in (ticks[0], ticks[-1])]
    ((along, title),) = re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"[^>]*><title>([^<]+)</title>', svg)
    value = low + (float(along) + report_parts.TOP - low_at) / (high_at - low_at) * (high - low)
    assert title == "run, step 40: 1.2345 bits/spike" and value == pytest.approx(1.2345, abs=0.005)


@pytest.mark.parametrize("num_columns", [7, 50, 320])
def test_thinning_loses_no_extreme_and_keeps_the_mean(num_columns):
    rng = np.random.default_rng(0)
    x, y = np.arange(1, 1001.0), rng.standard_normal(1000)
    y[100:400:7] = np.nan
    at, low, high, mean = report_parts.thin(x, y, num_columns)
    assert len(at) <= num_columns and (np.diff(at) > 0).all()
    assert np.nanmin(low) == np.nanmin(y) and np.nanmax(high) == np.nanmax(y)
    column = np.minimum((x - 1) / 999 * num_columns, num_columns - 1e-9).astype(int)
    for place in range(num_columns):
        of_column = y[column == place]
        assert mean[place] == pytest.approx(np.nanmean(of_column)) and low[place] == np.nanmin(of_column)
    assert np.isnan(report_parts.thin(x, np.where(x < 500, np.nan, y), 10)[3][:4]).all()


def test_few_points_are_not_thinned():
    x, y = np.arange(5.0), np.array([1.0, np.nan, 3.0, 2.0, 5.0])
    assert all(np.array_equal(each, y, equal_nan=True) for each in report_parts.thin(x, y, 5)[1:])


def test_fifty_thousand_steps_make_a_small_page_soon(tmp_path):
    rng = np.random.default_rng(0)
    lines = [start(0), *(train(step, loss) for step, loss in enumerate((losses(50_000) + rng.random(50_000)).tolist(), 1))]
    folder = write_run(tmp_path / "run", [*lines, validation(50_000, 1.0)], steps=50_000)
    for number in range(6):  # more than are shown, and more than there is room for
        path = folder / "samples" / f"step-{number:08}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(400_000))
    began = time.process_time()
    html, page = read_page(folder)
    assert time.process_time() - began < 10 and len(html) < 2_000_000
    assert len(page.of("img")) == 2 and "Left out of this page for their size" in page.text


def test_two_runs_share_axes_and_what_differs_is_listed(tmp_path):
    other = Config(training=replace(Config().training, steps=80), optimizer=replace(Config().optimizer, lr=0.5))
    folders = write_run(tmp_path / "one"), write_run(tmp_path / "two", config=other, steps=80)
    rungs = [[name, value + 1e-9] for name, value in RUNGS]  # fitted on a machine with more threads
    (folders[1] / "ladder.json").write_text(json.dumps({"held_out": HELD_OUT, "rungs": rungs}))
    html, page = read_page(*folders)
    assert page.row("own-history n-gram") == ["0.900", "+0.334"] and page.text.count("per-neuron histogram") == 2
    charts = re.findall(r'aria-label="bits per spike by step"', html)
    assert len(charts) == 1 and html.count("<li>") >= 4
    colors = [style for style in (report.report_scores.style(0), report.report_scores.style(1))]
    assert len(set(colors)) == 2 and len({color for color, _ in colors}) == 2 and len({dash for _, dash in colors}) == 2
    for number, name in enumerate(("one", "two")):
        assert re.search(rf'stroke="{colors[number][0]}"[^>]*></path></svg>{name}</li>', html)
    differing = next(table for table in page.tables if table[0] == ["", "one", "two"] and table[1][0].startswith("training."))
    assert differing[1:] == [["training.steps", "40", "80"], ["optimizer.lr", "0.0003", "0.5"]]
    assert page.row("held-out score") == ["1.234 bits/spike after step 40", "1.234 bits/spike after step 80"]


def test_runs_of_one_name_are_numbered(tmp_path):
    _, page = read_page(write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run"))
    assert page.row("steps done") == ["40", "40"] and "run (1)" in page.text and "run (2)" in page.text


def test_runs_on_other_held_out_data_share_no_chart_of_scores_and_no_baselines(tmp_path):
    lines = [start(0), train(1, 2.0), validation(1, 0.75, held_out="of something else")]
    html, page = read_page(write_run(tmp_path / "one"), write_run(tmp_path / "two", lines, ladder=True))
    assert html.count('aria-label="bits per spike by step"') == 2 and "different held-out data" in page.text
    assert page.row("own-history n-gram") == ["0.900", "+0.334"]  # once, and of run one
    assert page.row("best baseline")[1] == ""


def test_without_validation_the_page_has_its_loss_and_says_that_no_score_is_known(tmp_path):
    folder = write_run(tmp_path / "run", [start(0), *(train(step, 1 / step) for step in range(1, 9))], ladder=False)
    html, page = read_page(folder)
    assert "No validation is on record" in page.text and "training loss by step" in html
    assert "bits per spike by step" not in html and page.row("steps done") == ["8"]


def test_a_run_that_failed_before_its_first_step_is_a_page_that_says_why(tmp_path):
    failed = {"reason": "failed", "step": None, "attempt": 2, "rank": 1, "phase": "building the model", "error": "Boom: 7 < 8"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text(json.dumps(failed))
    _, page = read_page(tmp_path / "run")
    assert "run failed before its first step, rank 1 in its phase building the model: Boom: 7 < 8" in page.text
    assert "no metrics.jsonl" in page.text and "no config.toml" in page.text and page.row("ended") == ["failed"]


def test_a_run_resumed_three_times_with_skipped_steps_lists_them(tmp_path):
    lines = [start(0, attempt=1)]
    for step in range(1, 41):
        lines.append(train(step, 1.0 if step != 17 else None, skipped=step == 17))
        lines += [{"kind": "skip", "step": 17, "rows": ["a (row 3) from bin 5"]}] if step == 17 else []
        lines += [start(step, attempt=step // 10 + 1)] if step in (10, 20, 30) else []
    exit_json = {"reason": "preempted", "why": "SIGTERM", "step": 40, "attempt": 4}
    exit_json["previous"] = {"step": 31, "attempt": 3, "rank": 0, "phase": "backward", "error": "OSError: disk"}
    html, page = read_page(write_run(tmp_path / "run", lines, exit_json=exit_json))
    assert page.row("starts on record") == ["4"] and page.row("steps skipped") == ["1"]
    assert page.row("ended") == ["told to stop; it can go on (SIGTERM), step 40"]
    assert [row[:3] for table in page.tables for row in table if row[-1:] == ["2.13.0"]] == [
        ["0", "1", "2"],
        ["10", "2", "2"],
        ["20", "3", "2"],
        ["30", "4", "2"],
    ]
    assert page.row("17") == ["a (row 3) from bin 5"]
    assert html.count("went on from step 20") == 3  # on the charts of loss, speed and gradient
    assert "run, attempt 3, failed at step 31, rank 0 in its phase backward: OSError: disk" in page.text


def test_a_torn_last_line_is_told_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 41, "lo')
    _, page = read_page(folder)
    assert "1 line(s) of metrics.jsonl cannot be read" in page.text and page.row("steps done") == ["40"]


def test_broken_files_are_told_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    for name in ("exit.json", "ladder.json", "config.toml"):
        (folder / name).write_bytes(b"\xff{")
    (folder / "samples").mkdir()
    (folder / "samples" / "step-00000007.png").write_text("no picture")
    _, page = read_page(folder)
    assert all(f"{name} cannot be read" in page.text for name in ("exit.json", "ladder.json", "config.toml"))
    assert page.row("held-out score") == ["1.234 bits/spike after step 40"] and page.of("img") == []


def test_a_record_of_another_version_is_told_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation").mkdir()
    for name in ("ladder.json", "evaluation/evaluation.json"):
        (folder / name).write_text('{"a": 1}')
    _, page = read_page(folder)
    assert "ladder.json is not of this version: it has no 'rungs'" in page.text
    assert "evaluation.json is not of this version: it has no 'checkpoints'" in page.text
    scored = {"step": 1, "scores": {"bits_per_spike": "x"}, "curves": {"all": {}}}
    for content in (
        {"checkpoints": []},
        {"checkpoints": [{"scores": {}}], "data": 3},
        {"checkpoints": [scored]},
        an_evaluation() | {"checkpoints": [an_evaluation()["checkpoints"][0] | scored]},
        an_evaluation() | {"warnings": 7},
    ):
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps(content))
        (folder / "ladder.json").write_text(json.dumps({"held_out": HELD_OUT, "rungs": [["a name", "and no number"]]}))
        said = []
        report.write_page([folder], tmp_path / "page.html", said.append)
        page = Reader((tmp_path / "page.html").read_text())
        for name in ("evaluation.json", "ladder.json"):
            told = f"{name} is not of this version: "
            assert told in page.text and any(line.startswith(f"report: run: {told}") for line in said)
        assert page.row("held-out score") == ["1.234 bits/spike after step 40"]


def an_evaluation(groups=(), value=1.0):
    """As evaluate.py leaves it, of two checkpoints."""
    scores = {key: value for key in ("bits_per_spike", "bits_per_spike_hist", "bits_per_spike_rate")} | {"spikes": 77}
    scores["standard_errors"] = dict.fromkeys(scores, 0.125)
    context = {
        "from_bin": [0, 1, 2],
        "to_bin": [1, 2, 4],
        "bits_per_spike": [0.25, 0.5, value],
        "standard_error": [0.1, None, 0.1],
    }
    neuron = {"from_neuron": [0, 1], "to_neuron": [1, 2], "bits_per_spike": [value, None]}
    curves = {"context": context, "neuron": neuron, "pit": {"shares": [0.05] * 20, "distance": 0.0625, "counts": 9}}
    both = {"fp_bits_per_spike": value / 2, "standard_error": 0.03125}
    ahead = {"fp_bits_per_spike": [value, value / 2], "standard_error": [0.1, 0.1], "together": both, "prompts": 8}
    last = {"scores": scores, "macro": scores, "groups": dict.fromkeys(groups, scores), "curves": {"all": curves}}
    last["forecast"] = ahead | {"horizon": 2, "rollouts": 4, "baselines": {"persistence": ahead | {"model_ahead": ahead}}}
    last["ideal"] = {"floor": 0.5, "gap": 0.0625, "standard_error": 0.0078125, "captured": 0.875, "is_leak": True}
    last["ideal"]["curves"] = {"all": {"context": {"bits_per_spike": [0.5, 1.0, 1.5]}}}
    rung = {"name": "own-history n-gram", "bits_per_spike": 0.75, "standard_error": 0.25}
    rungs = [rung | {"model_ahead": value - 0.75, "model_ahead_standard_error": 0.015625}]
    data = {"source": "embedded:a2929", "split": "test", "bin_width_s": 0.02}
    common = {"data": data, "windows": "all", "warnings": ["take care"], "baselines": {"all": {"rungs": rungs}}}
    return common | {"checkpoints": [last | {"step": 20}, last | {"step": 40}]}


def test_an_evaluation_is_shown_with_its_errors_and_two_on_the_same_axes(tmp_path):
    folders = []
    for name, value in (("one", 1.0), ("two", 1.5)):
        folders.append(write_run(tmp_path / name))
        (folders[-1] / "evaluation").mkdir()
        (folders[-1] / "evaluation" / "evaluation.json").write_text(json.dumps(an_evaluation(["lab"], value)))
    _, page = read_page(folders[0])
    assert page.row("lab") == ["1.000 ± 0.125", "1.000 ± 0.125", "1.000 ± 0.125", "", "77", ""]
    assert page.row("all counts")[3] == "0.750, own-history n-gram"
    assert ["own-history n-gram", "0.750 ± 0.250", "0.250 ± 0.016"] in sum(page.tables, [])
    assert page.row("persistence") == ["0.500 ± 0.031", "0.500 ± 0.031"]
    assert "one is 0.0625 ± 0.0078 nats/count above the ideal observer's 0.5000; 87.5% of the gain" in page.text
    assert "one is better than the best possible" in page.text and "take care" in page.text
    html, page = read_page(*folders)
    for label, dots in (("context", 6), ("neuron", 2), ("checkpoint", 4)):
        svg = html[html.index(f'aria-label="bits per spike by {label}"') :].partition("</figure>")[0]
        assert svg.count("<circle") == dots and "one: 1.0000" in svg and "two: 1.5000" in svg
    assert "Without a spike, and so without a score: one at 1; two at 1." in page.text
    assert "each place is another neuron. Below the frame" not in page.text
    evaluation = an_evaluation(["lab"])
    evaluation["checkpoints"][1]["curves"]["all"]["neuron"]["bits_per_spike"] = [-40.0, -0.5]
    (folders[0] / "evaluation" / "evaluation.json").write_text(json.dumps(evaluation))
    _, page = read_page(folders[0])
    assert "each place is another neuron. Below the frame: one -40.0 at 0." in page.text
    assert "(a bin is 20 ms)" in page.text and page.text.count("one: at most 0.0625 away") == 1


def test_nothing_private_and_no_markup_of_others_is_on_the_page(tmp_path):
    config = Config(
        job=replace(Config().job, description="of Alice Smith", dump_folder="/home/alice/runs/x"),
        data=replace(Config().data, source="/home/alice/secret.npz", index_folder="/scratch/alice", include_sources=["<b>x"]),
        checkpoint=replace(Config().checkpoint, init_from="/home/alice/weights"),
    )
    token = "hf_" + "A1" * 12
    failed = {"reason": "failed", "step": 3, "error": f"OSError: /home/alice/x {token}", "phase": "<script>alert(1)</script>"}
    folder = write_run(tmp_path / "alice@host", config=config, exit_json=failed)
    evaluated = an_evaluation(["/home/alice/data", "<i>monkey"])
    evaluated |= {"asked": {"checkpoint": "/home/alice/runs"}, "warnings": [f"not evaluated: /home/alice/runs {token}"]}
    evaluated["data"]["source"], evaluated["checkpoints"][0]["loaded"] = token, "/home/alice/runs"
    generated = {"asked": {"out": "/home/alice/out"}, "prompt": "of /home/alice/secret.npz", "realism": None}
    for name, record in (("evaluation/evaluation.json", evaluated), ("made/generated.json", generated)):
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(record))
    html, page = read_page(folder)
    assert not re.search("alice|Alice|hf_A|/home|/scratch", html)
    assert not {"script", "i"} & {tag for tag, _ in page.tags}
    drawn = [
        rasters.draw(np.zeros((2, 3), np.uint8), np.ones((1, 2, 3), np.uint8), title=title).pixels()
        for title in ("from the first 3 bins of /home/alice/x", disclosure.LEFT_OUT, "from the first 3 bins of lab/m1/day1")
    ]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()
    assert "<i>monkey" in page.text and ["data.include_sources", '["<b>x"]', "[]"] in sum(page.tables, [])


def test_the_floor_of_a_ring_hmm_is_that_of_just_the_windows_scored(tmp_path):
    source = "ring-hmm:n=3,K=5,p=0.1,bins=8,test_rows=20"
    settings = {"source": source, "seq_len": 32, "seed": 42}
    held_out = spikes.build(**settings, split="test", mode="aligned", overlap=True)
    windows = ring_hmm_floor.window_nll(held_out)
    counts, nll = sum(number for *_, number in windows), sum(nats for _, nats, _ in windows)
    config = Config(data=replace(Config().data, source=source), training=replace(Config().training, seq_len=32, steps=1))
    scored = dict(held_out=resume.sha256(held_out.fingerprint), counts=counts, windows=20, nll=0.9, null_nll=1.1, hist_nll=1.0)
    folder = write_run(tmp_path / "run", [start(0), train(1, 1.0), validation(1, 0.2, **scored)], config=config, ladder=False)
    run = report.read(folder)
    expected = (1.1 * counts - nll) / (1234 * log(2))
    assert run.ideal == pytest.approx({"nll": nll / counts, "bits_per_spike": expected})
    html, page = read_page(folder)
    assert page.row("ideal observer: the best possible")[0] == f"{expected:.3f}"
    for change in ({"held_out": "other"}, {"counts": counts - 1}, {"windows": 19}):
        lines = [start(0), train(1, 1.0), validation(1, 0.2, **scored | change)]
        assert report.read(write_run(tmp_path / str(change), lines, config=config)).ideal is None
