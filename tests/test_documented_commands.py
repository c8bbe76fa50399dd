"""Every block that a document marks as runnable is run, in order, by a reader who begins with the README.

    bash run          ends with 0
    bash refused      ends with 2, and says what the text block after it shows
    file=PATH         is written to PATH
    line=PATH         enters PATH before its first line that closes a brace

All in one copy of the project, with the programs of this environment first on the path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, Block, blocks, documents, name_of

SECONDS = 180
FIRST = "README.md"


class Reader:
    """Does what the documents say, each document once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[str] = set()

    def read(self, document: str) -> None:
        if document in self.done:
            return
        self.done.add(document)
        found = list(blocks((ROOT / document).read_text()))
        for block, after in zip(found, [*found[1:], None], strict=True):
            self._follow(document, block, after)

    def _follow(self, document: str, block: Block, after: Block | None) -> None:
        place = f"{document}, line {block.line}"
        if block.target is not None:
            self._write(block)
        elif block.words == ("bash", "run"):
            code, said = self._shell(block.text)
            assert code == 0, f"{place}: ended with {code}\n{said}"
        elif block.words == ("bash", "refused"):
            code, said = self._shell(block.text)
            assert code == 2, f"{place}: ended with {code}\n{said}"
            assert after is not None and after.words == ("text",), f"{place}: no text block shows what is said"
            assert after.text.strip() in said, f"{place}: said\n{said}"

    def _write(self, block: Block) -> None:
        assert block.target is not None
        path = self.folder / block.target
        path.parent.mkdir(parents=True, exist_ok=True)
        if f"file={block.target}" in block.words:
            path.write_text(block.text)
            return
        lines = path.read_text().splitlines(keepends=True)
        lines.insert(lines.index("}\n"), block.text)
        path.write_text("".join(lines))

    def _shell(self, text: str) -> tuple[int, str]:
        """Exit code, and both outputs as one."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        environment = inherited | {
            "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", ""),
            "PYTHONPATH": str(self.folder),
            "COLUMNS": "120",
            "OMP_NUM_THREADS": "1",
        }
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        return ran.returncode, ran.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("reader") / "headway"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, folder / file)
    return Reader(folder)


RUNNABLE = [
    name_of(document)
    for document in documents()
    if any(block.words[1:] in (("run",), ("refused",)) for block in blocks(document.read_text()))
]


@pytest.mark.parametrize("document", sorted(RUNNABLE, key=lambda name: (name != FIRST, name)))
def test_what_a_document_says_can_be_run(reader: Reader, document: str) -> None:
    reader.read(FIRST)
    reader.read(document)
