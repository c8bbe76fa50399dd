"""Hostfiles as DeepSpeed's launcher reads them: `HOST slots=N` on each line; empty lines and `# comments` aside."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """One line: a host, and how many processes it takes; None where the line does not say so."""

    name: str
    slots: int | None
    line: int


def read_hostfile(path: Path) -> tuple[list[Host], list[str]]:
    """The hosts, in order, and what is wrong with their lines."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"the hostfile {path} cannot be read: {getattr(error, 'strerror', None) or error}."]
    hosts: list[Host] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        slots = re.fullmatch(r"slots=(\d+)", words[1]) if len(words) == 2 else None
        if slots is None:
            faults.append(f"{path}, line {number}: {line.strip()!r} is not HOST slots=N.")
        hosts.append(Host(words[0], int(slots[1]) if slots else None, number))
    return hosts, faults


def hostfile_faults(path: Path, nodes: int, processes: int) -> tuple[list[Host], list[str]]:
    """The hosts of a run of `nodes` x `processes`, and everything in the file that disagrees with it, in sentences."""
    hosts, faults = read_hostfile(path)
    if faults and not hosts:
        return hosts, faults
    first: dict[str, int] = {}
    for host in hosts:
        if host.name in first:
            faults.append(f"{path}, line {host.line}: {host.name} stands in line {first[host.name]} already.")
        first.setdefault(host.name, host.line)
        if host.slots not in (None, processes):
            faults.append(
                f"{path}, line {host.line}: {host.name} has slots={host.slots}, and --processes says {processes} "
                f"for each node: write slots={processes}, or give --processes {host.slots}."
            )
    if len(first) != nodes:
        count = f"{len(first)} host{'s' if len(first) != 1 else ''}"
        remedy = f"give --nodes {len(first)}" if first else "write HOST slots=N for each"
        faults.append(f"{path} has {count}, and --nodes says {nodes}: {remedy}.")
    slots = [host.slots for host in hosts if host.slots is not None]
    if len(slots) == len(hosts) and sum(slots) not in (0, nodes * processes):
        faults.append(
            f"{path} has {sum(slots)} slots in all, and {nodes} nodes of {processes} processes are a world of "
            f"{nodes * processes}."
        )
    return hosts, faults
