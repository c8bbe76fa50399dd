"""What the system lets a process have."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

from trainer.doctor.finding import Finding

MIB = 2**20
FEWEST_FILES, FEW_FILES = 256, 4096
LITTLE_SHARED = 1024 * MIB
SHARED = Path("/dev/shm")


def look() -> list[Finding]:
    """All of it."""
    return [open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]), locked(), *shared_memory()]


def open_files(soft: int) -> Finding:
    """How many files and sockets a process may have open: connections to other ranks count."""
    remedy = "`ulimit -n 65536`, or LimitNOFILE of the service that starts it"
    unlimited = soft == resource.RLIM_INFINITY
    hint = fault = ""
    if not unlimited and soft < FEWEST_FILES:
        fault = f"a process may open {soft} files, and training needs {FEWEST_FILES} or more: {remedy}."
    elif not unlimited and soft < FEW_FILES:
        hint = f"a process may open {soft} files, which is little for many ranks: {remedy}."
    return Finding("open files", "unlimited" if unlimited else str(soft), "", hint, fault)


def locked() -> Finding:
    """Memory that may be locked, as pinned buffers and InfiniBand want it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding("locked memory", "unlimited")
    return Finding("locked memory", f"{soft / MIB:.0f} MiB", "InfiniBand and offloading want it unlimited: ulimit -l")


def shared_memory(place: Path = SHARED, gpus: int | None = None) -> list[Finding]:
    """What ranks of one machine exchange through."""
    if not place.is_dir():
        return [Finding("shared memory", "none", f"there is no {place}")]
    if gpus is None:
        import torch

        gpus = torch.cuda.device_count()
    usage = shutil.disk_usage(place)
    hint = fault = ""
    remedy = "start the container with --shm-size=8g, or mount a larger tmpfs there"
    if usage.free < LITTLE_SHARED:
        sentence = f"{place} has {usage.free / MIB:.0f} MiB free, and NCCL exchanges through it: {remedy}."
        hint, fault = ("", sentence) if gpus > 1 else (sentence, "")
    return [
        Finding("shared memory", f"{usage.free / MIB:.0f} of {usage.total / MIB:.0f} MiB free", str(place), hint, fault)
    ]
