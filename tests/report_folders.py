"""Run folders made by hand, and their pages read as a person would."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from math import log

import numpy as np

from torchtitan_bio import config_loader, resume
from torchtitan_bio.config import Config
from torchtitan_bio.science import report

HELD_OUT = {"ids": "abc", "seq_len": 64}
RUNGS = [["Poisson null (oracle)", 0.0], ["per-neuron histogram", 0.25], ["own-history n-gram", 0.9], ["pooled", -3.0]]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def validation(step, bits_per_spike, **others):
    scores = dict(nll=0.3, nll_all=0.28, nll_bos=0.001, leak=1e-5, bits_per_count=0.3 / log(2), bits_per_spike_hist=0.7)
    scores |= dict(bits_per_spike_rate=0.8, null_nll=0.5, hist_nll=0.45, spikes=1234, counts=9876, tokens=9999, windows=12)
    scores |= dict(subset="all", held_out=resume.sha256(HELD_OUT), seconds=2.0, headline="bits_per_spike")
    return {"kind": "validation", "step": step, "bits_per_spike": bits_per_spike} | scores | others


def train(step, loss, **others):
    numbers = dict(
        grad_norm=1.5, lr=1e-3, skipped=False, tokens=step * 100, tokens_per_s=5000.0, step_s=0.02, data_wait_s=0.002
    )
    return {"kind": "train", "step": step, "loss": loss} | numbers | dict(mfu=None, peak_memory_gib=1.25) | others


def start(step, **others):
    return {
        "kind": "start",
        "step": step,
        "device": "CPU",
        "ranks": 2,
        "torch": "2.13.0",
        "attention": {"name": "flash"},
    } | others


def losses(steps):
    return 5 * np.exp(-np.arange(1, steps + 1) / steps * 4)


def write_run(folder, lines=None, *, config=None, exit_json=None, ladder=True, steps=40):
    folder.mkdir(parents=True)
    config = config or Config(training=replace(Config().training, steps=steps))
    (folder / "config.toml").write_text(config_loader.dump(config))
    if lines is None:
        lines = [start(0, attempt=1), validation(0, -60.0), *(train(step, loss) for step, loss in enumerate(losses(steps), 1))]
        lines += [validation(steps, 1.2345)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "exit.json").write_text(json.dumps(exit_json or {"reason": "finished", "step": steps, "attempt": 1}))
    if ladder:
        (folder / "ladder.json").write_text(json.dumps({"held_out": HELD_OUT, "rungs": RUNGS, "left_out": {}}))
    return folder


class Reader(HTMLParser):
    """Tables as rows of cells, words outside them, tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.tags, self.words, self._cell = [], [], [], None
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data):
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def row(self, label):
        (found,) = [row for table in self.tables for row in table if row and row[0] == label]
        return found[1:]

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def read_page(*folders):
    html = report.page([report.read(folder) for folder in folders])
    return html, Reader(html)
