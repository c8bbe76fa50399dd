"""Documents of text and images: how they become tokens, and how batches come to know the modality of each."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Batch
from model.untie import UntieConfig
from parallel.processes import Process
from tests.trainer.runs import write_config
from trainer.commands import data as commands
from trainer.config import Refused, load_config
from trainer.data.check import check_sources
from trainer.data.config import DataConfig, DataSource
from trainer.data.documents import ReadingOptions
from trainer.data.evaluation import EvaluationData, validation_sets
from trainer.data.fingerprint import fingerprint, fingerprint_differences
from trainer.data.indexed import open_pair
from trainer.data.inspect import as_text, inspect_dataset
from trainer.data.lazy import megatron
from trainer.data.modalities import differing_ranges, unseen_modalities
from trainer.data.parts import TokenIds, readable
from trainer.data.prepare import prepare_dataset
from trainer.data.sidecar import read_sidecar
from trainer.data.tokenizer import load_tokenizer
from trainer.data.train_tokenizer import train_tokenizer
from trainer.data.training import TrainingData

V, K = 280, 12
IDS = TokenIds(V, K)
BY_IDS = UntieConfig(2, ranges=IDS.ranges, names=["text", "image"])
BY_COLUMN = UntieConfig(2, names=["text", "image"])
READING = ReadingOptions(parts="parts", image_codes=K)


def documents(count: int, seed: int = 0) -> list[list[dict]]:
    """Texts and images in turn, of many lengths; some of one of them alone."""
    random = np.random.default_rng(seed)
    words = ["a red boot", " on a hill", "rain ", "two dogs and a cat", "é"]
    made = []
    for _ in range(count):
        kinds = [["text", "image"], ["image", "text"], ["text", "image", "text"], ["image", "image"], ["text"]]
        made.append(
            [
                {"text": str(random.choice(words))}
                if kind == "text"
                else {"image": random.integers(K, size=random.integers(1, 9)).tolist()}
                for kind in kinds[random.integers(len(kinds))]
            ]
        )
    return made


def write_lines(path: Path, made: list) -> str:
    path.write_text("".join(json.dumps({"id": 1, "parts": parts}) + "\n" for parts in made), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the texts, and `set`, prepared by the command."""
    folder = tmp_path_factory.mktemp("parts")
    lines, tokenizer = write_lines(folder / "lines.jsonl", documents(80)), str(folder / "TOK")
    command = [lines, "--out", tokenizer, "--vocab-size", str(V), "--parts", "parts"]
    assert commands.tokenizer(command) == 0
    command = [lines, "--tokenizer", tokenizer, "--out", str(folder / "set"), "--parts", "parts"]
    assert commands.prepare([*command, "--image-codes", str(K)]) == 0
    return folder


@pytest.fixture(scope="module")
def prefix(folder: Path) -> str:
    return str(folder / "set")


def expected_tokens(parts: list[dict], folder: Path) -> list[int]:
    """By hand: each text by itself, each image between its marks, the end token last."""
    tokenizer, tokens = load_tokenizer(folder / "TOK"), []
    for part in parts:
        if "text" in part:
            tokens += tokenizer.encode(part["text"])
        else:
            tokens += [V + K, *(V + code for code in part["image"]), V + K + 1]
    return [*tokens, tokenizer.end_token]


def column(prefix: str) -> np.ndarray:
    return np.fromfile(prefix + ".modalities", dtype=np.uint8)


def test_parts_in_order_with_marks_around_images_and_the_end_token(folder: Path, prefix: str):
    data, sidecar = open_pair(prefix), read_sidecar(prefix)
    expected = [expected_tokens(parts, folder) for parts in documents(80)]
    assert [data.document(index).tolist() for index in range(data.documents)] == expected
    joined = np.concatenate(expected)
    is_image = (joined >= V) & (joined < V + K)
    assert column(prefix).tolist() == is_image.tolist() and 0 < is_image.sum() < len(joined) / 2
    assert sidecar is not None and sidecar["vocab_size"] == V + K + 2 and sidecar["max_token"] == V + K + 1
    assert data.tokens.dtype == np.uint16
    texts = [part["text"] for parts in documents(80) for part in parts if "text" in part]
    assert sidecar["bytes"] == sum(len(text.encode()) for text in texts)
    described = sidecar["modalities"]
    assert described["names"] == ["text", "image"] and described["bytes"] == len(joined)
    assert described["tokens"] == [int((~is_image).sum()), int(is_image.sum())]
    assert sorted(path.name for path in folder.glob("set.*")) == [
        f"set.{ending}" for ending in ("bin", "idx", "json", "modalities", "tokenizer")
    ]


