"""Datasets to batches: the order, the documents, the layouts, and what validation counts."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Batch
from trainer.data.config import DataConfig, DataSource
from trainer.data.evaluation import EvaluationData, validation_sets
from trainer.data.fingerprint import fingerprint, fingerprint_differences
from trainer.data.lazy import megatron
from trainer.data.order import wait_for
from trainer.data.split import split_ranges, training_documents
from trainer.data.training import TrainingData

VOCAB = 5000


def write_pair(prefix: Path, documents: list[np.ndarray], dtype: type = np.uint16) -> str:
    """A dataset as Megatron's own tools write it: no sidecar."""
    indexed = megatron("indexed_dataset")
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def numbered(count: int, first: int = 0, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    """Documents whose every token is unique: first, first + 1, ... No end token, no repetition."""
    lengths = np.random.default_rng(seed).integers(1, longest, size=count)
    edges = first + np.concatenate([[0], np.cumsum(lengths)])
    return [np.arange(start, stop) for start, stop in itertools.pairwise(edges)]


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    return numbered(90)


@pytest.fixture(scope="module")
def prefix(documents: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_pair(tmp_path_factory.mktemp("data") / "numbers", documents)


def config(prefix: str, **changes) -> DataConfig:
    return DataConfig(**{"train": [prefix], "seq_len": 16, "global_batch_size": 4, **changes})


def open_training(made: DataConfig, cache: Path, samples: int = 200, seed: int = 7, vocab_size: int = VOCAB):
    return TrainingData(made, seed=seed, samples=samples, cache_dir=cache, vocab_size=vocab_size)


def equal(one: Batch, other: Batch) -> bool:
    fields = ("tokens", "targets", "counted", "positions", "documents")
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields)


def joined(parts: list[Batch]) -> Batch:
    fields = ("tokens", "targets", "counted", "documents", "positions")
    return Batch(**{field: torch.cat([getattr(part, field) for part in parts]) for field in fields})


def test_shapes_and_types(prefix: str, tmp_path: Path):
    batch = open_training(config(prefix), tmp_path).batch(0, range(4))
    assert batch.documents is not None
    for field in (batch.tokens, batch.targets, batch.documents, batch.positions):
        assert field.shape == (4, 16) and field.dtype == torch.int64 and field.is_contiguous()
    assert batch.counted.shape == (4, 16) and batch.counted.dtype == torch.bool


def test_documents_positions_and_counted_against_a_brute_force(prefix: str, documents, tmp_path: Path):
    """Every token names its document here, so what a row is made of can be read off the row."""
    owner = np.concatenate([np.full(len(document), index) for index, document in enumerate(documents)])
    data = open_training(config(prefix), tmp_path)
    boundaries = 0
    for step in range(50):
        batch = data.batch(step, range(4))
        for row in range(4):
            tokens, targets = batch.tokens[row].tolist(), batch.targets[row].tolist()
            assert tokens[1:] == targets[:-1]
            expected_document, expected_position = 0, 0
            for place, (token, target) in enumerate(zip(tokens, targets, strict=True)):
                if place and (token != tokens[place - 1] + 1 or owner[token] != owner[tokens[place - 1]]):
                    expected_document, expected_position = expected_document + 1, 0
                assert batch.documents[row, place] == expected_document
                assert batch.positions[row, place] == expected_position
                follows = target == token + 1 and owner[target] == owner[token]
                assert batch.counted[row, place] == follows
                boundaries += not follows
                expected_position += 1
    assert boundaries > 100


def test_a_document_followed_by_itself_is_a_new_document(tmp_path: Path):
    made = config(write_pair(tmp_path / "one", [np.arange(10)]), seq_len=9)
    batch = open_training(made, tmp_path, samples=12).batch(1, range(4))
    assert set(batch.tokens.flatten().tolist()) == set(range(10))
    for row in range(4):
        restarts = (batch.tokens[row] == 0).nonzero().flatten().tolist()
        expected = [sum(place >= r for r in restarts if r > 0) for place in range(9)]
        assert batch.documents[row].tolist() == expected
        assert batch.counted[row].tolist() == [target != 0 for target in batch.targets[row].tolist()]


def test_without_isolation_everything_counts(prefix: str, tmp_path: Path):
    together, apart = (
        open_training(config(prefix, isolate_documents=isolate), tmp_path).batch(3, range(4))
        for isolate in (False, True)
    )
    assert torch.equal(together.tokens, apart.tokens)
    assert together.documents is None and together.counted.all() and not apart.counted.all()
    assert torch.equal(together.positions, torch.arange(16).expand(4, 16))


def test_documents_of_no_tokens_are_passed_over(tmp_path: Path):
    nothing = np.zeros(0, dtype=np.int64)
    texts = [nothing, np.arange(1, 8), nothing, nothing, np.arange(10, 30), nothing]
    prefix = write_pair(tmp_path / "gaps", texts)
    batch = open_training(config(prefix, seq_len=6), tmp_path, samples=8).batch(0, range(4))
    assert batch.documents[:, 0].tolist() == [0] * 4
    jumps = (batch.targets != batch.tokens + 1).tolist()
    assert (~batch.counted).tolist() == jumps
    checked = EvaluationData(prefix, seq_len=6)
    assert counted_targets(checked, 2) == [*range(2, 8), *range(11, 30)]


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_the_batch_does_not_depend_on_how_it_is_shared(prefix: str, tmp_path: Path, ways: int):
    data = open_training(config(prefix), tmp_path)
    share = 4 // ways
    for step in (0, 1, 17):
        parts = [data.batch(step, range(rank * share, (rank + 1) * share)) for rank in range(ways)]
        assert equal(joined(parts), data.batch(step, range(4)))
    assert not torch.equal(data.batch(0, range(1)).tokens, data.batch(0, range(1, 2)).tokens)
    assert not torch.equal(data.batch(0, range(4)).tokens, data.batch(1, range(4)).tokens)


def test_the_batch_depends_on_data_seed_and_step_alone(prefix: str, tmp_path: Path):
    first = open_training(config(prefix), tmp_path / "a")
    expected = [first.batch(step, range(4)) for step in range(6)]
    again = open_training(config(prefix), tmp_path / "b")
    for step in (5, 0, 3):
        assert equal(again.batch(step, range(4)), expected[step])
    other = open_training(config(prefix), tmp_path / "a", seed=8)
    assert not torch.equal(other.batch(0, range(4)).tokens, expected[0].tokens)


def test_every_sample_comes_once_in_an_epoch(prefix: str, documents, tmp_path: Path):
    tokens = sum(map(len, documents))
    samples = (tokens - 1) // 16
    data = open_training(config(prefix, global_batch_size=1), tmp_path, samples=samples)
    seen = torch.cat([data.batch(step, range(1)).tokens.flatten() for step in range(samples)])
    assert len(seen) == samples * 16 == len(set(seen.tolist()))


def test_a_fixed_number_of_samples_fixes_the_order_and_ends_it(prefix: str, tmp_path: Path):
    """A run of fewer steps sees the beginning of the longer run: `samples` is what the order is made from."""
    data = open_training(config(prefix), tmp_path, samples=90)
    data.batch(21, range(4))
    with pytest.raises(ValueError, match=r"data\.samples = 90: step 23 takes .* 88 to 91.* the last .* is 22"):
        data.batch(22, range(4))
    # Batches of another size cut the same sequence of samples.
    small = open_training(config(prefix, global_batch_size=2), tmp_path, samples=90)
    halves = joined([small.batch(6, range(2)), small.batch(7, range(2))])
    assert equal(halves, data.batch(3, range(4)))


def test_real_tokens_are_never_rewritten(tmp_path: Path):
    """Megatron turns its padding id into 0, and -1 where the type has it; 65535 is what -1 would be in uint16."""
    ids = np.array([65535, 0, 1, 2, 65535, 3] * 20)
    data = open_training(config(write_pair(tmp_path / "edge", [ids])), tmp_path, samples=4, vocab_size=65536)
    batch = data.batch(0, range(4))
    assert set(batch.tokens.flatten().tolist()) == {0, 1, 2, 3, 65535}
    follows = {65535: {0, 3}, 0: {1}, 1: {2}, 2: {65535}, 3: {65535}}
    for token, target in zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True):
        assert target in follows[token]


