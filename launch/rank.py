"""`python -m launch.rank --first FILE train CONFIG.toml ...`: one rank, where a launcher starts ranks itself.

DeepSpeed's launcher takes few of the variables of the machine it is started on to the others, and starts ranks over
ssh. So each rank finds out here what launch/torchrun.sh finds out for a node; and the first one writes into FILE which
process it is, so that it can be asked for a stop. A signal to the launcher instead would give the ranks 30 s.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

REFUSED = 2


def main(argv: list[str]) -> int:
    """Run a command of the trainer as this rank; returns its exit code."""
    if len(argv) < 3 or argv[0] != "--first":
        print("usage: python -m launch.rank --first FILE train CONFIG.toml [--section.key VALUE ...]", file=sys.stderr)
        return REFUSED
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _choose_interface()
    if os.environ.get("RANK") == "0":
        file = Path(argv[1])
        partial = file.with_name(file.name + ".partial")
        partial.write_text(f"{os.getpid()}\n")
        os.replace(partial, file)
    from trainer.cli import main as trainer_main

    return trainer_main(argv[2:])


def _choose_interface() -> None:
    """The one on the way to the master. gloo and NCCL would guess, by the host's name or the first that they see."""
    from launch.preflight.machine import own_place

    if "GLOO_SOCKET_IFNAME" in os.environ or "MASTER_ADDR" not in os.environ:
        return
    interface, _, faults = own_place("", os.environ["MASTER_ADDR"])
    if interface and not faults:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
