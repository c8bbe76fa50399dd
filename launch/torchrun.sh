#!/usr/bin/env bash
# Train on one node or on several: launch/torchrun.sh --help
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/torchrun.sh [SETTING ...] CONFIG.toml [--section.key VALUE ...]

Trains with torchrun, on this machine alone or together with others. On several nodes, give the same
command on each at the same time, with its own --node-rank. A setting is a flag or a variable:

  --nodes N          NODES          how many nodes (1)
  --node-rank R      NODE_RANK      which of them this is, from 0 (a task of Slurm knows: SLURM_NODEID)
  --master ADDRESS   MASTER_ADDR    name or address of node 0
  --port P           MASTER_PORT    a free port of node 0 (29500)
  --processes P      PROCESSES      processes on each node (one for each GPU, or 1 without)
  --interface NAME   INTERFACE      network interface (the one on the way to the master)
  --wait SECONDS     WAIT           how long the preflight waits for the other nodes (15, the most)
  --patience SECONDS PATIENCE       for how long a preflight that finds faults is tried again (0)
  --preempted CODE   PREEMPTED      what a stop by a signal ends with (0)
                     PYTHON         the Python to use (python)

Several nodes first make sure, within 30 s, that they can train together (python -m launch.preflight).
Where a scheduler starts them at its leisure, --patience lets the first wait for the last.
SIGTERM, SIGUSR1 and Ctrl-C ask for a stop: a checkpoint is written, and the same command goes on.

Ends with 0 (finished, or stopped with a checkpoint), 2 (refused) or 70 (failed).
TEXT
}

refuse() {
    echo "$1" >&2
    exit 2
}

nodes=${NODES:-1} node_rank=${NODE_RANK:-${SLURM_NODEID:-}} master=${MASTER_ADDR:-} port=${MASTER_PORT:-29500}
interface=${INTERFACE:-} wait=${WAIT:-15} patience=${PATIENCE:-0} preempted=${PREEMPTED:-0} python=${PYTHON:-python}
# torchrun counts GPUs itself, and refuses where there is none.
processes=${PROCESSES:-$([ -e /dev/nvidia0 ] && echo gpu || echo 1)}

while [[ ${1:-} == -* ]]; do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --nodes | --node-rank | --master | --port | --processes | --interface | --wait | --patience | --preempted)
            [[ $# -ge 2 ]] || refuse "$1 has no value; see launch/torchrun.sh --help."
            name=${1#--}
            printf -v "${name/-/_}" '%s' "$2"
            shift 2
            ;;
        *) refuse "$1 is no setting of launch/torchrun.sh, and stands before CONFIG.toml; see launch/torchrun.sh --help." ;;
    esac
done
[[ $# -ge 1 ]] || refuse "No CONFIG.toml is given; see launch/torchrun.sh --help."
[[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "--nodes $nodes: expected a number of at least 1."
for name in patience preempted; do
    [[ ${!name} =~ ^[0-9]+$ ]] || refuse "--$name ${!name}: expected a whole number of at least 0."
done

# The floors are packages of this checkout, found from wherever this is started.
checkout=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# shellcheck source=launch/ending.sh
source "$checkout/launch/ending.sh"

# torchrun, asked to stop, gives its ranks 30 s and then kills them: too short for a large checkpoint. launch.agent asks
# the ranks instead, and ends when they have ended. Before they have begun there is nothing to save.
agent='' asked='' early=$((preempted ? preempted : 70))
stop() {
    asked=yes
    [[ -n $agent ]] || exit "$early"
    kill -TERM "$agent" 2>/dev/null || true
}
trap stop TERM USR1 INT

run_folder=$("$python" -m launch.run_folder "$@") || exit
note_status "$run_folder"

if [[ $nodes == 1 ]]; then
    rendezvous=(--standalone)
else
    [[ $node_rank =~ ^[0-9]+$ ]] || refuse "--node-rank is missing: which of the $nodes nodes is this, from 0?"
    [[ -n $master ]] || refuse "--master is missing: the address of node 0, on all nodes."
    until found=$("$python" -m launch.preflight --nodes "$nodes" --node-rank "$node_rank" --master "$master" --port "$port" \
        --run-dir "$run_folder" --interface "$interface" --wait "$wait"); do
        ((SECONDS < patience)) || exit 2
        echo "The preflight is tried again, for $((patience - SECONDS)) s more." >&2
        sleep 1
    done
    read -r interface address <<<"$found"
    # gloo and NCCL would guess, by the host's name or the first interface that they see.
    [[ -z $interface ]] || export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME="=$interface"
    # Static: node 0 is the one that was said to be. By the c10d rendezvous nodes are numbered in the order of their
    # names. Neither starts ranks anew on several nodes, so no restarts are asked for: the same command goes on.
    rendezvous=(
        --master-addr "$master" --master-port "$port" --node-rank "$node_rank" --local-addr "$address"
    )
fi

"$python" -m launch.agent "${rendezvous[@]}" --nnodes "$nodes" --nproc-per-node "$processes" \
    -m trainer train "$@" &
agent=$!
wait_for "$agent"
state=$(state_of_this_start "$code")
code=$(exit_code_of "$code" "$state")
[[ $code:$state != 0:preempted ]] || code=$preempted
[[ $code:$state:$asked != 70::yes ]] || code=$early
exit "$code"
