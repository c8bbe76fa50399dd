"""`headway train CONFIG` in which rank 1 kills itself in the CALL-th call of NAME: killed_rank.py CONFIG NAME CALL."""

import importlib
import os
import signal
import sys
from typing import Any

from trainer.cli import main

MODULES = {"TrainingData": "trainer.data.training", "CheckpointWriter": "trainer.checkpoint"}


def kill_in(class_name: str, name: str, call: int) -> None:
    owner = getattr(importlib.import_module(MODULES[class_name]), class_name)
    plain = getattr(owner, name)
    calls = 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **kwargs)

    setattr(owner, name, killed)


if os.environ["RANK"] == "1":
    kill_in(*sys.argv[2].split("."), int(sys.argv[3]))
sys.exit(main(["train", sys.argv[1]]))
