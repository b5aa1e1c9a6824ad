#!/usr/bin/env bash
# One study on the nodes of a Slurm job:
#   sbatch deploy/slurm.sh my_space.yaml [options of bilora-ray tune]
# Edit the lines below, or give them to sbatch: its options come first. See README.md beside this file.
#SBATCH --job-name=bilora-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=bilora-ray-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# USR1 comes three minutes before the time is over. Ray's ports are fixed, so two searches cannot share a node.
#SBATCH --signal=B:USR1@180
#SBATCH --exclusive

set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch slurm.sh SPACE [options of bilora-ray tune]" >&2
    exit 2
fi
space=$1
shift

# Slurm runs a copy of this script: the virtual environment is looked for where sbatch was called.
venv=${BILORA_RAY_VENV:-$SLURM_SUBMIT_DIR/.venv}
if [[ -f $venv/bin/activate ]]; then
    # shellcheck source=/dev/null
    source "$venv/bin/activate"
fi
storage=${BILORA_RAY_STORAGE_PATH:-$SLURM_SUBMIT_DIR/runs}
# Not one of 10002 to 19999, which are for Ray's workers.
port=${BILORA_RAY_PORT:-6379}
# A folder of the job's own: /tmp/ray may be another user's. Its path must be short, it holds sockets.
temp=/tmp/ray-$SLURM_JOB_ID

# In the environment, not on a command line, which all users of a node can read.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_USAGE_STATS_ENABLED=0
# Since Slurm 22.05 a step does not inherit the job's --cpus-per-task.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
addresses=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
ip=$(tr ' ' '\n' <<<"$addresses" | grep --extended-regexp --max-count=1 '^[0-9.]+$' || true)
if [[ -z $ip || $ip == 127.* ]]; then
    echo "slurm.sh: node $head knows no IPv4 address of its own that others could reach ($addresses)" >&2
    exit 1
fi
address=$ip:$port

steps=()
tune=
stopped=
requeue=

# shellcheck disable=SC2329 # the traps call it
stop() {
    stopped=yes
    echo "slurm.sh: $1, the search ends" >&2
    [[ -z $tune ]] || kill -TERM "$tune" 2>/dev/null || true
}

# shellcheck disable=SC2329 # as above
clean_up() {
    if ((${#steps[@]} > 0)); then
        # srun passes the signal on to Ray, on each node.
        kill -TERM "${steps[@]}" 2>/dev/null || true
        wait
        srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 rm -rf "$temp" || true
    fi
}

# A trapped signal ends `wait` before the process has ended.
await() {
    local status
    while true; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || return "$status"
    done
}

# Who preempts a job queues it again, and one that scancel ends must not come back: requeue when the time is over only.
trap 'requeue=yes; stop "the time is nearly over"' USR1
trap 'stop "Slurm wants the nodes"' TERM
trap clean_up EXIT
# Without job control bash starts a background process deaf to SIGINT, with which bilora-ray ends a search cleanly.
set -m

start=(ray start --num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="$temp" --disable-usage-stats --block)
srun --nodes=1 --ntasks=1 --nodelist="$head" \
    "${start[@]}" --head --node-ip-address="$ip" --port="$port" --dashboard-host=127.0.0.1 &
steps+=($!)
others=$((${#nodes[@]} - 1))
if ((others > 0)); then
    srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head" \
        "${start[@]}" --address="$address" &
    steps+=($!)
fi

# The search counts once how many trials the cluster has room for, so all nodes must be there first.
python - "$address" "${#nodes[@]}" "${steps[@]}" <<'PYTHON' &
import os
import socket
import sys
import time

import ray

address, expected, steps = sys.argv[1], int(sys.argv[2]), [int(step) for step in sys.argv[3:]]
host, _, port = address.rpartition(":")
deadline = time.monotonic() + 300
while True:
    try:
        # Where nothing listens yet ray.init would try for minutes, whatever becomes of the steps.
        socket.create_connection((host, int(port)), timeout=2).close()
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
        alive = sum(node["Alive"] for node in ray.nodes())
        ray.shutdown()
    except Exception:
        alive = 0
    if alive >= expected:
        break
    if not all(os.path.exists(f"/proc/{step}") for step in steps):
        sys.exit("slurm.sh: Ray has ended on one of the nodes; its reason is above")
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {alive} of {expected} nodes have joined the Ray cluster in 5 minutes")
    time.sleep(2)
PYTHON
tune=$!
status=0
await "$tune" || status=$?

if [[ $status -eq 0 && -z $stopped ]]; then
    resume=()
    study=$(bilora-ray validate "$space" --json | python -c 'import json, sys; print(json.load(sys.stdin)["study"]["name"])')
    if compgen -G "$storage/studies/$study/trials/*" >/dev/null; then
        resume=(--resume)
    fi
    bilora-ray tune --space "$space" --ray-address "$address" --storage-path "$storage" "${resume[@]}" "$@" &
    tune=$!
    [[ -z $stopped ]] || kill -TERM "$tune" # the signal came between the two
    await "$tune" || status=$?
fi

if [[ $requeue && $status -ne 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$status"
