"""`python -m launch.agent ARGUMENTS`: torchrun, but it ends with what its ranks ended with.

torchrun itself ends with 1 whatever a failing rank returns. So a refusal, after which nothing stands in the run folder,
could not be told from a failure.

And it passes SIGTERM, SIGUSR1 and SIGINT on to the ranks and waits for them. torchrun itself gives them 30 s and then
kills them, too short for a large checkpoint, and of SIGUSR1 it dies. A scheduler may signal every process of a job.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

REFUSED, FAILED = 2, 70
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def main(argv: list[str]) -> int:
    """Run torchrun with these arguments.

    Returns:
        0 when all ranks of this node ended with 0, 2 when one of them refused, 70 otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    for number in STOPS:
        signal.signal(number, _ask_ranks)
    try:
        run(parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", *argv]))
    except ChildFailedError as error:
        return ending(failure.exitcode for failure in error.failures.values())
    except (SignalException, RendezvousError) as error:
        print(f"torchrun on this node has ended: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    return 0


def _ask_ranks(number: int, frame: object) -> None:
    """Ask every rank of this node for a stop; before there are any, end."""
    ranks = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    if not ranks:
        print(f"{signal.Signals(number).name} came before there were ranks.", file=sys.stderr)
        raise SystemExit(FAILED)
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def ending(exit_codes: Iterable[int]) -> int:
    """The exit code for those of ranks that did not end with 0: a refusal ends the others, by whatever signal."""
    return REFUSED if REFUSED in set(exit_codes) else FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
