"""Raw text to documents: text, JSON lines and Parquet files, plain or gzipped, alone or in folders.

The readers are the standard library's and pyarrow's: a file is refused by name and line, which the block-wise readers
of `datasets` cannot tell, and no second copy of the text is put into a cache.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from trainer.data.parts import Part, read_parts

TEXT = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".json", ".ndjson")
PARQUET = (".parquet",)
MOST_LISTED = 20
BYTE_ORDER_MARK = "\ufeff"


@dataclass
class ReadingOptions:
    """How files are cut into documents."""

    documents: Literal["file", "paragraph", "line"] = "file"
    key: str = "text"
    parts: str | None = None
    """Instead of `key`: where documents of parts are in JSON lines."""
    image_codes: int | None = None
    """How many codes images in them are made of."""

    def faults(self) -> list[str]:
        """Which options do not go together, one sentence each."""
        if self.image_codes is None:
            return []
        faults = []
        if self.image_codes < 1:
            faults.append(f"--image-codes {self.image_codes}: must be positive; for example 256.")
        if self.parts is None:
            faults.append(
                f"--image-codes {self.image_codes}: only documents of parts have images; name their key with --parts, "
                "for example --parts parts."
            )
        return faults


@dataclass
class Problems:
    """What could not be read: listed and refused at the end, or, with `skip`, counted and passed over."""

    skip: bool
    skipped: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    def add(self, kind: str, sentence: str) -> None:
        """Note one fault. `kind` is the name it is counted under."""
        if self.skip:
            self.skipped[kind] += 1
            return
        self.listed.append(sentence)
        if len(self.listed) >= MOST_LISTED:
            self.refuse_if_any()

    def refuse_if_any(self) -> None:
        """Raise ValueError with everything listed so far."""
        if self.listed:
            more = f"\n(the first {MOST_LISTED}; there may be more)" if len(self.listed) >= MOST_LISTED else ""
            advice = "\nMend them, or pass over them with --skip-broken."
            raise ValueError("\n".join(self.listed) + more + advice)


def find_inputs(inputs: list[str]) -> list[str]:
    """The files that the arguments name, folders taken recursively and in order of their names.

    Raises ValueError listing every argument that is missing, of an unknown kind, or a folder without usable files.
    """
    files, faults = [], []
    known = ", ".join(TEXT + JSON_LINES + PARQUET) + ", and .gz of text and JSON lines"
    for given in inputs:
        if os.path.isdir(given):
            inside = [file for file in _walk(given) if _kind(file)]
            files += inside
            if not inside:
                faults.append(f"{given}: no file in this folder can be read; known endings are {known}.")
        elif not os.path.isfile(given):
            faults.append(f"{given}: there is no such file or folder.")
        elif not _kind(given):
            faults.append(f"{given}: the ending {os.path.splitext(given)[1]!r} is not known; known are {known}.")
        else:
            files.append(given)
    if not inputs:
        faults.append("INPUT: give at least one file or folder to read.")
    if faults:
        raise ValueError("\n".join(faults))
    return files


def read_documents(files: list[str], options: ReadingOptions, problems: Problems) -> Iterator[list[Part]]:
    """The documents of the files, in order, none of them empty: a text alone, or parts. What cannot be read goes to
    `problems`."""
    for file in files:
        count = 0
        before = len(problems.listed) + problems.skipped.total()
        for place, document in _read(file, options, problems):
            count += 1
            if not any(not isinstance(part, str) or part.strip() for part in document):
                problems.add("empty", f"{place}: the document is empty.")
            elif all(_is_utf8(part) for part in texts(document)):
                yield document
            else:
                problems.add("invalid_utf8", f"{place}: holds half of a surrogate pair, which UTF-8 cannot write.")
        if count == 0 and before == len(problems.listed) + problems.skipped.total():
            problems.add("empty", f"{file}: the file is empty.")


def texts(document: list[Part]) -> Iterator[str]:
    """The texts among the parts of a document."""
    return (part for part in document if isinstance(part, str))


def _read(file: str, options: ReadingOptions, problems: Problems) -> Iterator[tuple[str, list[Part]]]:
    """(place, document), of a file of any kind."""
    kind = _kind(file)
    if options.parts is not None:
        if kind == "json":
            yield from _read_parts(file, options.parts, options.image_codes, problems)
        else:
            problems.add("unreadable", f"{file}: documents of parts (--parts) are read from JSON lines alone.")
        return
    reader = {"text": _read_text, "json": _read_json_lines, "parquet": _read_parquet}[kind]
    for place, text in reader(file, options, problems):
        yield place, [text]


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            yield os.path.join(parent, name)


def _kind(file: str) -> str:
    stem = file.lower().removesuffix(".gz")
    if stem.endswith(TEXT):
        return "text"
    if stem.endswith(JSON_LINES):
        return "json"
    return "parquet" if file.lower().endswith(PARQUET) else ""


def _open(file: str) -> IO[bytes]:
    return gzip.open(file, "rb") if file.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def _numbered_lines(file: str, problems: Problems) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end), of the lines that are UTF-8; a file that breaks off is one fault."""
    number = 0
    try:
        with _open(file) as stream:
            for raw in stream:
                number += 1
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as fault:
                    problems.add(
                        "invalid_utf8", f"{file}, line {number}: not UTF-8 (byte {fault.start + 1} of the line)."
                    )
                    continue
                yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except (EOFError, gzip.BadGzipFile, OSError) as fault:
        problems.add("unreadable", f"{file}, after line {number}: cannot be read on ({fault}).")


