"""Processes: who this one is, its device, and the process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Process:
    """One process of the run, as torchrun describes it (alone: rank 0 of 1)."""

    rank: int
    local_rank: int
    world_size: int
    device_type: str

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda", self.local_rank) if self.device_type == "cuda" else torch.device("cpu")


def this_process() -> Process:
    """Read from the environment; no process group is needed or made."""
    import torch

    return Process(
        rank=int(os.environ.get("RANK", 0)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        device_type="cuda" if torch.cuda.is_available() else "cpu",
    )


@contextmanager
def process_group(process: Process, timeout: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """The default process group for the length of a `with`, also for a process alone.

    CPU tensors travel by gloo; on GPUs, CUDA tensors by NCCL. A caller that has a group already keeps it.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    if process.device_type == "cuda":
        torch.cuda.set_device(process.device)
    backend = "cpu:gloo,cuda:nccl" if process.device_type == "cuda" else "gloo"
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if "RANK" not in os.environ else {}
    dist.init_process_group(backend, timeout=timeout, **alone)
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank. Collective."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
