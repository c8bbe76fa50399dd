"""Documents of parts: text and images in turn, as JSON lines have them and as tokens.

    {"parts": [{"text": "A red boot"}, {"image": [17, 3, 250]}]}

An image is a list of codes, as `trainer.data.patches` makes them. Beside a tokenizer of V ids and K codes, code c is
token V + c; V + K opens an image and V + K + 1 closes it. Those two are text, as in Transfusion (arXiv 2408.11039):
they are read and predicted in its turn, and whatever lies between them is image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.tokenizer import Tokenizer

Part = str | list[int]
"""A text, or the codes of an image."""
KINDS = ("text", "image")
NAMES = ["text", "image"]
"""What the modalities are called, in the order of their numbers."""
ANY_CODES = 1 << 31
"""So many codes that every list of them is in order: for who looks at the text alone."""


@dataclass(frozen=True)
class TokenIds:
    """How text and images share one vocabulary: `text` ids of the tokenizer, then `codes` of images, then two marks."""

    text: int
    codes: int

    @property
    def opens(self) -> int:
        """The id before an image."""
        return self.text + self.codes

    @property
    def closes(self) -> int:
        """The id behind an image."""
        return self.text + self.codes + 1

    @property
    def vocab_size(self) -> int:
        """How many ids there are in all."""
        return self.text + self.codes + 2

    @property
    def ranges(self) -> list[list[int]]:
        """`untie.ranges`: for each of `NAMES` its ids."""
        return [[0, self.text, self.opens, self.vocab_size], [self.text, self.opens]]

    def image(self, codes: Sequence[int]) -> list[int]:
        """The tokens of an image, marks included."""
        return [self.opens, *(self.text + code for code in codes), self.closes]

    def modalities(self, tokens: np.ndarray) -> np.ndarray:
        """The modality of each token [n], by its id: uint8 [n]."""
        return ((tokens >= self.text) & (tokens < self.opens)).astype(np.uint8)


def configuration(sidecar: dict[str, Any]) -> str:
    """The lines that a configuration needs for a dataset whose sidecar tells of modalities."""
    column = sidecar["modalities"]
    named = ", ".join(f'"{name}"' for name in column["names"])
    return (
        f"[model]\nvocab_size = {sidecar['vocab_size']}\n\n"
        f"[untie]\nmodalities = {len(column['names'])}\nnames = [{named}]\nranges = {column['ranges']}"
    )


def split_parts(value: Any) -> tuple[list[tuple[str, Any]], list[str]]:
    """([(kind, content) of each part], what is wrong) of what a JSON line has under its key, contents unseen."""
    if not isinstance(value, list):
        return [], [f"the value is no list of parts but {type(value).__name__}"]
    if not value:
        return [], ["there are no parts"]
    parts, faults = [], []
    for number, part in enumerate(value, 1):
        if not isinstance(part, dict):
            faults.append(f'part {number} is no object such as {{"text": ...}} but {type(part).__name__}')
        elif len(part) != 1 or next(iter(part)) not in KINDS:
            found = ", ".join(sorted(part)) or "none"
            faults.append(f"part {number} has the keys {found}; exactly one of {' and '.join(KINDS)} is known")
        else:
            parts.append(next(iter(part.items())))
    return parts, faults


def read_parts(value: Any, image_codes: int | None) -> tuple[list[Part], list[str]]:
    """(parts, what is wrong with them, in half sentences) of what a JSON line has under its key.

    `image_codes`: how many codes there are; None: an image is a fault.
    """
    parts, faults = split_parts(value)
    if faults:
        return [], faults
    for number, (kind, content) in enumerate(parts, 1):
        fault = _text_fault(content) if kind == "text" else _image_fault(content, image_codes)
        if fault:
            faults.append(f"part {number}: {fault}")
    return [content for _, content in parts], faults


def _text_fault(content: Any) -> str:
    if not isinstance(content, str):
        return f"the text is no text but {type(content).__name__}"
    return "" if content else "the text is empty"


def _image_fault(content: Any, image_codes: int | None) -> str:
    if image_codes is None:
        return "there is an image, and --image-codes does not say how many codes there are"
    if isinstance(content, str):
        return f"the image is {content!r}, and a list of codes is needed; `headway data patches` makes it from files"
    if not isinstance(content, list):
        return f"the image is no list of codes but {type(content).__name__}"
    if not content:
        return "the image is empty; at least one code is needed"
    for place, code in enumerate(content):
        if isinstance(code, bool) or not isinstance(code, int):
            return f"code {place} of the image is {code!r}, which is no whole number"
        if not 0 <= code < image_codes:
            return f"code {place} of the image is {code}, outside 0 to {image_codes - 1} (--image-codes {image_codes})"
    return ""


def readable(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of the ids; a run of those beyond the tokenizer, as an image is, stands in brackets as numbers."""
    runs = itertools.groupby((int(token) for token in ids), lambda token: 0 <= token < tokenizer.vocab_size)
    return "".join(tokenizer.decode(list(run)) if is_text else f"[{' '.join(map(str, run))}]" for is_text, run in runs)
