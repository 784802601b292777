#!/usr/bin/env bash
# Train: on a laptop, on one machine with accelerators, or as a SLURM job on many. The only launcher.
#
#   ./train.sh                                                     the quickstart, train_configs/quickstart.toml
#   ./train.sh train_configs/debug.toml --training.steps 20        a config, and settings that differ from it
#   ./train.sh --help                                              every setting with its default
#   sbatch --nodes=16 --gpus-per-node=8 train.sh train_configs/primate_8B.toml    (submitted from this folder)
#
# The run takes place in the Python that is active, if that has torch, numpy and pyarrow. Otherwise in .venv, which is made on first
# use with the versions of constraints.txt. A torch that is installed is never replaced. Then torchrun starts train.py, one process
# per GPU or one on the CPU; in a SLURM job of several nodes srun starts one torchrun a node, and they meet on the first host, at a
# port made from the job id. A process that is alone needs no torchrun, unless TORCHRUN_ARGS ask for it: its errors and its exit code
# are then its own. Paths are read from where you stand.
#
# What a site needs is said by environment variables, each of them optional:
#   PYTHON           the Python that is looked at first, and from which .venv is made. Default: python3
#   VENV             the environment that is made, an absolute path. Default: .venv beside this script
#   NPROC            processes on each node. Default: one per GPU, or one
#   OMP_NUM_THREADS  CPU threads of each process. Default: its share of the node's cores; for one process, torch's own choice
#   TORCHRUN_ARGS    further arguments of torchrun, split at spaces: "--max-restarts 3 --log-dir logs"
#   SRUN_ARGS        further arguments of srun, split at spaces: "--mpi=none --network=single_node_vni"
# pip reads its own: PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU builds spares a machine without GPU several GB.

set -euo pipefail
set -f # TORCHRUN_ARGS and SRUN_ARGS are split at spaces, but no * in them is a file name

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# sbatch runs a copy of this file from its spool folder.
if [[ ! -f $here/train.py && -n ${SLURM_SUBMIT_DIR:-} ]]; then here=$SLURM_SUBMIT_DIR; fi

say() { echo "${0##*/}: $*" >&2; }

stop() {
    say "$@"
    exit 1
}

# look_at PYTHON MODULE...: one line, "VERSION_OF_TORCH|none venv|base MISSING...". Nothing is imported, so it takes no time.
look_at() {
    local interpreter=$1
    shift
    "$interpreter" - "$@" <<'PYTHON'
import importlib.metadata, importlib.util, sys

sys.path = [folder for folder in sys.path if folder]  # a folder ./datasets where the user stands is not the package
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if sys.version_info >= (3, 11):
    missing = [name for name in missing if name != "tomli"]  # tomllib is in the standard library
torch = importlib.metadata.version("torch") if importlib.util.find_spec("torch") else "none"
if torch != "none" and tuple(map(int, torch.split(".")[:2])) < (2, 11):
    missing.append("torch>=2.11")
if sys.version_info < (3, 10):
    missing.append("Python>=3.10")
print(torch, "base" if sys.prefix == sys.base_prefix else "venv", *missing)
PYTHON
}

# find_python EXTRA MODULE...: sets $python to one that has what train.py needs and these modules: the active one, or that of $VENV,
# made or completed with pyproject.toml's dependencies and this extra of them.
find_python() {
    local extra=$1 modules report torch kind missing venv=${VENV:-$here/.venv} constraints=$here/constraints.txt
    shift
    modules=(torch numpy pyarrow tomli "$@")
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || stop "there is no $python here; set PYTHON to a Python 3.10 or newer"
    report=$(look_at "$python" "${modules[@]}")
    read -r torch kind missing <<<"$report"
    if [[ -z $missing ]]; then return; fi

    if [[ -x $venv/bin/pip ]]; then
        say "$python lacks $missing; using $venv"
    else
        if [[ $missing == *">="* ]]; then stop "$python lacks $missing; upgrade it, or set PYTHON to another Python"; fi
        if [[ $torch == none ]]; then
            say "$python lacks $missing; making $venv, once"
            "$python" -m venv "$venv"
        elif [[ $kind == base ]]; then
            say "$python lacks $missing; making $venv, once, on top of it: its torch $torch is the one that is used"
            "$python" -m venv --system-site-packages "$venv"
        else
            # An environment made from a virtual one would not see its torch, and download another.
            stop "the active environment has torch $torch but lacks $missing; install that into it, or deactivate it and $venv is made"
        fi
    fi

    python=$venv/bin/python
    report=$(look_at "$python" "${modules[@]}")
    read -r torch kind missing <<<"$report"
    if [[ -z $missing ]]; then return; fi
    if [[ $torch != none ]]; then
        sed "s/^torch==.*/torch==$torch/" "$constraints" >"$venv/constraints.txt"
        constraints=$venv/constraints.txt
    fi
    say "installing $missing and what they need into $venv"
    "$python" -m pip install --disable-pip-version-check -c "$constraints" -e "$here${extra:+[$extra]}" >&2
    report=$(look_at "$python" "${modules[@]}")
    read -r torch kind missing <<<"$report"
    if [[ -n $missing ]]; then stop "$venv still lacks $missing; delete it, or set VENV to another folder, and start again"; fi
}

