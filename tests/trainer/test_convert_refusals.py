"""What `headway convert` refuses: bad input, code nobody allowed, what is there already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import stored_weights, write_step
from tests.trainer.conversions import KINDS, SWIGLU, decoder, done
from tests.trainer.runs import headway

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("in_this_process")


def test_a_layer_of_ones_own_goes_with_its_source(own_package: None, tmp_path: Path) -> None:
    tables = decoder({"mine": {"kind": "mixing.mixers:Halved", "num_heads": 4}}, SWIGLU)
    step = write_step(tmp_path / "step", tables, allow_code=True)
    code, said = headway("convert", "to-hf", str(step), str(tmp_path / "out"))
    assert code == 2 and "--allow-code" in said
    done("convert", "to-hf", str(step), str(tmp_path / "out"), "--allow-code")
    text = (tmp_path / "out" / "modeling_headway.py").read_text()
    assert "def half" in text and "mixing.helpers import" not in text
    code, said = headway("convert", "from-hf", str(tmp_path / "out"), str(tmp_path / "back"))
    assert code == 2 and "--allow-code" in said
    done("convert", "from-hf", str(tmp_path / "out"), str(tmp_path / "back"), "--allow-code")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_short(folder: Path) -> None:
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_file(folder: Path) -> None:
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()


def lose_a_tensor(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"].pop("model.norm.weight")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BAD: dict[str, tuple[Any, list[str]]] = {
    "a truncated file": (cut_short, ["is damaged or cut short", ".safetensors"]),
    "a missing file": (lose_a_file, [".safetensors is missing."]),
    "a missing tensor": (lose_a_tensor, ["missing from the checkpoint: model.norm.weight."]),
    "an unknown architecture": (
        lambda folder: change_config(folder, model_type="llama4_text"),
        ["model_type = 'llama4_text' is no kind of checkpoint that Headway reads", "the nearest is 'llama'"],
    ),
    "remote code": (
        lambda folder: change_config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "m.Mine"}),
        ["model_type = 'mine'", "names code of its own, which Headway never runs"],
    ),
    "a configuration that disagrees": (
        lambda folder: change_config(folder, intermediate_size=64, num_hidden_layers=2),
        ["left over in the checkpoint", "model.layers.2.", "is [48, 32], expected [64, 32]"],
    ),
    "a scaled rotation": (
        lambda folder: change_config(folder, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ["rope_type = 'linear'"],
    ),
    "another activation and odd biases at once": (
        lambda folder: change_config(folder, hidden_act="relu", attention_bias=True),
        ["hidden_act = 'relu', expected 'silu'", "attention_bias = True and mlp_bias = False"],
    ),
    "a configuration that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["config.json is damaged"],
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_input_is_refused_in_sentences(fault: str, exported: Path, tmp_path: Path) -> None:
    spoil, wanted = BAD[fault]
    spoil(exported)
    for command in (["convert", "from-hf", str(exported), str(tmp_path / "back")], ["generate", str(exported)]):
        code, said = headway(*command)
        assert code == 2, said
        assert "Traceback" not in said
        if command[0] == "convert":
            assert all(words in said for words in wanted), said
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob("*.partial"))


MIXTRAL = KINDS["mixtral"][1]
OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "settings of gates": (
        {"score": "sigmoid", "gate_scale": 2.0, "bias_rate": 0.01, "shared": "swiglu"},
        [
            "score = 'sigmoid', expected 'softmax'",
            "gate_scale = 2.0, expected 1.0",
            "shared = 'swiglu', expected None",
            "bias_rate = 0.01, expected 0.0",
        ],
    ),
    "one expert for a token": (
        {"top_k": 1, "gate_norm": "none"},
        ["gate_norm = 'none', expected 'selected'", "top_k = 1 would be a gate of 1 there"],
    ),
    "experts of another kind": ({"expert": "sglu"}, ["experts are of the kind swiglu there, and sglu is not"]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_mixture_that_mixtral_cannot_say_goes_out_as_our_own(what: str, tmp_path: Path) -> None:
    settings, said_of_it = OTHERS[what]
    feedforwards = {"moe": MIXTRAL["feedforwards"]["moe"] | settings, "sglu": {"d_ff": 8}} | SWIGLU
    tables = decoder(MIXTRAL["mixers"], feedforwards, feedforward_pattern=["moe"])
    step, out = write_step(tmp_path / "step", tables), tmp_path / "out"
    code, said = headway("convert", "to-hf", str(step), str(out), "--format", "mixtral")
    assert code == 2 and all(words in said for words in said_of_it), said
    done("convert", "to-hf", str(step), str(out))
    assert json.loads((out / "config.json").read_text())["model_type"] == "headway"


def test_one_expert_of_several_for_a_token_is_refused(tmp_path: Path) -> None:
    step, out = write_step(tmp_path / "step", MIXTRAL), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out))
    change_config(out, num_experts_per_tok=1, hidden_act="relu")
    code, said = headway("convert", "from-hf", str(out), str(tmp_path / "back"))
    assert code == 2 and "hidden_act = 'relu'" in said
    assert "num_experts_per_tok = 1 of num_local_experts = 5" in said and "num_experts_per_tok = 2 can be read" in said
    change_config(out, num_experts_per_tok=7, hidden_act="silu")
    code, said = headway("convert", "from-hf", str(out), str(tmp_path / "back"))
    assert code == 2 and "the nearest that can is 5" in said


def test_routers_stay_as_exact_as_they_are(tmp_path: Path) -> None:
    """They are in fp32 in every model: what is compared rounds neither ours nor those of transformers."""
    step, out, back = write_step(tmp_path / "step", MIXTRAL), tmp_path / "out", tmp_path / "back"
    done("convert", "to-hf", str(step), str(out))
    done("convert", "from-hf", str(out), str(back), "--dtype", "bfloat16")
    ours, again = stored_weights(step), stored_weights(back)
    router, expert = "layers.1.feedforward.router.weight", "layers.1.feedforward.experts.3.up.weight"
    assert torch.equal(again[router], ours[router])
    assert torch.equal(again[expert], ours[expert].bfloat16())


def test_pickled_code_is_not_run(exported: Path, tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (exec, ("raise SystemExit('pickled code was run')",))

    for path in exported.glob("*.safetensors*"):
        path.unlink()
    (exported / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}))
    code, said = headway("convert", "from-hf", str(exported), str(tmp_path / "back"))
    assert code == 2
    assert "pytorch_model.bin" in said


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, out = write_step(tmp_path / "step", KINDS["llama"][1]), tmp_path / "out"
    import model.hf.export as export

    written: list[Path] = []

    def interrupted(tensors: Any, path: Path, **rest: Any) -> None:
        assert not out.exists(), "a kill at this moment would leave half an export under its name"
        if written:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", interrupted)
        assert headway("convert", "to-hf", str(step), str(out), "--max-shard-size", "30KB")[0] == 70
    assert written and not out.exists() and not list(tmp_path.glob("*.partial"))
    # What a killed one leaves behind is in nobody's way.
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("half")
    done("convert", "to-hf", str(step), str(out))
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_there_is_not_replaced_unasked(exported: Path, tmp_path: Path) -> None:
    step = tmp_path / "step"
    code, said = headway("convert", "to-hf", str(step), str(exported))
    assert code == 2 and "--overwrite" in said
    done("convert", "to-hf", str(step), str(exported), "--overwrite", "--dtype", "bfloat16")
    code, said = headway("convert", "to-hf", str(exported), str(step), "--overwrite")
    assert code == 2 and "is no Hugging Face folder, so it is not replaced" in said
    code, said = headway("convert", "from-hf", str(step), str(tmp_path / "b"))
    assert code == 2 and "is a checkpoint of Headway already" in said
    wrong = ["--dtype", "int8", "--max-shard-size", "much"]
    code, said = headway("convert", "to-hf", str(tmp_path / "none"), str(exported), *wrong)
    assert code == 2
    assert all(words in said for words in ("--dtype 'int8'", "size 'much'", "none does not exist", "--overwrite")), said


def test_everyone_may_read_what_others_may_read(exported: Path) -> None:
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1
