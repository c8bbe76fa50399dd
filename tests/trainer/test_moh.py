"""Mixture-of-head models from dense ones, trained, resumed, exported, looked at; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.upcycle
from model.hf.loading import load
from model.mixers.moh import MoH
from tests.checkpoints import stored_weights, write_step
from tests.pool import Pool
from tests.trainer.conversions import decoder, done
from tests.trainer.runs import VOCAB, assert_twins, begin_with, headway, train, write_config, write_tokens
from trainer.diagnostics import unchosen
from trainer.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("in_this_process")

SWIGLU = {"swiglu": {"d_ff": 32}}
HEADS = {"num_heads": 8, "num_kv_heads": 4}
DENSE = decoder({"softmax": HEADS}, SWIGLU, d_model=32, num_layers=2, vocab_size=VOCAB)
HYBRID = decoder({"lightning": {"num_heads": 2}, "softmax": HEADS}, SWIGLU, num_layers=2, d_model=32, vocab_size=VOCAB)
FLAGS = ("--shared-heads", "4", "--active-heads", "2")
TOKENS = torch.arange(40).remainder(VOCAB)[None] * 7 % VOCAB


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_step(tmp_path_factory.mktemp("dense") / "step", DENSE)


@pytest.mark.parametrize("router", ["norm", "learned"])
def test_the_weights_are_those_of_the_source(router: str, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done("upcycle", "moh", str(dense), str(out), *FLAGS, "--router", router)
    weights, (model, tables) = stored_weights(dense), load(out)
    assert tables["model"]["pattern"] == ["moh"] and tables["mixers"]["moh"]["router"] == router
    mixer = model.layers["1"].mixer
    assert isinstance(mixer, MoH) and mixer.config.group_order == [0, 2, 1, 3]
    for name, parameter in model.named_parameters():
        if name not in weights:
            assert router == "learned" and name.split(".")[3] in MoH.routers
            continue
        wanted = weights[name]
        if name.startswith("layers") and name.split(".")[3] in "qkv" and "norm" not in name:
            wanted = wanted.unflatten(0, (4, -1))[[0, 2, 1, 3]].flatten(0, 1)
        elif name.endswith("mixer.o.weight"):
            wanted = wanted.unflatten(1, (4, -1))[:, [0, 2, 1, 3]].flatten(1, 2)
        assert torch.equal(parameter, wanted), name
    plain, _ = load(dense)
    apart = (model(TOKENS) - plain(TOKENS)).abs().max() / plain(TOKENS).abs().max()
    assert apart > 0.01, "heads were left out"
    with torch.no_grad():
        for block in model.layers.values():
            block.mixer.config.active_heads = 4
            for name in MoH.routers:
                if (found := getattr(block.mixer, name)) is not None:
                    found.weight.zero_()
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-5)
    # In the folder heads lie as they are numbered, whoever reads it.
    assert json.loads((out / "config.json").read_text())["headway"]["mixers"]["moh"]["group_order"] == [0, 1, 2, 3]


def test_layers_of_other_kinds_stay_as_they_are(tmp_path: Path) -> None:
    step, out = write_step(tmp_path / "step", HYBRID), tmp_path / "out"
    done("upcycle", "moh", str(step), str(out), *FLAGS)
    model, tables = load(out)
    assert tables["model"]["pattern"] == ["lightning", "moh"]
    assert torch.equal(model.layers["0"].mixer.u.weight, stored_weights(step)["layers.0.mixer.u.weight"])


def test_it_trains_under_tp_and_goes_out_again(pool: Pool, data: str, dense: Path, tmp_path: Path) -> None:
    """Heads lie as they are numbered in the folder, balanced in two shares and the checkpoint, and numbered again."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    done("upcycle", "moh", str(dense), str(out), *FLAGS)
    config = write_config(tmp_path, data, optimizer={"lr": 0.01}, metrics={"diagnose_every_steps": 5})
    begin_with(config, out)
    results = pool.run(train, 2, config, "--parallel.tp", "2")
    assert [code for code, _ in results] == [0, 0], results
    ((code, said),) = pool.run(train, 1, config, "--run.dir", str(alone))
    assert code == 0, said
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(alone)
    for one, two in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)
        assert one["head_balance_loss"] == pytest.approx(two["head_balance_loss"], rel=1e-3)
        assert one["total_loss"] == one["loss"] + one["head_balance_loss"]
    assert ours[-1]["loss"] < ours[0]["loss"] - 0.5
    load_rows = ours[-1]["diagnostics"]["load"]
    assert all(row[:4] == [1, 1, 1, 1] and sum(row[4:]) == pytest.approx(2, rel=1e-4) for row in load_rows)
    assert ours[-1]["head_load_min"] == pytest.approx(min(min(row) for row in load_rows), rel=1e-4)
    done("convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "tuned"))
    trained, _ = load(tmp_path / "run")
    again, _ = load(tmp_path / "tuned")
    for name, parameter in trained.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    done("eval", str(tmp_path / "tuned"), "--data", data, "--seq-len", "32")
    done("report", str(tmp_path / "run"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'id="heat-load"' in page and "Head load" in page


@pytest.mark.parametrize("over", ["sequence", pytest.param("global_batch", marks=pytest.mark.matrix)])
def test_it_resumes_bit_for_bit(over: str, pool: Pool, data: str, tmp_path: Path) -> None:
    mixers = {"softmax": {"kind": "moh", "num_heads": 4, "shared_heads": 1, "active_heads": 2, "balance_over": over}}
    (tmp_path / "stopped").mkdir()
    twin = write_config(tmp_path, data, mixers=mixers, parallel={"tp": 2})
    stopped = write_config(tmp_path / "stopped", data, mixers=mixers, parallel={"tp": 2})
    for config, steps in ((twin, ("10",)), (stopped, ("3", "7", "10"))):
        for step in steps:
            results = pool.run(train, 4, config, "--run.stop_at_step", step)
            assert [code for code, _ in results] == [0] * 4, results
    assert_twins(tmp_path / "stopped" / "run", tmp_path / "run")
    assert all(record["head_balance_loss"] > 0 for record in read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_a_dense_run_is_where_training_may_begin(
    world_size: int, pool: Pool, data: str, dense: Path, tmp_path: Path
) -> None:
    """From a step folder, which keeps heads as they are numbered: they are put where this model has them."""
    mixer = HEADS | {"kind": "moh", "router": "norm", "shared_heads": 4, "active_heads": 4}
    tables = {"model": {"d_model": 32, "pattern": ["softmax"], "init_from": str(dense)}, "mixers": {"softmax": mixer}}
    config = write_config(tmp_path, data, optimizer={"lr": 0.0}, schedule={"steps": 1, "warmup_steps": 0}, **tables)
    results = pool.run(train, world_size, config)
    assert [code for code, _ in results] == [0] * world_size, results
    plain, _ = load(dense)
    kept, _ = load(tmp_path / "run")
    assert kept.layers["0"].mixer.config.group_order == [0, 2, 1, 3]
    torch.testing.assert_close(kept(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-5)


def test_heads_are_not_reordered_on_resume(pool: Pool, data: str, tmp_path: Path) -> None:
    mixers = {"softmax": {"kind": "moh", "num_heads": 4, "shared_heads": 2, "active_heads": 1, "router": "norm"}}
    config = write_config(tmp_path, data, mixers=mixers)
    ((code, said),) = pool.run(train, 1, config, "--run.stop_at_step", "2")
    assert code == 0, said
    flags = ("--mixers.softmax.shared_heads", "1", "--run.allow_change", "mixers")
    ((code, said),) = pool.run(train, 1, config, *flags)
    assert code == 2 and "mixers.softmax.group_order is [0, 2, 1, 3] in the checkpoint" in said, said


def test_a_head_that_nobody_chooses_is_named(
    pool: Pool, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixers = {"softmax": {"kind": "moh", "num_heads": 4, "shared_heads": 1, "active_heads": 2, "router_init_std": 0.0}}
    model = {"d_model": 16, "num_layers": 2, "vocab_size": VOCAB, "pattern": ["softmax"]}
    settings: dict[str, Any] = {"mixers": mixers, "model": model, "metrics": {"diagnose_every_steps": 1}}
    config = write_config(tmp_path, data, **settings, schedule={"steps": 1, "warmup_steps": 0}, optimizer={"lr": 0.0})
    ((code, said),) = pool.run(train, 1, config)
    assert code == 0, said
    (record,) = read_metrics(tmp_path / "run")
    assert record["diagnostics"]["load"] == [[1, 1, 1, 0]] * 2 and record["head_load_min"] == 0
    assert " ".join(unchosen(record)).startswith(
        "no token that was looked at chose heads 3 of layer 0; 3 of layer 1: raise balance_weight"
    )
    done("diagnose", str(tmp_path / "run"), "--rows", "2")
    assert "chose heads 3 of layer 0" in " ".join(capsys.readouterr().out.split())


def test_text_is_generated_with_a_cache(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done("upcycle", "moh", str(dense), str(out), *FLAGS, "--router", "learned")
    from transformers import AutoModelForCausalLM

    from model.decoding import Sampling, decode

    model, _ = load(out)
    (ours,) = decode(model, [TOKENS[0, :9].tolist()], 12, Sampling())
    theirs = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    found = theirs.generate(TOKENS[:, :9], max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert ours == found[0, 9:].tolist()


def refused(dense: Path, out: Path, *flags: str) -> str:
    code, said = headway("upcycle", "moh", str(dense), str(out), *flags)
    assert code == 2 and not out.exists() and not list(out.parent.glob("*.partial*"))
    return said


def test_what_cannot_be_made_is_refused_all_at_once(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = refused(dense, out, "--shared-heads", "3", "--active-heads", "9", "--route-unit", "kv_group")
    assert "active_heads = 9 of 5 routed heads" in said and "shared_heads = 3 with route_unit" in said
    assert "active_heads = 9 with route_unit" in said
    assert "shared_heads = 0 with two-stage" in refused(
        dense, out, "--shared-heads", "0", "--active-heads", "1", "--router", "learned"
    )
    said = refused(tmp_path / "nowhere", out, *FLAGS, "--dtype", "int8", "--max-shard-size", "big")
    assert "nowhere does not exist" in said and "--dtype 'int8'" in said and "--max-shard-size" in said
    linear = write_step(
        tmp_path / "linear", decoder({"lightning": {"num_heads": 2}}, SWIGLU, d_model=32, vocab_size=VOCAB)
    )
    assert "no layer has softmax attention" in refused(linear, out, *FLAGS)
    chosen = decoder({"moh": HEADS | {"shared_heads": 2, "active_heads": 2}}, SWIGLU, d_model=32, vocab_size=VOCAB)
    assert "mixers.moh is mixture-of-head attention already" in refused(
        write_step(tmp_path / "chosen", chosen), out, *FLAGS
    )
    sinks = decoder({"softmax": HEADS | {"sink": True}}, SWIGLU, d_model=32, vocab_size=VOCAB)
    assert "a key bias or a sink" in refused(write_step(tmp_path / "sinks", sinks), out, *FLAGS)
    out.mkdir()
    (out / "mine").write_text("")
    code, said = headway("upcycle", "moh", str(dense), str(out), *FLAGS)
    assert code == 2 and "is no Hugging Face folder" in said


def test_a_folder_that_computes_something_else_is_not_written(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.upcycle._WithRouters.read

    def mixed_up(self: Any, names: Any) -> Any:
        return {
            name: x.flip(0) if name.endswith("1.mixer.k.weight") else x for name, x in plain(self, list(names)).items()
        }

    monkeypatch.setattr(trainer.upcycle._WithRouters, "read", mixed_up)
    assert "it computes something else than" in refused(dense, tmp_path / "out", *FLAGS)