def _read_text(file: str, options: ReadingOptions, problems: Problems) -> Iterator[tuple[str, str]]:
    """(place, document) for a text file, cut as `options.documents` says."""
    if options.documents == "line":
        for number, line in _numbered_lines(file, problems):
            if line.strip():
                yield f"{file}, line {number}", line.rstrip("\r\n")
    elif options.documents == "paragraph":
        yield from _paragraphs(file, problems)
    else:
        before = len(problems.listed) + problems.skipped.total()
        text = "".join(line for _, line in _numbered_lines(file, problems))
        # A file with a broken line is broken as a document.
        if text and before == len(problems.listed) + problems.skipped.total():
            yield file, text


def _paragraphs(file: str, problems: Problems) -> Iterator[tuple[str, str]]:
    """Runs of lines between blank ones."""
    lines: list[str] = []
    start = 0
    for number, line in _numbered_lines(file, problems):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield f"{file}, line {start}", "".join(lines).rstrip("\r\n")
            lines = []
    if lines:
        yield f"{file}, line {start}", "".join(lines).rstrip("\r\n")


def json_objects(file: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for a file with one JSON object a line; blank lines are passed over."""
    for number, line in _numbered_lines(file, problems):
        place = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as fault:
            problems.add(
                "broken_json", f"{place}: not JSON ({getattr(fault, 'msg', fault)}); expected one object a line."
            )
            continue
        if isinstance(entry, dict):
            yield place, entry
        else:
            problems.add("broken_json", f"{place}: expected a JSON object and found {type(entry).__name__}.")


def under_key(file: str, key: str, option: str, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for those JSON lines that have the key, which `option` has named."""
    for place, entry in json_objects(file, problems):
        if key in entry:
            yield place, entry
        else:
            found = ", ".join(sorted(entry)[:8]) or "none"
            problems.add("missing_key", f"{place}: no key {key!r}; its keys are {found} (choose with {option}).")


def _read_json_lines(file: str, options: ReadingOptions, problems: Problems) -> Iterator[tuple[str, str]]:
    """(place, text under the key) for a file with one JSON object a line."""
    for place, entry in under_key(file, options.key, "--key", problems):
        if isinstance(entry[options.key], str):
            yield place, entry[options.key]
        else:
            kind = type(entry[options.key]).__name__
            problems.add("missing_key", f"{place}: the value of {options.key!r} is no text but {kind}.")


def _read_parts(file: str, key: str, image_codes: int | None, problems: Problems) -> Iterator[tuple[str, list[Part]]]:
    """(place, parts under the key) for a file with one JSON object a line."""
    for place, entry in under_key(file, key, "--parts", problems):
        parts, faults = read_parts(entry[key], image_codes)
        if faults:
            problems.add("broken_parts", f"{place}: {'; '.join(faults)}.")
        else:
            yield place, parts


def _read_parquet(file: str, options: ReadingOptions, problems: Problems) -> Iterator[tuple[str, str]]:
    """(place, text) for the rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow
            if options.key not in columns.names:
                found = ", ".join(columns.names[:8])
                problems.add(
                    "missing_key", f"{file}: no column {options.key!r}; its columns are {found} (choose with --key)."
                )
                return
            row = 0
            for batch in table.iter_batches(columns=[options.key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if isinstance(value, str):
                        yield f"{file}, row {row}", value
                    else:
                        kind = type(value).__name__
                        problems.add(
                            "missing_key", f"{file}, row {row}: the value of {options.key!r} is no text but {kind}."
                        )
    except (pyarrow.ArrowException, OSError) as fault:
        problems.add("unreadable", f"{file}: not a readable Parquet file ({fault}).")


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
