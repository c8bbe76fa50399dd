"""Processes: who this one is, its device, and the process group."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Process:
    """One process of the run, as torchrun or DeepSpeed's launcher describes it (alone: rank 0 of 1).

    `node` is its node's place of `nodes`.
    """

    rank: int
    local_rank: int
    world_size: int
    device_type: str
    node: int = 0
    nodes: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if self.device_type == "cuda" else torch.device("cpu")


def this_process() -> Process:
    """Read from the environment; no process group is needed or made."""
    return Process(
        rank=int(os.environ.get("RANK", 0)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        device_type="cuda" if torch.cuda.is_available() else "cpu",
        # What torchrun calls a group, DeepSpeed's launcher calls cross.
        node=int(os.environ.get("GROUP_RANK", os.environ.get("CROSS_RANK", 0))),
        nodes=int(os.environ.get("GROUP_WORLD_SIZE", os.environ.get("CROSS_SIZE", 1))),
    )


@contextmanager
def process_group(process: Process, timeout: timedelta = timedelta(minutes=10)) -> Iterator[None]:
    """The default process group for the length of a `with`, also for a process alone.

    CPU tensors travel by gloo; on GPUs, CUDA tensors by NCCL. A caller that has a group already keeps it.
    """
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


def from_first_rank(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """The first rank's value, on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def gathered_on_first_rank(value: Any, group: dist.ProcessGroup | None = None) -> list[Any] | None:
    """The values of all ranks, on the first one; None on the others. Collective."""
    gathered = [None] * dist.get_world_size(group) if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, group=group)
    return gathered


def group_beside_training() -> dist.ProcessGroup:
    """A gloo group of all ranks for collectives that run in another thread than training's. Collective."""
    return dist.new_group(backend="gloo")


def first_process_first(build: Callable[[], None]) -> None:
    """Run `build` on the first process, and return on all of them when it is done.

    Without a process group, or alone, it just runs. Collective otherwise.

    Raises:
        ValueError: on every other process when the first one failed, so that none waits for ever.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        build()
        return
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            build()
        except Exception as fault:
            failure = fault
    said = from_first_rank(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if said is not None:
        raise ValueError(f"the first process failed: {said}")
