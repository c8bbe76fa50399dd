"""Network interfaces, InfiniBand, and the port at which processes meet."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from parallel.nodes import interfaces
from trainer.doctor.finding import Finding

PORT = 29500
"""Where torchrun's processes meet unless told otherwise."""

_LISTENING = "0A"


def look(port: int = PORT) -> list[Finding]:
    """All of it."""
    return [*addresses(), *infiniband(), meeting_place(port)]


def addresses() -> list[Finding]:
    """Interfaces that have an IPv4 address."""
    found = [Finding(name, address, speed(name)) for name, address in interfaces().items() if address]
    hint = "no network interface has an address but loopback: this machine can train alone, not with others."
    if all(one.found.startswith("127.") for one in found):
        found.append(Finding("other machines", "out of reach", "", hint))
    return found


def speed(name: str, root: Path = Path("/sys/class/net")) -> str:
    """As the driver says it; virtual interfaces say nothing."""
    with suppress(OSError, ValueError):
        megabits = int((root / name / "speed").read_text())
        if megabits > 0:
            return f"{megabits / 1000:g} Gb/s"
    return "loopback" if name == "lo" else "speed not known"


def infiniband(root: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """Ports of InfiniBand or RoCE, with rate and state."""
    found = []
    for port in sorted(root.glob("*/ports/*")):
        with suppress(OSError):
            name = f"{port.parents[1].name}, port {port.name}"
            state, rate = ((port / file).read_text().strip() for file in ("state", "rate"))
            hint = (
                "" if "ACTIVE" in state else f"{name} is {state}: NCCL goes another way; look at the cable or subnet."
            )
            found.append(Finding(name, rate, state, hint))
    return found


def meeting_place(port: int) -> Finding:
    """Whether a port is free."""
    with socket.socket() as asker:
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asker.bind(("", port))
        except OSError:
            who = holder(port)
            hint = (
                f"port {port}, where torchrun's processes meet by default, is taken by {who}: end that, or give "
                "torchrun another --master-port."
            )
            return Finding(f"port {port}", "taken", who, hint)
    return Finding(f"port {port}", "free", "where torchrun's processes meet by default")


def holder(port: int) -> str:
    """Who listens there, as far as this user may see."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(str(file.readlink()) in inodes for file in (process / "fd").iterdir()):
                return f"process {process.name} ({(process / 'comm').read_text().strip()})"
    return "a process of somebody else"
