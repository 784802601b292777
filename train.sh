#!/usr/bin/env bash
# Train: on a laptop, on one machine with accelerators, or as a SLURM job on many. The only launcher.
#
#   ./train.sh                                                     the quickstart, train_configs/quickstart.toml
#   ./train.sh train_configs/debug.toml --training.steps 20        a config, and settings that differ from it
#   ./train.sh --help                                              every setting with its default
#   sbatch --nodes=16 --gpus-per-node=8 --signal=B:USR1@300 --requeue --open-mode=append train.sh train_configs/primate_8B.toml
#
# The run takes place in the Python that is active, if that has torch, numpy and pyarrow. Otherwise in .venv, which is made on first
# use with the versions of constraints.txt. A torch that is installed is never replaced. Then torchrun starts train.py, one process
# per GPU or one on the CPU; in a SLURM job of several nodes srun starts one torchrun a node, and they meet on the first host, at a
# port made from the job id. A process that is alone needs no torchrun, unless TORCHRUN_ARGS ask for it: its errors and its exit code
# are then its own. Paths are read from where you stand: submit from this folder.
#
# A SLURM job that must leave (SIGUSR1 or SIGTERM to this script, a file STOP in the run folder, the time limit) saves and is requeued;
# one that failed, or three times in a row did not come to a step, is not, and its exit code is not 0. Else it is 0 if the run folder's
# exit.json says finished or preempted, whatever torchrun makes of it. docs/slurm.md has the rest, and examples for three kinds of cluster.
#
# What a site needs is said by environment variables, each of them optional:
#   PYTHON           the Python that is looked at first, and from which .venv is made. Default: python3
#   VENV             the environment that is made, an absolute path. Default: .venv beside this script
#   NPROC            processes on each node. Default: one per GPU, or one
#   OMP_NUM_THREADS  CPU threads of each process. Default: its share of the node's cores; for one process, torch's own choice
#   TORCHRUN_ARGS    further arguments of torchrun, split at spaces: "--max-restarts 3 --log-dir logs"
#   SRUN_ARGS        further arguments of srun, split at spaces: "--mpi=none --network=single_node_vni"
#   TASKS_PER_NODE   in a SLURM job: srun starts so many processes a node itself, without torchrun, and SRUN_ARGS can give each its own
#                    GPU and cores: "--gpus-per-task=1 --gpu-bind=closest --cpus-per-task=7"
# pip reads its own: PIP_EXTRA_INDEX_URL set to PyTorch's index of CPU builds spares a machine without GPU several GB.