def test_the_lines_that_are_printed_are_those_of_the_configuration(folder: Path, tmp_path: Path, capsys):
    command = [str(folder / "lines.jsonl"), "--tokenizer", str(folder / "TOK"), "--out", str(tmp_path / "set")]
    commands.prepare([*command, "--parts", "parts", "--image-codes", str(K)])
    printed = capsys.readouterr().out
    counts = read_sidecar(str(tmp_path / "set"))["modalities"]["tokens"]
    assert f"{counts[0]:,} text, {counts[1]:,} image." in printed
    tables = tomllib.loads(printed.partition("For the configuration:")[2])
    assert tables["model"] == {"vocab_size": V + K + 2}
    untie = UntieConfig(**tables["untie"])
    assert untie.ranges == [[0, V, V + K, V + K + 2], [V, V + K]] and untie.faults(V + K + 2) == []
    assert check_sources(DataConfig(train=[str(tmp_path / "set")], seq_len=8), V + K + 2, untie) == []


def test_many_codes_are_written_as_int32(folder: Path, tmp_path: Path):
    out = str(tmp_path / "set")
    wide = ReadingOptions(parts="parts", image_codes=66_000)
    assert prepare_dataset([str(folder / "lines.jsonl")], str(folder / "TOK"), out, reading=wide)["dtype"] == "int32"
    assert open_pair(out).tokens.dtype == np.int32 and open_pair(out).largest() == V + 66_001


def test_texts_without_images_stay_plain(folder: Path, tmp_path: Path):
    lines = write_lines(tmp_path / "t.jsonl", [[{"text": "rain"}, {"text": " on a hill"}]])
    sidecar = prepare_dataset(
        [lines], str(folder / "TOK"), str(tmp_path / "set"), reading=ReadingOptions(parts="parts")
    )
    assert "modalities" not in sidecar and sidecar["vocab_size"] == V
    assert not (tmp_path / "set.modalities").exists()


BROKEN: list[tuple[object, str]] = [
    ("text", r"the value is no list of parts but str"),
    ([], r"there are no parts"),
    (
        [{"text": "a"}, {"sound": [1]}, 7],
        r"part 2 has the keys sound; exactly one of text and image .*; part 3 is no ob",
    ),
    ([{"text": "a", "image": [1]}], r"part 1 has the keys image, text; exactly one"),
    ([{"text": 5}, {"text": ""}], r"part 1: the text is no text but int; part 2: the text is empty"),
    ([{"image": []}], r"part 1: the image is empty; at least one code is needed"),
    ([{"image": "a.png"}], r"part 1: the image is 'a\.png', and a list .*; `headway data patches` makes it"),
    ([{"image": {"a": 1}}], r"part 1: the image is no list of codes but dict"),
    ([{"image": [1, 2.0]}], r"part 1: code 1 of the image is 2\.0, which is no whole number"),
    ([{"image": [True]}], r"part 1: code 0 of the image is True, which is no whole number"),
    ([{"text": "a"}, {"image": [0, K]}], rf"part 2: code 1 of the image is {K}, outside 0 to {K - 1}"),
    ([{"image": [-1]}], r"part 1: code 0 of the image is -1, outside"),
    ([{"text": "  "}], r"the document is empty"),
    ([{"text": "\ud800"}], r"half of a surrogate pair"),
]


