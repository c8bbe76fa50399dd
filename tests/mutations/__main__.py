"""Plant faults, one at a time, and see the tests fail: `make mutations`.

Each fault breaks a copy of the code in a way the field breaks. A fault that no test notices is printed as SURVIVED and
the exit code is 1. First the tests must pass in a copy of the code as it is. Not part of CI: a quarter of an hour.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.attention import FAULTS as IN_ATTENTION
from tests.mutations.bam import FAULTS as OF_BAM
from tests.mutations.diagnostics import FAULTS as IN_DIAGNOSTICS
from tests.mutations.experts import FAULTS as OF_EXPERTS
from tests.mutations.fault import Fault
from tests.mutations.gated import FAULTS as OF_GATED
from tests.mutations.general import FAULTS as GENERAL
from tests.mutations.kernels import FAULTS as IN_KERNELS
from tests.mutations.launch import FAULTS as IN_LAUNCH
from tests.mutations.layouts import FAULTS as IN_LAYOUTS
from tests.mutations.megatron import FAULTS as OF_MEGATRON
from tests.mutations.objectives import FAULTS as IN_OBJECTIVES
from tests.mutations.reparam import FAULTS as OF_REPARAM
from tests.mutations.routing import FAULTS as OF_ROUTING
from tests.mutations.towers import FAULTS as OF_TOWERS
from tests.mutations.zero import FAULTS as OF_ZERO

ROOT = Path(__file__).parents[2]
FLOORS = ("kernels", "model", "parallel", "trainer", "launch", "tests", "configs")
FAULTS = [
    *(*GENERAL, *IN_KERNELS, *IN_LAYOUTS, *IN_ATTENTION, *IN_OBJECTIVES, *IN_DIAGNOSTICS, *IN_LAUNCH),
    *(*OF_REPARAM, *OF_GATED, *OF_ROUTING, *OF_BAM, *OF_EXPERTS, *OF_TOWERS, *OF_ZERO, *OF_MEGATRON),
]


SECONDS_FOR_ONE, SECONDS_FOR_ALL = 900, 3600


def copy_code(folder: Path) -> None:
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, folder / floor, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)


def fail(tests: list[str], folder: Path, what: str, seconds: int) -> bool:
    """Whether one of the tests fails in a copy of the code; `what` it is a copy of goes into the complaint."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, check=False)
    # 1 is "tests failed"; anything else means that pytest itself did not get that far.
    assert done.returncode in (0, 1), f"{what}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}"
    return done.returncode == 1


def plant(fault: Fault, folder: Path) -> bool:
    """Break a copy of the code; whether the tests notice."""
    copy_code(folder)
    path = folder / fault.file
    text = path.read_text()
    for old, new in fault.replacements:
        assert text.count(old) >= 1, f"{fault.name}: {fault.file} has no {old!r} any more"
        text = text.replace(old, new)
    path.write_text(text)
    return fail(fault.tests, folder, fault.name, SECONDS_FOR_ONE)


def main(wanted: list[str]) -> int:
    """Plant all faults, or those whose name holds one of the words given."""
    chosen = [fault for fault in FAULTS if not wanted or any(word in fault.name for word in wanted)]
    with tempfile.TemporaryDirectory(prefix="headway-whole-") as folder:
        copy_code(Path(folder))
        tests = dict.fromkeys(test for fault in chosen for test in fault.tests)
        if fail(list(tests), Path(folder), "the code as it is", SECONDS_FOR_ALL):
            print("the tests fail in a copy of the code as it is: what they would say of a fault means nothing")
            return 1
    survived = 0
    for fault in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="headway-fault-") as folder:
            caught = plant(fault, Path(folder))
        survived += not caught
        print(f"{'caught' if caught else 'SURVIVED':<9} {fault.name} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
