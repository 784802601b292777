"""train.sh and test.sh start what they say. python3, srun and scontrol are stand-ins that write down how they are called."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.run import get_args_parser

import preflight
from torchtitan_bio import config_loader, metrics
from torchtitan_bio.config import ConfigError

ROOT = Path(__file__).resolve().parents[1]

# A python3 that answers questions by a `report` beside it or, without one, as the real Python does; it "makes" environments.
PYTHON3 = r"""#!/usr/bin/env bash
beside=$(dirname "$0")
record() {
    local settings="OMP=${OMP_NUM_THREADS-unset} CUDA=${CUDA_VISIBLE_DEVICES-unset}"
    { printf '%s\x1f' "$settings RANK=${RANK-unset} MASTER=${MASTER_ADDR-unset}" "$0" "$@"; printf '\x1e'; } >>"$CALLS"
}
case "$1 ${2-}" in
    "- "*)
        echo "$*" >>"$CALLS.asked"
        if [[ -f $beside/report ]]; then cat >/dev/null; cat "$beside/report"; else exec "$REAL_PYTHON" "$@"; fi ;;
    "-c "*) exec "$REAL_PYTHON" "$@" ;;
    "-m venv")
        record "$@"
        made=${!#}
        mkdir -p "$made/bin"
        cp "$0" "$made/bin/python" && touch "$made/bin/pip" && chmod +x "$made/bin/pip"
        echo "none venv torch" >"$made/bin/report"
        case "$*" in *--system-site-packages*) cp "$beside/report" "$made/bin/report" ;; esac ;;
    "-m pip") record "$@"; echo "2.13.0 venv" >"$beside/report" ;;
    *) record "$@"
       case "$*" in
           *preflight.py*) echo "for $WORLD_SIZE" >>"$CALLS.asked"; echo "run folder"; exit "${CHECK:-0}" ;;
           *) exit "${FAIL:-0}" ;;
       esac ;;
esac
"""
SRUN = r"""#!/usr/bin/env bash
{ printf '%s\x1f' "" srun "$@"; printf '\x1e'; } >>"$CALLS"
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = '#!/usr/bin/env bash\n[[ "$*" == "show hostnames node-a[7-9]" ]] && printf "node-a7\\nnode-a8\\nnode-a9\\n"\n'
JOB = {"SLURM_JOB_ID": "4012345", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node-a[7-9]"}


class Site:
    """A checkout and a machine; `start` runs a command there and gives its exit code, stderr and the calls of the stand-ins."""

    def __init__(self, folder: Path):
        self.checkout, self.bin, self.home = folder / "the checkout", folder / "bin", folder / "home"
        for made in (self.checkout, self.bin, self.home):
            made.mkdir()
        for name in ("train.sh", "test.sh", ".ci", "constraints.txt"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, self.checkout / name)
        (self.checkout / "train.py").touch()
        for name, text in (("python3", PYTHON3), ("srun", SRUN), ("scontrol", SCONTROL)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.calls = folder / "calls"

    def report(self, line: str):
        """What the active Python has: its torch, the kind of environment, what it lacks."""
        (self.bin / "report").write_text(line + "\n")

    def gpus(self, count: int) -> dict:
        torch = self.home / "site" / "torch"
        torch.mkdir(parents=True)
        (torch / "__init__.py").write_text(f"class cuda:\n    device_count = staticmethod(lambda: {count})\n")
        return {"PYTHONPATH": str(torch.parent)}

    def start(self, *arguments: str, script: str | Path = "train.sh", cwd: Path | None = None, **env: str):
        self.calls.write_text("")
        plain = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.home)}
        plain |= {"CALLS": str(self.calls), "REAL_PYTHON": sys.executable}
        answer = subprocess.run(
            ["bash", str(self.checkout / script), *arguments],
            cwd=cwd or self.home,
            env=plain | env,
            capture_output=True,
            text=True,
        )
        calls = [call.split("\x1f")[:-1] for call in self.calls.read_text().split("\x1e")[:-1]]
        return answer.returncode, answer.stderr, calls


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def settings_of(calls) -> list[str]:
    """The arguments of train.py in the last call, as torchrun's own parser understands it."""
    return torchrun(calls[-1]).training_script_args


