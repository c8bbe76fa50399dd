"""The nodes meet at the master's port, before torchrun uses it: one connection from each, lines of JSON.

    a node says     {"rank", "nodes", "name", "address", "port", "versions", "faults"}
    it hears        {"waiting_for": [ranks]} every second, until all are there or have had their time
    and then        {"look": {"file", "peer"}}
    a node says     {"faults"}: of the run folder, and of the way to an ephemeral port of its peer, the next node
    all hear        {"verdict": [sentences]}: every fault of every node; none if the run may begin

The port is the one that torchrun listens on afterwards, so that what stands between a node and that very port is found.
Between two nodes gloo and NCCL use any port, so each node also listens on one and is tried by another.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.preflight.folder import SECONDS_TO_APPEAR, folder_faults, marked
from launch.preflight.machine import listed, version_faults, versions
from launch.preflight.reach import LONGEST_LINE, Unreachable, connect, receive, send
from parallel.nodes import interfaces

SECONDS_TO_LOOK = SECONDS_TO_APPEAR + 4.0
SECONDS_BETWEEN_TRIES = 0.3
SECONDS_OF_A_VISIT = 26.0
"""Altogether, from a node's start."""
SECONDS_OF_SILENCE = 4.0
"""Of a master that speaks every second."""


@dataclass(frozen=True)
class Settings:
    """What a node was started with. `seconds`: how long it waits for the others; `address`: its own."""

    nodes: int
    rank: int
    master: str
    port: int
    run_dir: Path
    seconds: float
    address: str

    @property
    def name(self) -> str:
        """This node in a sentence."""
        return f"node {self.rank} (host {socket.gethostname()}, address {self.address or 'unknown'})"


@dataclass
class Visitor:
    """A node as the master sees it."""

    hello: dict[str, Any]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.hello["name"])


async def meet(settings: Settings, faults: list[str]) -> list[str]:
    """Every fault of every node that could be found; `faults` are those that this node has found by itself."""
    faults = [f"{settings.name}: {fault}" for fault in faults]
    async with _ephemeral_port(settings) as port:
        hello = {
            "rank": settings.rank,
            "nodes": settings.nodes,
            "name": settings.name,
            "address": settings.address,
            "port": port,
            "versions": versions(),
            "faults": faults,
        }
        if settings.rank == 0:
            return await Master(settings, hello).hold()
        return await _visit(settings, hello)


@asynccontextmanager
async def _ephemeral_port(settings: Settings) -> AsyncIterator[int]:
    """A port of this node's own address that answers with the node's rank; 0 where it has no address."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await send(writer, {"rank": settings.rank})
        writer.close()

    if not settings.address:
        yield 0
        return
    server = await asyncio.start_server(answer, settings.address, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


class Master:
    """Node 0."""

    def __init__(self, settings: Settings, hello: dict[str, Any]):
        self.settings, self.hello = settings, hello
        self.visitors: dict[int, Visitor] = {}
        self.faults: list[str] = list(hello["faults"])
        self.news = asyncio.Event()
        self.over = asyncio.Event()

    async def hold(self) -> list[str]:
        """Wait for all nodes, let them look, and tell all what was found."""
        s = self.settings
        try:
            # On all addresses, as torchrun will: who has the port on one of them is in its way.
            server = await asyncio.start_server(self._receive, None, s.port, limit=LONGEST_LINE)
        except OSError as error:
            return [*self.faults, f"{s.name}: {_cannot_listen(s, error)}"]
        async with server:
            if own := await _not_own_address(s):
                return [*self.faults, f"{s.name}: {own}"]
            await self._wait_for_all()
            await self._let_look()
            # Whatever several nodes say alike is said once.
            verdict = list(dict.fromkeys(self.faults))
            await asyncio.gather(*(_tell(visitor, {"verdict": verdict}) for visitor in self.visitors.values()))
            self.over.set()
        return verdict

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; it is kept until the meeting is over."""
        try:
            hello = await receive(reader, 5)
            visitor = Visitor(hello, reader, writer)
            rank, nodes = int(hello["rank"]), int(hello["nodes"])
        except (TimeoutError, ValueError, KeyError, OSError):
            writer.close()  # a stranger
            return
        s = self.settings
        if nodes != s.nodes:
            self.faults.append(f"{visitor.name} was started as one of {nodes} nodes, {s.name} as one of {s.nodes}.")
        if rank in self.visitors or rank == 0 or rank >= s.nodes:
            other = s.name if rank == 0 else self.visitors[rank].name if rank in self.visitors else "no node"
            again = f"{visitor.name} has node rank {rank}, which is that of {other}: ranks are 0 to {s.nodes - 1}."
            self.faults.append(again)
            await _tell(visitor, {"verdict": [again]})
            writer.close()
            return
        self.faults += hello["faults"]
        self.visitors[rank] = visitor
        self.news.set()
        await self.over.wait()
        writer.close()

    async def _wait_for_all(self) -> None:
        s = self.settings
        deadline = time.monotonic() + s.seconds
        while missing := [rank for rank in range(1, s.nodes) if rank not in self.visitors]:
            if time.monotonic() > deadline:
                self.faults.append(
                    f"after {s.seconds:g} s, of {s.nodes} nodes these are missing at {s.master} port {s.port}: node "
                    f"rank {_ranks(missing)}. Start all at the same time; one that is started says itself what stops "
                    "it."
                )
                return
            for visitor in list(self.visitors.values()):
                await _tell(visitor, {"waiting_for": missing})
            self.news.clear()
            try:
                await asyncio.wait_for(self.news.wait(), 1)
            except TimeoutError:
                continue

    async def _let_look(self) -> None:
        """All nodes look at the run folder and try their neighbours, at the same time."""
        s = self.settings
        everybody = {0: self.hello} | {rank: visitor.hello for rank, visitor in self.visitors.items()}
        self.faults += version_faults({hello["name"]: hello["versions"] for hello in everybody.values()})
        ranks = sorted(everybody)
        peers = {rank: everybody[ranks[(place + 1) % len(ranks)]] for place, rank in enumerate(ranks)}
        with marked(s.run_dir) as (file, faults):
            self.faults += [f"{s.name}: {fault}" for fault in faults]
            looks = {rank: {"file": "" if faults else file, "peer": _place(peers[rank])} for rank in ranks}
            asked = [self._ask(visitor, looks[rank]) for rank, visitor in self.visitors.items()]
            results = await asyncio.gather(look(s, looks[0]), *asked)
        self.faults += [fault for found in results for fault in found]

    async def _ask(self, visitor: Visitor, what: dict[str, Any]) -> list[str]:
        try:
            await send(visitor.writer, {"look": what})
            return (await receive(visitor.reader, SECONDS_TO_LOOK + 1))["faults"]
        except (TimeoutError, ValueError, KeyError, OSError):
            return [
                f"{visitor.name} has not answered after it had come: its preflight has ended, or the network fails."
            ]


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def _place(hello: dict[str, Any]) -> dict[str, Any]:
    return {key: hello[key] for key in ("rank", "name", "address", "port")}


