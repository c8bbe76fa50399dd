"""What is refused before a run starts: values of `[data]`, and files, by name and place."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from trainer.data.check import check_sources
from trainer.data.config import DataConfig, DataSource
from trainer.data.indexed import MAGIC


def write_pair(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> str:
    """A hand-made pair, byte by byte as the format says: nothing of Megatron, nothing of ours."""
    size = np.dtype(dtype).itemsize
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths.astype(np.int64))])[:-1] * size
    head = MAGIC + struct.pack("<QBQQ", 1, {2: 8, 4: 4}[size], len(documents), len(documents) + 1)
    tail = lengths.tobytes() + offsets.astype(np.int64).tobytes() + np.arange(len(documents) + 1).tobytes()
    Path(f"{prefix}.idx").write_bytes(head + tail)
    Path(f"{prefix}.bin").write_bytes(np.array([t for d in documents for t in d], dtype=dtype).tobytes())
    return str(prefix)


@pytest.fixture
def good(tmp_path: Path) -> str:
    return write_pair(tmp_path / "good", [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]])


def config(*prefixes: str, **changes) -> DataConfig:
    return DataConfig(**{"train": list(prefixes), "seq_len": 4, **changes})


def only(faults: list[str], pattern: str) -> None:
    assert len(faults) == 1 and re.search(pattern, faults[0]), faults


def test_a_sound_pair_has_no_faults_and_is_what_megatron_reads(good: str):
    from trainer.data.lazy import megatron

    assert check_sources(config(good), 13) == [] == config(good).faults()
    theirs = megatron("indexed_dataset").IndexedDataset(good)
    assert [theirs[index].tolist() for index in range(3)] == [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"train": []}, r"^data\.train = \[\]: there is nothing to train on"),
        ({"split": [0.9, 0.2]}, r"^data\.split = \[0\.9, 0\.2\]: fractions must sum to 1 \(they sum to 1\.1\); for ex"),
        ({"split": [0.9, 0.05, 0.05]}, r"^data\.split = .*: expected two fractions.* got 3"),
        ({"split": [1.0, 0.0]}, r"^data\.split = .* between 0 and 1"),
        ({"seq_len": 0}, r"^data\.seq_len = 0: must be at least 1; for example 1024\."),
        ({"global_batch_size": -2}, r"^data\.global_batch_size = -2: must be at least 1; for example 8\."),
        ({"samples": 0}, r"^data\.samples = 0: must be at least 1"),
        ({"validation_batches": -1}, r"^data\.validation_batches = -1: must be at least 0"),
        ({"validate_every_steps": 5}, r"^data\.validate_every_steps = 5: there is nothing to validate on"),
        ({"validation": ["v"], "split": [0.9, 0.1]}, r"^data\.split = .*: data\.validation is given too"),
        ({"train": ["p", DataSource("p", 2.0)]}, r"^data\.train names p 2 times"),
        ({"train": [DataSource("p", 0.0)]}, r"^data\.train: the weight of p is 0\.0: weights must be positive"),
        ({"train": [DataSource("p", float("nan"))]}, r"weight of p is nan"),
    ],
)
def test_values_that_are_refused(changes: dict, pattern: str):
    only(DataConfig(**{"train": ["p"], **changes}).faults(), pattern)


def test_all_value_faults_at_once():
    assert len(DataConfig(seq_len=0, split=[0.5, 0.6], samples=-1).faults()) == 4


def test_missing_files_and_the_nearest_prefixes(good: str, tmp_path: Path):
    only(
        check_sources(config(str(tmp_path / "gone"))), r"data\.train: .*gone\.bin and .*gone\.idx cannot.*are .*good\."
    )
    only(check_sources(config(good + ".bin")), r"expected a prefix and got a file; write .*good instead")
    os.remove(good + ".idx")
    only(check_sources(config(good)), r"good\.idx cannot be found; `headway data prepare` writes both")


@pytest.mark.parametrize("change", [-1, -2, 2])
def test_a_bin_of_the_wrong_size(good: str, change: int):
    content = Path(good + ".bin").read_bytes()
    Path(good + ".bin").write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    state = "cut short" if change < 0 else "longer than its index says"
    pattern = (
        rf"good\.bin: {24 + change} bytes, but .*good\.idx counts 12 tokens of uint16, which take 24: it is {state}"
    )
    only(check_sources(config(good)), pattern)


def test_a_broken_index(good: str):
    content = Path(good + ".idx").read_bytes()
    for broken, pattern in [
        (content[:-5], r"good\.idx: \d+ bytes, but its header announces 3 sequences and 4 document boundaries"),
        (b"", "not a Megatron index"),
        (b"PK" + content[2:], "not a Megatron index"),
        (content[:9] + struct.pack("<Q", 2) + content[17:], "index version 2; version 1 is the one"),
        (content[:17] + b"\x07" + content[18:], "type code 7 is not that of whole numbers"),
        (content[:34] + struct.pack("<i", -5) + content[38:], "document 0 has length -5"),
        (content[:46] + struct.pack("<q", 9999) + content[54:], "document 0 starts at byte 9999, outside the .bin"),
    ]:
        Path(good + ".idx").write_bytes(broken)
        only(check_sources(config(good)), pattern)


def test_empty_datasets(tmp_path: Path):
    only(check_sources(config(write_pair(tmp_path / "none", []))), r"the dataset is empty \(0 documents\)")
    only(check_sources(config(write_pair(tmp_path / "blank", [[], []]))), "empty .2 documents without a token")


def test_too_few_tokens_for_one_sample(good: str):
    assert check_sources(config(good, seq_len=11)) == []
    only(check_sources(config(good, seq_len=12)), r"12 tokens .* data\.seq_len \+ 1 = 13; the largest .* works is 11\.")


def test_ids_above_the_vocabulary_by_document_and_place(good: str, tmp_path: Path):
    pattern = r"good\.bin: token 2 of document 1 is id 8, outside the model's vocabulary of 8"
    only(check_sources(config(good), 8), pattern)
    negative = write_pair(tmp_path / "negative", [[1, 2, 3], [4, -1, 5, 6]], np.int32)
    only(check_sources(config(negative), 100), "token 1 of document 1 is id -1")
    # Not looked for without a vocabulary.
    assert check_sources(config(good)) == []


def test_the_scan_crosses_its_chunks(good: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.data.indexed.CHUNK_TOKENS", 5)
    only(check_sources(config(good), 11), "token 2 of document 2 is id 11")


def test_splits_that_leave_nothing(good: str, tmp_path: Path):
    only(check_sources(config(good, split=[0.9, 0.1])), r"of 3 documents leaves none to validate on")
    only(check_sources(config(good, split=[0.1, 0.9])), r"of 3 documents leaves none to train on")
    single = write_pair(tmp_path / "single", [[1, 2, 3, 4, 5], [6]])
    only(check_sources(config(single, split=[0.5, 0.5])), "no document to validate on has a second token")


def write_sidecar(prefix: str, **changes) -> None:
    sizes = {"bin_bytes": os.path.getsize(prefix + ".bin"), "idx_bytes": os.path.getsize(prefix + ".idx")}
    content = {"tokenizer_fingerprint": "a" * 64, "max_token": 12, "end_token": 1, **sizes, **changes}
    Path(prefix + ".json").write_text(json.dumps(content))


def test_a_sidecar_of_other_files(good: str):
    write_sidecar(good)
    assert check_sources(config(good), 13) == []
    write_sidecar(good, bin_bytes=1000)
    only(check_sources(config(good)), r"describes a \.bin of 1000 bytes, and .*good\.bin has 24: they do not belong")
    Path(good + ".json").write_text('{"tokenizer_fingerprint": "a')
    only(check_sources(config(good)), r"good\.json: damaged")


def test_raw_text_beside_megatron_data_is_no_sidecar(good: str):
    Path(good + ".json").write_text('{"text": "raw"}\n{"text": "more"}\n')
    assert check_sources(config(good), 13) == []


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from trainer.data.train_tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "t.txt").write_text("some words that come again and again, some words that do not\n" * 5)
    for size in (280, 285):
        train_tokenizer([str(folder / "t.txt")], str(folder / str(size)), size)
    return [str(folder / "280"), str(folder / "285")]


def test_the_wrong_tokenizer(tokenizers: list[str], tmp_path: Path):
    from trainer.data.prepare import prepare_dataset

    (tmp_path / "t.txt").write_text("some words that come again")
    made = []
    for name, tokenizer in zip(("a", "b"), tokenizers, strict=True):
        prepare_dataset([str(tmp_path / "t.txt")], tokenizer, str(tmp_path / name))
        made.append(str(tmp_path / name))
    assert check_sources(config(made[0]), 280) == []
    assert check_sources(config(made[0], tokenizer=tokenizers[0]), 280) == []
    pattern = r"data\.tokenizer = .*285: .*a was made with another tokenizer .* lies in .*a\.tokenizer"
    only(check_sources(config(made[0], tokenizer=tokenizers[1]), 280), pattern)
    only(check_sources(config(made[0], validation=[made[1]]), 285), "made with different tokenizers: .*a .*b ")
    only(check_sources(config(made[0], tokenizer="nowhere")), r"data\.tokenizer: nowhere: there is no tokenizer")


def test_all_faults_of_all_files_at_once(good: str, tmp_path: Path):
    short = write_pair(tmp_path / "short", [[1, 2], [90]])
    cut = write_pair(tmp_path / "cut", [[1, 2, 3]])
    Path(cut + ".bin").write_bytes(b"")
    faults = check_sources(config(good, short, cut, validation=[str(tmp_path / "gone")], end_token=70), 50)
    patterns = ["short: 3 tokens", r"short\.bin: token 0 of document 1 is id 90", r"cut\.bin: 0 bytes"]
    patterns += [r"data\.validation: .*gone", r"data\.end_token = 70"]
    assert len(faults) == 5 and all(re.search(p, f) for p, f in zip(patterns, faults, strict=True)), faults
