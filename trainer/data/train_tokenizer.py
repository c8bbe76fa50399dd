"""Training a SentencePiece model, and writing it down a second time for Hugging Face."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from model.files import new_folder, write_json
from trainer.data.documents import Problems, ReadingOptions, find_inputs, read_documents, texts
from trainer.data.parts import ANY_CODES
from trainer.data.tokenizer import MARKER, MODEL_FILE, Tokenizer, marker

END = "</s>"
UNKNOWN = "<unk>"
# The space, as SentencePiece writes it in its pieces.
SPACE = "▁"
LONGEST_PIECE_OF_TEXT = 1 << 14
DEFAULT_SAMPLE_MB = 200


def train_tokenizer(
    inputs: list[str],
    out: str,
    vocab_size: int,
    *,
    key: str = "text",
    parts: str | None = None,
    sample_mb: int = DEFAULT_SAMPLE_MB,
    skip_broken: bool = False,
    overwrite: bool = False,
) -> int:
    """Train a BPE SentencePiece model on text and write the folder `out`. Returns how many characters it has seen.

    Decoding gives back the text that was encoded, whatever its spaces, tabs, line ends and unknown characters: bytes
    stand in for what has no piece. The exception is U+2581, which SentencePiece writes for a space and reads as one.
    The same text gives the same bytes. Of more than `sample_mb` megabytes, lines are taken evenly. Where documents lie
    under `parts`, their texts alone are read.

    Raises ValueError when an input cannot be read, when `out` exists, or when the text cannot carry a vocabulary of
    exactly `vocab_size`, naming the nearest size that works.
    """
    if vocab_size < 1:
        raise ValueError(f"--vocab-size {vocab_size}: must be positive; for example 8192.")
    _check_free(out, overwrite)
    files = find_inputs(inputs)
    keep = min(1.0, sample_mb * 1e6 / max(1, sum(os.path.getsize(file) for file in files)))
    reading = ReadingOptions(documents="file", key=key, parts=parts, image_codes=ANY_CODES if parts else None)
    lines = _lines(files, reading, Problems(skip=skip_broken))
    seen = _Watched(_sample(lines, keep))
    model = _train(seen, vocab_size)
    write_tokenizer(model, Path(out))
    return seen.characters


def _check_free(out: str, overwrite: bool) -> None:
    if not os.path.exists(out):
        return
    if not overwrite:
        raise ValueError(f"--out {out}: it exists already; give another name, or --overwrite to replace it.")
    if not os.path.isfile(os.path.join(out, MODEL_FILE)):
        raise ValueError(
            f"--out {out}: it exists and is no tokenizer folder, so it is not replaced; give another name."
        )


def write_tokenizer(model: bytes, out: Path) -> None:
    """Write a SentencePiece model and its Hugging Face twin as the folder `out`, whole or not at all."""
    with new_folder(out) as partial:
        (partial / MODEL_FILE).write_bytes(model)
        hugging_face_twin(model).save_pretrained(str(partial))
        write_json(partial / MARKER, marker(model))


def write_hugging_face_files(tokenizer: Tokenizer, out: Path) -> None:
    """The tokenizer's files such that `AutoTokenizer.from_pretrained(out)` finds one.

    Raises ValueError for a SentencePiece model that has no Hugging Face files and is not of our making.
    """
    tokenizer.copy_to(out)
    if any((out / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return
    try:
        hugging_face_twin((out / MODEL_FILE).read_bytes()).save_pretrained(str(out))
    except Exception as fault:
        raise ValueError(
            f"this SentencePiece model has no Hugging Face files beside it, and none can be made ({fault}): give "
            "--tokenizer a Hugging Face tokenizer folder, or none to leave it out."
        ) from fault


def hugging_face_twin(model: bytes) -> Any:
    """The same BPE model as a transformers tokenizer, which gives the same ids."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    processor = SentencePieceProcessor(model_proto=model)
    vocabulary = {processor.id_to_piece(piece): piece for piece in range(processor.vocab_size())}
    bpe = models.BPE(
        vocab=vocabulary,
        merges=_merges(processor, vocabulary),
        byte_fallback=True,
        unk_token=UNKNOWN,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        # "</s>" written in a text is text, as it is for SentencePiece.
        split_special_tokens=True,
    )


def _merges(processor: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece would merge them."""
    plain = {
        piece: index
        for piece, index in vocabulary.items()
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index))
    }
    merges = []
    for piece in sorted(plain, key=plain.__getitem__):
        pairs = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        known = [pair for pair in pairs if pair[0] in plain and pair[1] in plain]
        merges += sorted(known, key=lambda pair: (plain[pair[0]], plain[pair[1]]))
    return merges


def _train(lines: _Watched, vocab_size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as fault:
        raise lines.fault or ValueError(_size_fault(str(fault), vocab_size)) from fault
    if lines.fault:
        raise lines.fault
    return model.getvalue()


def _size_fault(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint as a sentence that names the nearest vocabulary that works."""
    if found := re.search(r"too high .* value <= (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: the text does not hold that many different pieces; "
            f"{found[1]} is the largest that works, or give more text."
        )
    if found := re.search(r"required_chars\. (\d+) vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size}: 256 byte pieces and the characters of the text need more; "
            f"{found[2]} is the smallest that works."
        )
    return f"SentencePiece refused the text: {message.strip()}"


def _lines(files: list[str], options: ReadingOptions, problems: Problems) -> Iterator[str]:
    """The text in pieces: lines with their ends, and long ones cut, since SentencePiece drops what is too long."""
    for document in read_documents(files, options, problems):
        for text in texts(document):
            for line in text.splitlines(keepends=True):
                for start in range(0, len(line), LONGEST_PIECE_OF_TEXT):
                    yield line[start : start + LONGEST_PIECE_OF_TEXT]
    problems.refuse_if_any()


def _sample(lines: Iterable[str], keep: float) -> Iterator[str]:
    """Evenly spaced lines, a share `keep` of them."""
    for index, line in enumerate(lines):
        if int((index + 1) * keep) > int(index * keep):
            yield line


class _Watched:
    """Iterates, counts the characters that went by, and keeps what the reading raised: SentencePiece would bury it."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = lines
        self.characters = 0
        self.fault: ValueError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for line in self._lines:
                self.characters += len(line)
                yield line
        except ValueError as fault:
            self.fault = fault
