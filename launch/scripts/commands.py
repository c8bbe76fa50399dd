"""`headway launch torchrun | deepspeed | slurm | kubernetes CONFIG.toml --nodes N [--section.key VALUE ...]`"""

from __future__ import annotations

import json
import posixpath
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from launch.scripts.hostfile import hostfile_faults
from launch.scripts.settings import (
    DeepspeedSettings,
    KubernetesSettings,
    Settings,
    SlurmSettings,
    TorchrunSettings,
)
from launch.scripts.writing import CHECKOUT, Script, check, label, shell_words, write
from trainer.commands.plan import split

Kind = TypeVar("Kind", bound=Settings)


def torchrun(argv: list[str]) -> int:
    """Write a script that is started on each node. Raises ValueError for what is refused."""
    settings, overrides = _parse(TorchrunSettings, argv)
    script = _script(settings, overrides)
    check(script, settings.faults(overrides))
    values = {"port": str(settings.port), "patience": str(settings.patience)}
    write(script, values | _places(script) | _command(settings, argv))
    if settings.nodes == 1:
        return _say(script, f"bash {script.out}")
    return _say(
        script,
        *(f"NODE_RANK={rank} MASTER_ADDR=ADDRESS bash {script.out}" for rank in dict.fromkeys((0, settings.nodes - 1))),
        where=f"on each node at the same time, from NODE_RANK=0 to {settings.nodes - 1}, ADDRESS being node 0's",
    )


def deepspeed(argv: list[str]) -> int:
    """Write a script that starts all hosts of a hostfile. Raises ValueError for what is refused."""
    settings, overrides = _parse(DeepspeedSettings, argv)
    script = _script(settings, overrides)
    hosts, wrong = hostfile_faults(settings.hostfile, settings.nodes, settings.processes)
    check(script, [*settings.faults(overrides), *wrong])
    values = {
        "hostfile": str(settings.hostfile),
        "master": settings.master or hosts[0].name,
        "port": str(settings.port),
    }
    write(script, values | _places(script) | _command(settings, argv))
    return _say(script, f"bash {script.out}")


def slurm(argv: list[str]) -> int:
    """Write a script for sbatch. Raises ValueError for what is refused."""
    settings, overrides = _parse(SlurmSettings, argv)
    script = _script(settings, overrides)
    check(script, settings.faults(overrides))
    optional = {
        "gpus-per-node": str(settings.processes) if settings.device == "gpu" else None,
        "partition": settings.partition,
        "account": settings.account,
    }
    values = {
        "name": settings.name or label(settings.config.stem),
        "cpus": str(settings.cpus * settings.processes),
        "optional": "\n".join(f"#SBATCH --{option}={word}" for option, word in optional.items() if word),
        "time": settings.time,
        "grace": str(settings.grace),
        "patience": str(settings.patience),
    }
    write(script, values | _places(script) | _command(settings, argv))
    return _say(script, f"sbatch {script.out}")


def kubernetes(argv: list[str]) -> int:
    """Write a manifest for kubectl. Raises ValueError for what is refused."""
    settings, overrides = _parse(KubernetesSettings, argv)
    script = _script(settings, overrides)
    workdir = settings.workdir or settings.mount
    lost = run_folder_faults(settings.config, overrides, workdir, settings.mount)
    check(script, [*settings.faults(overrides), *lost])
    gpus = f'            limits:\n              nvidia.com/gpu: "{settings.processes}"'
    lines = settings.config.read_text().rstrip("\n").split("\n")
    values = {
        "name": settings.job,
        "claim": settings.claim,
        "configuration": "\n".join(f"    {line}" if line else "" for line in lines),
        "retries": str(settings.retries),
        "backoff": str(settings.retries * settings.nodes),
        "grace": str(settings.grace),
        "image": settings.image,
        "workdir": workdir,
        "checkout": settings.checkout,
        "arguments": json.dumps(["/etc/headway/config.toml", *overrides], ensure_ascii=False),
        "port": str(settings.port),
        "patience": str(settings.patience),
        "cpus": str(settings.cpus * settings.processes),
        "limits": gpus if settings.device == "gpu" else "",
        "mount": settings.mount,
    }
    write(script, values | _command(settings, argv))
    return _say(script, f"kubectl apply -f {script.out}")


def run_folder_faults(config: Path, overrides: Sequence[str], workdir: str, mount: str) -> list[str]:
    """Why checkpoints would be lost together with the pod; nothing about a configuration that cannot be read."""
    from launch.run_folder import run_folder

    try:
        folder = run_folder(config, overrides)
    except ValueError:
        return []
    place = posixpath.normpath(posixpath.join(workdir, folder))
    if posixpath.commonpath([place, posixpath.normpath(mount)]) == posixpath.normpath(mount):
        return []
    return [
        f'run.dir = "{folder}" is {place} in a pod, outside the claim at {mount}, and is lost with the pod: give '
        f"--run.dir {posixpath.join(mount, 'runs', label(config.stem))}, or another --workdir."
    ]


def _parse(kind: type[Kind], argv: list[str]) -> tuple[Kind, list[str]]:
    own, overrides = split(argv)
    prog = f"headway launch {kind.kind}"
    return tyro.cli(kind, args=own, prog=prog, config=(tyro.conf.FlagCreatePairsOff,)), overrides


def _script(settings: Settings, overrides: Sequence[str]) -> Script:
    return Script(
        settings.kind,
        settings.suffix,
        settings.config,
        overrides,
        settings.nodes,
        settings.processes,
        settings.path,
        settings.overwrite,
    )


def _command(settings: Settings, argv: Sequence[str]) -> dict[str, str]:
    """How the script was made, on one line."""
    return {"command": " ".join(shlex.join(["headway", "launch", settings.kind, *argv]).split("\n"))}


def _places(script: Script) -> dict[str, str]:
    """For a shell: where Headway and its Python lie, from where paths are seen, and what is to be trained."""
    return {
        "folder": shlex.quote(str(Path.cwd())),
        "checkout": shlex.quote(str(CHECKOUT)),
        "python": shlex.quote(sys.executable),
        "arguments": shell_words(script.config, script.overrides),
    }


def _say(script: Script, *commands: str, where: str = "") -> int:
    print(f"{script.out}: {script.nodes} x {script.processes} processes. Read it, then{f' {where}' if where else ''}:")
    print("\n".join(f"    {command}" for command in commands))
    return 0