async def _tell(visitor: Visitor, message: dict[str, Any]) -> None:
    """A visitor that has gone is missed elsewhere."""
    try:
        await asyncio.wait_for(send(visitor.writer, message), 1)
    except (TimeoutError, OSError):
        return


def _cannot_listen(settings: Settings, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {settings.port} is taken on this machine, by another program or a run that has not ended: end it, "
            "or give another master port on all nodes."
        )
    return f"this machine cannot listen on port {settings.port}: {error.strerror or error}."


async def _not_own_address(settings: Settings) -> str:
    """What is wrong where the master's address is none of this machine's; else empty."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(settings.master, settings.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return f"the name {settings.master} does not resolve here ({error.strerror}): give this machine's address."
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as asker:
                asker.bind((address[0], 0, *address[2:]))
                return ""
        except OSError:
            continue
    return (
        f"the master's address {settings.master} is none of this machine's, which has {listed(interfaces())}. Node 0 "
        "must be the machine with that address, or give one of these on all nodes."
    )


async def look(settings: Settings, what: dict[str, Any]) -> list[str]:
    """What this node finds wrong with its run folder, and with the way to its peer."""
    faults: list[str] = []
    if what["file"] and settings.rank != 0:
        faults += await asyncio.to_thread(folder_faults, settings.run_dir, what["file"])
    peer = what["peer"]
    if peer["port"]:
        try:
            reader, writer = await connect(peer["address"], peer["port"])
            answered = await receive(reader, 2)
            writer.close()
            if answered.get("rank") != peer["rank"]:
                faults.append(f"at {peer['name']} answers another node: its address stands for several machines.")
        except Unreachable as why:
            faults.append(f"{peer['name']} cannot be reached from here on a port of its choice: {why}")
        except (TimeoutError, ValueError, OSError):
            faults.append(f"at {peer['name']} something else answers on its port {peer['port']}.")
    return [f"{settings.name}: {fault}" for fault in faults]


async def _visit(settings: Settings, hello: dict[str, Any]) -> list[str]:
    """What a node other than the first finds, and hears from the first."""
    s, own = settings, list(hello["faults"])
    began = time.monotonic()
    while True:
        try:
            reader, writer = await connect(s.master, s.port)
            break
        except Unreachable as why:
            if why.lasting or time.monotonic() > began + s.seconds:
                return [*own, f"{s.name}: the master cannot be reached. {why}"]
        await asyncio.sleep(SECONDS_BETWEEN_TRIES)
    waiting_for: list[int] = []
    patience = SECONDS_OF_SILENCE
    left = 0.0
    try:
        await send(writer, hello)
        while True:
            left = began + SECONDS_OF_A_VISIT - time.monotonic()
            message = await receive(reader, min(left, patience))
            waiting_for = message.get("waiting_for", [])
            if "look" in message:
                await send(writer, {"faults": await look(s, message["look"])})
                patience = SECONDS_TO_LOOK + 2
            if "verdict" in message:
                return message["verdict"]
    except TimeoutError:
        if waiting_for and left < patience:
            what = f"node 0 at {s.master} port {s.port} still waits for node rank {_ranks(waiting_for)}. Start all "
            what += "nodes at the same time."
        else:
            what = f"at {s.master} port {s.port} something answers that is no preflight of Headway, or stands still. "
            what += "If another program has the port, give another master port on all nodes."
    except (ValueError, KeyError, OSError):
        what = f"{s.master} port {s.port} ended the connection: the preflight of node 0 was ended, or another program "
        what += "has the port."
    finally:
        writer.close()
    return [*own, f"{s.name}: {what}"]