set -euo pipefail
set -f # TORCHRUN_ARGS and SRUN_ARGS are split at spaces, but no * in them is a file name

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=${0##*/}
# sbatch runs a copy of this file from its spool folder, under another name.
if [[ ! -f $here/train.py && -n ${SLURM_SUBMIT_DIR:-} ]]; then here=$SLURM_SUBMIT_DIR name=train.sh; fi

say() { echo "$name: $*" >&2; }

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

run_folder="" # where train.py writes, once preflight.py has said so
run=""        # the process of a SLURM job that trains
signalled=""

# The trap of a SLURM job. train.py saves and leaves when it finds STOP; torchrun or srun would soon end ranks that are saving. Until
# exit.json says that this very start is running, another job may have the folder, and would leave in its place: so long STOP waits.
ask_to_stop() {
    local told
    signalled=yes
    while [[ -n $run ]] && kill -0 "$run" 2>/dev/null; do
        told=$(cat "$run_folder/exit.json" 2>/dev/null) || true
        if [[ $told == *'"reason": "running"'* && $told == *"\"launch\": \"$TRAIN_SH_LAUNCH\""* ]]; then
            touch "$run_folder/STOP" || say "a signal came, but nobody will see it"
            return 0 # a bare one, in a trap, gives back the status of what was interrupted
        fi
        sleep 0.2
    done
}

# What exit.json says of this start, its reason first: "preempted, step 500, steps_here 80, why STOP"; "nothing of this start" if it is
# of another one. Ranks whose torchrun was killed are "running" until they have saved: the lock that they then give back is awaited.
read_exit() {
    "$python" -c '
import json, os, socket, sys, time
from pathlib import Path

def read(name):
    try:
        content = json.loads((Path(sys.argv[1]) / name).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

def is_alive(holder):
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return False
        except (OSError, KeyError, TypeError):
            pass
    return bool(holder)

deadline = time.monotonic() + 300
while True:
    holder, told = read("lock"), read("exit.json")
    if told.get("launch") != os.environ["TRAIN_SH_LAUNCH"]:
        told = {"reason": "nothing of this start"}
    if told["reason"] != "running" or not is_alive(holder) or time.monotonic() > deadline:
        break
    time.sleep(0.2)
facts = ("step", "steps_here", "why", "crash_loop")
print(told["reason"], *(f"{key} {told[key]}" for key in facts if key in told), sep=", ")' "$run_folder"
}

forget_idle_starts() {
    rm -f "$idle" || say "warning: $idle stays, and its starts without a step will be counted again"
}

# run_in_job COMMAND...: see it to its end, requeue the SLURM job if the run was preempted, and exit.
run_in_job() {
    local idle=$run_folder/idle_starts job=$SLURM_JOB_ID submitted=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} told code woken
    # The last element of an array has the array's own number, by which scontrol would requeue all of them.
    if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) of job $job on ${SLURM_JOB_NUM_NODES:-1} node(s)"
    # In the background, because bash runs a trap only between commands. A command there is deaf to Ctrl-C unless it is told not to
    # be; this script hears it too, and waits for the end that it makes.
    (
        trap - INT
        exec "$@"
    ) &
    run=$!
    trap 'woken=yes' INT
    trap 'woken=yes; ask_to_stop' USR1 TERM
    if [[ -n $signalled ]]; then ask_to_stop; fi # it came while the run was being prepared
    woken=yes
    # A signal ends `wait` too. Of a run that ends at that very moment bash 5.2 forgets the exit code: it is -1 then, no less a failure.
    while [[ -n $woken ]]; do
        woken=""
        wait $run && code=0 || code=$?
    done
    trap '' USR1 TERM # a job that is requeued is ended first, this script too

    told=$(read_exit)
    # One that came too late to be heard, or for a run that has failed.
    if [[ $told != nothing* ]]; then rm -f "$run_folder/STOP" || true; fi
    case $told in
        finished*)
            forget_idle_starts
            exit 0
            ;;
        preempted*) ;;
        *)
            say "exit code $code, exit.json: $told; job $job is not requeued"
            exit "$code"
            ;;
    esac
    # scontrol would bring back even what someone has cancelled. Such a job, and one past its time limit, is COMPLETING by now.
    if [[ $(scontrol show job "$job" 2>&1) =~ JobState=(COMPLETING|CANCELLED) ]]; then
        say "$told; Slurm is ending job $job, which is not requeued: the same command goes on"
        exit 0
    fi
    # One that needs more time to begin than it has would come back for ever. Each start without a step is a line of $idle.
    if [[ $told == *", steps_here 0,"* ]]; then
        if ! echo "$submitted" >>"$idle"; then
            say "warning: this start without a step cannot be counted in $idle"
        elif (($(grep -cxF "$submitted" "$idle") >= 3)); then
            say "$told; job $job is not requeued: three starts in a row had to leave before they had done a step." \
                "Submit it again with a longer --time (or job.max_wall_s), or with a --signal that comes later"
            exit 1
        fi
    else
        forget_idle_starts
    fi
    say "$told; requeueing job $job"
    scontrol requeue "$job" || say "job $job is not requeued: the same command goes on"
    exit 0
}

# ask COMMAND...: sets $answer to what it prints. In the foreground it would outlive this script, if a signal ends that. A SLURM job hears
# its signals when it has the answer.
ask() {
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        answer=$("$@")
        return
    fi
    local printed signal
    printed=$(mktemp)
    exec 3>"$printed" 4<"$printed"
    rm -f "$printed"
    "$@" >&3 3>&- 4<&- &
    for signal in TERM INT HUP USR1; do
        # shellcheck disable=SC2064 # the signal is that of now
        trap "trap - $signal; kill \$!; kill -$signal \$\$" $signal
    done
    wait $!
    trap - TERM INT HUP USR1
    answer=$(cat <&4)
    exec 3>&- 4<&-
}

# as_tasks, with_torchrun: turn main's $command into that of $nproc processes on each of $nodes nodes.
as_tasks() {
    export WORLD_SIZE=$((nodes * nproc)) LOCAL_WORLD_SIZE=$nproc MASTER_ADDR=$host MASTER_PORT=$port
    # shellcheck disable=SC2016 # each task has its own numbers
    command=(srun --nodes="$nodes" --ntasks="$WORLD_SIZE" --ntasks-per-node="$nproc" --kill-on-bad-exit=1 ${SRUN_ARGS:-} bash -c
        'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} exec "$@"'
        task "${command[@]}")
}