main() {
    # Some sites export these for every job; a process that is alone would wait for others.
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    local settings=("$@") argument
    if [[ $# -gt 0 && $1 != -* ]]; then
        settings=(--job.config_file "$@")
    elif [[ " $* " != *" --job.config_file"* ]]; then
        settings=(--job.config_file "$here/train_configs/quickstart.toml" "$@")
    fi
    [[ ${NPROC:-1} =~ ^[1-9][0-9]*$ ]] || stop "NPROC=$NPROC is not a number of processes; set it to 1 or more, or unset it"
    find_python ""
    for argument in "$@"; do
        case $argument in
            -h | --help | --print-config) exec "$python" "$here/train.py" "${settings[@]}" ;;
        esac
    done
    local nodes=${SLURM_JOB_NUM_NODES:-1} counts nproc threads command
    local count=("$python" -c '
import os, sys
nproc = int(sys.argv[1])
if not nproc:
    import torch
    nproc = max(torch.cuda.device_count(), 1)
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(nproc, max(cores // nproc, 1))' "${NPROC:-0}")
    # No binding: srun would tie the one torchrun of a node, and all it starts, to the cores of one task.
    local srun=(srun --ntasks-per-node=1 --cpu-bind=none ${SRUN_ARGS:-})
    # The node where this script runs may be a login node without a GPU (salloc): ask one that will train.
    if ((nodes > 1)); then count=("${srun[@]}" --nodes=1 --ntasks=1 "${count[@]}"); fi
    counts=$("${count[@]}")
    read -r nproc threads <<<"$counts"
    # What cannot work is told once and ends with exit code 2; under torchrun the code would be 1.
    WORLD_SIZE=$((nodes * nproc)) LOCAL_WORLD_SIZE=$nproc "$python" "$here/preflight.py" "${settings[@]}"
    if ((nproc > 1)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}; fi
    # Threads that wait for one another by spinning lose a core to every other program: on 2 cores with one of them busy the quickstart
    # runs at 16,000 tokens/s with this and at 10,000 without; on idle cores at 31,000 and 34,000.
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}

    if ((nodes * nproc == 1)) && [[ -z ${TORCHRUN_ARGS:-} ]]; then exec "$python" "$here/train.py" "${settings[@]}"; fi
    # `python -m` rather than `torchrun`, which on PATH may belong to another Python.
    command=("$python" -m torch.distributed.run --nproc-per-node="$nproc")
    if ((nodes > 1)); then
        local hosts endpoint
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        # Below 32768, where Linux begins to hand out ports by itself.
        endpoint=${hosts%%$'\n'*}:$((10000 + SLURM_JOB_ID % 20000))
        command=("${srun[@]}" --nodes="$nodes" --ntasks="$nodes" --kill-on-bad-exit=1 "${command[@]}"
            --nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$SLURM_JOB_ID")
        say "$nodes nodes with $nproc process(es) each, which meet at $endpoint"
    else
        command+=(--standalone)
    fi
    exec "${command[@]}" ${TORCHRUN_ARGS:-} "$here/train.py" "${settings[@]}"
}

# test.sh sources this file for find_python.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
