"""The accelerators' benchmark, rehearsed on the CPU at toy size: borrowed minutes are not to be lost to its own mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOY = "--seq_len 256 --dim 64 --num_heads 4 --num_kv_heads 2 --ffn_dim 128 --num_layers 2 --budget_s 1".split()


@pytest.mark.slow
def test_every_slice_of_the_gpu_benchmark_runs_and_checks_itself(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "all", *TOY, "--json", str(tmp_path / "out.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    measured = json.loads((tmp_path / "out.json").read_text())
    assert all(row["error"] < 1e-5 for row in measured["kernels"])
    assert [row["kernel"] for row in measured["kernels"]] == ["flash", "math"] and measured["probe"][0]["name"] == "flash"
    assert len(measured["block"]) == 6 and all(row["seconds"] > 0 for row in measured["block"])
    assert [row["layers"] for row in measured["model"]] == [2, 2]
    *run, last = measured["longest"]
    assert [row["tokens"] for row in [*run, last]] == [256 * 2**number for number in range(len(run) + 1)]
    assert run and "would take longer" in last["skipped"]
