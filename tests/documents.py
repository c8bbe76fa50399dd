"""Reading the project's documents, and the tables in them that are made from the code.

    python -m tests.documents

writes those tables anew. They stand between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trainer.describe import keys, sections

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
TABLE = re.compile(r"<!-- table: (?P<name>[^>]+) -->\n(?P<body>.*?)<!-- end of table -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind its first fence, its text, and the line it begins on."""

    words: tuple[str, ...]
    text: str
    line: int

    @property
    def target(self) -> str | None:
        """The PATH of a `file=PATH` or `line=PATH` block."""
        return next((word.split("=", 1)[1] for word in self.words if word.startswith(("file=", "line="))), None)


def documents() -> list[Path]:
    """Every Markdown file of the project."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    for found in FENCE.finditer(text):
        yield Block(tuple(found[1].split()), found[2], text.count("\n", 0, found.start()) + 1)


def prose(text: str) -> str:
    """A document without its fenced blocks and inline code."""
    return INLINE_CODE.sub("", FENCE.sub("", text))


def code(text: str) -> Iterator[str]:
    """Everything a reader might type: shell blocks, with continued lines joined, and inline code."""
    for block in blocks(text):
        if block.words[:1] == ("bash",):
            yield from block.text.replace("\\\n", " ").splitlines()
    yield from (found[1] for found in INLINE_CODE.finditer(FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#{1,6} (.+)$", FENCE.sub("", text), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        result.add(f"{slug}-{count}" if count else slug)
    return result


def table(name: str) -> str:
    """The table of that name, as it should stand."""
    if name == "presets":
        return presets_table()
    if name in (layouts := layout_tables()):
        return _lines(layouts[name])
    return keys_table(sections()[name])


def keys_table(cls: Any) -> str:
    """A row for each key: type, default, and the docstring under it."""
    rows = [("key", "type", "default", "meaning"), ("---",) * 4]
    for key, kind, default, meaning in keys(cls):
        shown = default if default in ("required", "not set") else f"`{default}`"
        rows.append((f"`{key}`", _coded(kind), shown, meaning.replace("|", "\\|")))
    return _lines(rows)


def _coded(kind: str) -> str:
    """Literal values and table keys as code."""
    return re.sub(r'"[^"]*"|(?<=table of )\w+|(?<=path, )\w+', lambda found: f"`{found[0]}`", kind)


def _lines(rows: Sequence[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def presets_table() -> str:
    """A row for each of configs/: what it is made of, and how many parameters a model built from it has."""
    import torch

    from model.stack import Model
    from trainer.config import load_config

    head = ("preset", "mixers", "feed-forward", "layers", "width", "vocabulary", "seq_len", "parameters")
    rows: list[tuple[str, ...]] = [head]
    rows.append(("---", "---", "---", "--:", "--:", "--:", "--:", "--:"))
    for path in sorted((ROOT / "configs").glob("*.toml")):
        config = load_config(path)
        with torch.device("meta"):
            model = Model(config.architecture)
        count = sum(parameter.numel() for parameter in model.parameters())
        m, names = config.model, config.architecture.feedforward_names
        numbers = (m.num_layers, m.d_model, m.vocab_size, config.data.seq_len, count)
        link = f"[`{path.name}`](../configs/{path.name})"
        rows.append((link, ", ".join(m.pattern), ", ".join(dict.fromkeys(names)), *(f"{n:,}" for n in numbers)))
    return _lines(rows)


@cache
def layout_tables() -> dict[str, list[tuple[str, ...]]]:
    """Name -> rows of the tables of docs/layouts.md."""
    from tests.conformance.cells import tables

    return tables()


def with_tables(text: str) -> str:
    """A document with its tables made anew."""
    return TABLE.sub(
        lambda found: f"<!-- table: {found['name']} -->\n{table(found['name'])}<!-- end of table -->", text
    )


if __name__ == "__main__":
    for document in documents():
        before = document.read_text()
        if (after := with_tables(before)) != before:
            document.write_text(after)
            print(f"{name_of(document)}: tables written", file=sys.stderr)
