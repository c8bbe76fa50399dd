"""Gloo workers for the tests, fresh ones for each case.

Importing torch, megatron-core and the model takes seconds, so it is done once, by a server that then does nothing else
than fork: eight workers have found each other within a third of a second. Workers that took one case after another
would not do: torch keeps the meshes it has seen in caches of many kinds, and with them their process groups and those
groups' threads (after two hundred cases a worker had a thousand, and stood still).
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import logging
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

SECONDS_PER_CASE = 300
IMPORTED_BEFORE = [
    "pydantic.dataclasses",
    "pydantic.type_adapter",
    "tomli_w",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "trainer.commands.train",
    "trainer.run",
    "trainer.data.gpt",
    "model.feedforward.gated",
    "model.feedforward.mlp",
    "tests.conformance.layouts",
]


def _work(rank: int, world_size: int, store: str, answer: Connection, call: bytes) -> None:
    faulthandler.enable()
    gc.freeze()  # What was imported before the fork stays; looking through it for garbage would copy its pages.
    torch.set_num_threads(1)
    # Tests look at whole tensors, however many collectives that takes; torch warns of each.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    try:
        timeout = datetime.timedelta(seconds=SECONDS_PER_CASE)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
        )
        function, args, kwargs = pickle.loads(call)
        answer.send_bytes(pickle.dumps((True, function(*args, **kwargs))))
    except BaseException:
        answer.send_bytes(pickle.dumps((False, f"rank {rank}:\n{traceback.format_exc()}")))
    # The others may still be talking to this process: it waits to be ended with them.
    answer.poll(None)


class Pool:
    """`pool.run(function, world_size, ...)` calls a module-level function on every rank of a fresh process group."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size = size
        self.folder = folder
        self.cases = 0
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(IMPORTED_BEFORE)

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
        """The results by rank. A failure on any rank is raised here with that rank's traceback."""
        assert world_size <= self.size, f"the pool has {self.size} workers"
        self.cases += 1
        store = str(self.folder / f"store-{self.cases}")
        # Pickled here: torch's own way to send a tensor keeps a file open for as long as the tensor lives, and what
        # tests keep of hundreds of cases is more than the 1024 files that many systems let a process open.
        call = pickle.dumps((function, args, kwargs))
        workers: list[tuple[Any, Connection]] = []
        try:
            for rank in range(world_size):
                ours, theirs = self.context.Pipe()
                process = self.context.Process(target=_work, args=(rank, world_size, store, theirs, call), daemon=True)
                # The server too, begun by the first worker, must have no threads: it is forked.
                with patch.dict(os.environ, OMP_NUM_THREADS="1"):
                    process.start()
                theirs.close()
                workers.append((process, ours))
            answers, failures = _answers(workers)
        finally:
            for process, connection in workers:
                process.kill()
                process.join(10)
                connection.close()
        if failures:
            raise AssertionError("\n".join(failures))
        return answers


def _answers(workers: list[tuple[Any, Connection]]) -> tuple[list[Any], list[str]]:
    """What the ranks answered, in their order, and what went wrong, in the order it was heard of."""
    answers: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {connection: rank for rank, (_, connection) in enumerate(workers)}
    # After the first failure the others have only moments: they hang in a collective without it.
    while waiting and (ready := wait(list(waiting), 2 if failures else SECONDS_PER_CASE)):
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                succeeded, answer = pickle.loads(connection.recv_bytes())
            except EOFError:
                process, _ = workers[rank]
                process.join(10)
                succeeded, answer = False, f"rank {rank}: its process ended with {process.exitcode}"
            if succeeded:
                answers[rank] = answer
            else:
                failures.append(answer)
    failures += [f"rank {rank}: no answer" for rank in waiting.values()]
    return [answers[rank] for rank in sorted(answers)], failures
