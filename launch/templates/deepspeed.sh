#!/usr/bin/env bash
# {{config}} on {{nodes}} node(s) with {{processes}} process(es) each, by DeepSpeed's launcher: bash {{out}}
# Written by: {{command}}
#
# Started on one machine, from which every host of the hostfile can be reached by ssh without a password (ssh HOST true),
# and on which pdsh is installed. All see this folder, and have this Python at the same path.
#
# Ends with 0 (finished, or stopped with a checkpoint), 2 (refused) or 70 (failed).
# SIGTERM, SIGUSR1 and Ctrl-C ask for a stop. The same again goes on from the newest checkpoint.
set -euo pipefail

# Relative paths, in the configuration too, are seen from here.
cd {{folder}}
python=${PYTHON:-{{python}}}
# DeepSpeed takes this variable to all hosts, but few others.
export PYTHONPATH={{checkout}}${PYTHONPATH:+:$PYTHONPATH}
hostfile={{hostfile}}
hosts=$(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$hostfile" | paste -sd, -)
# An address of the first host which all the others know; the port has to be free there.
master=${MASTER_ADDR:-{{master}}}
port=${MASTER_PORT:-{{port}}}

# The configuration, and what is set on top of it.
arguments=(
{{arguments}}
)
source {{checkout}}/launch/ending.sh
run_folder=$("$python" -m launch.run_folder "${arguments[@]}") || exit
note_status "$run_folder"

on_hosts() { PDSH_RCMD_TYPE=ssh pdsh -S -w "$1" "cd '$PWD' && PYTHONPATH='$PYTHONPATH' $2"; }

# Within 30 s: can they train together? (%n: pdsh's number of a host)
on_hosts "$hosts" "'$python' -m launch.preflight --nodes {{nodes}} --node-rank %n --master '$master' --port '$port' \
    --run-dir '$run_folder'" >/dev/null || exit 2

# DeepSpeed's launcher, asked to stop, ends every launcher of this Python on all hosts, whichever run it belongs to, and
# gives ranks 30 s before it kills them. So it never hears of a signal (setsid: not of Ctrl-C either), and the first rank,
# which says here what number its process has, is asked instead; it tells the others.
first_rank=$PWD/.first-rank-$(hostname)-$$
trap 'rm -f "$first_rank"' EXIT
launcher=
stop() {
    local moments=120
    while [[ ! -s $first_rank ]] && kill -0 "$launcher" 2>/dev/null && ((moments--)); do sleep 1; done
    [[ ! -s $first_rank ]] || on_hosts "${hosts%%,*}" "kill -TERM $(cat "$first_rank")" || true
}
trap stop TERM USR1 INT

# --module, --no_local_rank: a module, which finds its rank in the environment, instead of a script with --local_rank.
setsid "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" --launcher pdsh --force_multi \
    --master_addr "$master" --master_port "$port" --no_local_rank \
    --module launch.rank --first "$first_rank" train "${arguments[@]}" &
launcher=$!
wait_for "$launcher"
# What the launcher ends with is the code of some rank; what became of the run stands in status.json.
exit "$(exit_code_of "$code" "$(state_of_this_start "$code")")"
