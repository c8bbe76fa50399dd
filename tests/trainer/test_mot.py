"""Weights per modality as a user meets them: a run, its metrics and report, frozen towers, upcycling, exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.decoding import Sampling, decode
from model.folders import newest_complete
from model.hf.loading import load
from model.objective import NextToken, token_nats
from model.towers import tied
from tests.checkpoints import stored_weights, write_step
from tests.pool import Pool
from tests.trainer.conversions import GROUPED, SWIGLU, decoder, done
from tests.trainer.runs import VOCAB, begin_with, headway, train, write_config, write_tokens
from trainer.config import load_config
from trainer.data.evaluation import validation_sets
from trainer.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("in_this_process")

NAMES = {"names": ["text", "image"]}
TWO = {"modalities": 2, "ranges": [[0, 40], [40, VOCAB]]} | NAMES
DENSE = decoder({"softmax": GROUPED, "lightning": {"num_heads": 2}}, SWIGLU, num_layers=2, vocab_size=VOCAB)
TOKENS = torch.arange(60).remainder(VOCAB)[None] * 7 % VOCAB
UPCYCLED = ("--modalities", "2", "--new-ids", "16", "--markers", "2", "--names", "text", "image")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_step(tmp_path_factory.mktemp("dense") / "step", DENSE)


def logits(model: Path, tokens: Tensor = TOKENS, **given: Any) -> Tensor:
    with torch.no_grad():
        return load(model)[0](tokens, **given)


@torch.no_grad()
def validated(config: Path, model: Path) -> dict[str, float]:
    """Losses of all validation data, by the definition."""
    made = load_config(config)
    (data,) = validation_sets(made.data, untie=made.architecture.untie).values()
    batches, found = [data.batch(index, range(8), 8) for index in range(data.num_batches(8))], load(model)[0]
    assert len(batches) > 1
    nats = torch.cat([token_nats(found, NextToken(), batch).flatten() for batch in batches])
    counted = torch.cat([batch.counted.flatten() for batch in batches])
    image = torch.cat([batch.targets.flatten() for batch in batches]) >= 40
    parts = {
        "val_loss": counted,
        "modality/text/val_loss": counted & ~image,
        "modality/image/val_loss": counted & image,
    }
    return {name: nats[part].mean().item() for name, part in parts.items()}


def test_losses_of_modalities_in_metrics_and_report(pool: Pool, tmp_path: Path) -> None:
    """Of the global batch: together they are the loss, whatever each rank had of which."""
    config = write_config(
        tmp_path, write_tokens(tmp_path / "walk"), untie=TWO, data={"validate_every_steps": 5}, schedule={"steps": 10}
    )
    assert [code for code, _ in pool.run(train, 2, config)] == [0, 0]
    records = read_metrics(tmp_path / "run")
    for record in records:
        tokens = {name: record[f"modality/{name}/tokens"] for name in ("text", "image")}
        assert min(tokens.values()) > 20
        total = sum(record[f"modality/{name}/loss"] * count for name, count in tokens.items())
        assert total / sum(tokens.values()) == pytest.approx(record["loss"], rel=1e-12)
    assert len({record["modality/text/tokens"] for record in records}) > 3
    assert len([record for record in records if "val_loss" in record]) == 2
    wanted = validated(config, tmp_path / "run")
    assert {name: records[-1][name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    # Where both ranks have the same rows, each is counted once.
    (cut := tmp_path / "cut").mkdir()
    same: dict[str, Any] = {"untie": TWO, "data": {"validate_every_steps": 5}, "parallel": {"cp": 2}}
    twin = write_config(cut, str(tmp_path / "walk"), **same)
    assert [code for code, _ in pool.run(train, 2, twin)] == [0, 0]
    for record, other in zip(records, read_metrics(cut / "run"), strict=True):
        told = {name for name in record if name.endswith("loss") or name.startswith("modality/")}
        assert len(told) == (5 + 3 if "val_loss" in record else 5)
        assert {name: other[name] for name in told} == pytest.approx({name: record[name] for name in told}, rel=1e-4)
    done("report", str(tmp_path / "run"))
    (page,) = (tmp_path / "run").glob("*.html")
    assert {"Loss of text", "Loss of image"} <= set(re.findall(r"Loss of \w+", page.read_text()))


def test_a_frozen_text_tower_says_the_same_to_the_bit(dense: Path, pool: Pool, tmp_path: Path) -> None:
    """Neither updates nor decay touch it, nor the rows of its ids; the other learns, and its ids."""
    begin = tmp_path / "begin"
    done("upcycle", "mot", str(dense), str(begin), *UPCYCLED)
    frozen, ids = ["*.towers.0.*", "final_norm.*"], [0, VOCAB, VOCAB + 16, VOCAB + 18]
    config = write_config(
        tmp_path,
        write_mixed(tmp_path / "mixed"),
        run={"freeze": frozen, "freeze_ids": ids},
        optimizer={"lr": 0.02, "weight_decay": 0.5},
    )
    begin_with(config, begin)
    assert [code for code, _ in pool.run(train, 1, config)] == [0]
    records = read_metrics(tmp_path / "run")
    assert records[-1]["modality/image/loss"] < records[0]["modality/image/loss"] - 0.3
    after = tmp_path / "run"
    old = [*range(VOCAB), VOCAB + 16, VOCAB + 17]
    assert torch.equal(logits(after)[..., old], logits(begin)[..., old])
    images = torch.tensor([[3, 80, *range(64, 80), 81]])
    assert not torch.allclose(logits(after, images), logits(begin, images), atol=0.1)
    was = dict(load(begin)[0].named_parameters())
    folder, _ = newest_complete(after)
    assert folder is not None
    moved = {name for name, tensor in stored_weights(folder).items() if not torch.equal(tensor, was[name])}
    assert moved == {name for name in was if ".towers.1." in name} | {"embedding.weight", "head.weight"}
    for name in ("embedding.weight", "head.weight"):
        rows = (stored_weights(folder)[name] != was[name]).any(1)
        assert rows.nonzero().flatten().tolist() == list(range(VOCAB, VOCAB + 16))


@pytest.mark.parametrize(
    ("ids", "said"),
    [([4, 4], "must be pairs of a first id"), ([0, 4, 6], "must be pairs"), ([0, 65], "beyond model.vocab_size = 64")],
)
def test_ids_that_cannot_be_frozen(tmp_path: Path, ids: list[int], said: str) -> None:
    config = write_config(tmp_path, str(tmp_path / "nothing"), run={"freeze_ids": ids})
    code, found = headway("plan", str(config), "--world", "1")
    assert code == 2 and f"run.freeze_ids = {ids}" in found and said in found


def write_mixed(prefix: Path) -> str:
    """Documents of text and "images" of 16 codes between two markers: of ids as `upcycle mot` makes them here."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(60):
        text = generator.integers(VOCAB, size=generator.integers(5, 30))
        image = VOCAB + (generator.integers(16) + np.arange(16)) % 16
        tokens = np.concatenate((text, [VOCAB + 16], image, [VOCAB + 17])).astype(np.int64)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_upcycled_it_computes_what_it_did(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    done("upcycle", "mot", str(dense), str(out), *UPCYCLED)
    said = capsys.readouterr().out
    assert "ids: text 0 to 63, 80 to 81; image 64 to 79" in said, said
    assert "logits of the source, and of the result with its tokens of any modality" in said
    assert "logits of transformers and Headway" in said
    model, tables = load(out)
    assert tables["untie"]["ranges"] == [[0, 64, 80, 82], [64, 80]] and tables["model"]["vocab_size"] == 82
    weights = stored_weights(dense)
    for name, parameter in model.named_parameters():
        wanted = weights[tied(name)]
        assert torch.equal(parameter[: len(wanted)], wanted), name
    new = model.embedding.weight[VOCAB:]
    assert new.unique(dim=0).shape[0] == 18
    known = weights["embedding.weight"]
    assert ((new - known.mean(0)) / known.std(0)).std().item() == pytest.approx(0.1, rel=0.15)
    mixed = torch.arange(60)[None] % 2
    for modalities in (torch.zeros_like(mixed), torch.ones_like(mixed), mixed):
        torch.testing.assert_close(logits(out, modalities=modalities)[..., :VOCAB], logits(dense), rtol=1e-5, atol=1e-5)


def test_upcycled_without_new_ids_the_data_says(dense: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "out", tmp_path / "parts"
    done("upcycle", "mot", str(dense), str(out), "--modalities", "3")
    assert "ranges" not in load(out)[1]["untie"] or load(out)[1]["untie"]["ranges"] == []
    torch.testing.assert_close(logits(out, modalities=TOKENS % 3), logits(dense), rtol=1e-5, atol=1e-5)
    code, said = headway("upcycle", "mot", str(out), str(parts), "--modalities", "2")
    assert code == 2 and "weights for 3 modalities already" in said


def test_a_mixture_of_experts_for_each_modality(tmp_path: Path) -> None:
    experts = {"moe": {"num_experts": 3, "top_k": 2, "expert": "swiglu", "gate_norm": "selected"}} | SWIGLU
    source, out = (
        write_step(tmp_path / "step", decoder({"bam": GROUPED | {"num_experts": 2}}, experts)),
        tmp_path / "out",
    )
    done("upcycle", "mot", str(source), str(out), "--modalities", "2")
    assert len(load(out)[0].layers["0"].feedforward.by_tower[1].experts) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--modalities", "1"), ["--modalities 1: one is the model itself; the nearest that works is 2"]),
        (
            ("--modalities", "3", "--new-ids", "16", "--markers", "-1"),
            ["--new-ids 16: each modality after the first has some, so --modalities 3 wants 2", "--markers -1"],
        ),
        (
            ("--modalities", "2", "--markers", "2"),
            ["--markers 2: so many ids more, not below 0, where there are --new-ids"],
        ),
        (("--modalities", "2", "--new-ids", "0"), ["--new-ids 0: a modality has at least 1 id"]),
        (("--modalities", "2", "--names", "text"), ["untie.names has 1 names for modalities = 2"]),
    ],
)
def test_refusals(dense: Path, tmp_path: Path, flags: tuple[str, ...], said: list[str]) -> None:
    code, found = headway("upcycle", "mot", str(dense), str(tmp_path / "out"), *flags)
    assert code == 2 and all(sentence in found for sentence in said), found
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_gets_no_name(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.towers

    plain = trainer.towers._Towers._read

    def spoiled(self: Any, name: str) -> Tensor:
        return plain(self, name) * (1.001 if name == "layers.1.mixer.k.towers.1.weight" else 1.0)

    monkeypatch.setattr(trainer.towers._Towers, "_read", spoiled)
    code, said = headway("upcycle", "mot", str(dense), str(tmp_path / "out"), *UPCYCLED)
    assert code == 2 and "computes something else" in said and not list(tmp_path.iterdir())


def test_transformers_decodes_across_modalities(tmp_path: Path) -> None:
    """By the file that goes with an export, a token at a time, as we do."""
    from transformers import AutoModelForCausalLM

    tables = DENSE | {"untie": TWO}
    tables["model"] = tables["model"] | {"init_std": 0.3, "norm_position": "sandwich_out"}
    out = tmp_path / "hf"
    done("convert", "to-hf", str(write_step(tmp_path / "step", tables)), str(out))
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    prompt = TOKENS[:, 1:10]
    found = theirs.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    assert found == decode(load(out)[0], prompt.tolist(), 24, Sampling())[0]
    modalities = [int(token >= 40) for token in found]
    assert 0 < sum(modalities) < len(found), "nothing is crossed"
    back = tmp_path / "back"
    done("convert", "from-hf", str(out), str(back))
    assert torch.equal(logits(back), logits(out))


def test_without_parts_it_is_a_llama(tmp_path: Path) -> None:
    """Which nobody asks for modalities, though the data says them."""
    plain = decoder({"softmax": GROUPED}, SWIGLU) | {"untie": {"modalities": 2, "parts": []}}
    out = tmp_path / "hf"
    done("convert", "to-hf", str(write_step(tmp_path / "step", plain)), str(out), "--format", "llama")
    assert torch.equal(logits(out, TOKENS % 61), logits(tmp_path / "step", TOKENS % 61))


def test_no_other_format_takes_it(tmp_path: Path) -> None:
    plain = decoder({"softmax": GROUPED}, SWIGLU)
    step = write_step(tmp_path / "step", plain | {"untie": {"modalities": 2, "ranges": [[0, 40], [40, 61]]}})
    code, said = headway("convert", "to-hf", str(step), str(tmp_path / "hf"), "--format", "llama")
    assert code == 2 and "modalities have no weights of their own there" in said
    step = write_step(tmp_path / "other", decoder({"softmax": GROUPED}, SWIGLU, norm_position="sandwich_out"))
    code, said = headway("convert", "to-hf", str(step), str(tmp_path / "hf"), "--format", "llama")
    assert code == 2 and "norms stand before mixers and feed-forwards there" in said


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`set`, prepared from documents of text and image codes, and its tokenizer `TOK`, of 280 pieces; 12 codes."""
    folder = tmp_path_factory.mktemp("captioned")
    lines = folder / "lines.jsonl"
    with lines.open("w") as stream:
        for number in range(120):
            said = ("a red boot", "rain on a hill", "two dogs and a cat", "é")
            words = " ".join(said[i] for i in (number % 4, 2, number % 3))
            codes = [(number + step) % 12 for step in range(9)]
            stream.write(json.dumps({"parts": [{"text": words}, {"image": codes}][:: 1 - 2 * (number % 2)]}) + "\n")
    parts = ("--parts", "parts")
    done("data", "tokenizer", str(lines), "--out", str(folder / "TOK"), "--vocab-size", "280", *parts)
    prepared = ("--tokenizer", str(folder / "TOK"), "--out", str(folder / "set"), *parts, "--image-codes", "12")
    done("data", "prepare", str(lines), *prepared)
    return folder


def test_the_column_of_the_data_says_what_ids_say(captioned: Path, pool: Pool, tmp_path: Path) -> None:
    """The same curve, bit for bit; and a model that cannot know is evaluated by the data, and does not generate."""
    ids = {"ranges": [[0, 280, 292, 294], [280, 292]]} | NAMES
    runs = {}
    for name, untie in (("ids", ids), ("column", dict(NAMES))):
        folder = tmp_path / name
        folder.mkdir()
        config = write_config(
            folder,
            str(captioned / "set"),
            model={"vocab_size": 294},
            untie={"modalities": 2} | untie,
            data={"validate_every_steps": 10},
        )
        assert [code for code, _ in pool.run(train, 2, config)] == [0, 0]
        runs[name] = folder / "run"
    records = {name: read_metrics(run) for name, run in runs.items()}
    told = [key for key in records["ids"][-1] if key.startswith("modality/") or "loss" in key]
    assert len(told) == 8
    for one, other in zip(records["ids"], records["column"], strict=True):
        assert [one.get(key) for key in told] == [other.get(key) for key in told]
    scores = {}
    for name, run in runs.items():
        done("eval", str(run), "--data", str(captioned / "set"), "--out", str(tmp_path / f"{name}.json"))
        scores[name] = json.loads((tmp_path / f"{name}.json").read_text())
        done("diagnose", str(run), "--data", str(captioned / "set"), "--rows", "2")
    assert scores["ids"][0]["nats_per_token"] == scores["column"][0]["nats_per_token"]
    prompt = ("--prompt", "a red", "--max-tokens", "3")
    assert headway("generate", str(runs["ids"]), *prompt)[0] == 0
    code, said = headway("generate", str(runs["column"]), *prompt)
    assert code == 2 and "ids do not say which one a token is of" in said
