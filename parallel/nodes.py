"""Nodes: which ranks are on which machine, and the names that they have in messages."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel.processes import Process

SIOCGIFADDR = 0x8915
"""Linux's request for the IPv4 address of an interface (netdevice(7))."""


@dataclass(frozen=True)
class Node:
    """One machine of the run.

    Attributes:
        index: its place among the nodes, from 0; rank 0 is on node 0.
        host: its host name, which another node may have too.
        address: where the others reach it.
        ranks: its ranks, ascending.
    """

    index: int
    host: str
    address: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        first, last = self.ranks[0], self.ranks[-1]
        ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
        return f"node {self.index} (host {self.host}, address {self.address}, {ranks})"


def gather_nodes(process: Process) -> list[Node]:
    """The table of all nodes, by index, on every rank. Collective."""
    import torch.distributed as dist

    seen: list[tuple[int, str, str]] = [(0, "", "")] * process.world_size
    dist.all_gather_object(seen, (process.node, socket.gethostname(), own_address()))
    ranks: dict[int, list[int]] = {}
    for rank, (index, _, _) in enumerate(seen):
        ranks.setdefault(index, []).append(rank)
    return [Node(index, *seen[ranks[index][0]][1:], tuple(ranks[index])) for index in sorted(ranks)]


def own_address() -> str:
    """Where other nodes reach this one: the address of the interface that gloo or NCCL was told to use, or else the
    one from which this machine reaches the master. Empty if neither can be found."""
    for library in ("GLOO", "NCCL"):
        # A list of names, and for NCCL a pattern, is possible; then the way to the master decides.
        if address := interface_address(os.environ.get(f"{library}_SOCKET_IFNAME", "")):
            return address
    return address_towards(os.environ.get("MASTER_ADDR", ""))


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface; empty if there is no such interface, or it has none."""
    if not name or len(name.encode()) > 15:  # longer than Linux lets a name be
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        try:
            answer = fcntl.ioctl(asker, SIOCGIFADDR, struct.pack("256s", name.encode()))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def interfaces() -> dict[str, str]:
    """Every network interface of this machine with its IPv4 address, empty where it has none."""
    return {name: interface_address(name) for _, name in socket.if_nameindex()}


def address_towards(host: str) -> str:
    """The address that this machine has when it speaks to `host`; empty if it has no way there. Sends nothing."""
    if not host:
        return ""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as asker:
            asker.connect(target)
            return asker.getsockname()[0]
    except OSError:
        return ""


def named_in(text: str, nodes: Sequence[Node]) -> Node | None:
    """The node whose address stands in `text`, as in gloo's errors; None if none does or several share it."""

    def stands_there(address: str) -> bool:
        return bool(address) and re.search(rf"(?<![\w.:]){re.escape(address)}(?!\w|\.\w)", text) is not None

    found = [node for node in nodes if stands_there(node.address)]
    return found[0] if len(found) == 1 else None