def test_broken_parts_are_refused_by_file_and_line_or_counted(folder: Path, tmp_path: Path):
    lines, tokenizer = write_lines(tmp_path / "a.jsonl", [parts for parts, _ in BROKEN]), str(folder / "TOK")
    (tmp_path / "b.txt").write_text("plain text")
    with pytest.raises(ValueError) as refusal:
        prepare_dataset([str(tmp_path)], tokenizer, str(tmp_path / "out" / "set"), reading=READING)
    faults = str(refusal.value).splitlines()
    assert len(faults) == len(BROKEN) + 2
    for number, (fault, (_, pattern)) in enumerate(zip(faults, BROKEN, strict=False), 1):
        assert re.search(rf"a\.jsonl, line {number}: .*{pattern}", fault), (fault, pattern)
    assert "b.txt: documents of parts (--parts) are read from JSON lines alone" in faults[-2]
    assert os.listdir(tmp_path / "out") == []
    write_lines(tmp_path / "a.jsonl", [[{"text": "rain"}], *(parts for parts, _ in BROKEN)])
    out = str(tmp_path / "out" / "set")
    sidecar = prepare_dataset([lines], tokenizer, out, reading=READING, skip_broken=True)
    assert sidecar["documents"] == 1 and len(column(out)) == sidecar["tokens"]
    assert sidecar["skipped"] == {"broken_parts": 12, "empty": 1, "invalid_utf8": 1}


def test_options_that_do_not_go_together(folder: Path, tmp_path: Path):
    lines, tokenizer, out = str(folder / "lines.jsonl"), str(folder / "TOK"), str(tmp_path / "set")
    with pytest.raises(ValueError, match=r"line \d+: .*--image-codes does not say how many codes there are"):
        prepare_dataset([lines], tokenizer, out, reading=ReadingOptions(parts="parts"))
    with pytest.raises(ValueError, match=r"--image-codes 0: must be positive.*\n.*name their key with --parts"):
        prepare_dataset([lines], tokenizer, out, reading=ReadingOptions(image_codes=0))
    with pytest.raises(ValueError, match=r"no key 'story'; its keys are id, parts \(choose with --parts\)"):
        prepare_dataset([lines], tokenizer, out, reading=ReadingOptions(parts="story", image_codes=K))
    with pytest.raises(ValueError, match=r"part 1: the text is empty"):
        train_tokenizer([write_lines(tmp_path / "x.jsonl", [[{"text": ""}]])], str(tmp_path / "T"), 300, parts="parts")


