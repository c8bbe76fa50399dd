"""Mixtures of experts from dense models: what their weights are, what they compute, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.experts
from model.feedforward.moe import MoE
from model.hf.folder import TensorFiles
from model.hf.loading import load
from tests.checkpoints import stored_weights, write_step
from tests.pool import Pool
from tests.trainer.conversions import EXPERTS, GROUPED, SWIGLU, decoder, done
from tests.trainer.runs import VOCAB, begin_with, headway, train, write_config, write_tokens
from trainer.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("in_this_process")

DENSE = decoder({"softmax": GROUPED}, SWIGLU, num_layers=2, vocab_size=VOCAB)
FOUR, ONE = ("--experts", "4", "--top-k", "2"), ("--experts", "4", "--top-k", "1")
TOKENS = torch.arange(40).remainder(VOCAB)[None] * 7 % VOCAB


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_step(tmp_path_factory.mktemp("dense") / "step", DENSE)


def config_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def apart(one: Path, other: Path) -> float:
    """How far logits differ, as a part of the largest of the second."""
    ours, theirs = load(one)[0](TOKENS), load(other)[0](TOKENS)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_a_llama_becomes_a_mixtral(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    done("upcycle", "moe", str(dense), str(out), *FOUR)
    said = capsys.readouterr().out
    assert "as mixtral (MixtralForCausalLM)" in said and "the function is unchanged" in said, said
    assert "logits of the result and of the source" in said and "logits of transformers and Headway" in said
    assert config_of(out)["num_local_experts"] == 4 and config_of(out)["num_experts_per_tok"] == 2
    weights, model = stored_weights(dense), load(out)[0]
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3)
        else:
            assert torch.equal(parameter, weights[trainer.experts._source_of(name)]), name
    assert not torch.equal(*(model.layers[i].feedforward.router.weight for i in "01"))
    assert apart(out, dense) < 1e-5


def test_from_a_hugging_face_folder_and_in_several_files(dense: Path, tmp_path: Path) -> None:
    """Whose tensors are read into memory that they share."""
    folder, out = tmp_path / "folder", tmp_path / "out"
    done("convert", "to-hf", str(dense), str(folder), "--dtype", "bfloat16")
    done("upcycle", "moe", str(folder), str(out), *FOUR, "--max-shard-size", "40KB")
    assert len(list(out.glob("*.safetensors"))) > 2 and TensorFiles(out).dtype == torch.bfloat16
    assert apart(out, folder) < 1e-5


def test_one_expert_of_several_begins_with_a_router_of_zeros(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Output projections are N / K times what they were, gates 1 / N each."""
    out = tmp_path / "out"
    done("upcycle", "moe", str(dense), str(out), *ONE)
    said = capsys.readouterr().out
    assert "by 4, and routers are zero: the function is unchanged; all tokens begin with the first of them" in said, (
        said
    )
    model, tables = load(out)
    assert config_of(out)["model_type"] == "headway" and tables["feedforwards"]["moe"]["gate_norm"] == "none"
    mixture = model.layers["1"].feedforward
    assert isinstance(mixture, MoE) and not mixture.router.weight.any()
    weights = stored_weights(dense)
    assert torch.equal(mixture.experts["3"].down.weight, 4 * weights["layers.1.feedforward.down.weight"])
    assert torch.equal(mixture.experts["2"].up.weight, weights["layers.1.feedforward.up.weight"])
    assert apart(out, dense) < 1e-5


