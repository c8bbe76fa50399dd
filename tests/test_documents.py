"""What the documents say is so: links, commands, keys, tables. What they tell a reader to run is run elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from launch.cli import COMMANDS
from tests.documents import ROOT, TABLE, anchors, code, documents, name_of, prose, sections, table

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?:^|\s)headway ([a-z]+)(?: ([a-z-]+))?")
KEY = re.compile(r"(?:^|--|\s)(run|model|objective|data|optimizer|schedule|parallel|checkpoint|metrics)\.([a-z_-]+)\b")
FORBIDDEN = {
    "a path of some machine": r"(?<![\w.-])/(work|tmp|root|home|Users|mnt)/",
    "an address of a package index": r"(?:index-url|find-links)[ =]\S*://",
    "a picture": r"[\u2600-\u27bf\U0001f000-\U0001faff]",
    "praise": r"(?i)\b(blazing|seamless|cutting.edge|state.of.the.art|effortless|revolutionary|powerful)",
}
LONGEST_LINE = 100
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}
NO_KEYS = {"metrics.jsonl", "model.generate", "model.hf", "schedule.stesp", "data.sequence_length"}
"""Files, and what docs/configuration.md shows being refused."""

every_document = pytest.mark.parametrize("document", documents(), ids=name_of)
every_command = pytest.mark.parametrize("command", COMMANDS)


@every_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(prose(document.read_text())):
        parts = urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc, f"{target} is no https address"
            continue
        file = (document.parent / parts.path).resolve() if parts.path else document
        assert file.exists(), f"{target}: {file} does not exist"
        if parts.fragment:
            assert parts.fragment in anchors(file.read_text()), f"{target}: no such heading in {file.name}"


@every_document
def test_commands_exist(document: Path) -> None:
    for line in code(document.read_text()):
        for first, second in COMMAND.findall(line):
            assert {first, f"{first} {second}"} & (COMMANDS.keys() | GROUPS), f"headway {first} {second}: {line}"
            assert first not in GROUPS or not second or f"{first} {second}" in COMMANDS, line


@every_document
def test_keys_exist(document: Path) -> None:
    """`data.seq_len` and `--data.seq_len` in what may be typed are keys of their sections."""
    known = {name: {field.name for field in fields(cls)} for name, cls in sections().items()}
    for line in code(document.read_text()):
        for section, key in KEY.findall(line):
            assert key.replace("-", "_") in known[section] or f"{section}.{key}" in NO_KEYS, (
                f"{section}.{key} is no key: {line}"
            )


def test_every_command_is_documented() -> None:
    text = "\n".join(line for document in documents() for line in code(document.read_text()))
    missing = [name for name in COMMANDS if f"headway {name}" not in text]
    assert not missing, f"no document names {missing}"


def test_help_answers_at_once() -> None:
    """`headway --help` promises an answer within a second: a busy machine is given three."""
    asked = subprocess.run([_headway(), "--help"], capture_output=True, text=True, timeout=3, check=True)
    assert all(name in asked.stdout for name in COMMANDS)


@every_command
def test_each_command_helps(command: str) -> None:
    argv = [_headway(), *command.split(), "--help"]
    asked = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    assert f"headway {command}" in asked.stdout


def _headway() -> str:
    return str(Path(sys.executable).parent / "headway")


@pytest.mark.parametrize("name", [*sections(), "presets"])
def test_tables_are_those_of_the_code(name: str) -> None:
    found = {match["name"]: match["body"] for document in documents() for match in TABLE.finditer(document.read_text())}
    if name.startswith(("mixers.", "feedforwards.")) and name not in found:
        return  # a layer may be described wherever its author likes; `headway train --help` has its keys
    assert name in found, f"no document holds <!-- table: {name} -->"
    assert found[name] == table(name), "`python -m tests.documents` writes the tables anew"


def test_every_preset_is_described() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    missing = [path.name for path in (ROOT / "configs").glob("*.toml") if path.name not in text]
    assert not missing, f"docs/models.md does not name {missing}"


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    text = (folder / "README.md").read_text()
    missing = [path.name for path in folder.glob("0*.md") if f"({path.name})" not in text]
    assert not missing, f"docs/decisions/README.md does not list {missing}"


@every_document
@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_that_does_not_belong(document: Path, what: str) -> None:
    found = re.search(FORBIDDEN[what], document.read_text())
    assert found is None, f"{what}: {found[0]!r}"


@every_document
def test_prose_fits_a_screen(document: Path) -> None:
    too_long = [
        line
        for line in prose(document.read_text()).splitlines()
        if len(line) > LONGEST_LINE and not line.startswith(("|", "<!--")) and "](" not in line
    ]
    assert not too_long


@every_document
def test_inline_code_stays_on_its_line(document: Path) -> None:
    """Broken over two lines, it would escape the tests above."""
    broken = [line for line in prose(document.read_text()).splitlines() if "`" in line]
    assert not broken


def test_every_cell_of_the_matrix_is_a_test() -> None:
    """docs/layouts.md speaks of tests by their names; each is there to be run."""
    from tests.conformance.cells import FILES, test_ids

    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *FILES]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert test_ids() <= set(found.stdout.splitlines())


def test_figures_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from performance import PAGE, page

    assert PAGE.read_text() == page(), "`python benchmarks/performance.py` writes the page anew"
