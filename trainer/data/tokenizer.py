"""Tokenizers: one small face over SentencePiece models and Hugging Face folders.

A folder that `headway data tokenizer` wrote holds `tokenizer.model`, the same thing as Hugging Face files, and
`headway_tokenizer.json`, which says that the two are the same: there, and for a bare `.model`, SentencePiece does the
work. Every other folder is read by transformers alone, since a `tokenizer.model` in it need not know the added tokens.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKER = "headway_tokenizer.json"
MODEL_FILE = "tokenizer.model"
# What makes up a tokenizer in a Hugging Face folder, which may hold weights as well.
FILE_PATTERNS = (
    "tokenizer*.json",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.tiktoken",
    MARKER,
)


class Tokenizer(ABC):
    """Text to token ids and back.

    `vocab_size`: ids lie in [0, vocab_size). `end_token`: the id that ends a document. `fingerprint`: SHA-256 of what
    decides the ids, equal for two copies of the same tokenizer wherever they lie.
    """

    vocab_size: int
    end_token: int
    fingerprint: str

    @property
    def token_ids(self) -> dict[str, int]:
        """Special tokens by their keys in `config.json` of Hugging Face: at least `eos_token_id`."""
        return {"eos_token_id": self.end_token}

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any token added."""
        return self.encode_batch([text], workers=1)[0]

    @abstractmethod
    def encode_batch(self, texts: list[str], workers: int) -> list[list[int]]:
        """The ids of several texts, in order, computed by `workers` threads; their number changes nothing."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; end tokens and other control tokens are no text."""

    @abstractmethod
    def count_bytes(self, ids: Sequence[int]) -> int:
        """How many UTF-8 bytes of text the ids stand for."""

    @abstractmethod
    def copy_to(self, folder: str | Path) -> None:
        """Copy the tokenizer's files into an existing folder, such that `load_tokenizer(folder)` gives an equal one."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model."""

    def __init__(self, model_path: Path, files: list[Path]) -> None:
        from sentencepiece import SentencePieceProcessor

        content = model_path.read_bytes()
        self._processor = _read_model(model_path, content, SentencePieceProcessor)
        self._files = files
        self.vocab_size = self._processor.vocab_size()
        self.end_token = self._processor.eos_id()
        self.fingerprint = hashlib.sha256(b"sentencepiece\n" + content).hexdigest()
        if self.end_token < 0:
            raise ValueError(
                f"{model_path}: this SentencePiece model has no end token, and every document must end with one; "
                "train it with an eos piece, or make one with `headway data tokenizer`."
            )

    def encode_batch(self, texts: list[str], workers: int) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=workers)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])

    def count_bytes(self, ids: Sequence[int]) -> int:
        import numpy as np

        return int(np.asarray(self._piece_bytes, dtype=np.int64)[np.asarray(ids, dtype=np.int64)].sum())

    @functools.cached_property
    def _piece_bytes(self) -> list[int]:
        """UTF-8 bytes per piece: exact also where a character is cut into its bytes, which decoding could not show."""
        return [self._bytes_of(piece) for piece in range(self.vocab_size)]

    def _bytes_of(self, piece: int) -> int:
        if self._processor.is_byte(piece):
            return 1
        if self._processor.is_control(piece):
            return 0
        if self._processor.is_unknown(piece):
            return len(self._processor.decode([piece]).encode())
        return len(self._processor.id_to_piece(piece).replace("▁", " ").encode())

    def copy_to(self, folder: str | Path) -> None:
        for file in self._files:
            name = MODEL_FILE if file.suffix == ".model" else file.name
            shutil.copyfile(file, Path(folder) / name)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer in a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            # Unless told, transformers asks on the console whether code in the folder may run: it may not.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as fault:
            raise ValueError(f"{folder}: transformers cannot read a tokenizer there ({_first_line(fault)}).") from fault
        self._folder = folder
        self.vocab_size = len(self._tokenizer)
        if self._tokenizer.eos_token_id is None:
            raise ValueError(
                f"{folder}: this tokenizer names no eos_token, and every document must end with one; "
                "set eos_token in its tokenizer_config.json."
            )
        self.end_token = int(self._tokenizer.eos_token_id)
        self.fingerprint = _hugging_face_fingerprint(self._tokenizer)

    @property
    def token_ids(self) -> dict[str, int]:
        named = {key: getattr(self._tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {key: int(token) for key, token in named.items() if token is not None}

    def encode_batch(self, texts: list[str], workers: int) -> list[list[int]]:
        # The tokenizers library takes its number of threads from the machine.
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        plain = [int(token) for token in ids]
        return self._tokenizer.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count_bytes(self, ids: Sequence[int]) -> int:
        return len(self.decode(ids).encode("utf-8", errors="replace"))

    def copy_to(self, folder: str | Path) -> None:
        for file in tokenizer_files(self._folder):
            shutil.copyfile(file, Path(folder) / file.name)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer folder, a `.model` file or any Hugging Face tokenizer folder.

    Raises ValueError when there is nothing at `path`, when it cannot be read, or when it has no end token.
    """
    place = Path(path)
    if place.is_file():
        return SentencePieceTokenizer(place, [place])
    if not place.is_dir():
        raise ValueError(
            f"{place}: there is no tokenizer; expected a folder that `headway data tokenizer` wrote, a .model file "
            "or a Hugging Face tokenizer folder."
        )
    model = place / MODEL_FILE
    alone = not any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if model.is_file() and (alone or _marker_agrees(place, model)):
        return SentencePieceTokenizer(model, tokenizer_files(place))
    return HuggingFaceTokenizer(place)


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The files in a folder that belong to its tokenizer, sorted."""
    return sorted({file for pattern in FILE_PATTERNS for file in Path(folder).glob(pattern) if file.is_file()})


def marker(model: bytes) -> dict[str, str]:
    """The content of `headway_tokenizer.json`: which model the Hugging Face files beside it were made from."""
    return {"kind": "sentencepiece", "model_sha256": hashlib.sha256(model).hexdigest()}


def _marker_agrees(folder: Path, model: Path) -> bool:
    file = folder / MARKER
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == marker(model.read_bytes())


def _read_model(path: Path, content: bytes, processor: Any) -> Any:
    try:
        return processor(model_proto=content)
    except RuntimeError as fault:
        raise ValueError(
            f"{path}: not a SentencePiece model ({_first_line(fault)}); --tokenizer takes a folder that "
            "`headway data tokenizer` wrote, a .model file or a Hugging Face tokenizer folder."
        ) from fault


def _hugging_face_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over what decides the ids: the backend's whole description, or the vocabulary where there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        # Truncation and padding are set by whoever called last.
        described["truncation"] = described["padding"] = None
    else:
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    described["end_token"] = tokenizer.eos_token_id
    canonical = json.dumps(described, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(b"huggingface\n" + canonical.encode()).hexdigest()


def _first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0].rstrip(".")[:200]


def default_workers() -> int:
    """As many threads as this process may use cores."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1))
