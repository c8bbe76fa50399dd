"""`python -m launch.preflight --nodes N --node-rank R --master ADDRESS --port P --run-dir DIR`, on all nodes at once.

Ends with 0 and prints this node's interface and address on stdout, or with 2 and all faults on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
from pathlib import Path

from launch.preflight.machine import own_place
from launch.preflight.meeting import Settings, meet

REFUSED = 2
SECONDS = 29.0
"""Within which there is an answer, whatever hangs."""
LONGEST_WAIT = 15.0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    given = _arguments(argv)
    watchdog = threading.Timer(SECONDS, _give_up)
    watchdog.daemon = True
    watchdog.start()
    interface, address, faults = own_place(given.interface, given.master)
    settings = Settings(
        given.nodes, given.node_rank, given.master, given.port, given.run_dir, min(given.wait, LONGEST_WAIT), address
    )
    if found := asyncio.run(meet(settings, faults)):
        count = f"{len(found)} reason{'s' if len(found) > 1 else ''}"
        print(f"The nodes cannot train together, for {count}:", file=sys.stderr)
        print("\n".join(f"  - {fault}" for fault in found), file=sys.stderr, flush=True)
        return REFUSED
    watchdog.cancel()
    print(interface, address)
    return 0


def _give_up() -> None:
    # The main thread may hang in a file system or a name service, and cannot be asked to end.
    print(
        f"The preflight has not ended within {SECONDS:g} s: the name service or the file system of the run folder does "
        "not answer here, or the nodes were started too far apart.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(REFUSED)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.preflight", description="On all nodes at once: can they train together?"
    )
    parser.add_argument("--nodes", type=int, required=True, help="how many nodes")
    parser.add_argument("--node-rank", type=int, required=True, help="which of them this is, from 0")
    parser.add_argument("--master", required=True, help="name or address of node 0")
    parser.add_argument("--port", type=int, required=True, help="the port of node 0 that torchrun will use")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run folder")
    parser.add_argument("--interface", default="", help="network interface; default: the one on the way to the master")
    parser.add_argument(
        "--wait", type=float, default=LONGEST_WAIT, help="seconds to wait for the other nodes, at most %(default)s"
    )
    given = parser.parse_args(argv)
    if not 0 <= given.node_rank < given.nodes:
        parser.error(f"--node-rank {given.node_rank}: the ranks of {given.nodes} nodes are 0 to {given.nodes - 1}")
    return given


if __name__ == "__main__":
    sys.exit(main())
