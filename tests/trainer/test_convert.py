"""`headway convert`: round trips of every layer and every kind of checkpoint, and what its own check catches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import model.hf.check as check
import model.hf.formats as formats
import model.hf.names as names
import trainer.convert
from model.hf.export import modelling_file
from model.hf.formats import FORMATS
from model.hf.loading import load
from model.hf.source import open_model
from model.mixers import MIXERS
from model.mixers.softmax import Softmax
from tests.checkpoints import architecture_of, ask_in_this_process, random_weights, stored_weights, write_step
from tests.conformance.models import CASES, mixer_class
from tests.pool import Pool
from tests.trainer.runs import VOCAB, begin_with, headway, stored, train, write_config, write_tokens

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers is imported once for all tests; `test_without_headway` is about processes of their own."""
    monkeypatch.setattr(trainer.convert, "ask_transformers", ask_in_this_process)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def done(*argv: str) -> None:
    code, said = headway(*argv)
    assert code == 0, said


def decoder(mixers: dict[str, Any], feedforwards: dict[str, Any], **model: Any) -> dict[str, Any]:
    settings = {"d_model": 32, "num_layers": 3, "vocab_size": 61, "pattern": [*mixers]} | model
    return {"model": settings, "mixers": mixers, "feedforwards": feedforwards}