with_torchrun() {
    # `python -m` rather than `torchrun`, which on PATH may belong to another Python.
    local torchrun=("$python" -m torch.distributed.run --nproc-per-node="$nproc") torch
    if ((nodes > 1)); then
        torchrun=("${srun[@]}" --nodes="$nodes" --ntasks="$nodes" --kill-on-bad-exit=1 "${torchrun[@]}"
            --nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$host:$port" --rdzv-id="$SLURM_JOB_ID")
        # A store that outlives a restart may tell a rank the address of one that is gone.
        export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
    else
        torchrun+=(--standalone)
    fi
    # A signal that torchrun does not pass on kills it and leaves its workers alone; one that it does gave them 30 s to save. It would
    # end at SIGHUP, when a terminal closes, even under nohup, which asks for the opposite.
    local passed_on=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    if [[ $(trap -p HUP) == *"''"* ]]; then passed_on=${passed_on/SIGHUP,/}; fi
    torch=$("$python" -c 'import importlib.util; print(*importlib.util.find_spec("torch").submodule_search_locations)')
    if grep -qs signals_to_handle "$torch/distributed/run.py"; then
        torchrun+=("--signals-to-handle=$passed_on")
    fi
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
    command=("${torchrun[@]}" ${TORCHRUN_ARGS:-} "${command[@]:1}")
}

main() {
    # Some sites export these for every job; a process that is alone would wait for others.
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    local settings=("$@") argument number
    if [[ $# -gt 0 && $1 != -* ]]; then
        settings=(--job.config_file "$@")
    elif [[ " $* " != *" --job.config_file"* ]]; then
        settings=(--job.config_file "$here/train_configs/quickstart.toml" "$@")
    fi
    for number in NPROC TASKS_PER_NODE; do
        [[ ${!number:-1} =~ ^[1-9][0-9]*$ ]] ||
            stop "$number=${!number} is not a number of processes; set it to 1 or more, or unset it"
    done
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        trap ask_to_stop USR1 TERM
        # By this train.py tells what was left by an earlier start, and this script what exit.json says of this one.
        TRAIN_SH_LAUNCH=$(date +%s).$SLURM_JOB_ID.$$
        export TRAIN_SH_LAUNCH
    elif [[ -n ${TASKS_PER_NODE:-} ]]; then
        stop "TASKS_PER_NODE=$TASKS_PER_NODE is for srun in a SLURM job; here NPROC says how many processes"
    fi
    find_python ""
    for argument in "$@"; do
        case $argument in
            -h | --help | --print-config) exec "$python" "$here/train.py" "${settings[@]}" ;;
        esac
    done
    local nodes=${SLURM_JOB_NUM_NODES:-1} answer nproc threads host port
    local command=("$python" "$here/train.py" "${settings[@]}") count=("$python" -c '
import os, sys
nproc = int(sys.argv[1])
if not nproc:
    import torch
    nproc = max(torch.cuda.device_count(), 1)
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
print(nproc, max(cores // nproc, 1))' "${TASKS_PER_NODE:-${NPROC:-0}}")
    # No binding: srun would tie the one torchrun of a node, and all it starts, to the cores of one task.
    local srun=(srun --ntasks-per-node=1 --cpu-bind=none ${SRUN_ARGS:-})
    # The node where this script runs may be a login node without a GPU (salloc): ask one that will train.
    if ((nodes > 1)) && [[ -z ${TASKS_PER_NODE:-} ]]; then count=("${srun[@]}" --nodes=1 --ntasks=1 "${count[@]}"); fi
    ask "${count[@]}"
    read -r nproc threads <<<"$answer"
    # What cannot work is told once and ends with exit code 2; under torchrun the code would be 1.
    local check=(env WORLD_SIZE=$((nodes * nproc)) LOCAL_WORLD_SIZE="$nproc" "$python" "$here/preflight.py" "${settings[@]}")
    ask "${check[@]}"
    run_folder=$answer
    if ((nproc > 1)) && [[ -z ${TASKS_PER_NODE:-} ]]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}; fi
    # Threads that wait for one another by spinning lose a core to every other program: on 2 cores with one of them busy the quickstart
    # runs at 16,000 tokens/s with this and at 10,000 without; on idle cores at 31,000 and 34,000.
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}

    if ((nodes > 1)) || [[ -n ${TASKS_PER_NODE:-} ]]; then
        host=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        host=${host%%$'\n'*}
        port=$((10000 + SLURM_JOB_ID % 20000)) # below 32768, where Linux begins to hand out ports by itself
        say "$nodes node(s) with $nproc process(es) each, which meet at $host:$port"
    fi
    if [[ -n ${TASKS_PER_NODE:-} ]]; then
        as_tasks
    elif ((nodes * nproc > 1)) || [[ -n ${TORCHRUN_ARGS:-} ]]; then
        with_torchrun
    fi
    if [[ -n ${SLURM_JOB_ID:-} ]]; then run_in_job "${command[@]}"; fi
    exec "${command[@]}"
}

# test.sh sources this file for find_python.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi
