"""The settings of `headway launch torchrun | deepspeed | slurm | kubernetes`, and what is wrong with them alone."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from launch.scripts.writing import CHECKOUT, label


@dataclass(kw_only=True)
class Settings:
    """What every kind of script needs to know."""

    kind: ClassVar[str]
    suffix: ClassVar[str] = "sh"
    least: ClassVar[dict[str, int]] = {}
    """The least that some settings may be; nodes and processes are at least 1."""

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """A preset (see configs/) or your own file."""
    nodes: int
    """How many machines."""
    processes: int = 8
    """Processes on each node: one for each GPU."""
    out: Path | None = None
    """The file to write. Default: CONFIG's name and the kind, in this folder."""
    overwrite: bool = False
    """Replace a file that is there."""
    port: int = 29500
    """A free port of node 0."""

    @property
    def path(self) -> Path:
        return self.out or Path(f"{self.config.stem}.{self.kind}.{self.suffix}")

    def faults(self, overrides: Sequence[str]) -> list[str]:
        """What cannot be, in sentences; the configuration is looked at elsewhere."""
        found = [
            f"--{name} {value}: expected at least {least}."
            for name, least in ({"nodes": 1, "processes": 1} | self.least).items()
            if (value := getattr(self, name)) < least
        ]
        return found if 1024 <= self.port <= 65535 else [*found, f"--port {self.port}: expected 1024 to 65535."]


@dataclass(kw_only=True)
class TorchrunSettings(Settings):
    """A script that starts training on one of several nodes, by torchrun; it is started on each.

    For an ssh loop, or a scheduler that has no kind of its own here. The configuration and the layout are checked
    first. Settings are overridden as for `headway train`: --section.key VALUE.
    """

    kind = "torchrun"
    least = {"patience": 0}
    patience: int = 60
    """Seconds for which the first node waits until the last one is up."""


@dataclass(kw_only=True)
class DeepspeedSettings(Settings):
    """A script that starts training on all hosts of a hostfile, by DeepSpeed's launcher over pdsh and ssh.

    The hostfile (HOST slots=N on each line), the configuration and the layout are checked first. Settings are
    overridden as for `headway train`: --section.key VALUE. Either parallel.engine may be used.
    """

    kind = "deepspeed"
    hostfile: Path
    """Which hosts, and how many processes each takes."""
    master: str | None = None
    """An address of the first host that all the others know. Default: its name in the hostfile."""

    def faults(self, overrides: Sequence[str]) -> list[str]:
        places = [str(self.config), str(self.hostfile), str(Path.cwd()), str(CHECKOUT), sys.executable]
        given = [*places, *overrides, *([self.master] if self.master else [])]
        return super().faults(overrides) + [
            f"{word!r} goes through a shell on every host, which would read it otherwise: only letters, digits and "
            "_@+=:,./- pass. Write a setting into CONFIG instead, or give a file or folder another name."
            for word in dict.fromkeys(given)
            if shlex.quote(word) != word or "%" in word
        ]


TIMES = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")


@dataclass(kw_only=True)
class SlurmSettings(Settings):
    """A script for sbatch: it asks for a checkpoint before its time is over, and goes back into the queue.

    The configuration and the layout are checked first. Settings are overridden as for `headway train`:
    --section.key VALUE.
    """

    kind = "slurm"
    least = {"cpus": 1, "grace": 1, "patience": 0}
    port: tyro.conf.Suppress[int] = 29500
    time: str = "24:00:00"
    """The longest that one start may take, as sbatch has it: D-HH:MM:SS, HH:MM:SS or minutes."""
    grace: int = 300
    """Seconds before that at which a checkpoint is asked for."""
    cpus: int = 8
    """CPU cores for each process."""
    device: Literal["gpu", "cpu"] = "gpu"
    """What each process has for itself."""
    name: str | None = None
    """Of the job. Default: CONFIG's name."""
    partition: str | None = None
    """As sbatch has it."""
    account: str | None = None
    """As sbatch has it."""
    patience: int = 120
    """Seconds for which the first node waits until the last one is up."""

    def faults(self, overrides: Sequence[str]) -> list[str]:
        found = super().faults(overrides)
        seconds = _seconds(self.time)
        if seconds is None:
            found.append(f"--time {self.time!r}: expected D-HH:MM:SS, HH:MM:SS or minutes, as 24:00:00.")
        elif self.grace >= seconds:
            found.append(
                f"--grace {self.grace}: not before the time is over, which is {seconds} s (--time {self.time})."
            )
        words = {"name": self.name, "partition": self.partition, "account": self.account}
        return found + [
            f"--{option} {word!r}: expected one word of letters, digits and _.,-."
            for option, word in words.items()
            if word is not None and not re.fullmatch(r"[\w.,-]+", word)
        ]


def _seconds(time: str) -> int | None:
    """A time limit as sbatch reads it; None for what it does not."""
    found = TIMES.fullmatch(time)
    if found is None:
        return None
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        return days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)


@dataclass(kw_only=True)
class KubernetesSettings(Settings):
    """A manifest for kubectl: a ConfigMap, a headless Service and an Indexed Job, one pod for each node.

    The configuration, the layout and the place of the run folder are checked first. Settings are overridden as for
    `headway train`: --section.key VALUE.
    """

    kind = "kubernetes"
    suffix = "yaml"
    least = {"cpus": 1, "grace": 1, "patience": 0, "retries": 0}
    image: str
    """The container image: Python, torch, and Headway with what it needs."""
    claim: str
    """The PersistentVolumeClaim, ReadWriteMany, with the data, on which the run folder is written."""
    mount: str = "/shared"
    """Where pods see it."""
    checkout: str = "/opt/headway"
    """Where Headway lies in the image."""
    workdir: str | None = None
    """From where relative paths are seen. Default: the mount."""
    name: str | None = None
    """Of the job. Default: CONFIG's name."""
    cpus: int = 8
    """CPU cores for each process."""
    device: Literal["gpu", "cpu"] = "gpu"
    """What each process has for itself (gpu: nvidia.com/gpu)."""
    grace: int = 600
    """Seconds from SIGTERM to SIGKILL: as long as a checkpoint may take."""
    retries: int = 3
    """So many times a run that has failed is started anew; a stop by a signal does not count."""
    patience: int = 1200
    """Seconds for which the first pod waits until the last one is up."""

    @property
    def job(self) -> str:
        return self.name or label(self.config.stem)

    def faults(self, overrides: Sequence[str]) -> list[str]:
        found = super().faults(overrides)
        longest = 63 - len(f"-{max(self.nodes - 1, 0)}")
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.job) or len(self.job) > longest:
            found.append(
                f"--name {self.job!r}: expected a letter, then small letters, digits and hyphens, no hyphen last, at "
                f"most {longest} in all, since each pod's name is a host name."
            )
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", self.claim):
            found.append(f"--claim {self.claim!r} is no name of Kubernetes: small letters, digits, hyphens and dots.")
        if not re.fullmatch(r"[\w./:@-]+", self.image):
            found.append(f"--image {self.image!r} is no name of an image, as registry/name:tag.")
        places = {"mount": self.mount, "checkout": self.checkout, "workdir": self.workdir or self.mount}
        return found + [
            f"--{option} {place!r}: expected an absolute path, of letters, digits and _./-."
            for option, place in places.items()
            if not re.fullmatch(r"/[\w./-]*", place)
        ]
