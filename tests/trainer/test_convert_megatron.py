"""`headway convert to-megatron` and `from-megatron`: round trips, with megatron-core itself on the other side."""

from __future__ import annotations

import argparse
import enum
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.megatron.check as check
import model.megatron.names as names
from model.megatron import probe
from model.megatron.distributed import MegatronReader
from model.megatron.folder import MegatronFolder
from model.megatron.names import LAYER, LOCAL
from model.shards import read_tensors
from tests.checkpoints import architecture_of, random_weights, stored_weights, write_step
from tests.trainer.conversions import GROUPED, KINDS, SWIGLU, decoder, done
from tests.trainer.runs import headway
from trainer.convert_megatron import from_megatron

WRITER = Path(__file__).with_name("megatron_writer.py")
GELU = {"gelu": {"d_ff": 48}}

SAYABLE = {name: KINDS[name][1] for name in ("llama, wide heads", "qwen3", "gpt2", "gpt2, exact gelu, untied")} | {
    "grouped, tied, with biases": KINDS["llama tied, with biases"][1],
    "biases on queries, keys and values alone": decoder({"softmax": GROUPED | {"qkv_bias": True}}, SWIGLU),
    "tanh without biases, no positions": decoder({"softmax": GROUPED}, GELU, positions="none", norm="layernorm"),
    "one head of keys": decoder({"softmax": GROUPED | {"num_kv_heads": 1}}, SWIGLU),
    "a vocabulary that needs no padding": decoder({"softmax": GROUPED}, SWIGLU, vocab_size=128),
}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core computes without a process of its own for each time: it is imported once for all tests."""

    def run_here(script: Path, request: Path, ranks: int) -> None:
        assert (script, ranks) == (check.PROBE, 1)
        probe.main(str(request), 0)

    monkeypatch.setattr(check, "run_ranks", run_here)


def same(step: Path, other: Path) -> bool:
    ours, theirs = stored_weights(step), stored_weights(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def raw_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a distributed checkpoint as they lie there."""
    entries = MegatronReader(folder).read_metadata().state_dict_metadata
    found = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items() if hasattr(e, "size")}
    read_tensors(found, folder, alone=True, reader=MegatronReader(folder))
    return found


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("kind", SAYABLE)
def test_out_and_in_again(kind: str, tmp_path: Path) -> None:
    """The commands compare logits with megatron-core's themselves; here: no parameter and no setting has changed."""
    step = write_step(tmp_path / "step", SAYABLE[kind])
    done("convert", "to-megatron", str(step), str(tmp_path / "out"))
    done("convert", "from-megatron", str(tmp_path / "out"), str(tmp_path / "back"))
    assert same(step, tmp_path / "back")
    done("convert", "to-megatron", str(tmp_path / "back"), str(tmp_path / "again"))
    first, second = (raw_tensors(tmp_path / name / "release") for name in ("out", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert MegatronFolder(tmp_path / "out").tables == MegatronFolder(tmp_path / "again").tables


@pytest.mark.usefixtures("in_this_process")
def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    step = write_step(tmp_path / "step", SAYABLE["qwen3"], precision="bf16")
    done("convert", "to-megatron", str(step), str(tmp_path / "out"))
    assert {tensor.dtype for tensor in raw_tensors(tmp_path / "out" / "release").values()} == {torch.bfloat16}
    done("convert", "from-megatron", str(tmp_path / "out"), str(tmp_path / "back"))
    done("convert", "to-megatron", str(tmp_path / "back"), str(tmp_path / "again"))
    first, second = (raw_tensors(tmp_path / name / "release") for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`step` of ours, `out` as exported, and what megatron-core has written at tp = 2 x pp = 2 after it loaded `out`:
    `distributed`, `numbered` and `ranks`."""
    folder = tmp_path_factory.mktemp("theirs")
    tables = decoder({"softmax": GROUPED}, SWIGLU, num_layers=4, bias=True, tie_embeddings=True)
    step = write_step(folder / "step", tables)
    done("convert", "to-megatron", str(step), str(folder / "out"))
    source = MegatronFolder(folder / "out")
    content = {
        "folder": str(source.folder),
        "arguments": check.plain(source.arguments),
        "rows": source.rows,
        "tokens": [[0]],
        "tp": 2,
        "pp": 2,
        "out": str(folder),
        "meeting": str(folder / "meeting"),
    }
    (folder / "request.json").write_text(json.dumps(content))
    check.run_ranks(WRITER, folder / "request.json", 4)
    return folder


@pytest.mark.parametrize("kind", ["distributed", "numbered", "ranks"])
def test_what_megatron_core_writes_comes_in(kind: str, theirs: Path, tmp_path: Path) -> None:
    """Written by its own classes at tp = 2 x pp = 2; files of ranks are checked in as many processes as tp says."""
    done("convert", "from-megatron", str(theirs / kind), str(tmp_path / "back"))
    assert same(theirs / "step", tmp_path / "back")


def test_megatron_core_writes_what_we_write(theirs: Path) -> None:
    """Every entry that it writes is in ours, the same bit for bit."""
    ours = raw_tensors(theirs / "out" / "release")
    written = raw_tensors(theirs / "distributed" / "iter_0000100")
    assert ours.keys() == written.keys() and all(torch.equal(ours[name], written[name]) for name in ours)
    entries = [
        MegatronReader(folder).read_metadata().state_dict_metadata.keys()
        for folder in (theirs / "out" / "release", theirs / "distributed" / "iter_0000100")
    ]
    assert entries[1] <= entries[0]


def ranks_of(folder: Path) -> dict[str, Any]:
    return {path.parent.name: torch.load(path, weights_only=True) for path in folder.glob("*/mp_rank_*/model_*.pt")}


def write_ranks(folder: Path, ranks: dict[str, Any]) -> Path:
    for name, content in ranks.items():
        (folder / "iter_0000100" / name).mkdir(parents=True)
        torch.save(content, folder / "iter_0000100" / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("100\n")
    return folder


def as_transformer_engine(state: dict[str, Any]) -> dict[str, Any]:
    """A rank's model under TransformerEngine's names, with what its modules keep beside weights."""
    renamed = {}
    for name, tensor in state.items():
        match = LAYER.fullmatch(name)
        renamed[f"decoder.layers.{match[1]}.{LOCAL.get(match[2], match[2])}" if match else name] = tensor
    assert any(name.endswith("linear_fc1.layer_norm_weight") for name in renamed)
    return renamed | {"decoder.layers.0.self_attention.core_attention._extra_state": io.BytesIO(b"fp8")}


def in_turns(state: dict[str, Any], layers: set[int]) -> dict[str, Any]:
    """A piece of a stage that has these of its layers, numbered from 0; ends of the model stay where they are."""
    order = {layer: place for place, layer in enumerate(sorted(layers))}
    found = {}
    for name, tensor in state.items():
        match = LAYER.fullmatch(name)
        if match is None or int(match[1]) in order:
            found[f"decoder.layers.{order[int(match[1])]}.{match[2]}" if match else name] = tensor
    return found


class Mode(enum.Enum):
    """As Megatron's arguments hold them; it is not there when the file is read."""

    auto = 5


def test_other_names_pieces_in_turns_and_objects_of_megatron(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerEngine's names; two pieces to a stage, which hold layers 0 and 2, 1 and 3; settings of its types."""
    ranks = ranks_of(theirs / "ranks")
    monkeypatch.setitem(sys.modules, "megatron.modes", argparse.Namespace(Mode=Mode))
    Mode.__module__ = "megatron.modes"
    for tp in ("00", "01"):
        first, last = ranks[f"mp_rank_{tp}_000"], ranks[f"mp_rank_{tp}_001"]
        early, late = as_transformer_engine(first.pop("model")), as_transformer_engine(last.pop("model"))
        # Layers 0 1 | 2 3 become 0 | 1 and then 2 | 3: the second layer of the first stage is the last one's.
        ends = {name for name in late if LAYER.fullmatch(name) is None}
        first["model0"], last["model0"] = in_turns(early, {0}), in_turns(only_layers(early), {1})
        first["model1"] = in_turns(only_layers(late), {0})
        last["model1"] = in_turns(only_layers(late), {1}) | {name: late[name] for name in ends}
        first["args"].attention_backend = Mode.auto
    folder = write_ranks(tmp_path / "turned", ranks)
    monkeypatch.undo()
    done("convert", "from-megatron", str(folder), str(tmp_path / "back"))
    assert same(theirs / "step", tmp_path / "back")


def only_layers(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if LAYER.fullmatch(name)}


@pytest.mark.usefixtures("in_this_process")
def test_trained_padding_stays(tmp_path: Path) -> None:
    """Rows after the tokens that are not zeros are weights like others: they come in, and go out again."""
    tables = decoder({"softmax": GROUPED}, SWIGLU, vocab_size=128)
    step = write_step(tmp_path / "step", tables)
    done("convert", "to-megatron", str(step), str(tmp_path / "out"))
    common = tmp_path / "out" / "release" / "common.pt"
    content = torch.load(common, weights_only=False)
    content["args"].vocab_size = 100
    torch.save(content, common)
    said: list[str] = []
    from_megatron(tmp_path / "out", tmp_path / "back", say=said.append)
    assert any("28 rows after the 100 tokens were trained" in line for line in said), said
    assert same(step, tmp_path / "back")


def mixed_up(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Break the packing, in both directions alike."""
    pack, take = names.Held.pack, names.Held.take

    def moved(held: names.Held) -> names.Held:
        if fault == "groups" and held.groups > 1:
            return replace(held, groups=1)
        if fault == "gate and up" and "linear_fc1.weight" in held.name:
            return replace(held, parts=held.parts[::-1])
        return held

    def packed(held: names.Held, parts: list[Tensor], rows: int) -> Tensor:
        there = moved(held)
        return pack(there, [parts[held.parts.index(part)] for part in there.parts], rows)

    monkeypatch.setattr(names.Held, "pack", packed)
    monkeypatch.setattr(names.Held, "take", lambda held, *rest: take(moved(held), *rest))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("fault", ["groups", "gate and up"])
def test_a_mix_up_that_undoes_itself_is_caught(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that a round trip cannot see: megatron-core computes something else, so nothing is written."""
    step = write_step(tmp_path / "step", KINDS["llama"][1])
    done("convert", "to-megatron", str(step), str(tmp_path / "right"))
    mixed_up(monkeypatch, fault)
    code, said = headway("convert", "to-megatron", str(step), str(tmp_path / "out"))
    assert code == 2 and "megatron-core computes something else" in said, said
    code, said = headway("convert", "from-megatron", str(tmp_path / "right"), str(tmp_path / "back"))
    assert code == 2 and "Headway computes something else" in said, said
    assert sorted(os.listdir(tmp_path)) == ["right", "step"]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("key", ["rotary_base", "norm_epsilon", "num_query_groups"])
def test_settings_are_read_as_megatron_means_them(key: str, tmp_path: Path) -> None:
    """A setting that no tensor shows is what the export says, or its logits would be others."""
    special = {"rotary_base": ("mixers", "rope_theta", 500.0), "norm_epsilon": ("model", "norm_eps", 0.3)}
    tables = decoder({"softmax": dict(GROUPED)}, SWIGLU)
    section, name, value = special.get(key, ("mixers", "num_kv_heads", 1))
    part = tables[section]["softmax"] if section == "mixers" else tables[section]
    part[name] = value
    step = write_step(tmp_path / "step", tables)
    done("convert", "to-megatron", str(step), str(tmp_path / "out"))
    read = MegatronFolder(tmp_path / "out").tables[section]
    assert (read["softmax"] if section == "mixers" else read)[name] == value


def test_weights_of_a_rank_come_back_together() -> None:
    """Cut as Megatron cuts for two ranks, by hand, and merged."""
    architecture = architecture_of(decoder({"softmax": GROUPED}, SWIGLU, bias=True))
    held = names.held_tensors(architecture)
    weights = random_weights(architecture)
    fc1 = held["decoder.layers.1.mlp.linear_fc1.weight"]
    gate, up = (weights[f"layers.1.feedforward.{x}.weight"] for x in ("gate", "up"))
    shards = [torch.cat((gate[:24], up[:24])), torch.cat((gate[24:], up[24:]))]
    assert torch.equal(fc1.merge(shards), torch.cat((gate, up)))
    qkv = held["decoder.layers.1.self_attention.linear_qkv.bias"]
    q, k, v = (weights[f"layers.1.mixer.{x}.bias"] for x in "qkv")
    # A group is two query heads of 8, a key head and a value head.
    shards = [torch.cat((q[16 * g :][:16], k[8 * g :][:8], v[8 * g :][:8])) for g in range(2)]
    assert torch.equal(qkv.merge(shards), qkv.pack([q, k, v], 0)) and torch.equal(
        qkv.pack([q, k, v], 0)[:32], shards[0]
    )


def test_one_group_is_not_cut_by_its_parts() -> None:
    """Queries, keys and values of unequal widths, in one file of one rank."""
    architecture = architecture_of(decoder({"softmax": GROUPED | {"num_kv_heads": 1}}, SWIGLU))
    qkv = names.held_tensors(architecture)["decoder.layers.0.self_attention.linear_qkv.weight"]
    whole = torch.randn(48, 32)
    assert torch.equal(qkv.merge([whole]), whole) and torch.equal(qkv.merge([whole[:24], whole[24:]]), whole)


def test_what_ranks_share_has_to_be_the_same(theirs: Path, tmp_path: Path) -> None:
    ranks = ranks_of(theirs / "ranks")
    ranks["mp_rank_01_001"]["model"]["decoder.final_layernorm.weight"][0] += 1
    folder = write_ranks(tmp_path / "torn", ranks)
    code, said = headway("convert", "from-megatron", str(folder), str(tmp_path / "back"))
    assert code == 2 and "should have the same decoder.final_layernorm.weight, and differ" in said, said
    del ranks["mp_rank_01_001"]["model"]["decoder.final_layernorm.weight"]
    shutil.rmtree(folder)
    code, said = headway("convert", "from-megatron", str(write_ranks(folder, ranks)), str(tmp_path / "back"))
    assert code == 2 and "not all tensor-parallel ranks have decoder.final_layernorm.weight" in said, said
    assert os.listdir(tmp_path) == ["torn"]
