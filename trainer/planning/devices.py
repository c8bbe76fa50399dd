"""What a plan assumes: the device and its links, and what part of them a run attains."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trainer.throughput import PEAK_FLOPS

DeviceName = Literal["cpu", "v100", "a100", "h100", "h200"]
GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device, by its maker's data sheet.

    Attributes:
        memory: bytes that a process may have; None: not known here.
        peak: dense matrix products, FLOP/s; None: not known.
        link, network: bytes/s that a device sends inside a node, and out of it, when all of the node do.
    """

    memory: float | None
    peak: float | None
    link: float
    network: float


# Memory is the nominal 32, 80 and 141 GB, less what a driver keeps. Links are those of the makers' own servers, in one
# direction: NVLink, and a network adapter of 100, 200 or 400 Gbit/s for two GPUs (DGX-2) or for each (DGX A100, H100).
# The V100 multiplies no bf16: its peak is that of fp16.
DEVICES: dict[str, Device] = {
    "v100": Device(31.7 * GIB, 125e12, 150e9, 6.25e9),
    "a100": Device(79.1 * GIB, PEAK_FLOPS["A100"], 300e9, 25e9),
    "h100": Device(79.1 * GIB, PEAK_FLOPS["H100"], 450e9, 50e9),
    "h200": Device(139.7 * GIB, PEAK_FLOPS["H200"], 450e9, 50e9),
}


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; each can be said on the command line.

    Attributes:
        device: its name. memory: bytes a process may have, None where not known. reserve: bytes of it that are no
            tensors: the interpreter, or CUDA and NCCL and what the allocator cannot use.
        node_size: devices in a node.
        peak: FLOP/s of one device, None where not known. attained: part of it that layers reach while they compute.
        link, network: bytes/s that a device sends inside and out of a node. links_attained: part of it that is reached.
        overlap: part of the data-parallel traffic that hides behind computing, where there is enough of that.
    """

    device: DeviceName
    memory: float | None
    reserve: float
    node_size: int
    peak: float | None
    attained: float
    link: float
    network: float
    links_attained: float
    overlap: float

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


def this_machine() -> DeviceName:
    """What this machine has.

    Raises:
        ValueError: a GPU that is not in the table.
    """
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_name(0)
    for name in DEVICES:
        if name.upper() in found:
            return name  # type: ignore[return-value]
    raise ValueError(f"this machine has {found!r}, of which no plan can be made: say --device {'|'.join(DEVICES)}.")


def assume(
    device: DeviceName | None,
    world_size: int,
    *,
    node_size: int = 8,
    peak: float | None = None,
    attained: float = 0.4,
    link: float | None = None,
    network: float | None = None,
    links_attained: float = 0.8,
    overlap: float = 0.9,
    reserve: float | None = None,
) -> Assumptions:
    """Fill in what is not said: of the device, or of this machine.

    Raises:
        ValueError: figures that cannot be.
    """
    if device not in (None, *get_args(DeviceName)):
        raise ValueError(f"--device {device} is not known: take one of {', '.join(get_args(DeviceName))}.")
    name = device or this_machine()
    # Processes on a CPU share its memory, and talk through it.
    found = DEVICES.get(name) or Device(memory_here() / min(world_size, node_size), None, 1e9, 1e9)
    return Assumptions(
        device=name,
        memory=found.memory,
        reserve=reserve if reserve is not None else (3.0 if name != "cpu" else 0.5) * GIB,
        node_size=node_size,
        peak=peak or found.peak,
        attained=attained,
        link=link or found.link,
        network=network or found.network,
        links_attained=links_attained,
        overlap=overlap,
    )


def memory_here() -> float:
    """Bytes of memory that a process on this machine can have: all there is, or what a limit leaves."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS)[:1] if limit != resource.RLIM_INFINITY]
    cgroup = Path("/sys/fs/cgroup/memory.max")
    if cgroup.is_file() and (said := cgroup.read_text().strip()).isdigit():
        limits.append(int(said))
    return min(limits)