def test_blends_follow_the_weights_as_megatron_blends(tmp_path: Path):
    weights = [3.0, 1.0, 0.5]
    prefixes = [write_pair(tmp_path / str(i), numbered(60, first=1000 * i, seed=i, longest=30)) for i in range(3)]
    sources: list[str | DataSource] = [DataSource(p, w) for p, w in zip(prefixes, weights, strict=True)]
    data = open_training(config("", train=sources), tmp_path, samples=360)
    drawn = torch.cat([data.batch(step, range(4)).tokens[:, 0] // 1000 for step in range(90)])
    assert torch.bincount(drawn, minlength=3).tolist() == [240, 80, 40]
    # And in every stretch, not only in total.
    assert torch.bincount(drawn[:36], minlength=3).tolist() == [24, 8, 4]

    class Sized:
        index_split = megatron("utils").Split.train
        unique_identifiers: dict[str, str] = {}

        def __len__(self):
            return 1000

    class Uncached:
        path_to_cache = None
        defer_npy_index_mmap = False
        fast_cache_load = False

    theirs = megatron("blended_dataset").BlendedDataset([Sized()] * 3, weights, 360, Uncached())
    np.testing.assert_array_equal(theirs.dataset_index, data._blend[0])
    np.testing.assert_array_equal(theirs.dataset_sample_index, data._blend[1])


def test_a_source_may_give_nothing(prefix: str, tmp_path: Path):
    other = write_pair(tmp_path / "other", numbered(60, first=3000))
    made = config("", train=[prefix, DataSource(other, 1e-6)], global_batch_size=1)
    assert int(open_training(made, tmp_path, samples=1).batch(0, range(1)).tokens.max()) < 3000


def test_a_replaced_dataset_is_not_read_in_the_order_of_the_old_one(tmp_path: Path):
    prefix = write_pair(tmp_path / "set", numbered(50))
    before = open_training(config(prefix), tmp_path / "cache").batch(0, range(4))
    os.remove(prefix + ".idx")
    # As many documents, of other lengths: nothing but the index tells them apart.
    write_pair(tmp_path / "set", numbered(50, first=2000, seed=4))
    after = open_training(config(prefix), tmp_path / "cache").batch(0, range(4))
    assert equal(after, open_training(config(prefix), tmp_path / "fresh").batch(0, range(4)))
    assert int(before.tokens.max()) < 2000 <= int(after.tokens.min())


def test_an_order_is_laid_down_whole_or_not_at_all(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = np.save

    def full_disk(path, array, **more):
        if "shuffle_index" in str(path):
            raise OSError("no space left on device")
        real(path, array, **more)

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        open_training(config(prefix), tmp_path)
    assert not list(tmp_path.glob("order-*"))
    monkeypatch.undo()
    data = open_training(config(prefix), tmp_path)
    assert not list(tmp_path.glob("*partial*")) and len(list(tmp_path.glob("order-*"))) == 1
    assert equal(data.batch(0, range(4)), open_training(config(prefix), tmp_path / "b").batch(0, range(4)))
    for file in next(tmp_path.glob("order-*")).glob("*sample_index.npy"):
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"data\.cache_dir: .* cannot be read .*; delete it"):
        open_training(config(prefix), tmp_path)


def test_ids_outside_the_vocabulary_are_named_when_they_are_read(tmp_path: Path):
    texts = numbered(30)
    texts[11] = texts[11].copy()
    texts[11][-1] = 4321
    prefix = write_pair(tmp_path / "bad", texts)
    data = open_training(config(prefix), tmp_path, vocab_size=4000)
    place = f"token {len(texts[11]) - 1} of document 11 is id 4321"
    with pytest.raises(ValueError, match=f"{prefix}: {place}, outside the model's vocabulary of 4000"):
        for step in range(50):
            data.batch(step, range(4))
    with pytest.raises(ValueError, match=place):
        for index in range(100):
            EvaluationData(prefix, seq_len=16, vocab_size=4000).batch(index, range(1), 1)


def counted_targets(data: EvaluationData, batch_size: int) -> list[int]:
    found = []
    for index in range(data.num_batches(batch_size)):
        batch = data.batch(index, range(batch_size), batch_size)
        found += batch.targets[batch.counted].tolist()
    return found


@pytest.mark.parametrize("seq_len", [1, 5, 16, 4000])
@pytest.mark.parametrize("isolate", [True, False])
def test_evaluation_counts_every_token_but_the_first_exactly_once(prefix, documents, seq_len: int, isolate: bool):
    data = EvaluationData(prefix, seq_len=seq_len, isolate_documents=isolate)
    expected = np.concatenate([document[1:] for document in documents]).tolist()
    assert counted_targets(data, 3) == expected and data.counted_tokens == len(expected)
    assert data.num_batches(3) == -(-(sum(map(len, documents)) - 1) // (3 * seq_len))


def test_evaluation_rows_do_not_depend_on_how_they_are_shared_and_never_run_out(prefix: str):
    data = EvaluationData(prefix, seq_len=16)
    for index in range(data.num_batches(8)):
        whole = data.batch(index, range(8), 8)
        assert equal(joined([data.batch(index, range(r, r + 2), 8) for r in range(0, 8, 2)]), whole)
        assert whole.tokens.shape == (8, 16)
        for row in range(8):
            inside = whole.counted[row]
            assert (whole.targets[row][inside] == whole.tokens[row][inside] + 1).all()
    beyond = data.batch(data.num_batches(8) + 1, range(8), 8)
    assert not beyond.counted.any() and beyond.documents is not None


def test_what_fills_the_last_row_is_a_document_of_its_own(tmp_path: Path):
    data = EvaluationData(write_pair(tmp_path / "few", [np.arange(3), np.arange(10, 14)]), seq_len=10)
    batch = data.batch(0, range(1), 1)
    assert batch.tokens.tolist() == [[0, 1, 2, 10, 11, 12, 0, 0, 0, 0]]
    assert batch.targets[0, :6].tolist() == [1, 2, 10, 11, 12, 13]
    assert batch.counted.tolist() == [[True, True, False, True, True, True, False, False, False, False]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 3]]


def test_a_split_never_overlaps_and_cuts_where_megatron_cuts(prefix: str, documents, tmp_path: Path):
    made = config(prefix, split=[0.8, 0.2])
    data = open_training(made, tmp_path, samples=400)
    trained = {int(t) for step in range(100) for t in data.batch(step, range(4)).tokens.flatten()}
    held = validation_sets(made, vocab_size=VOCAB)["numbers"]
    validated = set(counted_targets(held, 4))
    assert trained and validated and not trained & validated
    cut = len(split_ranges(90, [0.8, 0.2])[0])
    assert trained <= set(np.concatenate(documents[:cut]).tolist())
    assert validated == set(np.concatenate([document[1:] for document in documents[cut:]]).tolist())
    assert len(list(training_documents(made))) == cut
    blends = megatron("blended_megatron_dataset_config")
    for count in (1, 2, 7, 50, 90, 1001):
        for split in ([0.98, 0.02], [0.8, 0.2], [0.5, 0.5], [0.015, 0.985]):
            vector = blends.parse_and_normalize_split(f"{split[0]},{split[1]},0")
            edges = [
                round(edge * float(count))
                for pair in blends.convert_split_vector_to_split_matrix(vector)[:2]
                for edge in pair
            ]
            ranges = split_ranges(count, split)
            assert edges == [ranges[0].start, ranges[0].stop, ranges[1].start, ranges[1].stop]


def test_validation_sets_have_names_of_their_own(tmp_path: Path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write_pair(tmp_path / folder / "wiki", numbered(5)))
    paths.append(write_pair(tmp_path / "books", numbered(9)))
    sets = validation_sets(config(paths[2], validation=paths))
    assert list(sets) == ["wiki", "wiki-2", "books"] and sets["wiki-2"].prefix == paths[1]
    assert validation_sets(config(paths[2])) == {}


def test_bytes_behind_the_counted_targets(tmp_path: Path):
    from trainer.data.prepare import prepare_dataset
    from trainer.data.tokenizer import load_tokenizer
    from trainer.data.train_tokenizer import train_tokenizer

    texts = ["emoji 🙂 first", "🙂 at the start", "plain words again and again\n", "中文 and naïve café", "x"] * 8
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer([str(tmp_path / "t.jsonl")], str(tmp_path / "TOK"), 310)
    prefix = str(tmp_path / "set")
    prepare_dataset([str(tmp_path / "t.jsonl")], str(tmp_path / "TOK"), prefix)
    loaded, data = load_tokenizer(tmp_path / "TOK"), EvaluationData(prefix, seq_len=7)
    table = [loaded.count_bytes([piece]) for piece in range(loaded.vocab_size)]
    for batches in (1, 2, 5, None):
        stop = data.num_batches(3) if batches is None else batches
        seen = [data.batch(index, range(3), 3) for index in range(stop)]
        targets = torch.cat([batch.targets[batch.counted] for batch in seen]).tolist()
        assert data.counted_bytes(loaded, batches=batches, batch_size=3) == sum(table[target] for target in targets)
    firsts = sum(loaded.count_bytes(loaded.encode(text)[:1]) for text in texts)
    assert data.counted_bytes(loaded) == sum(len(text.encode()) for text in texts) - firsts


def test_fingerprints_follow_the_content_and_say_what_differs(tmp_path: Path):
    (tmp_path / "moved").mkdir()
    texts = numbered(40)
    here, there = write_pair(tmp_path / "set", texts), write_pair(tmp_path / "moved" / "set", texts)
    old = fingerprint(config(here), seed=1, samples=80)
    assert json.loads(json.dumps(old)) == old
    moved = fingerprint(config(there), seed=1, samples=80)
    assert moved == old and fingerprint_differences(old, moved) == []
    texts[3] = texts[3] + 1
    write_pair(tmp_path / "set", texts)
    changed = fingerprint(config("", train=[DataSource(here, 2.0)], seq_len=32), seed=2, samples=80)
    differences = "\n".join(fingerprint_differences(old, changed))
    assert len(differences.splitlines()) == 4
    for part in ("seq_len was 16 and is 32", "seed was 1 and is 2", "weight was 1 and is 2", "other tokens"):
        assert part in differences
    write_pair(tmp_path / "set", [*texts[:-1], texts[-1][:0]])
    shorter = "\n".join(fingerprint_differences(old, fingerprint(config(here), seed=1, samples=80)))
    assert ".bin had" in shorter and ".idx differs" in shorter
    more = fingerprint(config("", train=[here, there]), seed=1, samples=80)
    assert "had 1 sources (set) and has 2 (set, set)" in fingerprint_differences(old, more)[0]


def worker(rank: int, prefix: str, folder: Path, queue) -> None:
    """One of two processes: reads its rows, then sees the first process fail."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    shared = open_training(config(prefix), folder / "cache").batch(5, range(2 * rank, 2 * rank + 2))
    try:
        open_training(config(prefix), Path("/dev/null/no-folder"))
        failure = "none"
    except (OSError, ValueError) as fault:
        failure = f"{type(fault).__name__}: {fault}"
    queue.put((rank, shared.tokens.tolist(), failure))
    dist.destroy_process_group()


def test_two_processes_share_one_order(prefix: str, tmp_path: Path):
    """The first lays it down, the other waits; when the first fails, both are told."""
    # Forks have megatron-core imported already.
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=worker, args=(rank, prefix, tmp_path, queue)) for rank in range(2)]
    for process in workers:
        process.start()
    try:
        answers = sorted(queue.get(timeout=60) for _ in workers)
    finally:
        for process in workers:
            process.join(timeout=5)
            process.kill()
    alone = open_training(config(prefix), tmp_path / "alone").batch(5, range(4)).tokens.tolist()
    assert answers[0][1] + answers[1][1] == alone
    assert answers[0][2].startswith("NotADirectoryError")
    assert re.match(r"ValueError: the first process failed: NotADirectoryError", answers[1][2])
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()) == ["blend", "order"]


def test_a_cache_that_another_node_does_not_see_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.cache_dir: .*order was written by the first process and is not seen"):
        wait_for(tmp_path / "order", seconds=0.2)
