"""Folders: what can be written, what room there is, and whether clocks agree."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import time
from pathlib import Path

from trainer.doctor.finding import Finding, run

GIB = 2**30
LEAST, LITTLE = 1 * GIB, 20 * GIB
"""Free space below which nothing is begun; below which it is said."""

SECONDS_APART = 2.0
"""How far the clock of a file system may be from this machine's; those of network file systems have a server's."""


def look(run_dir: Path | None) -> list[Finding]:
    """All of it; `run_dir`: where a run is to be."""
    found = []
    if run_dir is not None:
        found += [folder("run folder", run_dir, "give another run.dir"), room("its disk", run_dir, needed=True)]
    found.append(folder("this folder", Path.cwd(), "start from a folder of your own", needed=run_dir is None))
    if run_dir is None:
        found.append(room("its disk", Path.cwd(), needed=True))
    temporary = Path(tempfile.gettempdir())
    found += [folder("temporary files", temporary, "set TMPDIR"), room("their disk", temporary)]
    found += [folder(name, path, remedy, needed=False) for name, path, remedy in caches()]
    return [*found, file_clock(run_dir or Path.cwd()), network_time()]


def caches() -> list[tuple[str, Path, str]]:
    """Where libraries keep what they fetched or compiled."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton")
    return [
        ("cache of transformers", home.expanduser(), "set HF_HOME"),
        ("cache of triton", triton.expanduser(), "set TRITON_CACHE_DIR"),
    ]


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def folder(what: str, path: Path, remedy: str, needed: bool = True) -> Finding:
    """Whether something can be written there, by writing something."""
    place = existing(path)
    new = "" if place == path.absolute() else "will be made"
    try:
        if not place.is_dir():
            raise NotADirectoryError(20, "not a folder", str(place))
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"headway")
            file.flush()
    except OSError as error:
        sentence = f"{what} {path} cannot be written ({error.strerror}): mend its permissions, or {remedy}."
        return Finding(what, "not writable", str(path), *(("", sentence) if needed else (sentence, "")))
    return Finding(what, new or "writable", str(path))


def room(what: str, path: Path, needed: bool = False) -> Finding:
    """Free space on a folder's disk."""
    free = shutil.disk_usage(existing(path)).free
    said = f"{free / GIB:.1f} GiB free"
    hint = fault = ""
    if free < LEAST and needed:
        fault = f"{what} has {said} for {path}, less than 1 GiB: delete something, or take another place."
    elif free < LITTLE:
        hint = (
            f"{what} has {said} for {path}: `headway plan` says what a checkpoint takes, checkpoint.keep_last how many "
            "stay."
        )
    return Finding(what, said, "", hint, fault)


def file_clock(path: Path) -> Finding:
    """The clock of the file system there, against this machine's."""
    try:
        with tempfile.TemporaryFile(dir=existing(path)) as file:
            before = time.time()
            file.write(b"headway")
            file.flush()
            written, after = os.fstat(file.fileno()).st_mtime, time.time()
    except OSError:
        return Finding("clock of files", "unknown", "nothing can be written there")
    # A file system may round times, to 10 ms as the kernel ticks.
    apart = max(before - written, written - after, 0.0)
    said = f"{apart:.2f} s from this machine's"
    hint = f"files in {path} get times {said}: set both clocks by one time server." if apart > SECONDS_APART else ""
    return Finding("clock of files", said, "", hint)


def network_time() -> Finding:
    """Whether the clock follows a time server, as systemd or the kernel says it."""
    said = run("timedatectl", "show", "-p", "NTPSynchronized", "--value", seconds=5)
    who, state = "timedatectl", (said or "").strip()
    if state not in ("yes", "no"):
        who, state = "the kernel (adjtimex)", _kernel_time()
    hint = "the clock follows no time server: logs of several machines may not fit each other; start chrony or ntpd."
    return Finding("time server", {"yes": "followed", "no": "not followed"}.get(state, "unknown"), f"says {who}",
                   hint if state == "no" else "")  # fmt: skip


def _kernel_time() -> str:
    """adjtimex(2) asked without changing anything: TIME_ERROR says that the clock is not synchronised."""
    time_error = 5
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return "unknown"
    return {time_error: "no", -1: "unknown"}.get(state, "yes")
