"""What a dataset holds, with or without a sidecar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.data.indexed import TokenFile, open_pair
from trainer.data.parts import readable
from trainer.data.sidecar import read_sidecar, recorded_tokenizer
from trainer.data.tokenizer import Tokenizer, load_tokenizer

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
SHOWN_TOKENS = 200
SHOWN_CHARACTERS = 100


def inspect_dataset(
    prefix: str, *, tokenizer: str | None = None, end_token: int | None = None, show: int = 3
) -> dict[str, Any]:
    """Describe the dataset at a prefix, from a scan of all its tokens.

    Keys: prefix, documents, tokens, dtype, max_token, length_quantiles, groups (document boundaries, where they are
    not one per sequence), modalities (tokens of each, by name, where there are images), bytes_per_token (of text, where
    there is nothing else), end_token, end_with_end_token (documents that do), tokenizer, vocab_size, sidecar (bool),
    skipped, first_lines. What is not known is None.

    Raises ValueError when the files are missing, broken or empty.
    """
    data = open_pair(prefix)
    sidecar = read_sidecar(prefix)
    path = tokenizer or recorded_tokenizer(prefix)
    loaded = load_tokenizer(path) if path else None
    known_end = _end_token(end_token, sidecar, loaded)
    column = (sidecar or {}).get("modalities")
    return {
        "prefix": prefix,
        "documents": data.documents,
        "tokens": data.total,
        "dtype": data.tokens.dtype.name,
        "max_token": data.largest(),
        "length_quantiles": {str(q): float(np.quantile(data.lengths, q)) for q in QUANTILES},
        "groups": None if data.groups == data.documents else data.groups,
        "modalities": dict(zip(column["names"], column["tokens"], strict=True)) if column else None,
        "bytes_per_token": sidecar["bytes"] / sidecar["tokens"] if sidecar and not column else None,
        "end_token": known_end,
        "end_with_end_token": None if known_end is None else _ending_with(data, known_end),
        "tokenizer": path,
        "vocab_size": loaded.vocab_size if loaded and not column else (sidecar or {}).get("vocab_size"),
        "sidecar": sidecar is not None,
        "skipped": (sidecar or {}).get("skipped"),
        "first_lines": list(_first_lines(data, loaded, show, of_parts=column is not None)) if loaded else None,
    }


def as_text(found: dict[str, Any]) -> str:
    """The description for a person, one fact a line."""
    lines = [
        found["prefix"],
        f"  documents        {found['documents']:,}",
        f"  tokens           {found['tokens']:,} of {found['dtype']}, the largest id is {found['max_token']}",
        "  lengths          " + ", ".join(f"{name}: {value:g}" for name, value in _quantile_names(found)),
    ]
    if found["groups"] is not None:
        lines.append(f"  boundaries       {found['groups']:,}; every sequence is read as a document of its own")
    if found["modalities"] is not None:
        lines.append("  modalities       " + ", ".join(f"{name}: {n:,}" for name, n in found["modalities"].items()))
    if found["bytes_per_token"] is not None:
        lines.append(f"  bytes per token  {found['bytes_per_token']:.3f}")
    if found["end_token"] is not None:
        lines.append(
            f"  end token        {found['end_token']}, with which {found['end_with_end_token']:,} of "
            f"{found['documents']:,} documents end"
        )
    lines.append(f"  tokenizer        {found['tokenizer'] or 'not known; name one with --tokenizer'}")
    if found["vocab_size"] is not None:
        lines.append(f"  vocabulary       {found['vocab_size']:,}")
    if found["skipped"]:
        skipped = ", ".join(f"{kind} {count}" for kind, count in sorted(found["skipped"].items()))
        lines.append(f"  skipped          {skipped}")
    if not found["sidecar"]:
        lines.append(f"  sidecar          none: {found['prefix']}.json is what `headway data prepare` writes")
    for index, line in enumerate(found["first_lines"] or []):
        lines.append(f"  document {index:<8}{line}")
    return "\n".join(lines)


def _quantile_names(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for q, value in found["length_quantiles"].items():
        name = {"0.0": "shortest", "0.5": "median", "1.0": "longest"}.get(q, f"{float(q):.0%}")
        yield name, value


def _end_token(given: int | None, sidecar: dict[str, Any] | None, tokenizer: Tokenizer | None) -> int | None:
    if given is not None:
        return given
    if sidecar is not None:
        return int(sidecar["end_token"])
    return tokenizer.end_token if tokenizer else None


def _ending_with(data: TokenFile, end_token: int) -> int:
    filled = data.lengths > 0
    last = data.tokens[data.offsets[filled] + data.lengths[filled] - 1]
    return int((last == end_token).sum())


def _first_lines(data: TokenFile, tokenizer: Tokenizer, show: int, of_parts: bool) -> Iterator[str]:
    for index in range(min(show, data.documents)):
        ids = data.document(index)[:SHOWN_TOKENS]
        if not of_parts and ((ids < 0) | (ids >= tokenizer.vocab_size)).any():
            yield f"(not this tokenizer's: id {int(ids.max())} and {tokenizer.vocab_size} pieces)"
            continue
        text = readable(tokenizer, ids.tolist())
        yield repr((text.strip().splitlines() or [""])[0][:SHOWN_CHARACTERS])
