"""A watch over the nodes of a run: when one is lost, the others end, and say which.

A process that is killed closes its connections, so the collectives of the others raise at once, and name an address. A
machine that loses its power or its cable closes nothing: the others would wait inside a collective for as long as its
time-out allows. So each node gives a sign of life, a count that its first process raises in the store through which
the processes have found each other, and every process looks at all counts. What is counted are looks, not seconds:
a process that stood still itself has looked at nothing meanwhile, and accuses nobody.

Each process has two threads for it. One talks to the store and hangs when the node that holds it is lost; the other
notices just that, and ends the process, since the main thread hangs too.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from parallel.data import sum_over_ranks
from parallel.nodes import Node, gather_nodes, named_in
from parallel.processes import Process, from_first_rank

LOOKS = 10
"""So many looks without a new sign of life, one every `timeout / LOOKS` seconds, and a node is lost."""
SECONDS_TO_SAY_SO = 10.0
"""For writing down what happened: the file system may hang together with the node."""
SECONDS_TO_ASK = 5.0
"""For an answer of the store when a collective has raised."""
MOMENTS = 10
"""How often the store is asked meanwhile what others found."""


class LostNode(RuntimeError):
    """A node is lost, or a process on it has ended. `index` is the node's."""

    def __init__(self, sentence: str, index: int):
        super().__init__(sentence)
        self.index = index


@contextmanager
def watch_nodes(
    process: Process, timeout: float, *, on_loss: Callable[[LostNode], None], exit_code: int
) -> Iterator[NodeWatch | None]:
    """Watch over the nodes for the length of a `with`; None, and no thread, on one node. Collective.

    Args:
        timeout: seconds without a sign of life after which a node is lost; 0 watches nothing, but still explains.
        on_loss: called in a thread of the watch before it ends the process with `exit_code`.
    """
    if process.nodes == 1:
        yield None
        return
    watch = NodeWatch(process, timeout, on_loss, exit_code)
    watch.start()
    try:
        yield watch
        # Together: the sign of a node that was done earlier would be missed by the others.
        sum_over_ranks([0.0])
    finally:
        watch.stop()


