"""What all kinds of scripts share: the check of the run that they would start, and the writing from a template."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
TEMPLATES = CHECKOUT / "launch" / "templates"
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Script:
    """What is to be written: from which template, for which run, where."""

    kind: str
    suffix: str
    config: Path
    overrides: Sequence[str]
    nodes: int
    processes: int
    out: Path
    overwrite: bool


def check(script: Script, faults: Sequence[str]) -> None:
    """Whether anything speaks against starting this run so.

    Args:
        faults: what the kind itself has found.

    Raises:
        Refused: everything at once, in the settings, the configuration and the layout.
    """
    from trainer.config import Refused, load_config

    found = []
    world_size = script.nodes * script.processes if script.nodes > 0 and script.processes > 0 else None
    try:
        load_config(script.config, script.overrides, world_size=world_size)
    except Refused as refused:
        found += refused.faults
    found += faults
    if script.out.exists() and not script.overwrite:
        found.append(f"{script.out} is there already: give --overwrite to replace it, or another --out.")
    elif not script.out.absolute().parent.is_dir():
        found.append(f"--out {script.out}: there is no folder {script.out.parent}.")
    if found:
        raise Refused(found)


def render(template: str, values: dict[str, str]) -> str:
    """A template with `{{name}}` replaced by `values[name]`; a line whose only word is an empty value is left out."""
    named = set(PLACEHOLDER.findall(template))
    assert named == values.keys(), f"template and values differ in {named ^ values.keys()}"
    lines = []
    for line in template.splitlines():
        alone = PLACEHOLDER.fullmatch(line.strip())
        if alone is None or values[alone[1]]:
            lines.append(PLACEHOLDER.sub(lambda found: values[found[1]], line))
    return "\n".join(lines) + "\n"


def write(script: Script, values: dict[str, str]) -> None:
    """Write the script, whole or not at all; one for a shell can be executed."""
    common = {
        "config": str(script.config),
        "nodes": str(script.nodes),
        "processes": str(script.processes),
        "out": shlex.quote(str(script.out.absolute())),
    }
    template = (TEMPLATES / f"{script.kind}.{script.suffix}").read_text()
    text = render(template, common | values)
    partial = script.out.with_name(script.out.name + ".partial")
    try:
        partial.write_text(text)
        if script.suffix == "sh":
            partial.chmod(0o755)
        os.replace(partial, script.out)
    finally:
        partial.unlink(missing_ok=True)


def shell_words(config: Path, overrides: Sequence[str]) -> str:
    """The configuration and the overrides as lines of a bash array, a setting beside its value."""
    lines = [shlex.quote(str(config))]
    words = iter(overrides)
    for word in words:
        # `--a.b=VALUE` is whole; the value of `--a.b` is the next word.
        value = None if "=" in word else next(words, None)
        lines.append(" ".join(shlex.quote(part) for part in (word, value) if part is not None))
    return "\n".join(f"    {line}" for line in lines)


def label(name: str) -> str:
    """A name in which there are only the letters, digits and hyphens that schedulers take."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "headway"
