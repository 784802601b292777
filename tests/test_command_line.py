"""A mistyped flag of any script is answered with the one that was meant; what is right, or is configuration, is let pass."""

import os
import sys

import pytest

import dcp_to_llama
import evaluate
import generate
import llama_to_dcp
import plan
import prepare
from torchtitan_bio import exits
from torchtitan_bio.science import report


def read_report(words):
    """This one reads its flags inside exits.run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", *words])
        patch.setattr(os, "_exit", lambda code: pytest.fail(f"exits.run took it for a failure: {code}"))
        exits.run(report.main)


@pytest.mark.parametrize(
    ("read", "words", "answer"),
    [
        (evaluate.read_own_flags, "--chekpoint outputs/x", "--chekpoint is no flag; did you mean --checkpoint?"),
        (evaluate.read_own_flags, "--checkpoint x --no_baselines", "--no_baselines is no flag; did you mean --no-baselines?"),
        (evaluate.read_own_flags, "--checkpoint x --widnows=3", "--widnows is no flag; did you mean --windows?"),
        (plan.read_own_flags, "--no-trcae", "--no-trcae is no flag; did you mean --no-trace?"),
        (generate.read_flags, "--checkpoint x --out y --topk 3", "--topk is no flag; did you mean --top-k?"),
        (generate.read_flags, "--checkpoint x --out y --colour red", "unrecognized arguments: --colour red"),
        (prepare.read_flags, "spikes x --outt y", "--outt is no flag; did you mean --out?"),
        (prepare.read_flags, "inspect x --bin_width=1", "--bin_width is no flag; did you mean --bin-width?"),
        (prepare.read_flags, "split x --tset 0.1", "--tset is no flag; did you mean --test?"),
        (llama_to_dcp.parse, "--input-dir x --output_dir y", "--input-dir is no flag; did you mean --input_dir?"),
        (dcp_to_llama.parse, "--input_dir x --output_dir y --dryrun", "--dryrun is no flag; did you mean --dry_run?"),
        (read_report, "outputs/x --uot y", "--uot is no flag; did you mean --out?"),
    ],
)
def test_a_mistyped_flag_is_answered_with_the_one_that_was_meant(capsys, read, words, answer):
    with pytest.raises(SystemExit, match="2"):
        read(words.split())
    assert capsys.readouterr().err.endswith(f"error: {answer}\n")


@pytest.mark.parametrize("read", [evaluate.read_own_flags, plan.read_own_flags])
@pytest.mark.parametrize("words", ["--print-config", "--training.seq_len 64", "--data.split=test", "--seq_len 64"])
def test_configuration_is_left_to_those_who_know_it(read, words):
    assert read(["--checkpoint=x", *words.split()] if read is evaluate.read_own_flags else words.split())[1] == words.split()


@pytest.mark.parametrize(
    "read",
    [generate.read_flags, prepare.read_flags, llama_to_dcp.parse, dcp_to_llama.parse, read_report],
    ids=lambda f: f.__module__,
)
def test_help_ends_a_script_with_0(read):
    with pytest.raises(SystemExit, match="0"):
        read(["--help"])


def test_what_follows_two_dashes_is_no_flag():
    assert prepare.read_flags(["inspect", "x", "--", "--uot"]).sources == ["x", "--uot"]