class NodeWatch:
    """The watch of one process; see `watch_nodes`."""

    def __init__(self, process: Process, timeout: float, on_loss: Callable[[LostNode], None], exit_code: int):
        self.timeout, self.on_loss, self.exit_code = timeout, on_loss, exit_code
        self.here, self.rank, self.gives_sign = process.node, process.rank, process.local_rank == 0
        # A connection of its own: on the process group's, a look would wait behind whatever is asked there.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
        )
        # Of one start alone: after a restart the store may be the same.
        start = from_first_rank(os.urandom(8).hex())
        self.store = dist.PrefixStore(f"headway/{start}", store)
        if self.gives_sign:
            self.store.set(_sign(self.here), "0")
        self.nodes: Sequence[Node] = gather_nodes(process)
        self.silent_looks = {node.index: 0 for node in self.nodes if node.index != self.here}
        self.unanswered = 0
        self.store_error = ""
        self._done = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to give signs of life and to look for those of the others."""
        if self.timeout > 0:
            self._threads = [
                threading.Thread(target=run, name=f"node watch: {run.__name__}", daemon=True)
                for run in (self._talk, self._judge)
            ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads. One that hangs, because the store's node is lost, is left to end with the process."""
        self._done.set()
        for thread in self._threads:
            thread.join(SECONDS_TO_ASK)

    @property
    def between_looks(self) -> float:
        return self.timeout / LOOKS

    def _talk(self) -> None:
        """Give this node's sign, and count for how many looks each other node has given none."""
        signs = [_sign(index) for index in self.silent_looks]
        last: dict[int, bytes] = {}
        count = 0
        while not self._done.wait(self.between_looks):
            count += 1
            try:
                if self.gives_sign:
                    self.store.set(_sign(self.here), str(count))
                found = self.store.multi_get(signs)
            except RuntimeError as error:
                # Not made anew: the judge gives it its time, and a store that is gone does not come back.
                self.store_error = str(error)
                return
            for index, sign in zip(self.silent_looks, found, strict=True):
                self.silent_looks[index] = self.silent_looks[index] + 1 if last.get(index) == sign else 0
                last[index] = sign
            self.unanswered = 0

    def _judge(self) -> None:
        while not self._done.wait(self.between_looks):
            self.unanswered += 1
            if (index := self._lost()) is not None:
                self._end(index)

    def _lost(self) -> int | None:
        """The node that is lost, if one is. The store is on the first: where it is silent, nothing else is known."""
        if self.unanswered > LOOKS:
            return 0
        return next((index for index, looks in self.silent_looks.items() if looks >= LOOKS), None)

    def _end(self, index: int) -> None:
        loss = self._loss(
            index,
            f"has given no sign of life for {self.timeout:g} seconds: it has stopped, or the network between it and "
            f"node {self.here} is cut",
        )
        speaker = threading.Thread(target=self.on_loss, args=(loss,), daemon=True)
        speaker.start()
        speaker.join(SECONDS_TO_SAY_SO)
        os._exit(self.exit_code)

    def explain(self, error: BaseException) -> LostNode | None:
        """What other node is behind an error of a collective; None where none is. Tells the others what it found.

        The first process that knows tells it in the store, so that all name the same node: one that ends for that
        reason closes its connections as well, and those who have waited for it would name it.
        """
        ours = self._from_error(error)
        if ours is None and not _is_of_network(error):
            self._told(_verdict(self.here, f"failed on rank {self.rank}: {type(error).__name__}: {error}"))
            return None
        answered, told = self._told(ours)
        if not answered:
            # The store is on the first node, and gone with it; or, on that node itself, with the agent there.
            told = ours if self.here == 0 else _verdict(0, "does not answer: it, or torchrun on it, has ended")
        if told is None or told["node"] == self.here:
            return None
        return self._loss(told["node"], told["what"])

    def _from_error(self, error: BaseException) -> dict[str, Any] | None:
        node = named_in(_texts(error), self.nodes) if _is_of_network(error) else None
        return None if node is None or node.index == self.here else _verdict(node.index, _closed(error))

    def _told(self, ours: dict[str, Any] | None) -> tuple[bool, dict[str, Any] | None]:
        """Whether the store answers, and what was told first, after telling `ours` if nothing was.

        With nothing to tell, others are given a moment to.
        """
        answers: list[dict[str, Any] | None] = []

        def ask() -> None:
            with suppress(RuntimeError):
                for _ in range(MOMENTS):
                    if ours is not None or self.store.check(["verdict"]):
                        told = self.store.compare_set("verdict", "", json.dumps(ours))
                        answers.append(json.loads(told))
                        return
                    time.sleep(SECONDS_TO_ASK / 2 / MOMENTS)
                answers.append(None)

        asker = threading.Thread(target=ask, daemon=True)
        asker.start()
        asker.join(SECONDS_TO_ASK)
        return bool(answers), answers[0] if answers else None

    def _loss(self, index: int, what: str) -> LostNode:
        node = next(node for node in self.nodes if node.index == index)
        return LostNode(f"{node} {what}.", index)


def _sign(node: int) -> str:
    return f"sign of node {node}"


def _verdict(node: int, what: str) -> dict[str, Any]:
    return {"node": node, "what": what}


def _closed(error: BaseException) -> str:
    return f"has closed its connections: it, or a process on it, has ended ({_network_error(error)})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _texts(error: BaseException) -> str:
    return "\n".join(str(link) for link in _chain(error))


def _network_error(error: BaseException) -> str:
    """The first sentence of what the network library said, without the place in its source that gloo puts before."""
    said = next((str(link) for link in _chain(error) if _is_of_network_itself(link)), str(error))
    return re.sub(r"^\[\S*gloo/\S*\] ", "", said).split(". ")[0].split("\n")[0]


def _is_of_network(error: BaseException) -> bool:
    return any(_is_of_network_itself(link) for link in _chain(error))


def _is_of_network_itself(error: BaseException) -> bool:
    """gloo raises plain RuntimeErrors that name its own source; NCCL and the store have classes of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