@pytest.mark.parametrize("renames", range(5))
def test_a_death_between_renames_is_not_taken_for_a_complete_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
):
    out, tokenizer = str(tmp_path / "set"), str(folder / "TOK")
    lines = write_lines(tmp_path / "few.jsonl", documents(5, seed=2))
    prepare_dataset([lines], tokenizer, out, reading=READING)
    real, done = os.replace, []

    def dies(source, target):
        if str(target) in {out + end for end in (".modalities", ".json", ".bin", ".idx", ".tokenizer")}:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(target)
        real(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset([str(folder / "lines.jsonl")], tokenizer, out, reading=READING, overwrite=True)
    monkeypatch.undo()
    assert not list(tmp_path.glob("set.partial*"))
    with pytest.raises(ValueError, match="cannot be found"):
        open_pair(out)


def test_a_set_of_text_that_replaces_one_of_parts_has_no_column(folder: Path, tmp_path: Path):
    out, tokenizer = str(tmp_path / "set"), str(folder / "TOK")
    prepare_dataset([str(folder / "lines.jsonl")], tokenizer, out, reading=READING)
    (tmp_path / "t.txt").write_text("rain on a hill")
    for ending in (".bin", ".idx", ".json"):
        os.rename(out + ending, out + ending + ".away")
    with pytest.raises(ValueError, match=r"set\.modalities, .*set\.tokenizer already there"):
        prepare_dataset([str(tmp_path / "t.txt")], tokenizer, out)
    prepare_dataset([str(tmp_path / "t.txt")], tokenizer, out, overwrite=True)
    assert not (tmp_path / "set.modalities").exists() and read_sidecar(out)["documents"] == 1


def open_training(config: DataConfig, cache: Path, untie: UntieConfig | None) -> TrainingData:
    return TrainingData(config, seed=3, samples=40, cache_dir=cache, vocab_size=V + K + 2, untie=untie)


def config(*prefixes: str, **changes) -> DataConfig:
    return DataConfig(**{"train": list(prefixes), "seq_len": 11, "global_batch_size": 4, **changes})


def is_image(tokens: torch.Tensor) -> torch.Tensor:
    return ((tokens >= V) & (tokens < V + K)).long()


def assert_modalities(batch: Batch) -> None:
    for tokens, modalities in ((batch.tokens, batch.modalities), (batch.targets, batch.target_modalities)):
        assert modalities is not None and modalities.dtype == torch.int64 and modalities.is_contiguous()
        assert torch.equal(modalities, is_image(tokens))


@pytest.mark.parametrize("untie", [BY_IDS, BY_COLUMN], ids=["ids", "column"])
@pytest.mark.parametrize("isolate", [True, False])
def test_training_batches_know_modalities(prefix: str, tmp_path: Path, untie: UntieConfig, isolate: bool):
    """Over packed documents, and for some rows alone."""
    made = config(prefix, isolate_documents=isolate)
    data, plain = open_training(made, tmp_path, untie), open_training(made, tmp_path, None)
    crossed = 0
    for step in range(10):
        whole, without = data.batch(step, range(4)), plain.batch(step, range(4))
        assert torch.equal(whole.tokens, without.tokens) and torch.equal(whole.counted, without.counted)
        assert without.modalities is None and without.target_modalities is None
        assert_modalities(whole)
        for rows in (range(1, 3), range(3, 4), range(0)):
            part = data.batch(step, rows)
            assert part.modalities.tolist() == whole.modalities[rows.start : rows.stop].tolist()
            assert part.target_modalities.tolist() == whole.target_modalities[rows.start : rows.stop].tolist()
        crossed += int(whole.modalities.any(1).sum() and (whole.documents is None or whole.documents.max() > 0))
    assert crossed > 5, "rows of several documents, with images, are what this is about"


def write_numbered(prefix: Path, first: int, column: np.ndarray) -> str:
    """Documents of 5, 6, 7 ... tokens, where the token at place p of the file is first + p, and this column."""
    ends = np.cumsum(np.arange(5, 30))
    assert len(column) == ends[-1]
    builder = megatron("indexed_dataset").IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in np.split(first + np.arange(ends[-1]), ends[:-1]):
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    column.astype(np.uint8).tofile(f"{prefix}.modalities")
    return str(prefix)


def test_the_column_and_not_the_id_says_the_modality(tmp_path: Path):
    """Columns that have nothing to do with ids; a token tells its place in the file, so its number is known."""
    total, random = int(np.arange(5, 30).sum()), np.random.default_rng(0)
    columns = [random.integers(3, size=total), random.integers(3, size=total)]
    sources = [write_numbered(tmp_path / f"set{n}", 1000 * n, columns[n]) for n in range(2)]
    expected = np.zeros(2000, dtype=np.int64)
    expected[:total], expected[1000 : 1000 + total] = columns
    made, three = config("", train=[sources[0], DataSource(sources[1], 0.5)]), UntieConfig(3)
    training = TrainingData(made, seed=3, samples=40, cache_dir=tmp_path, untie=three)
    batches = [training.batch(step, range(4)) for step in range(10)]
    evaluated = EvaluationData(sources[1], seq_len=11, documents=range(3, 20), untie=three)
    # All rows but the last, which is filled up.
    batches += [evaluated.batch(row, range(1), 1) for row in range(evaluated.num_rows - 1)]
    assert any(int(batch.tokens.min()) < 1000 <= int(batch.tokens.max()) for batch in batches)
    for batch in batches:
        assert np.array_equal(batch.modalities, expected[batch.tokens.numpy()])
        assert np.array_equal(batch.target_modalities, expected[batch.targets.numpy()])


@pytest.mark.parametrize("untie", [BY_IDS, BY_COLUMN, UntieConfig(2, ranges=[[V, V + K], [0, V, V + K, V + K + 2]])])
def test_what_fills_up_evaluation_is_of_modality_0(prefix: str, untie: UntieConfig):
    data = EvaluationData(prefix, seq_len=50, untie=untie)
    left, image = data.tokens - 1, untie.ranges != [] and untie.ranges[0] == [V, V + K]
    for index in range(data.num_batches(3) + 1):
        batch = data.batch(index, range(3), 3)
        real = torch.arange(150) < left
        for tokens, modalities in ((batch.tokens, batch.modalities), (batch.targets, batch.target_modalities)):
            expected = is_image(tokens).flatten() ^ int(image)
            assert torch.equal(modalities.flatten(), torch.where(real, expected, 0))
        left -= 150
        part = data.batch(index, range(2, 3), 3)
        assert torch.equal(part.target_modalities, batch.target_modalities[2:])
    assert left < -150


def test_validation_sets_know_modalities(prefix: str):
    made = config(prefix, split=[0.7, 0.3])
    assert_modalities(validation_sets(made, untie=BY_COLUMN)["set"].batch(0, range(4), 4))
    assert validation_sets(made)["set"].batch(0, range(4), 4).modalities is None


def copied(prefix: str, folder: Path, *endings: str) -> str:
    for ending in (".bin", ".idx", *endings):
        (folder / f"copy{ending}").write_bytes(Path(prefix + ending).read_bytes())
    return str(folder / "copy")


def only(faults: list[str], pattern: str) -> None:
    assert len(faults) == 1 and re.search(pattern, faults[0]), faults


def test_a_column_that_cannot_say_modalities_is_refused_with_all_other_faults(prefix: str, tmp_path: Path):
    assert check_sources(config(prefix), V + K + 2, BY_COLUMN) == []
    copy = copied(prefix, tmp_path)
    for untie in (BY_IDS, None):
        assert check_sources(config(copy), V + K + 2, untie) == []
    missing = r"data\.train: .*copy\.modalities cannot be found: without untie\.ranges it says .* or give untie\.ranges"
    only(check_sources(config(copy), V + K + 2, BY_COLUMN), missing)
    faults = check_sources(config(copy, validation=[str(tmp_path / "gone")]), 20, BY_COLUMN)
    assert len(faults) == 3 and re.search("outside the model's vocabulary of 20", faults[0])
    assert re.search(missing, faults[1]) and "gone" in faults[2]
    with pytest.raises(ValueError, match="cannot be found: without"):
        open_training(config(copy), tmp_path, BY_COLUMN)
    with pytest.raises(ValueError, match="cannot be found: without"):
        validation_sets(config(copy, validation=[copy]), untie=BY_COLUMN)
    size = len(column(prefix))
    Path(copy + ".modalities").write_bytes(bytes(size - 1))
    only(check_sources(config(copy), None, BY_COLUMN), rf"{size - 1} bytes, but .*copy\.bin has {size} tokens")


def test_numbers_in_a_column_that_are_no_modality(prefix: str, tmp_path: Path):
    one = UntieConfig(1)
    first = int(column(prefix).argmax())
    document, place = open_pair(prefix).locate(first)
    told = rf"set\.modalities: token {place} of document {document} is of modality 1, and untie\.modalities = 1: .* 2 w"
    only(check_sources(config(prefix), None, one), told)
    copy = copied(prefix, tmp_path, ".modalities")
    only(check_sources(config(copy), None, one), told.replace("set", "copy"))
    # With a sidecar, its names and size count as well.
    only(
        check_sources(config(prefix), None, UntieConfig(2, names=["image", "text"])),
        r'untie\.names = \["image", "text"\], but .*set\.modalities numbers \["text", "image"\] in that order',
    )
    assert check_sources(config(prefix), None, UntieConfig(3, names=["text", "image", "sound"])) == []


def test_sources_of_other_codes_are_not_mixed(folder: Path, prefix: str, tmp_path: Path):
    other = ReadingOptions(parts="parts", image_codes=K + 1)
    prepare_dataset([str(folder / "lines.jsonl")], str(folder / "TOK"), str(tmp_path / "other"), reading=other)
    faults = check_sources(config(prefix, str(tmp_path / "other")), V + K + 3, None)
    only(faults, r"number their modalities differently: .*set \(.*other \(.*one --image-codes\.")


def test_each_modality_that_is_not_in_the_training_data_is_named(prefix: str, tmp_path: Path):
    total = open_pair(prefix).total
    assert unseen_modalities(config(prefix), BY_IDS) == unseen_modalities(config(prefix), BY_COLUMN) == []
    four = UntieConfig(4, ranges=[*IDS.ranges, [V + K + 2, V + K + 3, 400, 500], [500, 501]], names=list("abcd"))
    for untie, ids in (
        (four, f" (ids {V + K + 2} to {V + K + 2}, 400 to 499)"),
        (UntieConfig(4, names=list("abcd")), ""),
    ):
        told = unseen_modalities(config(prefix), untie)
        assert len(told) == 2 and '"d"' in told[1]
        assert told[0] == (
            f'untie: no token of "c"{ids} among the {total:,} tokens of the training data: its weights get no gradient '
            "but zeros and decay."
        )


def test_ranges_that_are_not_those_of_the_data_are_named(prefix: str):
    assert differing_ranges(config(prefix), BY_IDS) == differing_ranges(config(prefix), BY_COLUMN) == []
    padded = UntieConfig(2, ranges=[[*IDS.ranges[0][:-1], 400], IDS.ranges[1]])
    assert differing_ranges(config(prefix), padded) == []
    # As of a model whose vocabulary is 8 longer than the tokenizer's.
    late = UntieConfig(2, ranges=[[0, V + 8, V + 8 + K, 400], [V + 8, V + 8 + K]], names=["text", "image"])
    first, second = differing_ranges(config(prefix), late)
    assert f'set was prepared with ids {V + K} to {V + K + 1} for "text", and id {V + K} is of "image" here' in first
    assert f'with ids {V} to {V + K - 1} for "image", and id {V} is of "text" here' in second
    assert second.endswith(f"it belongs to ranges = {IDS.ranges}.")


def test_a_sidecar_does_not_count_for_other_ranges(prefix: str):
    swept = UntieConfig(2, ranges=[[0, V + K + 2], [V + K + 2, V + K + 4]])
    only(unseen_modalities(config(prefix), swept), f'untie: no token of "1" .ids {V + K + 2} to {V + K + 3}. among')


def test_the_tokens_are_looked_at_where_sidecars_do_not_count_them(folder: Path, prefix: str, tmp_path: Path):
    texts = [[{"text": "rain"}]] * 30
    lines = write_lines(tmp_path / "t.jsonl", [*texts, *documents(20, seed=4)])
    prepare_dataset([lines], str(folder / "TOK"), str(tmp_path / "late"), reading=READING)
    late = str(tmp_path / "late")
    assert unseen_modalities(config(late), BY_COLUMN) == []
    # Only what is trained on counts: images come after the split.
    for untie in (BY_IDS, BY_COLUMN):
        told = unseen_modalities(config(late, split=[0.5, 0.5]), untie)
        assert len(told) == 1 and re.match('untie: no token of "image".* among the ', told[0])
        assert unseen_modalities(config(late, split=[0.8, 0.2]), untie) == []
        assert unseen_modalities(config(prefix, late, split=[0.5, 0.5]), untie) == []


def test_of_very_much_data_evenly_spaced_blocks_are_looked_at(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy = copied(prefix, tmp_path)
    total = open_pair(copy).total
    monkeypatch.setattr("trainer.data.modalities.MOST_LOOKED_AT", 100)
    monkeypatch.setattr("trainer.data.modalities.BLOCK_TOKENS", 10)
    three = UntieConfig(3, ranges=[*IDS.ranges, [V + K + 2, V + K + 3]])
    assert unseen_modalities(config(copy), three) == [
        f'untie: no token of "2" (ids {V + K + 2} to {V + K + 2}) among the 100 tokens looked at, in evenly spaced '
        f"blocks, of the {total:,} tokens of the training data: its weights get no gradient but zeros and decay."
    ]
    # The last block ends with the last token: an image there is seen.
    tokens = np.fromfile(copy + ".bin", dtype=np.uint16)
    tokens[:], tokens[-1] = 0, V
    tokens.tofile(copy + ".bin")
    assert len(unseen_modalities(config(copy), three)) == 1


def test_the_fingerprint_follows_the_column_where_it_counts(prefix: str, tmp_path: Path):
    copy = copied(prefix, tmp_path, ".modalities")
    old = fingerprint(config(copy), seed=1, samples=80, untie=BY_COLUMN)
    changed = column(copy)
    changed[5] ^= 1
    changed.tofile(copy + ".modalities")
    new = fingerprint(config(copy), seed=1, samples=80, untie=BY_COLUMN)
    only(fingerprint_differences(old, new), r"data\.train\[0\] copy: its column of modalities differs")
    by_ids = fingerprint(config(copy), seed=1, samples=80, untie=BY_IDS)
    assert by_ids == fingerprint(config(copy), seed=1, samples=80) and fingerprint_differences(old, by_ids) == []


def test_bytes_are_not_counted_where_not_all_is_text(folder: Path, prefix: str, tmp_path: Path):
    """Bits per byte of an image's codes would mean nothing: it is null, and of plain text what it was."""
    tokenizer = load_tokenizer(folder / "TOK")
    assert EvaluationData(prefix, seq_len=8).counted_bytes(tokenizer) is None
    bare = copied(prefix, tmp_path)
    assert EvaluationData(bare, seq_len=8, untie=BY_IDS).counted_bytes(tokenizer) is None
    with pytest.raises(ValueError, match="and the tokenizer has 280"):
        EvaluationData(bare, seq_len=8).counted_bytes(tokenizer)
    lines = write_lines(tmp_path / "t.jsonl", [[{"text": "rain"}, {"text": " on a hill"}]])
    prepare_dataset([lines], str(folder / "TOK"), str(tmp_path / "t"), reading=ReadingOptions(parts="parts"))
    counted = [EvaluationData(str(tmp_path / "t"), seq_len=8, untie=u).counted_bytes(tokenizer) for u in (None, BY_IDS)]
    assert counted[0] == counted[1] and counted[0] is not None and counted[0] > 9


def test_inspect_and_generate_show_codes_as_numbers(folder: Path, prefix: str):
    tokenizer = load_tokenizer(folder / "TOK")
    ids = [*tokenizer.encode("a boot"), V + K, V + 3, V + K + 1, *tokenizer.encode(" é"), tokenizer.end_token]
    assert readable(tokenizer, ids) == f"a boot[{V + K} {V + 3} {V + K + 1}] é"
    assert readable(tokenizer, []) == "" and readable(tokenizer, [V]) == f"[{V}]"
    found = inspect_dataset(prefix, show=80)
    assert found["modalities"] == dict(
        zip(("text", "image"), read_sidecar(prefix)["modalities"]["tokens"], strict=True)
    )
    assert found["bytes_per_token"] is None and found["vocab_size"] == V + K + 2
    assert any(f"[{V + K} " in line for line in found["first_lines"])
    assert "  modalities       text: " in as_text(found) and "bytes per token" not in as_text(found)


def test_a_run_is_refused_or_warned_by_its_first_rank(prefix: str, tmp_path: Path):
    first, second = (Process(rank, rank, 2, "cpu") for rank in (0, 1))
    model = {"vocab_size": V + K + 10}
    three = {"modalities": 3, "names": ["text", "image", "sound"]}
    ranges = [*IDS.ranges, [V + K + 2, V + K + 10]]
    sections = {"model": model, "data": {"train": [prefix], "split": [0.8, 0.2]}, "untie": three | {"ranges": ranges}}
    path = write_config(tmp_path, prefix, **sections)
    warned = load_config(path, process=first).warnings
    only(warned, rf'untie: no token of "sound" \(ids {V + K + 2} to {V + K + 9}\) among the [\d,]+ tokens of')
    assert load_config(path, process=second).warnings == load_config(path).warnings == []
    copy = copied(prefix, tmp_path)
    path = write_config(tmp_path, copy, **{**sections, "data": {"train": [copy], "seq_len": 100_000}, "untie": three})
    with pytest.raises(Refused) as refusal:
        load_config(path, process=first)
    told = "\n".join(refusal.value.faults)
    assert "copy.modalities cannot be found" in told and "do not fill one sample" in told
    assert not refusal.value.seen_by_all and load_config(path, process=second).warnings == []
