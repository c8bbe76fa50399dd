"""What would lower the memory of a rank, each with the figure that a plan finds for it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from parallel.mesh import layout_faults, resolve_layout
from parallel.zero_config import resolve_zero
from trainer.config import Config
from trainer.planning.devices import GIB
from trainer.planning.program import trace_pipeline


@dataclass(frozen=True)
class Remedy:
    """Settings of `[parallel]` that lower a rank's memory.

    Attributes:
        changes: key -> value. world_size: processes it is for; more_processes: than there are.
        peak: bytes of the costliest rank, where a plan was made.
    """

    changes: dict[str, Any]
    world_size: int
    more_processes: bool
    peak: int | None = None

    def sentence(self) -> str:
        """In words, with the figure."""
        said = " ".join(f"--parallel.{key} {value}" for key, value in self.changes.items())
        if self.more_processes:
            said = f"{said} on {self.world_size} processes".strip()
        return said if self.peak is None else f"{said}: {self.peak / GIB:.2f} GiB"


def candidates(config: Config, world_size: int) -> Iterator[Remedy]:
    """What might help, the cheapest first; all of them are legal."""
    for changes, times in _of_zero(config) if config.parallel.engine == "deepspeed" else _of_torch(config, world_size):
        remedy = Remedy(changes, world_size * times, more_processes=times > 1)
        if _is_legal(config, remedy):
            yield remedy


_LEVELS = ("none", "selective", "full")


def _recomputing_more(config: Config) -> list[tuple[dict[str, Any], int]]:
    return [({"recompute": level}, 1) for level in _LEVELS[_LEVELS.index(config.parallel.recompute) + 1 :]]


def _of_zero(config: Config) -> list[tuple[dict[str, Any], int]]:
    """Settings of DeepSpeed's engine, and how many times as many processes they are for."""
    zero = resolve_zero(config.parallel)
    assert zero is not None
    settings: list[tuple[dict[str, Any], int]] = [({"microbatches": 2 * (config.parallel.microbatches or 1)}, 1)]
    settings += [({"zero_stage": stage}, 1) for stage in range(zero.stage + 1, 4)]
    settings += _recomputing_more(config)
    if zero.offload_optimizer == "none":
        settings.append(({"offload_optimizer": "cpu"}, 1))
    if zero.offload_parameters == "none":
        settings.append(({"zero_stage": 3, "offload_parameters": "cpu"}, 1))
    return [*settings, ({}, 2)]


def _of_torch(config: Config, world_size: int) -> list[tuple[dict[str, Any], int]]:
    """Settings of torch's engine, and how many times as many processes they are for."""
    layout = resolve_layout(config.parallel, world_size)
    fixed = {"dp_shard": layout.dp_shard}
    settings: list[tuple[dict[str, Any], int]] = []
    settings += [({"microbatches": layout.microbatches * 2}, 1)]
    settings += _recomputing_more(config)
    if layout.dp_replicate > 1:
        settings += [({"dp_replicate": 1, "dp_shard": layout.dp_replicate * layout.dp_shard}, 1)]
    if layout.dp_shard % 2 == 0:
        settings += [({"tp": layout.tp * 2, "dp_shard": layout.dp_shard // 2}, 1)]
    settings += [({"dp_shard": layout.dp_shard * 2}, 2), ({"tp": layout.tp * 2} | fixed, 2)]
    return [*settings, ({"pp": layout.pp * 2} | fixed, 2), ({"cp": layout.cp * 2} | fixed, 2)]


def remedies(
    config: Config, world_size: int, *, now: int, precision: str, gloo: bool, count: int = 3
) -> Iterator[Remedy]:
    """The first so many that do lower the peak from what it is `now`, each as soon as it is found."""
    for remedy in candidates(config, world_size):
        peak = peak_of(changed(config, remedy), remedy.world_size, precision=precision, gloo=gloo)
        if peak < now:
            yield replace(remedy, peak=peak)
            count -= 1
        if count == 0:
            return


def changed(config: Config, remedy: Remedy) -> Config:
    """The configuration with a remedy applied."""
    found = deepcopy(config)
    for key, value in remedy.changes.items():
        setattr(found.parallel, key, value)
    return found


def peak_of(config: Config, world_size: int, *, precision: str, gloo: bool) -> int:
    """Bytes of the costliest rank."""
    return max(rank.peak for rank in trace_pipeline(config, world_size, precision=precision, gloo=gloo))


def _is_legal(config: Config, remedy: Remedy) -> bool:
    parallel = changed(config, remedy).parallel
    faults = layout_faults(
        parallel,
        remedy.world_size,
        config.architecture,
        seq_len=config.data.seq_len,
        global_batch_size=config.data.global_batch_size,
        isolate_documents=config.data.isolate_documents,
        compiled=config.run.compile,
    )
    return not faults
