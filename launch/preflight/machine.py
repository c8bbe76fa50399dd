"""What this machine is: its network interfaces, its addresses, and the versions of what runs on it."""

from __future__ import annotations

import hashlib
import ipaddress
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from parallel.nodes import address_towards, interfaces

ROOT = Path(__file__).resolve().parents[2]
IFF_UP = 1
FLOORS = ("kernels", "model", "parallel", "trainer", "launch")


def listed(found: Mapping[str, str]) -> str:
    """Interfaces for a sentence: `lo (127.0.0.1), eth0 (10.0.0.5)`."""
    return ", ".join(f"{name} ({address or 'no address'})" for name, address in found.items()) or "none at all"


def own_place(interface: str, master: str) -> tuple[str, str, list[str]]:
    """The interface and address by which other nodes reach this one, and what is wrong with them.

    Args:
        interface: its name, or empty: then the one on the way to `master`, which is named also where this one is wrong.
    """
    found = interfaces()
    if not interface:
        address = address_towards(master)
        name = next((name for name, has in found.items() if has == address), "")
        return name, address, []
    there = f"this machine has {listed(found)}"
    if interface not in found:
        return interface, address_towards(master), [f"there is no network interface {interface}: {there}."]
    address = found[interface]
    if not address:
        return interface, address_towards(master), [f"the network interface {interface} has no IPv4 address: {there}."]
    faults = []
    if ipaddress.ip_address(address).is_loopback:
        faults.append(f"the network interface {interface} ({address}) leads to this machine alone: {there}.")
    elif not _is_up(interface):
        faults.append(f"the network interface {interface} ({address}) is switched off: {there}.")
    return interface, address, faults


def _is_up(interface: str) -> bool:
    """As Linux says it; whether there is a cable in it shows when others are tried."""
    flags = Path("/sys/class/net") / interface / "flags"
    return not flags.is_file() or bool(int(flags.read_text(), 16) & IFF_UP)


def versions() -> dict[str, str]:
    """What must be the same on all nodes, by name."""
    return {
        "Python": platform.python_version(),
        "torch": _version("torch"),
        "Headway": _version("headway"),
        "the code of Headway": code_hash(ROOT),
    }


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def code_hash(root: Path) -> str:
    """The first twelve digits of a SHA-256 over names and contents of all Python files of the floors."""
    digest = hashlib.sha256()
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            name = str(path.relative_to(root)).encode()
            content = path.read_bytes()
            digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return digest.hexdigest()[:12]


def version_faults(by_node: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A sentence for each thing whose version differs between nodes: who has which."""
    faults = []
    for what in dict.fromkeys(key for found in by_node.values() for key in found):
        holders: dict[str, list[str]] = {}
        for node, found in by_node.items():
            holders.setdefault(found.get(what, "unknown"), []).append(node)
        if len(holders) > 1:
            who = "; ".join(f"{has} on {', '.join(nodes)}" for has, nodes in holders.items())
            faults.append(f"{what} differs: {who}. All nodes must have the same.")
    return faults
