"""Hosts node1 and node2 that can be reached by ssh: two sshd on this machine, with keys of their own.

They are on its loopback, or each in a network namespace of its own (tests/launch/hosts.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launch.hosts import Host, free_ports, until_told, wait_until

SERVER = """\
ListenAddress {address}:{port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile {folder}/{name}.pid
# The folder of a test is not as well guarded as sshd wants, and root may be kept out by default.
StrictModes no
PermitRootLogin yes
UsePAM no
PasswordAuthentication no
"""
CLIENT = """\
Host {name}
    HostName {address}
    Port {port}
    IdentityFile {folder}/key
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking accept-new
    BatchMode yes
    LogLevel ERROR
"""


def why_not() -> str:
    """Why there can be no such hosts here; empty where there can."""
    missing = [
        name for name in ("sshd", "ssh", "ssh-keygen", "pdsh", "setsid") if shutil.which(name, path=_path()) is None
    ]
    if missing:
        return f"needs {', '.join(missing)} (apt-get install openssh-server pdsh)"
    if os.geteuid() != 0:
        return "needs root, to start sshd"
    return ""


def _path() -> str:
    return os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"


@dataclass
class Hosts:
    """Both, up. `folder` holds a hostfile for two processes on each; `master` is the address of the first.

    `on_first` is what a command begins with that is to run on the first.
    """

    folder: Path
    master: str
    on_first: list[str]
    servers: list[psutil.Popen]

    @property
    def environment(self) -> dict[str, str]:
        """In which `ssh node1` leads there."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "RANK", "WORLD_"))}
        return kept | {"PATH": f"{self.folder / 'bin'}{os.pathsep}{kept.get('PATH', '')}", "DS_ACCELERATOR": "cpu"}

    @property
    def processes(self) -> list[psutil.Process]:
        """Everything that was started on them and still runs."""
        return [child for server in self.servers for child in server.children(recursive=True)]


@contextlib.contextmanager
def ssh_hosts(folder: Path, hosts: Sequence[Host] = ()) -> Iterator[Hosts]:
    """The hosts node1 and node2, on `hosts` if there are any. At the end all that was started on them is ended."""
    for name in ("key", "host_key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    # Where Debian's sshd leaves its privileges; made by its service, which need not run.
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    prefixes = [["ip", "netns", "exec", host.name] for host in hosts] or [[], []]
    addresses = [host.address for host in hosts] or ["127.0.0.1", "127.0.0.2"]
    places = [
        {"name": f"node{index + 1}", "address": address, "port": port, "folder": folder}
        for index, (address, port) in enumerate(zip(addresses, free_ports(2), strict=True))
    ]
    (folder / "ssh_config").write_text("".join(CLIENT.format(**place) for place in places))
    (folder / "hostfile").write_text("".join(f"{place['name']} slots=2\n" for place in places))
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    started = Hosts(folder, addresses[0], prefixes[0], [])
    program = shutil.which("sshd", path=_path())
    assert program is not None
    try:
        for prefix, place in zip(prefixes, places, strict=True):
            settings, log = folder / f"{place['name']}.sshd", folder / f"{place['name']}.log"
            settings.write_text(SERVER.format(**place))
            started.servers.append(
                psutil.Popen([*prefix, program, "-D", "-f", str(settings), "-E", str(log)], start_new_session=True)
            )
            wait_until(
                lambda log=log: "listening on" in (log.read_text() if log.exists() else ""), 30, f"{log} says so"
            )
        yield started
    finally:
        for process in [*started.processes, *started.servers]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started.servers, timeout=10)


def main() -> int:
    """For a trial by hand: the hosts, with what belongs to them in FOLDER, until Ctrl-C."""
    if len(sys.argv) != 2 or why_not():
        print(why_not() or "usage: python -m tests.launch.ssh_hosts FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir(parents=True)
    with ssh_hosts(folder):
        print(f"node1 and node2, until Ctrl-C. Elsewhere: export PATH={folder}/bin:$PATH", flush=True)
        print(f"The hostfile is {folder}/hostfile; give --master 127.0.0.1.", flush=True)
        until_told()
    return 0


if __name__ == "__main__":
    sys.exit(main())