def test_no_weight_is_rounded_once_more(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of N / K = 8 / 3 the power of 2 is in the weights, and the rest in the gates."""
    out = tmp_path / "out"
    flags = ("--experts", "8", "--top-k", "3", "--gate-norm", "scale_n", "--dtype", "bfloat16")
    done("upcycle", "moe", str(dense), str(out), *flags)
    found = TensorFiles(out).read("model.layers.1.feedforward.experts.7.down.weight")
    wanted = stored_weights(dense)["layers.1.feedforward.down.weight"].bfloat16()
    assert torch.equal(found, 2 * wanted)
    assert load(out)[1]["feedforwards"]["moe"]["gate_scale"] == pytest.approx(4 / 3)
    said = capsys.readouterr().out
    assert "multiplied by 2, gates by 1.333, and routers are zero: the function is unchanged" in said, said
    assert "(tolerance 1e-05)" in said


@pytest.mark.parametrize("flags", [("--gate-norm", "none"), ("--gate-norm", "scale_n", "--router-std", "0.5")])
def test_where_the_function_changes_it_is_said_how_far(
    flags: tuple[str, ...], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    done("upcycle", "moe", str(dense), str(out), *ONE, *flags)
    said = capsys.readouterr().out
    assert "logits moved by" in said and "unchanged" not in said and apart(out, dense) > 0.01
    weights = stored_weights(dense)
    factor = 1 if "none" in flags else 4
    found = load(out)[0].layers["0"].feedforward.experts["1"].down.weight
    assert torch.equal(found, factor * weights["layers.0.feedforward.down.weight"])


def test_feedforwards_of_several_kinds_with_biases(tmp_path: Path) -> None:
    feedforwards = {"narrow": {"kind": "swiglu", "d_ff": 16}, "moe": {"kind": "gelu", "d_ff": 24}}
    tables = decoder(
        {"softmax": GROUPED}, feedforwards, num_layers=4, vocab_size=VOCAB, bias=True, positions="learned",
        max_positions=64, feedforward_pattern=["narrow", "moe"],
    )  # fmt: skip
    step, out = write_step(tmp_path / "step", tables), tmp_path / "out"
    done("upcycle", "moe", str(step), str(out), *ONE)
    again = load(out)[1]
    assert again["model"]["feedforward_pattern"] == ["moe_narrow", "moe_moe"] * 2
    assert again["feedforwards"]["moe_moe"]["expert"] == "moe"
    assert apart(out, step) < 1e-5


def test_a_minimax_keeps_its_residual(tmp_path: Path) -> None:
    tables = decoder(
        {"minimax": {"num_heads": 4}, "softmax": {"num_heads": 4}},
        SWIGLU,
        num_layers=2,
        vocab_size=VOCAB,
        residual="normalised",
        residual_factors={"minimax": [2.0, 1.0], "swiglu": [1.5, 0.5]},
    )
    step, out = write_step(tmp_path / "step", tables), tmp_path / "out"
    done("upcycle", "moe", str(step), str(out), *FOUR)
    assert config_of(out)["model_type"] == "minimax" and config_of(out)["mlp_alpha_factor"] == 1.5
    assert apart(out, step) < 1e-5


def test_it_trains_from_there(pool: Pool, dense: Path, tmp_path: Path) -> None:
    """Losses of its own over what the folder says; experts become different ones, also from a router of zeros."""
    data = write_tokens(tmp_path / "walk")
    out = tmp_path / "out"
    done("upcycle", "moe", str(dense), str(out), *ONE)
    config = write_config(tmp_path, data, optimizer={"lr": 0.01}, metrics={"diagnose_every_steps": 5})
    begin_with(config, out)
    ((code, said),) = pool.run(train, 1, config, "--feedforwards.moe.balance_weight", "0.02")
    assert code == 0, said
    records = read_metrics(tmp_path / "run")
    assert records[-1]["loss"] < records[0]["loss"]
    experts = load(tmp_path / "run")[0].layers["1"].feedforward.experts
    assert not torch.equal(experts["0"].up.weight, experts["1"].up.weight)
    done("convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "tuned"))


def refused(dense: Path, out: Path, *flags: str) -> str:
    code, said = headway("upcycle", "moe", str(dense), str(out), *flags)
    assert code == 2 and not out.exists() and not list(out.parent.glob("*.partial*"))
    return said


def test_what_cannot_be_made_is_refused_all_at_once(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = refused(dense, out, "--experts", "4", "--top-k", "9", "--router-std", "-1")
    assert "top_k = 9 of num_experts = 4 cannot be chosen: the nearest that can is 4" in said
    assert "router_init_std = -1" in said
    said = refused(dense, out, "--experts", "1", "--top-k", "1", "--gate-norm", "selected")
    assert "--experts 1: one copy is the dense model itself; the nearest that works is 2" in said
    assert "Take --gate-norm scale_n, or --top-k 2" in said
    said = refused(tmp_path / "nowhere", out, *FOUR, "--dtype", "int8", "--max-shard-size", "big")
    assert "nowhere does not exist" in said and "--dtype 'int8'" in said and "--max-shard-size" in said
    assert "gate_norm = 'none', expected 'selected'" in refused(dense, out, *ONE, "--format", "mixtral")
    mixed = decoder({"softmax": GROUPED}, {"moe": EXPERTS} | SWIGLU, vocab_size=VOCAB)
    said = refused(write_step(tmp_path / "mixed", mixed), out, *FOUR, "--router-std", "nan")
    assert "feedforwards.moe is a mixture of experts already" in said


def test_a_folder_that_computes_something_else_is_not_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.experts._Copies._read

    def mixed_up(self: Any, name: str) -> Any:
        tensor = plain(self, name)
        return tensor.flip(0) if name.endswith("1.feedforward.experts.0.up.weight") else tensor

    monkeypatch.setattr(trainer.experts._Copies, "_read", mixed_up)
    assert "it computes something else than" in refused(dense, tmp_path / "out", *FOUR)
