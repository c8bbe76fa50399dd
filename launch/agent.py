"""`python -m launch.agent ARGUMENTS`: torchrun, but it ends with what its ranks ended with, and does end.

torchrun itself ends with 1 whatever a failing rank returns. So a refusal, after which nothing stands in the run folder,
could not be told from a failure. And where the node that holds its store is lost without a word, it hangs on that store
for minutes after its ranks have ended.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

REFUSED, FAILED = 2, 70
SECONDS_TO_NOTICE = 10.0
"""torchrun looks at its ranks several times a second; when it has not for so long, it hangs."""


def main(argv: list[str]) -> int:
    """Run torchrun with these arguments.

    Returns:
        0 when all ranks of this node ended with 0, 2 when one of them refused, 70 otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    threading.Thread(target=_end_where_torchrun_hangs, daemon=True).start()
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        return ending(failure.exitcode for failure in error.failures.values())
    except (SignalException, RendezvousError) as error:
        print(f"torchrun on this node has ended: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    return 0


def ending(exit_codes: Iterable[int]) -> int:
    """The exit code for those of ranks: a refusal ends the others, by whatever signal."""
    codes = set(exit_codes)
    return REFUSED if REFUSED in codes else FAILED if codes - {0} else 0


def _end_where_torchrun_hangs() -> None:
    """End this process when all ranks have ended long ago and torchrun has not noticed."""
    first_seen: float | None = None
    while True:
        time.sleep(1)
        codes = _unnoticed()
        if not codes:
            first_seen = None
            continue
        first_seen = first_seen or time.monotonic()
        if time.monotonic() - first_seen > SECONDS_TO_NOTICE:
            print(
                f"torchrun on this node has not noticed for {SECONDS_TO_NOTICE:g} s that its ranks have ended, and is "
                "ended: the node that holds its store does not answer.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(ending(codes))


def _unnoticed() -> list[int]:
    """Exit codes of this process's children, if there are any, all have ended, and none has been waited for."""
    listed = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    codes = []
    for child in [int(pid) for pids in listed for pid in pids]:
        try:
            # Without taking it from torchrun, which wants to wait for it itself.
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return []
        if ended is None:
            return []
        codes.append(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
    return codes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
