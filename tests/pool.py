"""One pool of gloo workers for a whole test session.

Starting a process that has imported torch and the model takes seconds; a case in a running one, a tenth of a second. A
case that fails or hangs poisons the others' collectives, so the pool is then killed and started again.
"""

from __future__ import annotations

import datetime
import gc
import logging
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS_PER_CASE = 120


def _worker(rank: int, tasks: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Tests look at whole tensors, however many collectives that takes; torch warns of each.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    while True:
        task = tasks.recv()
        if task is None:
            return
        function, world_size, store, args, kwargs = task
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        try:
            timeout = datetime.timedelta(seconds=SECONDS_PER_CASE)
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
            )
            # All are connected before any goes on: one that is done at once would hang up on those still connecting.
            dist.barrier()
            try:
                tasks.send((True, function(*args, **kwargs)))
            finally:
                dist.destroy_process_group()
        except BaseException:
            tasks.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        # Models and schedules refer to themselves in circles and hold their process groups, whose threads go on (after
        # two hundred cases a worker had a thousand, and stood still): do not wait until Python looks for circles.
        gc.collect()
        if not gc.get_freeze_count():
            gc.freeze()  # What has been imported by now stays: it need not be looked at after every case.


class Pool:
    """`pool.run(function, world_size, ...)` calls a module-level function on every rank of a fresh process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[Any, Connection]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="headway-pool-"))
        self.cases = 0

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
        """The results by rank. A failure on any rank is raised here with that rank's traceback."""
        assert world_size <= self.size, f"the pool has {self.size} workers"
        if not self.workers:
            self._start()
        self.cases += 1
        store = str(self.folder / f"store-{self.cases}")
        taking_part = self.workers[:world_size]
        for _, connection in taking_part:
            connection.send((function, world_size, store, args, kwargs))
        results, failures = [], []
        for rank, (_, connection) in enumerate(taking_part):
            # After the first failure the others have only moments: they hang in a collective without it.
            if not connection.poll(2 if failures else SECONDS_PER_CASE):
                failures.append(f"rank {rank}: no answer")
                continue
            try:
                succeeded, result = connection.recv()
            except EOFError:
                succeeded, result = False, f"rank {rank}: its process ended"
            (results if succeeded else failures).append(result)
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    def _start(self) -> None:
        context = get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def stop(self) -> None:
        """End every worker by its own id."""
        for process, connection in self.workers:
            connection.close()
            process.kill()
            process.join(10)
        self.workers = []
