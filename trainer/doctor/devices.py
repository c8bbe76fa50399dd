"""Processors, memory, GPUs, and what connects them."""

from __future__ import annotations

import os
from collections import Counter
from itertools import combinations

from trainer.doctor.finding import Finding, run

LINKS = {"NV": "NVLink", "PIX": "one PCIe switch", "PXB": "several PCIe switches", "PHB": "the PCIe host bridge"} | {
    "NODE": "PCIe inside a NUMA node",
    "SYS": "PCIe between NUMA nodes, slow",
}
"""As `nvidia-smi topo -m` abbreviates them."""


def look() -> list[Finding]:
    """All of it."""
    return [processor(), memory(), *gpus(), *links()]


def processor() -> Finding:
    """Cores that this process may use, and torch's threads."""
    import torch

    cores = len(os.sched_getaffinity(0))
    what = f"{cores} of {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return Finding("processor", what, torch.backends.cpu.get_cpu_capability())


def memory() -> Finding:
    """Of the machine."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES")
    return Finding("memory", f"{pages * size / 2**30:.1f} GiB", f"{free * size / 2**30:.1f} GiB of it unused")


def gpus() -> list[Finding]:
    """Those that torch sees; a fault where there are others."""
    import torch

    listed = run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or ""
    present = [line.strip() for line in listed.splitlines() if line.strip()]
    if not torch.cuda.is_available():
        if not present:
            return [Finding("gpu", "none", "training runs on the CPU with gloo, in fp32")]
        why = "it is built without CUDA" if torch.version.cuda is None else f"it is built for CUDA {torch.version.cuda}"
        fault = (
            f"nvidia-smi lists {len(present)} GPUs ({present[0]}), and torch {torch.__version__} sees none: {why}. "
            "Install a build of torch for a CUDA version that the driver has, and look at CUDA_VISIBLE_DEVICES."
        )
        return [Finding("gpu", "not seen by torch", "", "", fault)]
    found = [_gpu(index) for index in range(torch.cuda.device_count())]
    driver = present[0].rpartition(",")[2].strip() if present else "unknown"
    built = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {_nccl()}"
    return [*found, Finding("driver", driver, f"torch is built with {built}")]


def _gpu(index: int) -> Finding:
    import torch

    from trainer.throughput import peak_flops

    device = torch.device("cuda", index)
    peak = peak_flops(device, "bf16")
    free, total = torch.cuda.mem_get_info(device)
    what = "peak not known: no MFU" if peak is None else f"MFU relative to {peak / 1e12:.0f} TFLOP/s (bf16, dense)"
    size = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    hint = ""
    if free < 0.8 * total:
        hint = f"gpu {index} has {size}: something else is using it; `nvidia-smi` says what."
    return Finding(f"gpu {index}", f"{torch.cuda.get_device_name(index)}, {size}", what, hint)


def _nccl() -> str:
    import torch

    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):
        return "missing"


def links() -> list[Finding]:
    """What the GPUs of this machine are connected by, pair by pair."""
    import torch

    if torch.cuda.device_count() < 2:
        return []
    table = run("nvidia-smi", "topo", "-m")
    if table is None:
        return [Finding("between gpus", "unknown", "nvidia-smi topo -m says nothing")]
    return connections(table)


def connections(table: str) -> list[Finding]:
    """What `nvidia-smi topo -m` says, counted by kind."""
    rows = [line.split() for line in table.splitlines() if line.startswith("GPU")]
    kinds = Counter(rows[i][j + 1] for i, j in combinations(range(len(rows)), 2))
    found = []
    for kind, count in kinds.most_common():
        name = next((LINKS[short] for short in LINKS if kind.startswith(short)), "unknown")
        pairs = f"{count} pair" + "s" * (count > 1)
        hint = ""
        if kind == "SYS":
            hint = f"{pairs} of GPUs talk {LINKS['SYS']}: keep parallel.tp among those with a faster link."
        found.append(Finding("between gpus", f"{pairs}: {kind}", name, hint))
    return found
