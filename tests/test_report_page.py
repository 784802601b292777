"""The page as a file: its pictures, what it points to, a real browser, the command that makes it."""

import json
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from report_folders import CHROMIUM, read_page, write_run

from torchtitan_bio.config import Config, ConfigError
from torchtitan_bio.science import drawing, report


def a_picture(path):
    path.parent.mkdir(exist_ok=True)
    drawing.Figure(60, 40, "x").save(path)


def whole_run(folder):
    """With something in every section."""
    write_run(folder)
    for step in (10, 20, 30, 40, 50):
        a_picture(folder / "samples" / f"step-{step:08}.png")
    for name in ("raster.png", "realism.png"):
        a_picture(folder / "made" / name)
    realism = {"rate": {"samples": 0.5, "data": 0.25, "difference": 0.125, "floor": None}}
    (folder / "made" / "generated.json").write_text(json.dumps({"prompt": "words", "realism": realism}))
    return folder


def test_pictures_stand_in_the_page_itself_the_last_sample_among_them(tmp_path):
    html, page = read_page(whole_run(tmp_path / "run"))
    pictures = page.of("img")
    assert [each["alt"] for each in pictures] == [
        *(f"rasters at step {step}" for step in (10, 20, 30, 50)),
        *("raster", "realism"),
    ]
    assert page.row("rate") == ["0.500", "0.250", "0.125", "-", "spikes a bin"]


def test_nothing_on_the_page_points_out_of_it(tmp_path):
    html, page = read_page(whole_run(tmp_path / "run"))
    pointers = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href", "srcset")]
    assert len(pointers) >= 10 and all(value.startswith(("data:", "#")) for value in pointers)
    assert not re.search(r"https?:|url\(|@import|<script|javascript:|\son\w+=", html)
    anchors = {value[1:] for value in pointers if value.startswith("#")}
    assert anchors == {attributes["id"] for attributes in page.of("h2")}


def browse(page: Path, folder: Path):
    """(what the console said, the addresses that the page asked for, pixels)."""
    from PIL import Image

    picture, requests = folder / "picture.png", folder / "net.json"
    flags = (
        "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    )
    answer = subprocess.run(
        [CHROMIUM, *flags.split(), "--disable-sync", "--window-size=1000,1400", f"--user-data-dir={folder / 'profile'}"]
        + ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", f"--log-net-log={requests}"]
        + [f"--screenshot={picture}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert picture.exists(), answer.stderr
    events = [event.get("params", {}) for event in json.loads(requests.read_text())["events"]]
    # What a browser asks for on its own account, such as the time, has no page as its origin.
    asked = {each["url"] for each in events if "url" in each and each.get("initiator", "not an origin") != "not an origin"}
    console = [line for line in answer.stderr.splitlines() if ":CONSOLE" in line]
    return console, asked, np.asarray(Image.open(picture).convert("RGB"))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no browser: none of chromium, chromium-browser, google-chrome is on the PATH")
def test_a_real_browser_shows_the_page_without_a_complaint_or_a_request(tmp_path):
    report.write_page([whole_run(tmp_path / "run"), write_run(tmp_path / "two")], tmp_path / "page.html", say=lambda line: None)
    console, asked, pixels = browse(tmp_path / "page.html", tmp_path)
    assert (console, asked) == ([], set())
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50 and (pixels == 255).all(2).mean() > 0.5
    # Looked at in the same way, a page that does both is found out.
    bad = '<img src="http://page-asks.example/x.png"><script>console.error("page complains")</script>'
    (tmp_path / "bad.html").write_text(bad)
    console, asked, _ = browse(tmp_path / "bad.html", tmp_path)
    assert any("page complains" in line for line in console) and asked == {"http://page-asks.example/x.png"}


def test_as_a_command_it_writes_the_page_or_says_what_is_no_run(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for arguments, written in (
        ([str(folder)], folder / "report.html"),
        ([str(folder), str(folder)], tmp_path / "comparison.html"),
        ([str(folder), "--out", "x.html"], tmp_path / "x.html"),
    ):
        monkeypatch.setattr("sys.argv", ["report", *arguments])
        report.main()
        assert written.read_text().startswith("<!doctype html>")
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="no run folder.*metrics.jsonl"):
        report.main()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    (tmp_path / "file").touch()
    monkeypatch.setattr(report, "page", None)  # refused before any work
    for out, complaint in (("file/x.html", "file cannot be written: .*Name another"), (tmp_path, "is a folder; name a file")):
        monkeypatch.setattr("sys.argv", ["report", str(folder), "--out", str(out)])
        with pytest.raises(ConfigError, match=complaint):
            report.main()


def test_the_defaults_that_settings_are_compared_with_are_those_of_config_py(tmp_path):
    _, page = read_page(write_run(tmp_path / "run", config=Config()))
    head = next(table for table in page.tables if table and table[0] == ["", "run"] and len(table) > 40)
    assert {row[0] for row in head[1:]} == {
        f"{section}.{key}" for section, keys in asdict(Config()).items() for key in keys if section != "job"
    } - {"data.index_folder"}
    assert not any(row[-1:] == ["default"] and len(table) > 1 for table in page.tables for row in table[:1])
