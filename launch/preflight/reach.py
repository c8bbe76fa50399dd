"""Trying to reach a port of another machine, and saying why it cannot be reached."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from typing import Any

SECONDS_TO_CONNECT = 2.5
UNUSED_PORT = 1
"""tcpmux, which nothing serves: a machine that is there refuses it."""
LONGEST_LINE = 1 << 20


class Unreachable(Exception):
    """A sentence that says why. `lasting`: trying again will not help."""

    def __init__(self, sentence: str, *, lasting: bool = False):
        super().__init__(sentence)
        self.lasting = lasting


async def connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection. Raises Unreachable."""
    try:
        return await asyncio.wait_for(asyncio.open_connection(host, port, limit=LONGEST_LINE), SECONDS_TO_CONNECT)
    except TimeoutError:
        raise Unreachable(await _dropped(host, port)) from None
    except OSError as error:
        raise _unreachable(host, port, error) from None


def _unreachable(host: str, port: int, error: OSError) -> Unreachable:
    if isinstance(error, socket.gaierror):
        return Unreachable(
            f"the name {host} does not resolve here ({error.strerror}): mend the name service, or give the address.",
            lasting=True,
        )
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(
            f"{host} refuses connections to port {port}: nothing listens there, or a filter rejects them. Is node 0 "
            "started, on the machine with this address?"
        )
    if error.errno == errno.ENETUNREACH:
        return Unreachable(
            f"this machine has no route to {host}: check the address, the netmask and the interface.", lasting=True
        )
    if error.errno == errno.EHOSTUNREACH:
        return Unreachable(
            f"{host} is unreachable: no machine of this network answers to that address, or a filter rejects packets."
        )
    return Unreachable(f"{host} port {port} cannot be reached: {error.strerror or error}.")


async def _dropped(host: str, port: int) -> str:
    """No answer at all: does a filter drop what is for this port, or does nothing of that machine answer?"""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, UNUSED_PORT), SECONDS_TO_CONNECT)
        writer.close()
        alive = True
    except ConnectionRefusedError:
        alive = True
    except (TimeoutError, OSError):
        alive = False
    tried = f"{host} port {port} gave no answer within {SECONDS_TO_CONNECT:g} s"
    if alive:
        return (
            f"{tried}, though the machine answers on another port: a filter between here and there drops packets for "
            f"port {port}. Open it, and the ports above 1023 that gloo and NCCL choose, between all nodes."
        )
    return (
        f"{tried}, nor did another port: the machine is off, the address is not its own, or a filter drops all packets."
    )


async def send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    """One line of JSON."""
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


async def receive(reader: asyncio.StreamReader, seconds: float) -> dict[str, Any]:
    """The next line.

    Raises:
        TimeoutError: none came in time.
        ValueError: what came is no object of JSON, or the connection ended.
    """
    line = await asyncio.wait_for(reader.readline(), seconds)
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("expected an object")
    return message
