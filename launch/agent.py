"""`python -m launch.agent ARGUMENTS`: torchrun, but it ends with what its ranks ended with.

torchrun itself ends with 1 whatever a failing rank returns. So a refusal, after which nothing stands in the run folder,
could not be told from a failure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

REFUSED, FAILED = 2, 70


def main(argv: list[str]) -> int:
    """Run torchrun with these arguments.

    Returns:
        0 when all ranks of this node ended with 0, 2 when one of them refused, 70 otherwise.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        return ending(failure.exitcode for failure in error.failures.values())
    except (SignalException, RendezvousError) as error:
        print(f"torchrun on this node has ended: {type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    return 0


def ending(exit_codes: Iterable[int]) -> int:
    """The exit code for those of ranks that did not end with 0: a refusal ends the others, by whatever signal."""
    return REFUSED if REFUSED in set(exit_codes) else FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
