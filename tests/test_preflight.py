"""Before ranks start the data is looked at, unless looking would take time."""

from pathlib import Path

import numpy as np
import pytest
from spike_files import table, write_arrow

import preflight
from torchtitan_bio import config_loader
from torchtitan_bio.config import ConfigError
from torchtitan_bio.data import recordings, sources

TOML = str(Path(__file__).parents[1] / "train_configs" / "debug.toml")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """What train.sh asks for so many ranks."""

    def ask(ranks, *settings):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        fixed = ["--job.config_file", TOML, "--job.dump_folder", str(tmp_path / "new"), "--validation.enable=false"]
        try:
            preflight.main(config_loader.load([*fixed, *settings]))
        finally:
            assert not (tmp_path / "new").exists() and not (tmp_path / "cache").exists()

    return ask


def test_fewer_windows_than_ranks_are_refused_before_ranks_start(start):
    long = ["--training.seq_len=800000", "--job.must_fit=false"]
    with pytest.raises(
        ConfigError, match=r"^embedded:a2929 has 1 training windows of training.seq_len=800000 for 2 ranks; take"
    ):
        start(2, *long)
    start(1, *long)
    start(2, *long, "--parallelism.context_parallel_degree=2")  # which share the one window


def test_large_files_are_left_to_the_ranks_and_small_ones_are_read(start, tmp_path, monkeypatch):
    source = tmp_path / "rows.arrow"
    write_arrow(source, table([np.zeros((4, 90), np.uint8), [[1, 2], [3]]]))
    settings = [f"--data.source={source}"]
    with pytest.raises(ConfigError, match="ragged: its neurons have from 1 to 2 bins"):
        start(1, *settings)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", source.stat().st_size)
    with pytest.raises(ConfigError, match="ragged"):
        start(1, *settings)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", source.stat().st_size - 1)
    monkeypatch.setattr(recordings.Recordings, "index", lambda self: pytest.fail("hours of a login node"))
    start(1, *settings)


def test_large_files_are_looked_at_once_their_index_is_there(start, tmp_path, monkeypatch):
    source, folder = tmp_path / "rows.arrow", tmp_path / "index"
    write_arrow(source, table([np.zeros((4, 90), np.uint8)]))
    settings = [f"--data.source={source}", f"--data.index_folder={folder}", "--training.global_batch_size=8"]
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 0)
    start(8, *settings)
    assert not folder.exists()
    recordings.Recordings([source], folder).index()
    with pytest.raises(ConfigError, match=r"has \d training windows of training.seq_len=128 for 8 ranks"):
        start(8, *settings)
