"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, with a configuration of their own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.cli import main as headway
from tests.launch.hosts import free_ports, until_told, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SECONDS_TO_START = 60
CONFIGURATION = """\
ClusterName=headway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that goes back into the queue waits until the credentials of its first start are void: 120 s by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000
PartitionName=usual Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def why_not() -> str:
    """Why there can be no cluster here; empty where there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"needs {', '.join(missing)} (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "needs root, to start slurmd"
    return ""


def _path() -> str:
    return os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"


@dataclass
class Cluster:
    """One that runs. Nodes are n1 and n2, both at 127.0.0.1; a job in the partition `urgent` preempts others."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _path(), "OMP_NUM_THREADS": "1"}
        # The nodes' names mean nothing to anybody but Slurm.
        return os.environ | own | {"MASTER_ADDR": "127.0.0.1", "PYTHON": sys.executable}

    def ask(self, *command: str) -> str:
        """What a command of Slurm says."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str) -> Job:
        """sbatch; relative paths are seen from the cluster's folder."""
        return Job(self, self.ask("sbatch", "--parsable", *arguments).strip())


@dataclass
class Job:
    """One that was submitted."""

    cluster: Cluster
    id: str

    def fact(self, name: str) -> str:
        """As scontrol names it: JobState, Restarts, ExitCode, StdOut."""
        said = self.cluster.ask("scontrol", "show", "job", "-o", self.id)
        found = re.search(rf"\b{name}=(\S+)", said)
        assert found is not None, f"{name} is not in {said}"
        return found[1]

    @property
    def state(self) -> str:
        return self.fact("JobState")

    @property
    def said(self) -> str:
        path = Path(self.fact("StdOut"))
        return path.read_text() if path.exists() else ""

    def reaches(self, *states: str, within: float) -> str:
        """The first of these states that it comes to."""
        try:
            wait_until(lambda: self.state in states, within, f"job {self.id} is {' or '.join(states)}")
        except AssertionError as late:
            raise AssertionError(f"{late}, but {self.state}:\n{self.said}") from None
        return self.state


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster, up. At the end its jobs and servers are ended."""
    text = CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=free_ports(3))
    (folder / "slurm.conf").write_text(text)
    (folder / "state").mkdir()
    made = Cluster(folder)
    servers: list[subprocess.Popen[bytes]] = []

    def serve(name: str, *command: str) -> None:
        with (folder / f"{name}.out").open("w") as output:
            servers.append(
                subprocess.Popen(
                    command,
                    env=made.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    # Ctrl-C is for us, who end them in order.
                    start_new_session=True,
                )
            )

    try:
        _serve_munge(folder, serve)
        serve("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            (folder / f"spool-{node}").mkdir()
            serve(f"slurmd-{node}", "slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"))
        wait_until(lambda: _nodes_are_up(made, servers), SECONDS_TO_START, "both nodes are idle")
        yield made
    finally:
        with contextlib.suppress(Exception):
            made.ask("scancel", "--full", "--user=root")
            wait_until(lambda: not made.ask("squeue", "-h").strip(), 45, "the queue is empty")
        for server in reversed(servers):
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(15)
            server.kill()


def _serve_munge(folder: Path, serve: object) -> None:
    """munged on a socket and with a key of its own: the machine may have another."""
    assert callable(serve)
    place = folder / "munge"
    place.mkdir(mode=0o755)
    key = place / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {"key": key, "socket": place / "socket", "pid": place / "pid", "log": place / "log", "seed": place / "seed"}
    options = [f"--{'socket' if name == 'socket' else f'{name}-file'}={path}" for name, path in files.items()]
    # --force: the folder of a test is not as well guarded as munged wants.
    serve("munged", "munged", "--foreground", "--force", *options)
    wait_until(lambda: (place / "socket").exists(), SECONDS_TO_START, "munged listens")


def _nodes_are_up(made: Cluster, servers: list[subprocess.Popen[bytes]]) -> bool:
    for server in servers:
        assert server.poll() is None, f"{server.args} has ended:\n{_logs(made.folder)}"
    asked = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%N %t"], env=made.environment, capture_output=True, text=True, timeout=60
    )
    if asked.returncode:
        time.sleep(0.5)
    return set(asked.stdout.splitlines()) == {"n1 idle", "n2 idle"}


def _logs(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.out")))


def script(folder: Path, config: Path, *settings: str) -> Path:
    """`headway launch slurm` for two nodes of one process each, with the code of this checkout."""
    argv = [str(config), "--nodes", "2", "--processes", "1", "--cpus", "1", "--device", "cpu", "--out", "job.sh"]
    with contextlib.chdir(folder):
        assert headway(["launch", "slurm", *argv, *settings]) == 0
    return folder / "job.sh"


def main() -> int:
    """For a trial by hand: a cluster in FOLDER until Ctrl-C."""
    if len(sys.argv) != 2 or why_not():
        print(why_not() or "usage: python -m tests.launch.slurm_cluster FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True)
    with cluster(folder):
        print(f"Two nodes, n1 and n2, until Ctrl-C. Elsewhere: export SLURM_CONF={folder}/slurm.conf", flush=True)
        print("Their names mean nothing outside Slurm, so for jobs: export MASTER_ADDR=127.0.0.1", flush=True)
        until_told()
    return 0


if __name__ == "__main__":
    sys.exit(main())
