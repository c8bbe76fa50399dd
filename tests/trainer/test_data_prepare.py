"""Text to tokenizer to dataset: round trips, and what is refused, by file and line."""

from __future__ import annotations

import gzip
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from model.files import file_sha256
from trainer.commands import data as commands
from trainer.data.documents import ReadingOptions
from trainer.data.indexed import open_pair
from trainer.data.inspect import inspect_dataset
from trainer.data.lazy import megatron
from trainer.data.prepare import prepare_dataset
from trainer.data.sidecar import read_sidecar
from trainer.data.tokenizer import load_tokenizer
from trainer.data.train_tokenizer import train_tokenizer

TEXT = """the cat sat on a mat while rain fell over 1234 hills and 77 dogs ran home again singing of rivers --- ---- oh
café naïve stone light window paper north wind morning evening slow bright river bridge"""
WORDS = TEXT.split()
ODD = [
    "  two  and   three    spaces ",
    "\n\n\ttabs\tand\r\nline ends\n",
    "digits 0123456789 and 10,000.50",
    "emoji 🙂👍🏽 and 中文 and \u00a0 hard spaces",
    "</s> is text, <unk> and <0x41> too",
    "-----  ------- a--------b",
    "\x00\x07 controls",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        rng.choice([" ", " ", " ", "  "]).join(rng.choice(WORDS) for _ in range(rng.randint(3, 14)))
        + rng.choice([".", "!", "?", " "])
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(4):
        (folder / f"{index}.txt").write_text("\n".join(sentences(120, index)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "TOK"
    assert commands.tokenizer([str(corpus), "--out", str(out), "--vocab-size", "400"]) == 0
    return out


def test_tokenizer_has_the_size_asked_for_and_an_end_token(tokenizer: Path):
    loaded = load_tokenizer(tokenizer)
    assert loaded.vocab_size == 400
    assert loaded.encode("</s>") != [loaded.end_token], "the end token written in a text is text"
    assert loaded.decode([*loaded.encode("a b"), loaded.end_token]) == "a b"


def test_decoding_is_the_inverse_of_encoding_and_hugging_face_agrees(tokenizer: Path):
    from transformers import AutoTokenizer

    loaded, twin = load_tokenizer(tokenizer), AutoTokenizer.from_pretrained(str(tokenizer))
    assert twin.eos_token == "</s>" and twin.eos_token_id == loaded.end_token and len(twin) == 400
    rng = random.Random(3)
    pool = WORDS + ODD + list(" \n\tabc019.é🙂中-") + ["  ", "---"]
    texts = ODD + ["".join(rng.choice(pool) for _ in range(rng.randint(1, 25))) for _ in range(1500)]
    for text in texts:
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert twin.encode(text, add_special_tokens=False) == ids
        assert twin.decode(ids, clean_up_tokenization_spaces=False) == text
        assert loaded.count_bytes(ids) == len(text.encode())


def test_digits_are_split(tokenizer: Path):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    assert processor.encode("1234", out_type=str) == list("1234")


def test_training_twice_gives_the_same_bytes(corpus: Path, tokenizer: Path, tmp_path: Path):
    train_tokenizer([str(corpus)], str(tmp_path / "again"), 400)
    for file in tokenizer.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert [entry.name for entry in tmp_path.iterdir()] == ["again"]


def test_a_vocabulary_that_the_text_cannot_carry_is_refused_with_one_that_works(corpus: Path, tmp_path: Path):
    out = tmp_path / "TOK"
    with pytest.raises(ValueError, match=r"--vocab-size 90000: .* (\d+) is the largest that works") as too_large:
        train_tokenizer([str(corpus)], str(out), 90000)
    with pytest.raises(ValueError, match=r"--vocab-size 200: .* (\d+) is the smallest that works") as too_small:
        train_tokenizer([str(corpus)], str(out), 200)
    assert not out.exists() and not list(tmp_path.iterdir())
    for refusal in (too_large, too_small):
        size = int(str(refusal.value).split(" is the ")[0].split()[-1])
        train_tokenizer([str(corpus)], str(out), size, overwrite=True)
        assert load_tokenizer(out).vocab_size == size


def test_tokenizer_refuses_broken_text_and_an_existing_folder(corpus: Path, tokenizer: Path, tmp_path: Path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"te\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: not JSON"):
        train_tokenizer([str(tmp_path)], str(tmp_path / "TOK"), 300)
    with pytest.raises(ValueError, match="it exists already"):
        train_tokenizer([str(corpus)], str(tokenizer), 400)
    with pytest.raises(ValueError, match="is no tokenizer folder, so it is not replaced"):
        train_tokenizer([str(corpus)], str(corpus), 400, overwrite=True)


def test_fingerprints_follow_content_and_copies_are_equal(tokenizer: Path, corpus: Path, tmp_path: Path):
    loaded = load_tokenizer(tokenizer)
    (tmp_path / "copy").mkdir()
    loaded.copy_to(tmp_path / "copy")
    assert {f.name for f in (tmp_path / "copy").iterdir()} == {f.name for f in tokenizer.iterdir()}
    assert load_tokenizer(tmp_path / "copy").fingerprint == loaded.fingerprint
    assert load_tokenizer(tokenizer / "tokenizer.model").fingerprint == loaded.fingerprint
    train_tokenizer([str(corpus)], str(tmp_path / "other"), 380)
    assert load_tokenizer(tmp_path / "other").fingerprint != loaded.fingerprint


def test_hugging_face_folders_and_what_is_no_tokenizer(tokenizer: Path, tmp_path: Path):
    foreign = tmp_path / "hf"
    foreign.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (foreign / name).write_bytes((tokenizer / name).read_bytes())
    (foreign / "model.safetensors").write_bytes(b"weights")
    loaded = load_tokenizer(foreign)
    assert loaded.encode_batch(ODD, 2) == load_tokenizer(tokenizer).encode_batch(ODD, 1)
    assert loaded.decode(loaded.encode(ODD[0])) == ODD[0] and loaded.end_token == 1 and loaded.vocab_size == 400
    (tmp_path / "copy").mkdir()
    loaded.copy_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == loaded.fingerprint
    assert not (tmp_path / "copy" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="there is no tokenizer; expected a folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "x.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")


def test_prepare_round_trip_over_every_kind_of_file(tokenizer: Path, tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    raw, texts = tmp_path / "raw", [*ODD, *sentences(8)]
    (raw / "deep").mkdir(parents=True)
    (raw / "a.txt").write_bytes(texts[0].encode())
    (raw / "b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    (raw / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[2:6]))
    (raw / "d.json.gz").write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts[6:9]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": texts[9:11]}), raw / "deep" / "e.parquet")
    (raw / "deep" / "f.txt").write_bytes(texts[11].encode())
    (raw / "notes.pdf").write_bytes(b"%PDF")
    out = str(tmp_path / "out" / "set")
    assert commands.prepare([str(raw), "--tokenizer", str(tokenizer), "--out", out]) == 0
    loaded, data, sidecar = load_tokenizer(tokenizer), open_pair(out), read_sidecar(out)
    assert sidecar is not None
    read = [data.document(index).tolist() for index in range(data.documents)]
    assert [loaded.decode(ids) for ids in read] == texts[:12]
    assert all(ids[-1] == loaded.end_token and ids.count(loaded.end_token) == 1 for ids in read)
    assert data.tokens.dtype == np.uint16 and sidecar["dtype"] == "uint16"
    assert sidecar["documents"] == 12 and sidecar["tokens"] == sum(map(len, read)) == data.total
    assert sidecar["bytes"] == sum(len(text.encode()) for text in texts[:12])
    assert sidecar["max_token"] == max(map(max, read)) == data.largest()
    assert sidecar["bin_sha256"] == file_sha256(out + ".bin") and sidecar["idx_sha256"] == file_sha256(out + ".idx")
    assert sidecar["tokenizer_fingerprint"] == load_tokenizer(out + ".tokenizer").fingerprint == loaded.fingerprint
    assert sorted(os.listdir(tmp_path / "out")) == ["set.bin", "set.idx", "set.json", "set.tokenizer"]


def test_megatron_reads_what_we_write_and_our_reader_agrees(corpus: Path, tokenizer: Path, tmp_path: Path):
    out = str(tmp_path / "set")
    prepare_dataset([str(corpus)], str(tokenizer), out, reading=ReadingOptions(documents="line"))
    theirs, ours = megatron("indexed_dataset").IndexedDataset(out), open_pair(out)
    assert len(theirs) == ours.documents == 480
    np.testing.assert_array_equal(theirs.document_indices, np.arange(481))
    for index in range(480):
        np.testing.assert_array_equal(theirs[index], ours.document(index))


def test_a_large_vocabulary_is_written_as_int32(corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch):
    wide = load_tokenizer(tokenizer)
    wide.vocab_size = 65500
    monkeypatch.setattr("trainer.data.prepare.load_tokenizer", lambda path: wide)
    assert prepare_dataset([str(corpus)], str(tokenizer), str(tmp_path / "set"))["dtype"] == "int32"
    assert open_pair(str(tmp_path / "set")).tokens.dtype == np.int32


def test_how_text_files_are_cut(tokenizer: Path, tmp_path: Path):
    (tmp_path / "t.txt").write_bytes(b"one\ntwo\n \n\nthree  \r\nfour")
    expected = {
        "file": ["one\ntwo\n \n\nthree  \r\nfour"],
        "paragraph": ["one\ntwo", "three  \r\nfour"],
        "line": ["one", "two", "three  ", "four"],
    }
    loaded = load_tokenizer(tokenizer)
    for how, texts in expected.items():
        out = str(tmp_path / how)
        command = [str(tmp_path / "t.txt"), "--tokenizer", str(tokenizer), "--out", out, "--documents", how]
        assert commands.prepare(command) == 0
        data = open_pair(out)
        assert [loaded.decode(data.document(index)) for index in range(data.documents)] == texts


def test_workers_and_chunks_change_nothing(corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch):
    by_line = ReadingOptions(documents="line")
    one = prepare_dataset([str(corpus)], str(tokenizer), str(tmp_path / "one"), reading=by_line, workers=1)
    monkeypatch.setattr("trainer.data.prepare.CHUNK_DOCUMENTS", 7)
    many = prepare_dataset([str(corpus)], str(tokenizer), str(tmp_path / "many"), reading=by_line, workers=3)
    assert one == many


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder with one of every fault, and two documents that are fine."""
    import pyarrow
    import pyarrow.parquet

    raw = tmp_path / "raw"
    raw.mkdir()
    lines = [
        '{"text": "fine"}',
        '{"text": "broken',
        '{"body": "x", "id": 1}',
        '{"text": 7}',
        '["text"]',
        '{"text": " "}',
    ]
    (raw / "a.jsonl").write_text("\n".join([*lines, '{"text": "\\ud800"}']) + "\n")
    (raw / "b.txt").write_bytes(b"")
    (raw / "c.txt").write_bytes(b"good\nbad \xff\xfe\nmore")
    (raw / "d.txt").write_bytes(b"fine too")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), raw / "e.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine as well", None]}), raw / "f.parquet")
    (raw / "g.parquet").write_bytes(b"PAR1 no")
    (raw / "h.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(3000).hex().encode())[:900])
    return raw


EXPECTED = [
    r"a\.jsonl, line 2: not JSON",
    r"a\.jsonl, line 3: no key 'text'; its keys are body, id",
    r"a\.jsonl, line 4: the value of 'text' is no text but int",
    r"a\.jsonl, line 5: expected a JSON object and found list",
    r"a\.jsonl, line 6: the document is empty",
    r"a\.jsonl, line 7: holds half of a surrogate pair",
    r"b\.txt: the file is empty",
    r"c\.txt, line 2: not UTF-8 \(byte 5 of the line\)",
    r"e\.parquet: no column 'text'; its columns are body",
    r"f\.parquet, row 2: the value of 'text' is no text but NoneType",
    r"g\.parquet: not a readable Parquet file",
    r"h\.txt\.gz, after line \d+: cannot be read on",
]


def test_broken_input_is_refused_with_all_faults_by_file_and_line(broken: Path, tokenizer: Path, tmp_path: Path):
    with pytest.raises(ValueError) as refusal:
        prepare_dataset([str(broken)], str(tokenizer), str(tmp_path / "out" / "set"))
    faults = str(refusal.value).splitlines()
    assert len(faults) == len(EXPECTED) + 1 and "--skip-broken" in faults[-1]
    for fault, pattern in zip(faults, EXPECTED, strict=False):
        assert re.search(pattern, fault), (fault, pattern)
    assert os.listdir(tmp_path / "out") == []


def test_broken_input_is_skipped_and_counted_when_asked(broken: Path, tokenizer: Path, tmp_path: Path, capsys):
    out = str(tmp_path / "set")
    assert commands.prepare([str(broken), "--tokenizer", str(tokenizer), "--out", out, "--skip-broken"]) == 0
    sidecar, data, loaded = read_sidecar(out), open_pair(out), load_tokenizer(tokenizer)
    assert sidecar is not None
    assert [loaded.decode(data.document(index)) for index in range(3)] == ["fine", "fine too", "fine as well"]
    assert sidecar["documents"] == 3
    counts = {"broken_json": 2, "missing_key": 4, "empty": 2, "invalid_utf8": 2, "unreadable": 2}
    assert sidecar["skipped"] == counts
    printed = capsys.readouterr().out
    assert all(f"skipped {kind}: {count}" in printed for kind, count in counts.items())


def test_at_most_twenty_faults_are_listed(tokenizer: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("{\n" * 50)
    with pytest.raises(ValueError) as refusal:
        prepare_dataset([str(tmp_path)], str(tokenizer), str(tmp_path / "set"))
    assert str(refusal.value).count("not JSON") == 20 and "there may be more" in str(refusal.value)


def test_inputs_that_are_not_there_or_not_known(corpus: Path, tokenizer: Path, tmp_path: Path):
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    inputs = [str(tmp_path / "gone.txt"), str(tmp_path / "x.pdf"), str(tmp_path)]
    with pytest.raises(ValueError) as refusal:
        prepare_dataset(inputs, str(tokenizer), str(tmp_path / "set"))
    faults = str(refusal.value).splitlines()
    assert len(faults) == 3 and "no such file" in faults[0] and "'.pdf' is not known" in faults[1]
    assert "no file in this folder can be read" in faults[2]


def test_an_existing_prefix_is_refused_unless_overwritten(corpus: Path, tokenizer: Path, tmp_path: Path):
    out = str(tmp_path / "set")
    prepare_dataset([str(corpus / "0.txt")], str(tokenizer), out)
    with pytest.raises(ValueError, match=r"set\.bin, .*set\.idx.* already there.*--overwrite"):
        prepare_dataset([str(corpus)], str(tokenizer), out)
    assert open_pair(out).documents == 1
    prepare_dataset([str(corpus)], str(tokenizer), out, overwrite=True)
    assert open_pair(out).documents == 4


def test_a_raw_file_beside_the_prefix_is_never_overwritten(tokenizer: Path, tmp_path: Path):
    raw = tmp_path / "set.json"
    raw.write_text('{"text": "keep me"}\n')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not ours to replace"):
            prepare_dataset([str(raw)], str(tokenizer), str(tmp_path / "set"), overwrite=overwrite)
    assert raw.read_text() == '{"text": "keep me"}\n'


@pytest.mark.parametrize("signal_sent", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_prepare_leaves_no_final_name(
    tokenizer: Path, tmp_path: Path, signal_sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    raw = tmp_path / "raw.txt"
    raw.write_text("\n".join(sentences(8000)), encoding="utf-8")
    prepare = importlib.import_module("trainer.data.prepare")
    in_one_go = prepare._chunks

    def slowly(texts):
        for chunk in in_one_go(texts):
            time.sleep(0.02)
            yield chunk

    monkeypatch.setattr(prepare, "_chunks", slowly)
    monkeypatch.setattr(prepare, "CHUNK_DOCUMENTS", 20)
    # Whoever starts the tests in the background has SIGINT ignored, and children inherit that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    # A fork has megatron-core imported already.
    process = multiprocessing.get_context("fork").Process(
        target=prepare_dataset,
        args=([str(raw)], str(tokenizer), str(tmp_path / "out" / "set")),
        kwargs={"reading": ReadingOptions(documents="line"), "workers": 1},
    )
    megatron("indexed_dataset")
    process.start()
    signal.signal(signal.SIGINT, inherited)
    written = tmp_path / "out" / "set.partial.bin"
    deadline = time.monotonic() + 60
    while not (written.exists() and written.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.is_alive() and process.pid is not None
    os.kill(process.pid, signal_sent)
    process.join(timeout=30)
    assert process.exitcode not in (None, 0)
    monkeypatch.undo()
    left = os.listdir(tmp_path / "out")
    assert all(name.startswith("set.partial") for name in left)
    assert signal_sent == signal.SIGKILL or left == []
    # What was left does not stand in the way of the next attempt.
    short = tmp_path / "short.txt"
    short.write_text("a short one")
    prepare_dataset([str(short)], str(tokenizer), str(tmp_path / "out" / "set"))
    assert sorted(os.listdir(tmp_path / "out")) == ["set.bin", "set.idx", "set.json", "set.tokenizer"]


@pytest.mark.parametrize("renames", range(4))
def test_a_death_between_renames_is_not_taken_for_a_complete_set(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
):
    out = str(tmp_path / "set")
    prepare_dataset([str(corpus / "0.txt")], str(tokenizer), out)
    real, done = os.replace, []

    def dies(source, target):
        if str(target) in {out + end for end in (".json", ".bin", ".idx", ".tokenizer")}:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset([str(corpus)], str(tokenizer), out, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot be found"):
        open_pair(out)


def test_inspect_describes_with_and_without_a_sidecar(corpus: Path, tokenizer: Path, tmp_path: Path, capsys):
    out = str(tmp_path / "set")
    prepare_dataset([str(corpus)], str(tokenizer), out, reading=ReadingOptions(documents="line"))
    found = inspect_dataset(out)
    assert found["documents"] == 480 == found["end_with_end_token"] and found["sidecar"] and found["vocab_size"] == 400
    first = (corpus / "0.txt").read_text(encoding="utf-8").splitlines()[0].strip()
    assert found["first_lines"][0] == repr(first[:100])
    assert found["bytes_per_token"] > 1 and found["max_token"] < 400
    os.remove(out + ".json")
    os.rename(out + ".tokenizer", tmp_path / "elsewhere")
    capsys.readouterr()
    assert commands.inspect([out, "--json"]) == 0
    bare = json.loads(capsys.readouterr().out)
    assert not bare["sidecar"] and bare["tokenizer"] is None and bare["first_lines"] is None
    assert {key: bare[key] for key in ("documents", "tokens", "max_token", "length_quantiles")} == {
        key: found[key] for key in ("documents", "tokens", "max_token", "length_quantiles")
    }
    assert commands.inspect([out, "--end-token", "2", "--tokenizer", str(tokenizer)]) == 0
    printed = capsys.readouterr().out
    assert "with which 0 of 480 documents end" in printed and first[:20] in printed


def test_the_commands_import_nothing_heavy():
    heavy = "{'torch', 'megatron', 'datasets', 'transformers', 'sentencepiece', 'pyarrow'}"
    light = ", ".join(f"trainer.{name}" for name in ("commands.data", "data.check", "data.training", "data.evaluation"))
    code = f"import sys, {light}; print({heavy} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