SWIGLU = {"swiglu": {"d_ff": 48}}
GROUPED = {"num_heads": 4, "num_kv_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", decoder({"softmax": GROUPED}, SWIGLU)),
    "llama tied, with biases": ("llama", decoder({"softmax": GROUPED}, SWIGLU, bias=True, tie_embeddings=True)),
    "llama, wide heads": ("llama", decoder({"softmax": {"num_heads": 2, "head_dim": 10}}, SWIGLU, norm_eps=1e-5)),
    "mistral with a window": ("mistral", decoder({"softmax": GROUPED | {"window": 7}}, SWIGLU, max_positions=80)),
    "mistral, heads that do not divide": ("mistral", decoder({"softmax": {"num_heads": 3, "head_dim": 6}}, SWIGLU)),
    "qwen2 with windows in some layers": (
        "qwen2",
        decoder(
            {"full": GROUPED | {"kind": "softmax", "qkv_bias": True}}
            | {"near": GROUPED | {"kind": "softmax", "qkv_bias": True, "window": 9}},
            SWIGLU,
            pattern=["full", "near", "near"],
        ),
    ),
    "qwen3": (
        "qwen3",
        decoder({"softmax": GROUPED | {"qk_norm": True, "head_dim": 10, "rope_theta": 500.0}}, SWIGLU),
    ),
    "gpt2": (
        "gpt2",
        decoder(
            {"softmax": {"num_heads": 4}},
            {"gelu": {"d_ff": 48}},
            positions="learned",
            max_positions=70,
            norm="layernorm",
            bias=True,
            tie_embeddings=True,
        ),
    ),
    "gpt2, exact gelu, untied": (
        "gpt2",
        decoder(
            {"softmax": {"num_heads": 4}},
            {"gelu": {"d_ff": 48, "tanh": False}},
            positions="learned",
            max_positions=70,
            norm="layernorm",
            bias=True,
        ),
    ),
    "minimax": (
        "minimax",
        decoder(
            {"minimax": {"num_heads": 4, "head_dim": 6}, "softmax": GROUPED | {"head_dim": 6}},
            SWIGLU,
            num_layers=4,
            pattern=["minimax*3", "softmax"],
            residual="normalised",
            residual_factors={"minimax": [3.5, 1.0], "softmax": [2.5, 0.5], "swiglu": [1.5, 2.0]},
        ),
    ),
    "transnormer, tied": (
        "transnormer",
        decoder(
            {"lightning": {"num_heads": 5, "head_dim": 6, "lrpe_layers": [0, 2]}},
            {"sglu": {"d_ff": 48}},
            norm="srmsnorm",
            positions="none",
            tie_embeddings=True,
            embedding_scale="sqrt",
        ),
    ),
    "transnormer, untied": (
        "transnormer",
        decoder(
            {"lightning": {"num_heads": 4, "activation": "1+elu"}},
            {"sglu": {"d_ff": 48}},
            norm="srmsnorm",
            positions="none",
        ),
    ),
    "a hybrid, parallel": (
        "headway",
        decoder({"lightning": {"num_heads": 4}, "softmax": GROUPED}, SWIGLU, num_layers=4, residual="parallel"),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_out_and_in_again(kind: str, tmp_path: Path) -> None:
    """The commands compare logits themselves; here: it is the class expected, and no parameter has changed."""
    model_type, tables = KINDS[kind]
    step = write_step(tmp_path / "step", tables)
    out, back = tmp_path / "out", tmp_path / "back"
    done("convert", "to-hf", str(step), str(out))
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (model_type, [FORMATS[model_type].class_name])
    done("convert", "from-hf", str(out), str(back))
    ours, again = stored_weights(step), stored_weights(back)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    # What has come in goes out as the same class again.
    done("convert", "to-hf", str(back), str(tmp_path / "again"))
    twice = json.loads((tmp_path / "again" / "config.json").read_text())
    # Our tables say in full what they left to defaults before.
    assert {k: v for k, v in twice.items() if k != "headway"} == {k: v for k, v in config.items() if k != "headway"}


def all_layers() -> dict[str, Any]:
    """One model in which every registered mixer stands under each of its examples, and every feed-forward."""
    mixers = {f"{kind}-{index}": {"kind": kind} | mixer_class(kind).examples[index] for kind, index in CASES}
    feedforwards = {"swiglu": {"d_ff": 48}, "sglu": {"d_ff": 40}, "gelu": {"d_ff": 56}}
    count = len(mixers)
    pattern = [[*feedforwards][index % len(feedforwards)] for index in range(count)]
    return decoder(mixers, feedforwards, num_layers=count, feedforward_pattern=pattern)


def test_every_mixer_goes_out_and_comes_in(tmp_path: Path) -> None:
    step = write_step(tmp_path / "step", all_layers())
    out, back = tmp_path / "out", tmp_path / "back"
    done("convert", "to-hf", str(step), str(out), "--max-shard-size", "40KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    done("convert", "from-hf", str(out), str(back))
    ours, again = stored_weights(step), stored_weights(back)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    tokens = torch.randint(61, (2, 30))
    assert torch.equal(load(step)[0](tokens), load(out)[0](tokens))


@pytest.mark.parametrize("kind", MIXERS)
def test_the_modelling_file_names_nothing_of_ours(kind: str) -> None:
    for example in mixer_class(kind).examples:
        text = modelling_file(architecture_of(decoder({kind: example}, SWIGLU)), "model.hf.modeling")
        assert not [
            line for line in text.splitlines() if line.startswith(("from model", "from kernels", "import model"))
        ]
        compile(text, "modeling_headway.py", "exec")


def test_without_headway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process where Headway cannot be imported the export loads, gives the same logits, and decodes with its
    cache what Headway decodes: ragged prompts, greedily."""
    monkeypatch.undo()
    step, out = write_step(tmp_path / "step", all_layers()), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out))
    from model.decoding import Sampling, decode

    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [1, 8, 2, 8]]
    (tmp_path / "script.py").write_text(SCRIPT)
    finished = subprocess.run(
        [
            sys.executable,
            "-P",
            "script.py",
            str(out),
            str(Path(names.__file__).with_name("probe.py")),
            json.dumps(prompts),
        ],
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["greedy"] == decode(load(step)[0], prompts, 20, Sampling())
    assert found["beams with a cache"] == found["beams without"]
    assert found["saved again"] is True


SCRIPT = """
import importlib.util, json, sys
folder, probe, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location("probe", probe)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
blocked = ["kernels", "model", "parallel", "trainer", "launch", "tests"]
sys.meta_path = [module._Without(finder, blocked) for finder in sys.meta_path]
try:
    import model
    raise SystemExit("Headway can be imported: this proves nothing")
except ModuleNotFoundError:
    pass
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
length = max(map(len, prompts))
tokens = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
settings = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
greedy = model.generate(tokens, **settings)[:, length:].tolist()
beams = [model.generate(tokens, num_beams=3, use_cache=cached, **settings).tolist() for cached in (True, False)]
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
print(json.dumps({"greedy": greedy, "beams with a cache": beams[0], "beams without": beams[1], "saved again": same}))
"""


# --- what the check catches -------------------------------------------------------------------------------------------


def swap_q_and_k(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = {"q": "k", "k": "q"}
    table = {name: swapped.get(name[0], name[0]) + name[1:] for name in Softmax.hf if "norm" not in name}
    monkeypatch.setattr(Softmax, "hf", Softmax.hf | {name: Softmax.hf[other] for name, other in table.items()})


def permute_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the queries alone: by one head."""
    take, lay_out = names.Place.take, names.Place.lay_out

    def moved(place: names.Place, tensor: torch.Tensor, rows: int) -> torch.Tensor:
        return tensor.roll(rows, 0) if "q_proj" in place.name else tensor

    monkeypatch.setattr(names.Place, "take", lambda place, whole: moved(place, take(place, whole), 8))
    monkeypatch.setattr(names.Place, "lay_out", lambda place, parts: moved(place, lay_out(place, parts), 8))


def lose_the_tied_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration says nothing of the tie, and the file holds no head."""

    def untied(original: Any) -> Any:
        return lambda architecture: original(architecture) | {"tie_word_embeddings": False}

    changed = {kind: replace(entry, write=untied(entry.write)) for kind, entry in formats.FORMATS.items()}
    monkeypatch.setattr(formats, "FORMATS", changed)


def forget_the_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another base of the rotary frequencies than the model's."""
    from model.hf.formats import llama

    written = llama.written_by_transformers
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    monkeypatch.setattr(llama, "written_by_transformers", lambda kind, **settings: written(kind, **(settings | base)))


@pytest.fixture
def tied_llama(tmp_path: Path) -> Path:
    tables = decoder({"softmax": {"num_heads": 4}}, SWIGLU, tie_embeddings=True)
    # As small as weights are when a model is new: then a mix-up shows least.
    weights = {name: w if "norm" in name else w / 15 for name, w in random_weights(architecture_of(tables)).items()}
    return write_step(tmp_path / "step", tables, weights)


@pytest.mark.parametrize("fault", [swap_q_and_k, permute_heads, lose_the_tied_head, forget_the_rotation])
def test_a_wrong_export_is_caught(
    fault: Any, tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    code, said = headway("convert", "to-hf", str(tied_llama), str(tmp_path / "out"))
    assert code == 2
    assert "transformers computes something else from the export" in said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("fault", [swap_q_and_k, permute_heads])
def test_a_wrong_import_is_caught(
    fault: Any, tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("convert", "to-hf", str(tied_llama), str(tmp_path / "out"))
    fault(monkeypatch)
    code, said = headway("convert", "from-hf", str(tmp_path / "out"), str(tmp_path / "back"))
    assert code == 2
    assert "Headway computes something else from the import" in said
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob("*.partial"))


def test_only_what_rounding_leaves_is_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the usual tolerance, ten times the difference between our own fp32 and fp64; never beyond the utmost."""
    source = open_model(write_step(tmp_path / "step", KINDS["llama"][1]))
    tokens = torch.randint(61, (1, 9))
    ours = torch.ones(1, 9, 61)

    def judged(difference: float, rounding: float) -> bool:
        monkeypatch.setattr(check, "native_logits", lambda *_, **__: ours.double() + rounding)
        return check.judge(ours + difference, ours, source, tokens, torch.float32).holds

    assert judged(5e-5, 0.0)
    assert not judged(5e-4, 1e-6)
    assert judged(5e-4, 7e-5)
    assert not judged(2e-3, 1e-2)
    monkeypatch.undo()
    rounding = check.compare(
        check.native_logits(source, tokens, torch.float32).double(),
        check.native_logits(source, tokens, torch.float32, precision=torch.float64),
    )
    assert 0 < rounding.error < 1e-5


# --- dtypes, sizes, names ---------------------------------------------------------------------------------------------


def test_a_bf16_run_goes_out_in_bf16_and_its_angles_do_not(tmp_path: Path) -> None:
    _, tables = KINDS["transnormer, tied"]
    step, out = write_step(tmp_path / "step", tables, precision="bf16"), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out))
    written = load_file(out / "model.safetensors")
    wide = {name for name, tensor in written.items() if tensor.dtype == torch.float32}
    assert wide == {f"model.layers.{layer}.token_mixer.lrpe.theta" for layer in (0, 2)}
    assert {tensor.dtype for name, tensor in written.items() if name not in wide} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    done("convert", "to-hf", str(step), str(tmp_path / "wide"), "--dtype", "float32")
    assert load_file(tmp_path / "wide" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float32
    # What has come in keeps the type it came in as a habit, and its exact values.
    done("convert", "from-hf", str(out), str(tmp_path / "back"))
    done("convert", "to-hf", str(tmp_path / "back"), str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], written[name]) for name in written)


@pytest.mark.parametrize("head", ["absent", "the same", "another"])
def test_a_published_transnormer_says_by_its_head_whether_it_is_tied(head: str, tmp_path: Path) -> None:
    """As the released files: their keys alone, a pickled file in bf16, the head there or not."""
    _, tables = KINDS["transnormer, tied"]
    done("convert", "to-hf", str(write_step(tmp_path / "step", tables)), str(tmp_path / "out"))
    tensors = {name: t.bfloat16() for name, t in load_file(tmp_path / "out" / "model.safetensors").items()}
    if head != "absent":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (2.0 if head == "another" else 1.0)
    released = tmp_path / "released"
    released.mkdir()
    torch.save(tensors, released / "pytorch_model.bin")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("headway", "tie_word_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        del config[key]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM"}
    (released / "config.json").write_text(json.dumps(config))
    (released / "modeling_transnormer.py").write_text("raise SystemExit('code of a model folder was run')")
    done("convert", "from-hf", str(released), str(tmp_path / "back"))
    stored = stored_weights(tmp_path / "back")
    assert ("head.weight" in stored) == (head == "another")
    assert torch.equal(
        stored["layers.2.mixer.lrpe.theta"], tensors["model.layers.2.token_mixer.lrpe.theta"].float()[:, 0]
    )


def test_another_format_may_be_asked_for(tmp_path: Path) -> None:
    step = write_step(tmp_path / "step", KINDS["llama"][1])
    done("convert", "to-hf", str(step), str(tmp_path / "own"), "--format", "headway")
    assert (tmp_path / "own" / "modeling_headway.py").is_file()
    code, said = headway("convert", "to-hf", str(step), str(tmp_path / "qwen"), "--format", "qwen3")
    assert code == 2
    assert "--format qwen3: qk_norm = False, expected True." in said
    code, said = headway("convert", "to-hf", str(step), str(tmp_path / "gpt"), "--format", "gpt")
    assert "the nearest is 'gpt2'" in said


# --- a layer of one's own ---------------------------------------------------------------------------------------------

OWN_MIXER = '''
from dataclasses import dataclass
from mixing.helpers import half
from model.mixers.softmax import Softmax


class Halved(Softmax):
    """Softmax attention of half the strength."""

    def forward(self, x, ctx, cache=None, head_gate=None):
        return half(super().forward(x, ctx, cache, head_gate))
'''


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "code" / "mixing"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "mixers.py").write_text(OWN_MIXER)
    (package / "helpers.py").write_text("def half(x):\n    return 0.5 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mixing"]:
        del sys.modules[name]


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


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    step, out = write_step(tmp_path / "step", KINDS["llama"][1]), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out), "--max-shard-size", "30KB")
    return out


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


# --- MODEL is a Hugging Face folder -----------------------------------------------------------------------------------


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