def torchrun(call):
    return get_args_parser().parse_args(call[call.index("torch.distributed.run") + 1 :])


def test_without_arguments_the_quickstart_is_trained(site):
    code, _, calls = site.start(NPROC="2")
    assert code == 0
    assert torchrun(calls[-1]).training_script == str(site.checkout / "train.py")
    assert settings_of(calls) == ["--job.config_file", str(site.checkout / "train_configs/quickstart.toml")]


def test_arguments_that_begin_with_dashes_are_settings_of_the_quickstart(site):
    _, _, calls = site.start("--training.steps", "5", NPROC="2")
    assert settings_of(calls)[1:] == [str(site.checkout / "train_configs/quickstart.toml"), "--training.steps", "5"]


def test_a_config_and_settings_arrive_as_they_were_typed(site):
    typed = ["my runs/a b.toml", "--job.description", "two  spaces * $HOME", '--model.freeze=["*"]']
    code, _, calls = site.start(*typed, NPROC="2")
    assert code == 0
    assert settings_of(calls) == ["--job.config_file", *typed]


def test_a_config_named_by_its_setting_replaces_the_quickstart(site):
    _, _, calls = site.start("--job.config_file=x.toml", NPROC="2")
    assert settings_of(calls) == ["--job.config_file=x.toml"]


@pytest.mark.parametrize("question", ["--help", "-h", "--print-config"])
def test_a_question_is_answered_without_torchrun(site, question):
    code, _, calls = site.start("x.toml", question)
    assert code == 0
    assert [call[2:] for call in calls] == [[str(site.checkout / "train.py"), "--job.config_file", "x.toml", question]]


def test_a_mistake_in_the_config_ends_with_code_2_before_torchrun(site):
    code, _, calls = site.start("x.toml", NPROC="2", CHECK="2")
    assert code == 2
    assert not any("torch.distributed.run" in call for call in calls)


def test_preflight_prints_the_run_folder_and_nothing_else(capsys):
    preflight.main(
        config_loader.load(["--job.config_file", str(ROOT / "train_configs/debug.toml"), "--job.dump_folder", "my runs/a"])
    )
    assert capsys.readouterr().out == "my runs/a\n"


LITTLE = SimpleNamespace(free=2**20)


@pytest.mark.parametrize(
    ("target", "name", "value", "told"),
    [
        (shutil, "disk_usage", LITTLE, r"new/checkpoint has 1.0 MiB free, and 2 more checkpoint\(s\) of 1.3 MiB each"),
        (os, "access", False, r"new/checkpoint cannot be written: \S+ is read-only"),
        (metrics, "host_memory_bytes", 2**20, r"a process needs 0.0 GiB and its share is 0.0"),
    ],
    ids=["disk", "folder", "memory"],
)
def test_what_disk_folder_or_memory_refuse_is_refused_before_ranks_start(target, name, value, told, tmp_path, monkeypatch):
    monkeypatch.setattr(target, name, lambda *settings: value)
    for each in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(each, raising=False)
    settings = ["--job.config_file", str(ROOT / "train_configs/debug.toml"), "--job.dump_folder", str(tmp_path / "new")]
    with pytest.raises(ConfigError, match=told):
        preflight.main(config_loader.load(settings))
    assert list(tmp_path.iterdir()) == []


def test_the_config_is_checked_for_all_processes_of_the_job(site):
    site.start("x.toml", NPROC="4", **JOB)
    assert Path(f"{site.calls}.asked").read_text().endswith("for 12\n")


def test_one_process_per_gpu_shares_the_cores(site):
    _, _, calls = site.start(**site.gpus(2))
    assert torchrun(calls[-1]).nproc_per_node == "2"
    assert torchrun(calls[-1]).standalone
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert calls[-1][0].startswith(f"OMP={max(cores // 2, 1)} ")


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_process_that_is_alone_keeps_all_cores_and_its_own_exit_code(site, gpus):
    code, _, calls = site.start("x.toml", **site.gpus(gpus), FAIL="7")
    assert calls[-1][2:] == [str(site.checkout / "train.py"), "--job.config_file", "x.toml"]
    assert calls[-1][0].startswith("OMP=unset ") and code == 7


