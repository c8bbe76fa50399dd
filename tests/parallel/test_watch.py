"""The watch over nodes, and whom it names: several nodes are played by processes of this one."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from parallel.nodes import Node, address_towards, interface_address, named_in
from parallel.processes import from_first_rank, this_process
from parallel.watch import LostNode, NodeWatch, watch_nodes
from tests.pool import Pool

TIMEOUT = 2.0
NODES = [Node(0, "a", "10.0.0.2", (0, 1)), Node(1, "a", "10.0.0.25", (2, 3)), Node(2, "b", "fd00::7", (4,))]


@contextmanager
def playing(nodes: list[int], *, timeout: float = TIMEOUT) -> Iterator[tuple[NodeWatch, list[LostNode]]]:
    """The watch of this process, rank i being on node `nodes[i]`, and the losses it found, which do not end it."""
    rank = dist.get_rank()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    os.environ |= {
        "GROUP_RANK": str(nodes[rank]),
        "GROUP_WORLD_SIZE": str(max(nodes) + 1),
        "LOCAL_RANK": str(nodes[:rank].count(nodes[rank])),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(from_first_rank(server.port if server is not None else None)),
    }
    losses: list[LostNode] = []
    watch = NodeWatch(this_process(), timeout, losses.append, 70)
    watch._end = lambda index: losses.append(watch._loss(index, "is silent"))  # type: ignore[method-assign]
    watch.start()
    try:
        yield watch, losses
        dist.barrier()
    finally:
        watch.stop()


def quiet_and_gone() -> None:
    before = set(threading.enumerate())
    with playing([0, 1]) as (watch, losses):
        assert len(watch._threads) == 2
        until = time.monotonic() + 2 * TIMEOUT
        while time.monotonic() < until:  # a main thread that computes, in Python, for twice the time-out
            sum(range(10_000))
    assert losses == []
    assert set(threading.enumerate()) == before


def test_a_long_pause_is_no_loss_and_no_thread_stays(pool: Pool) -> None:
    pool.run(quiet_and_gone, 2)


def alone() -> None:
    before = set(threading.enumerate())
    with watch_nodes(this_process(), TIMEOUT, on_loss=print, exit_code=70) as watch:
        assert watch is None
        assert set(threading.enumerate()) == before


def test_one_node_has_no_watch(pool: Pool) -> None:
    pool.run(alone, 2)


def one_stands_still() -> list[tuple[int, str]]:
    """Rank 1, on node 1, stands still, and so does rank 3, which gives no sign for its node 2; both go on later."""
    pids: list[Any] = [None] * 4
    dist.all_gather_object(pids, os.getpid())
    with playing([0, 1, 2, 2]) as (_, losses):
        time.sleep(TIMEOUT / 2)
        if dist.get_rank() == 0:
            for rank in (1, 3):
                os.kill(pids[rank], signal.SIGSTOP)
            time.sleep(2 * TIMEOUT)
            for rank in (1, 3):
                os.kill(pids[rank], signal.SIGCONT)
        dist.barrier()
        time.sleep(TIMEOUT)
    return [(loss.index, str(loss)) for loss in losses]


def test_who_stands_still_is_lost_and_accuses_nobody_afterwards(pool: Pool) -> None:
    first, second, third, fourth = pool.run(one_stands_still, 4)
    assert {index for index, _ in first} == {1}, "node 2 gives its sign by its first rank, which goes on"
    assert {index for index, _ in third} == {1}
    host = socket.gethostname()
    assert first[0][1] == f"node 1 (host {host}, address 127.0.0.1, rank 1) is silent."
    assert second == [] and fourth == []


def explained(errors: dict[int, str], order: list[int]) -> str | None:
    """What each rank makes of its error, one after the other."""
    nodes = [0, 1, 2, 2]
    with playing(nodes, timeout=0) as (watch, _):
        watch.nodes = [Node(index, "h", f"10.0.0.{index}", (index,)) for index in range(3)]
        found = None
        for rank in order:
            if rank == dist.get_rank():
                found = watch.explain(RuntimeError(errors[rank]))
            dist.barrier()
    return None if found is None else str(found)


def closed(address: str) -> str:
    return f"[/somewhere/gloo/transport/tcp/pair.cc:553] Connection closed by peer [{address}]:45241. More follows."


def test_all_name_the_node_that_the_first_has_named(pool: Pool) -> None:
    """Node 1 is killed; rank 0 knows; rank 2 has waited for rank 0, and rank 3 for rank 2 of its own node."""
    errors = {0: closed("10.0.0.1"), 2: closed("10.0.0.0"), 3: closed("10.0.0.2")}
    first, _, third, fourth = pool.run(explained, 4, errors, [0, 2, 3])
    assert first is not None and first.startswith(
        "node 1 (host h, address 10.0.0.1, rank 1) has closed its connections"
    )
    assert first.endswith("(Connection closed by peer [10.0.0.1]:45241).")
    assert third == first and fourth == first


def test_a_rank_that_fails_by_itself_is_named_with_its_error(pool: Pool) -> None:
    errors = {1: "the disk is full", 0: closed("10.0.0.1"), 2: closed("10.0.0.0")}
    first, second, third, _ = pool.run(explained, 4, errors, [1, 0, 2])
    assert second is None, "its own error says it"
    assert first == "node 1 (host h, address 10.0.0.1, rank 1) failed on rank 1: RuntimeError: the disk is full."
    assert third == first


def test_an_error_of_a_process_on_the_same_node_is_not_that_of_another(pool: Pool) -> None:
    found = pool.run(explained, 4, {2: closed("10.0.0.2")}, [2])
    assert found[2] is None


def without_a_store() -> tuple[str, str]:
    """The store ends, as it does with the first node: rank 1 is told nothing, and rank 2 has heard of nobody."""
    with playing([0, 1, 1], timeout=0) as (watch, _):
        dist.barrier()
        watch.store = dist.PrefixStore("gone", _Silent())
        found = watch.explain(RuntimeError(closed("10.9.9.9")))
    return str(found), "" if found is None else str(found.index)


class _Silent(dist.Store):
    def check(self, keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")


def test_a_silent_store_is_the_first_node_lost(pool: Pool) -> None:
    first, second, third = pool.run(without_a_store, 3)
    assert first == ("None", "")
    for said, index in (second, third):
        assert index == "0" and "does not answer: it, or torchrun on it, has ended" in said


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("closed by peer [10.0.0.2]:45241. This", 0),
        ("closed by peer [10.0.0.25]:45241", 1),
        ("remote=[fd00::7]:3500", 2),
        ("peer 10.0.0.2.", 0),
        ("peer 110.0.0.2", None),
        ("peer 10.0.0.2.7", None),
        ("peer 10.0.0.2 and 10.0.0.25", None),
        ("nobody", None),
    ],
)
def test_addresses_in_errors(text: str, index: int | None) -> None:
    found = named_in(text, NODES)
    assert (None if found is None else found.index) == index


def test_two_nodes_of_one_address_are_not_told_apart() -> None:
    assert named_in("10.0.0.2", [NODES[0], Node(1, "b", "10.0.0.2", (2,))]) is None


def test_names_of_nodes() -> None:
    assert str(NODES[1]) == "node 1 (host a, address 10.0.0.25, ranks 2-3)"
    assert str(NODES[2]) == "node 2 (host b, address fd00::7, rank 4)"


def test_own_addresses() -> None:
    assert interface_address("lo") == "127.0.0.1"
    assert interface_address("no-such-if") == "" and interface_address("") == ""
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("no-such-host.invalid") == "" and address_towards("") == ""
