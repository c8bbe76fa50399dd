#!/usr/bin/env bash
# {{config}} on {{nodes}} node(s) with {{processes}} process(es) each, by Slurm: sbatch {{out}}
# Written by: {{command}}
#
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
# One launch/torchrun.sh on each node, which starts the processes there.
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={{cpus}}
{{optional}}
#SBATCH --time={{time}}
# So many seconds before the time is over, SIGUSR1 comes to this script alone (B): time for a checkpoint.
#SBATCH --signal=B:USR1@{{grace}}
# A job that is preempted, or loses a node, may be put back into the queue, and writes on in the same file.
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail

# Relative paths, in the configuration too, are seen from here.
cd {{folder}}
export PYTHON=${PYTHON:-{{python}}}
export PYTHONPATH={{checkout}}${PYTHONPATH:+:$PYTHONPATH}
# The first node of this job. The port is the job's own, since jobs may share a node.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}

# The configuration, and what is set on top of it.
arguments=(
{{arguments}}
)
# shellcheck source=/dev/null
source {{checkout}}/launch/ending.sh
run_folder=$("$PYTHON" -m launch.run_folder "${arguments[@]}" "$@") || exit
note_status "$run_folder"
step_before=$(status_says step)

# srun hands the signal to every process of its tasks; those that matter take it as the wish for a checkpoint.
# A scheduler that preempts the job (SIGTERM, with its GraceTime) signals them by itself.
step=
stop() { [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true; }
trap stop USR1 TERM

# Which node each is, a task knows from Slurm. It does not inherit --cpus-per-task.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash {{checkout}}/launch/torchrun.sh \
    --nodes {{nodes}} --processes {{processes}} --patience {{patience}} --preempted 75 "${arguments[@]}" "$@" &
step=$!
wait_for "$step"
state=$(state_of_this_start "$code")
# A signal came before the run had begun.
[[ $code:$state != 75: ]] || state=preempted
code=$(exit_code_of "$code" "$state")
step_now=$(status_says step)
echo "This start (number $((${SLURM_RESTART_COUNT:-0} + 1))) has ended: ${state:-nothing in status.json}, code $code."
[[ $state == preempted ]] || exit "$code"

# Stopped by a signal, with a checkpoint: back into the queue, unless somebody has cancelled the job, or it is of no use.
if ! scontrol show job -o "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING'; then
    echo "The job is no longer meant to run: it is not put back into the queue. sbatch again goes on."
elif ((${SLURM_RESTART_COUNT:-0} > 0 && ${step_now:-0} <= ${step_before:-0})); then
    echo "Since step ${step_before:-0} this start has made no step: the job is not put back into the queue." >&2
    code=70
else
    echo "Put back into the queue; it goes on from step ${step_now:-0}."
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
