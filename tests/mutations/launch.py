"""Faults of `headway launch`: what is checked before anything is written, and what scripts decide at the end."""

from __future__ import annotations

from tests.mutations.fault import Fault

SLURM, KUBERNETES, ENDING = "launch/templates/slurm.sh", "launch/templates/kubernetes.yaml", "launch/ending.sh"
HOSTFILE, WRITING, COMMANDS = "launch/scripts/hostfile.py", "launch/scripts/writing.py", "launch/scripts/commands.py"
SCRIPTS, RANKS = "tests/launch/test_scripts.py", "tests/launch/test_rank.py"
AT_THE_END = "tests/launch/test_slurm.py::test_what_the_script_does_at_the_end"
AT_ONCE = f"{SCRIPTS}::test_everything_wrong_is_said_at_once"
REFUSED = f"{SCRIPTS}::test_what_cannot_be_is_refused"
NAMES = "tests/launch/test_kubernetes.py::test_names_that_have_to_agree_do"

FAULTS = [
    Fault(
        "a cancelled job goes back into the queue",
        SLURM,
        [("if ! scontrol show job", "if false && ! scontrol show job")],
        [AT_THE_END],
    ),
    Fault(
        "a job that makes no progress goes back without end",
        SLURM,
        [("${SLURM_RESTART_COUNT:-0} > 0 &&", "0 > 0 &&")],
        [AT_THE_END],
    ),
    Fault(
        "a script believes the status of an earlier start",
        ENDING,
        [('[[ $(which_status) == "$ending_before" ]] || status_says', "status_says")],
        [AT_THE_END],
    ),
    Fault("a hostfile names a host twice", HOSTFILE, [("if host.name in first:", "if False:")], [AT_ONCE]),
    Fault(
        "slots of a hostfile differ from the processes",
        HOSTFILE,
        [("if host.slots not in (None, processes):", "if False:")],
        [AT_ONCE],
    ),
    Fault(
        "a script is written for an illegal layout",
        WRITING,
        [("world_size=world_size)", "world_size=None)")],
        [AT_ONCE],
    ),
    Fault(
        "words of a script are not quoted",
        WRITING,
        [("shlex.quote(part) for part", "part for part")],
        [f"{SCRIPTS}::test_words_come_through_a_shell_as_they_were"],
    ),
    Fault(
        "a pod's run folder is lost with it",
        COMMANDS,
        [("if posixpath.commonpath([place, posixpath.normpath(mount)]) == posixpath.normpath(mount):", "if place:")],
        [REFUSED],
    ),
    Fault(
        "a pod's volume has another name",
        KUBERNETES,
        [("- name: shared\n              mount", "- name: share\n              mount")],
        [NAMES],
    ),
    Fault(
        "a node has no place under DeepSpeed's launcher",
        "parallel/processes.py",
        [('os.environ.get("CROSS_RANK", 0)', "0")],
        [RANKS],
    ),
]
