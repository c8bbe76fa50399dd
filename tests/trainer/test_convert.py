"""`headway convert`: round trips of every layer and every kind of checkpoint, and what its own check catches."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer

import model.hf.check as check
import model.hf.formats as formats
import model.hf.names as names
from model.hf.export import modelling_file
from model.hf.formats import FORMATS
from model.hf.loading import load
from model.hf.source import open_model
from model.mixers import MIXERS
from model.mixers.softmax import Softmax
from tests.checkpoints import architecture_of, random_weights, stored_weights, write_step
from tests.conformance.models import CASES, mixer_class
from tests.trainer.conversions import EXPERTS, KINDS, SWIGLU, decoder, done
from tests.trainer.runs import headway
from trainer.data.tokenizer import load_tokenizer
from trainer.data.train_tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("in_this_process")


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


def test_a_mixture_of_one_expert_is_a_plain_feedforward_to_minimax(tmp_path: Path) -> None:
    """Its gate is 1, whatever its router says."""
    tables = KINDS["minimax with experts"][1]
    one = {"moe": EXPERTS | {"num_experts": 1, "top_k": 1}} | SWIGLU
    step, out = write_step(tmp_path / "step", tables | {"feedforwards": one}), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out))
    (mixed, _), (plain, read) = load(step), load(out)
    assert read["feedforwards"] == SWIGLU and read["model"]["residual_factors"]["swiglu"] == [1.5, 2.0]
    tokens = torch.randint(61, (2, 30))
    torch.testing.assert_close(plain(tokens), mixed(tokens))


@pytest.mark.parametrize("kind", ["transnormer, tied", "transnormer, untied"])
def test_transformers_saves_a_transnormer_under_its_published_names(kind: str, tmp_path: Path) -> None:
    """Packed on disk, apart in memory, packed again."""
    out, again = tmp_path / "out", tmp_path / "again"
    done("convert", "to-hf", str(write_step(tmp_path / "step", KINDS[kind][1])), str(out))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(out), trust_remote_code=True)
    theirs.save_pretrained(str(again))
    written, twice = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert "model.layers.0.token_mixer.qkvu_proj.weight" in twice
    assert written.keys() == twice.keys()
    assert all(torch.equal(written[name], twice[name]) for name in written)


def all_layers() -> dict[str, Any]:
    """One model in which every registered mixer stands under each of its examples, and every feed-forward."""
    mixers = {f"{kind}-{index}": {"kind": kind} | mixer_class(kind).examples[index] for kind, index in CASES}
    feedforwards = {"swiglu": {"d_ff": 48}, "sglu": {"d_ff": 40}, "gelu": {"d_ff": 56}, "moe": EXPERTS}
    count = len(mixers)
    pattern = [[*feedforwards][index % len(feedforwards)] for index in range(count)]
    return decoder(mixers, feedforwards, num_layers=count, feedforward_pattern=pattern)


@pytest.mark.matrix
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
    table = {name: swapped[name[0]] + name[1:] for name in Softmax.hf if name[:2] in ("q.", "k.")}
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


# --- tokenizers -------------------------------------------------------------------------------------------------------

PAIRS = [(a, b) for a in ("to", "be", "or") for b in ("not", "so")]
LINES = [f"{a} {b}\t{number}, naïve 🙂 {b}{a}\n" for number, (a, b) in enumerate(PAIRS)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("".join(LINES * 20))
    train_tokenizer([str(folder / "text.txt")], str(folder / "tokenizer"), 310)
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_prefix=str(folder / "unigram"),
        model_type="unigram",
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


@pytest.mark.parametrize("given", ["tokenizer", "tokenizer/tokenizer.model"])
def test_the_tokenizer_goes_along(given: str, words: Path, tmp_path: Path) -> None:
    """A folder, or a bare model of ours, whose Hugging Face files are made: the command compares the ids itself."""
    tables = decoder({"softmax": {"num_heads": 4}}, SWIGLU, vocab_size=310)
    step, out = write_step(tmp_path / "step", tables), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out), "--tokenizer", str(words / given))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(out)), load_tokenizer(words / "tokenizer")
    for text in [*check.TEXTS, *LINES]:
        assert theirs(text)["input_ids"] == ours.encode(text), text
    tokens = [
        json.loads((out / f"{name}.json").read_text())["eos_token_id"] for name in ("config", "generation_config")
    ]
    assert tokens == [ours.end_token] * 2
    done("generate", str(out), "--prompt", "to be", "--max-tokens", "3")


def test_a_tokenizer_that_transformers_would_read_otherwise_is_refused(words: Path, tmp_path: Path) -> None:
    tables = decoder({"softmax": {"num_heads": 4}}, SWIGLU, vocab_size=310)
    step, out = write_step(tmp_path / "step", tables), tmp_path / "out"
    code, said = headway("convert", "to-hf", str(step), str(out), "--tokenizer", str(words / "unigram.model"))
    assert code == 2
    assert "tokenizer" in said and "none" in said, said
    assert not out.exists()
    done("convert", "to-hf", str(step), str(out), "--tokenizer", "none")
