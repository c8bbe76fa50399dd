"""The `headway` command: the trainer's commands, and those that start trainers on machines."""

from __future__ import annotations

import sys

from trainer.cli import COMMANDS as TRAINER_COMMANDS
from trainer.cli import main as trainer_main

COMMANDS = TRAINER_COMMANDS | {
    "launch torchrun": ("launch.scripts.commands:torchrun", "a script that starts training on each of several nodes"),
    "launch deepspeed": ("launch.scripts.commands:deepspeed", "a script for DeepSpeed's launcher and a hostfile"),
    "launch slurm": ("launch.scripts.commands:slurm", "a script for sbatch, which goes back into the queue"),
    "launch kubernetes": ("launch.scripts.commands:kubernetes", "a manifest: an Indexed Job, one pod for each node"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return trainer_main(argv, COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
