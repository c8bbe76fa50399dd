"""Two hosts with addresses of their own on this machine: network namespaces, joined by a cable that can be pulled.

They have one file system and one host name, and each its own interfaces, routes and ports.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
INTERFACE = "eth0"
SECONDS_FOR_IP = 10
_serial = count()


def why_not() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if shutil.which("ip") is None:
        return "needs the program ip (iproute2); there is none here"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    try:
        with two_hosts(Path("/nonexistent")):
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"


@dataclass
class Host:
    """One of them. `address` is on the cable between both."""

    name: str
    address: str
    folder: Path

    def start(self, label: str, *command: str, cwd: Path = ROOT, **variables: str) -> Started:
        """Start a program on this host, with the variables given in its environment."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("GLOO_", "MASTER_"))}
        inherited |= {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(cwd)}
        path = self.folder / f"{label}.out"
        output = path.open("w")
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command],
            cwd=cwd,
            env=inherited | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return Started(process, path, output)

    def kill_all(self) -> None:
        """kill -9 of every process on this host, as when its power fails (but its connections are closed)."""
        listed = _ip("netns", "pids", self.name, check=False).split()
        for pid in listed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def pull_the_cable(self) -> None:
        """Nothing comes or goes any more, and no connection is closed."""
        _ip("-n", self.name, "link", "set", INTERFACE, "down")

    def add_interface(self, name: str) -> None:
        """Another network interface, without an address."""
        _ip("-n", self.name, "link", "add", name, "type", "veth", "peer", f"{name}-end")

    def drop(self, ports: str) -> None:
        """A filter: packets that come for these TCP ports (`29500`, or `30000-65000`) vanish, and nobody is told."""
        # The rule that finds the machine's own addresses is the first, and has to make room.
        _ip("-n", self.name, "rule", "add", "pref", "10", "lookup", "local")
        _ip("-n", self.name, "rule", "del", "pref", "0")
        _ip(
            "-n", self.name, "rule", "add", "pref", "5", "iif", INTERFACE, "ipproto", "tcp", "dport", ports, "blackhole"
        )


@dataclass
class Started:
    """A program and what it says."""

    process: subprocess.Popen[bytes]
    path: Path
    output: IO[str]

    @property
    def said(self) -> str:
        return self.path.read_text()

    def ends_within(self, seconds: float) -> int:
        """Its exit code; fails if it goes on."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.path.stem} has not ended within {seconds} s:\n{self.said}") from None


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """The hosts 10.77.0.1 and 10.77.0.2. At the end all their processes are killed, and they are gone."""
    made = f"headway-{os.getpid()}-{next(_serial)}"
    hosts = [Host(f"{made}-{index}", f"10.77.0.{index + 1}", folder) for index in range(2)]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
        first, second = (host.name for host in hosts)
        _ip(*("link", "add", INTERFACE, "netns", first, "type", "veth"), *("peer", INTERFACE, "netns", second))
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield hosts
    finally:
        for host in hosts:
            host.kill_all()
            _ip("netns", "del", host.name, check=False)


def _ip(*words: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=check, timeout=SECONDS_FOR_IP)
    return done.stdout


def torchrun(hosts: Sequence[Host], processes: int, config: Path, *overrides: str, **variables: str) -> list[Started]:
    """`launch/torchrun.sh` on every host at once."""
    return [
        host.start(
            f"node-{rank}",
            str(ROOT / "launch/torchrun.sh"),
            *("--nodes", str(len(hosts)), "--node-rank", str(rank), "--master", hosts[0].address),
            *("--processes", str(processes), "--interface", INTERFACE, str(config), *overrides),
            **variables,
        )
        for rank, host in enumerate(hosts)
    ]


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody has at the moment, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]


def wait_until(happened: Callable[[], bool], seconds: float, what: str) -> None:
    """Look every tenth of a second; fails if it does not happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def until_told() -> None:
    """Wait for Ctrl-C or SIGTERM, which then end nothing by themselves."""
    awaited = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    signal.sigwait(awaited)
    # What is started from here on, to clean up, is to hear them again.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
