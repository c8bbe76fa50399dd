"""When memory ends during training: what was planned, what was found, and what would need less."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from parallel.processes import Process
from trainer.config import Config, load_config
from trainer.planning.devices import GIB, memory_here
from trainer.planning.remedies import Remedy, candidates, peak_of, remedies

SECONDS = 60
COUNT = 3
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class OutOfMemory(RuntimeError):
    """Memory has ended; the message says what would need less of it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ended: on the GPU, in torch's CPU allocator or in Python; also where another error came of it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def explain(error: BaseException, config: Config, precision: str, process: Process, seconds: float = SECONDS) -> str:
    """A paragraph for the user. The plan is made by another process, which has `seconds` for it."""
    if config.parallel.engine == "torch":
        planned, found, trouble = _ask_for_plan(config, precision, process, seconds)
    else:
        planned, found, trouble = None, [], "there is none for DeepSpeed's engine"
    parts = [f"Memory has ended: {_first_line(error)}", _observed(process)]
    if planned is not None:
        parts.append(f"A plan of this layout says {planned / GIB:.2f} GiB of tensors for the rank that holds most.")
    if trouble:
        parts.append(f"The plan is not complete: {trouble}.")
        known = [remedy.changes for remedy in found]
        others = (remedy for remedy in candidates(config, process.world_size) if remedy.changes not in known)
        found += islice(others, COUNT - len(found))
    if found:
        parts.append("Less is needed with " + "; or ".join(remedy.sentence() for remedy in found) + ".")
    return " ".join(parts)


def _first_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if text.endswith(".") else f"{text}."


def _observed(process: Process) -> str:
    """What this rank held, and what there is."""
    if process.device_type == "cuda":
        held, there = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        return (
            f"Rank {process.rank} had {held / GIB:.2f} GiB of tensors at its peak, on a GPU of {there / GIB:.2f} GiB."
        )
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (
        f"Rank {process.rank} held {held / GIB:.2f} GiB at its peak, the interpreter among them; "
        f"this machine lets it have {memory_here() / GIB:.2f} GiB."
    )


def _ask_for_plan(
    config: Config, precision: str, process: Process, seconds: float
) -> tuple[int | None, list[Remedy], str]:
    """(bytes of the costliest rank, remedies, why there is not more): what the other process found in its time."""
    environment = {
        name: value for name, value in os.environ.items() if name not in _LAUNCHER and "TORCHELASTIC" not in name
    }
    environment["CUDA_VISIBLE_DEVICES"] = ""
    gloo = "gloo" if process.device_type == "cpu" else "nccl"
    written = Path(config.run.dir) / "config.toml"
    command = [sys.executable, "-m", "trainer.planning.out_of_memory", str(written), str(process.world_size)]
    trouble = ""
    with tempfile.TemporaryFile("w+") as answer, tempfile.TemporaryFile("w+") as complaint:
        try:
            other = subprocess.Popen([*command, precision, gloo], stdout=answer, stderr=complaint, env=environment)
            try:
                if other.wait(seconds):
                    complaint.seek(0)
                    trouble = (complaint.read().strip().splitlines() or ["its process ended"])[-1].rstrip(".")
            except subprocess.TimeoutExpired:
                other.kill()
                other.wait()
                trouble = f"it was not done in {seconds:g} s"
        except OSError as error:
            trouble = f"no process could be started: {error}"
        answer.seek(0)
        lines = [json.loads(line) for line in answer.read().splitlines() if line.endswith("}")]
    planned = lines[0]["planned"] if lines else None
    return planned, [Remedy(**line) for line in lines[1:]], trouble


def answers(config: Config, world_size: int, precision: str, gloo: bool) -> Iterator[dict[str, Any]]:
    """What the other process writes, a line as soon as it is found."""
    now = peak_of(config, world_size, precision=precision, gloo=gloo)
    yield {"planned": now}
    for remedy in remedies(config, world_size, now=now, precision=precision, gloo=gloo, count=COUNT):
        yield asdict(remedy)


def main(path: str, world_size: str, precision: str, backend: str) -> None:
    """The other process. A limit on memory that training ran into is none for it, as far as that can be lifted."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    config = load_config(Path(path))
    for line in answers(config, int(world_size), precision, backend == "gloo"):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
