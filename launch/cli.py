"""The `headway` command: the trainer's commands, and those that start trainers on machines."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command; returns the exit code."""
    from trainer.cli import main as trainer_main

    return trainer_main()


if __name__ == "__main__":
    sys.exit(main())