def test_a_rank_that_the_site_exports_is_not_that_of_a_process_that_is_alone(site):
    _, _, calls = site.start(NPROC="1", RANK="1", WORLD_SIZE="2", MASTER_ADDR="elsewhere")
    assert calls[-1][0].endswith("RANK=unset MASTER=unset")


def test_nproc_and_omp_num_threads_overrule_what_is_found(site):
    _, _, calls = site.start(NPROC="4", OMP_NUM_THREADS="7", **site.gpus(8))
    assert torchrun(calls[-1]).nproc_per_node == "4"
    assert calls[-1][0].startswith("OMP=7 ")


@pytest.mark.parametrize(
    "number", ["NPROC=0", "NPROC=two", "NPROC=-1", "TASKS_PER_NODE=0", "TASKS_PER_NODE=2"], ids=lambda number: number
)
def test_an_impossible_number_of_processes_is_refused(site, number):
    name, _, value = number.partition("=")
    code, told, calls = site.start(**{name: value})  # without SLURM there is no srun for TASKS_PER_NODE
    assert code == 1 and number in told and calls == []


@pytest.mark.skipif("signals_to_handle" not in get_args_parser().format_help(), reason="this torchrun cannot")
def test_torchrun_passes_sigusr1_on_where_it_can_and_under_nohup_does_not_hear_a_terminal_close(site):
    _, _, calls = site.start(NPROC="2")
    assert torchrun(calls[-1]).signals_to_handle == "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        _, _, calls = site.start(NPROC="2")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert torchrun(calls[-1]).signals_to_handle == "SIGTERM,SIGINT,SIGQUIT,SIGUSR1"
    _, _, calls = site.start(**site.gpus(2))  # a torch without the option
    assert not any("signals" in argument for argument in calls[-1])


def test_torchrun_args_come_after_ours_and_before_the_script(site):
    _, _, calls = site.start(NPROC="1", TORCHRUN_ARGS="--max-restarts 3 --log-dir *")
    assert (torchrun(calls[-1]).max_restarts, torchrun(calls[-1]).log_dir) == (3, "*")


def test_several_nodes_meet_on_the_first_host(site):
    code, told, calls = site.start("x.toml", SRUN_ARGS="--mpi=none", **JOB, **site.gpus(8))
    assert code == 0
    *_, srun, started = calls
    assert srun[1] == "srun"
    assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--mpi=none", "--kill-on-bad-exit=1"} <= set(srun)
    arguments = torchrun(started)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.rdzv_backend) == ("3", "8", "c10d")
    assert (arguments.rdzv_endpoint, arguments.rdzv_id) == ("node-a7:22345", "4012345")
    assert not arguments.standalone
    assert arguments.training_script_args == ["--job.config_file", "x.toml"]
    assert "node-a7:22345" in told


def test_gpus_are_counted_on_a_node_that_trains(site):
    _, _, calls = site.start(**JOB, **site.gpus(8))
    counting = next(call for call in calls if call[1] == "srun")
    assert {"--nodes=1", "--ntasks=1"} <= set(counting) and "-c" in counting


@pytest.mark.parametrize("job", ["1", "19999", "20000", "4294967294"])
def test_the_port_follows_from_the_job_and_is_one_that_linux_leaves_free(site, job):
    _, _, calls = site.start(NPROC="2", **(JOB | {"SLURM_JOB_ID": job}))
    host, port = torchrun(calls[-1]).rdzv_endpoint.split(":")
    assert host == "node-a7"
    assert int(port) == 10000 + int(job) % 20000 < 32768


def test_a_job_on_one_node_needs_no_srun(site):
    _, _, calls = site.start(NPROC="2", **(JOB | {"SLURM_JOB_NUM_NODES": "1"}))
    assert torchrun(calls[-1]).standalone and not any(call[1] == "srun" for call in calls)


