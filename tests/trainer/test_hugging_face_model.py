"""MODEL is a Hugging Face folder: training begins with it, it is scored, it is no place to resume from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import stored_weights, write_step
from tests.pool import Pool
from tests.trainer.conversions import SWIGLU, decoder, done
from tests.trainer.runs import VOCAB, begin_with, headway, stored, train, write_config, write_tokens

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens")


LEARNER = decoder(
    {"lightning": {"num_heads": 2}, "softmax": {"num_heads": 2}},
    {"swiglu": {"d_ff": 32}},
    d_model=16,
    num_layers=2,
    vocab_size=VOCAB,
)
LLAMA = decoder({"softmax": {"num_heads": 2}}, {"swiglu": {"d_ff": 32}}, d_model=16, num_layers=2, vocab_size=VOCAB)


@pytest.mark.parametrize("tables", [LEARNER, LLAMA], ids=["own format", "llama"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_begins_with_weights_from_a_hugging_face_folder(
    tables: dict[str, Any], world_size: int, pool: Pool, data: str, tmp_path: Path
) -> None:
    """Sharded over two processes or not: the weights are there, what is frozen stays so, the rest learns."""
    step, out = write_step(tmp_path / "step", tables), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out))
    config = write_config(tmp_path, data, optimizer={"lr": 0.01}, run={"freeze": ["embedding.*", "layers.0.*"]})
    begin_with(config, out)
    for overrides in (("--run.stop_at_step", "1", "--optimizer.lr", "0"), ("--run.dir", str(tmp_path / "learned"))):
        results = pool.run(train, world_size, config, *overrides)
        assert [code for code, _ in results] == [0] * world_size, results
    first, learned, given = stored(tmp_path / "run", 1), stored(tmp_path / "learned", 10), stored_weights(step)
    for name, wanted in given.items():
        assert torch.equal(first[f"model.{name}"], wanted), name
        frozen = name.startswith(("embedding.", "layers.0."))
        assert torch.equal(learned[f"model.{name}"], wanted) == frozen, name
    # And out again: the same class as it came from.
    done("convert", "to-hf", str(tmp_path / "learned"), str(tmp_path / "tuned"))
    kinds = [json.loads((folder / "config.json").read_text())["model_type"] for folder in (out, tmp_path / "tuned")]
    assert kinds[0] == kinds[1]
    # A run that goes on needs its configuration no longer to be found there.
    ((code, said),) = pool.run(train, 1, config, "--model.init_from", str(tmp_path / "nowhere"))
    assert code == 2 and "nowhere does not exist" in said


def test_a_hugging_face_folder_scores_as_the_run_does(data: str, tmp_path: Path) -> None:
    step, out = write_step(tmp_path / "step", LEARNER | {"data": {"seq_len": 32}}), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out))
    scores = []
    for folder in (step, out):
        done("eval", str(folder), "--data", data, "--seq-len", "32", "--out", str(tmp_path / "scores.json"))
        scores.append(json.loads((tmp_path / "scores.json").read_text()))
    assert scores[0] == scores[1]
    for words, command in (
        ("give --data PREFIX", ["eval", str(out)]),
        ("there is nothing to count", ["eval", str(out), "--data", data, "--baselines"]),
        ("has no tokenizer with it: give --tokenizer", ["generate", str(out)]),
    ):
        code, said = headway(*command)
        assert code == 2 and words in said, said


def test_an_imported_folder_is_no_place_to_resume_from(exported: Path, data: str, pool: Pool, tmp_path: Path) -> None:
    imported = tmp_path / "step-00000000"
    done("convert", "from-hf", str(exported), str(imported))
    config = write_config(tmp_path, data)
    ((code, said),) = pool.run(train, 1, config, "--run.resume", str(imported))
    assert code == 2 and "begin one with model.init_from" in said


def test_code_that_another_models_configuration_names_is_not_imported_unasked(
    own_package: None, data: str, pool: Pool, tmp_path: Path
) -> None:
    tables = decoder({"mine": {"kind": "mixing.mixers:Halved", "num_heads": 4}}, SWIGLU, vocab_size=VOCAB)
    step = write_step(tmp_path / "step", tables, allow_code=True)
    config = write_config(tmp_path, data)
    begin_with(config, step)
    ((code, said),) = pool.run(train, 1, config)
    assert (
        code == 2 and "mixers.mine.kind = 'mixing.mixers:Halved' would import code that model.init_from names" in said
    )
