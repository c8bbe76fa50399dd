"""`headway launch slurm` on two nodes: jobs that are stopped, go back into the queue, and go on.

What the written script decides is tested with stand-ins for srun and scontrol; the rest on a cluster of two slurmd.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import slurm_cluster
from tests.launch.hosts import wait_until
from tests.launch.slurm_cluster import Cluster, Job
from tests.pool import Pool
from tests.trainer.runs import assert_twins, status, train, write_config, write_tokens
from trainer.metrics import read_metrics

SECONDS_TO_START = 120
SECONDS_TO_STOP = 60
SECONDS_TO_END = 240


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes; skipped, with the reason, where they cannot be made."""
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    folder = tmp_path / "slurm"
    folder.mkdir()
    with slurm_cluster.cluster(folder) as made:
        yield made


def has_made(job: Job, run_dir: Path, steps: int) -> None:
    """Waits for so many steps of a job."""

    def has() -> bool:
        assert job.state in ("PENDING", "CONFIGURING", "RUNNING"), f"{job.state}:\n{job.said}"
        return len(read_metrics(run_dir)) >= steps

    wait_until(has, SECONDS_TO_START, f"{steps} steps of job {job.id}")


@pytest.mark.cluster
def test_a_job_out_of_time_goes_back_into_the_queue_and_ends_as_its_twin(
    pool: Pool, cluster: Cluster, tmp_path: Path
) -> None:
    """The signal is the one that Slurm sends so many seconds before the limit, sent by hand."""
    (tmp_path / "twin").mkdir()
    schedule = {"steps": 200}
    twin = write_config(tmp_path / "twin", write_tokens(tmp_path / "walk"), schedule=schedule)
    results = pool.run(train, 2, twin)
    assert [code for code, _ in results] == [0] * 2, results

    config, run_dir = write_config(tmp_path, str(tmp_path / "walk"), schedule=schedule), tmp_path / "run"
    job = cluster.submit(str(slurm_cluster.script(tmp_path, config, "--time", "30")))
    has_made(job, run_dir, 5)
    cluster.ask("scancel", "--signal=USR1", "--batch", job.id)
    wait_until(lambda: job.fact("Restarts") == "1", SECONDS_TO_STOP, "the job is back in the queue")
    stopped = status(run_dir)
    assert (stopped["state"], stopped["reason"]) == ("preempted", "signal SIGUSR1")
    assert 5 <= stopped["step"] < 200
    assert job.reaches("COMPLETED", "FAILED", "CANCELLED", within=SECONDS_TO_END) == "COMPLETED", job.said
    print(job.said[-1500:])
    assert f"Put back into the queue; it goes on from step {stopped['step']}." in job.said
    assert "This start (number 2) has ended: finished, code 0." in job.said
    assert status(run_dir)["state"] == "finished"
    assert_twins(run_dir, tmp_path / "twin" / "run", step=200)


@pytest.mark.cluster
def test_a_preempted_job_goes_on_and_a_cancelled_one_does_not(cluster: Cluster, tmp_path: Path) -> None:
    """Another job preempts it, with SIGTERM and GraceTime; then it is cancelled, and leaves a checkpoint."""
    prefix = write_tokens(tmp_path / "walk")
    config = write_config(tmp_path, prefix, schedule={"steps": 20_000}, checkpoint={"every_steps": 5000})
    run_dir = tmp_path / "run"
    job = cluster.submit(str(slurm_cluster.script(tmp_path, config, "--time", "30")))
    has_made(job, run_dir, 5)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\ntrue\n")
    other = cluster.submit(
        *("--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"),
        *(f"--output={tmp_path}/urgent.out", str(urgent)),
    )
    assert other.reaches("COMPLETED", "FAILED", within=SECONDS_TO_STOP) == "COMPLETED"
    first = status(run_dir)
    assert (first["state"], first["reason"]) == ("preempted", "signal SIGTERM")
    wait_until(lambda: job.state == "RUNNING", SECONDS_TO_STOP, "the preempted job runs again")
    assert job.fact("Restarts") == "1"

    has_made(job, run_dir, first["step"] + 5)
    cluster.ask("scancel", job.id)
    wait_until(lambda: not cluster.ask("squeue", "-h").strip(), SECONDS_TO_STOP, "the queue is empty")
    assert job.state == "CANCELLED"
    last = status(run_dir)
    assert last["state"] == "preempted" and last["step"] > first["step"]
    assert "The job is no longer meant to run" in job.said


STAND_IN = """\
#!/bin/sh
# srun and scontrol as far as the script asks them.
case $(basename "$0"):$1:$2 in
    scontrol:show:hostnames) echo n1 ;;
    scontrol:show:job) echo "JobId=7 JobState=$JOB_STATE" ;;
    scontrol:requeue:*) echo requeue "$2" >>"$SAID" ;;
    srun:*)
        echo "$@" >"$SAID"
        [ -z "$STATE" ] || printf '{\\n "state": "%s",\\n "step": %s\\n}\\n' "$STATE" "$STEP" >"$RUN/new.json"
        [ -z "$STATE" ] || mv "$RUN/new.json" "$RUN/status.json"
        exit "$CODE"
        ;;
esac
"""
ENDINGS = {
    "finished": ("finished", 10, 0, "0", "RUNNING", 0, False),
    "stopped at a step": ("stopped", 10, 0, "0", "RUNNING", 0, False),
    "preempted": ("preempted", 10, 0, "0", "RUNNING", 0, True),
    "preempted, and srun says otherwise": ("preempted", 10, 143, "0", "RUNNING", 0, True),
    "preempted again": ("preempted", 10, 0, "3", "RUNNING", 0, True),
    "preempted again without a step": ("preempted", 4, 0, "3", "RUNNING", 70, False),
    "preempted at first without a step": ("preempted", 4, 0, "0", "RUNNING", 0, True),
    "stopped before it began": ("", 0, 75, "0", "RUNNING", 0, True),
    "stopped before it began, again": ("", 0, 75, "1", "RUNNING", 70, False),
    "cancelled": ("preempted", 10, 0, "0", "CANCELLED", 0, False),
    "failed": ("failed", 10, 70, "0", "RUNNING", 70, False),
    "killed": ("running", 10, 137, "0", "RUNNING", 70, False),
    "refused": ("", 0, 2, "0", "RUNNING", 2, False),
    "no word of this start": ("", 0, 137, "0", "RUNNING", 70, False),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_the_script_does_at_the_end(ending: str, tmp_path: Path) -> None:
    state, step, srun_code, restarts, job_state, code, requeued = ENDINGS[ending]
    config = write_config(tmp_path, "none", run={"dir": str(tmp_path / "run")})
    script = slurm_cluster.script(tmp_path, config)
    (tmp_path / "run").mkdir()
    # What an earlier start has left behind says nothing about this one.
    (tmp_path / "run" / "status.json").write_text('{\n "state": "preempted",\n "step": 4\n}\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_RESTART_COUNT": restarts,
        "JOB_STATE": job_state,
        "STATE": state,
        "STEP": str(step),
        "CODE": str(srun_code),
        "SAID": str(said),
        "RUN": str(tmp_path / "run"),
    }
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    asked = said.read_text().splitlines()
    assert "launch/torchrun.sh --nodes 2 --processes 1" in asked[0]
    assert asked[1:] == (["requeue 7"] if requeued else []), done.stdout