def test_sbatch_runs_a_copy_that_finds_the_checkout(site, tmp_path):
    copy = tmp_path / "slurm_script"
    shutil.copy(site.checkout / "train.sh", copy)
    _, _, calls = site.start(script=copy, NPROC="2", SLURM_SUBMIT_DIR=str(site.checkout))
    assert torchrun(calls[-1]).training_script == str(site.checkout / "train.py")


def test_an_environment_that_has_everything_is_used_as_it_is(site):
    code, _, calls = site.start(NPROC="2")  # the Python of these tests answers
    assert code == 0 and not (site.checkout / ".venv").exists()
    assert not any(word in call for call in calls for word in ("pip", "venv"))
    assert calls[-1][1] == str(site.bin / "python3")


def test_without_torch_an_environment_is_made_once(site):
    site.report("none base torch pyarrow")
    code, told, calls = site.start(NPROC="2")
    venv = site.checkout / ".venv"
    assert code == 0 and f"making {venv}" in told
    assert [call[2:] for call in calls[:2]] == [
        ["-m", "venv", str(venv)],
        ["-m", "pip", "install", "--disable-pip-version-check"]
        + ["-c", str(site.checkout / "constraints.txt"), "-e", str(site.checkout)],
    ]
    assert calls[-1][1] == str(venv / "bin/python")
    _, _, again = site.start(NPROC="2")
    assert not any(word in call for call in again for word in ("pip", "venv"))
    assert again[-1][1] == str(venv / "bin/python")


def test_an_environment_is_made_on_top_of_a_torch_that_is_installed_and_keeps_it(site):
    site.report("2.11.0+rocm6.4 base pyarrow")
    code, told, calls = site.start(NPROC="2", VENV=str(site.home / "made here"))
    made = site.home / "made here"
    assert code == 0 and "2.11.0+rocm6.4" in told
    assert calls[0][2:] == ["-m", "venv", "--system-site-packages", str(made)]
    constraints = Path(calls[1][calls[1].index("-c") + 1])
    pins = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
    assert pins == ["torch==2.11.0+rocm6.4"]


@pytest.mark.parametrize(
    "report, said",
    [
        ("2.12.0 venv pyarrow", "lacks pyarrow"),
        ("2.4.1 base torch>=2.11", "torch>=2.11"),
        ("none base torch Python>=3.10", "3.10"),
    ],
    ids=["virtual environment with torch", "old torch", "old Python"],
)
def test_an_environment_that_must_not_be_touched_is_named_and_left_alone(site, report, said):
    site.report(report)
    code, told, calls = site.start(NPROC="2")
    assert code == 1 and said in told and calls == []
    assert not (site.checkout / ".venv").exists()


def test_an_active_python_that_does_not_exist_is_named(site):
    code, told, _ = site.start(PYTHON="python9")
    assert code == 1 and "python9" in told


def test_looking_at_a_python_names_its_torch_and_what_it_lacks(tmp_path):
    import torch

    (tmp_path / "no_such_module").mkdir()  # a folder where the user stands is no installed module
    look = 'source "$1"; shift; look_at "$@"'
    command = ["bash", "-c", look, "bash", str(ROOT / "train.sh"), sys.executable, "torch", "no_such_module", "numpy", "tomli"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert answer[0] == torch.__version__
    assert answer[2:] == ["no_such_module"]  # tomli is not asked for where tomllib is


@pytest.mark.parametrize("script", ["test.sh", ".ci/run"])
def test_tests_run_on_the_cpu_with_what_they_need(site, script):
    code, _, calls = site.start("-m", "not slow", script=script)
    assert code == 0
    assert calls[-1][2:] == ["-m", "pytest", "-m", "not slow"] and " CUDA= " in calls[-1][0]
    asked = Path(f"{site.calls}.asked").read_text()
    assert "pytest transformers safetensors datasets torchdata tensorboard" in asked


def test_an_environment_made_for_tests_has_the_dev_extra(site):
    site.report("none base torch")
    _, _, calls = site.start(script="test.sh")
    assert calls[1][-1] == f"{site.checkout}[dev]"
