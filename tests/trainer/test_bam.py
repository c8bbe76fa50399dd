"""Models of experts from dense ones that were trained on from one seed: what they compute, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer.mixing
from model.hf.loading import load
from tests.checkpoints import architecture_of, random_weights, stored_weights, write_step
from tests.pool import Pool
from tests.trainer.conversions import decoder, done
from tests.trainer.runs import VOCAB, begin_with, headway, train, write_config, write_tokens
from trainer.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("in_this_process")

HEADS = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True}
SWIGLU = {"swiglu": {"d_ff": 24}}
DENSE = decoder({"softmax": HEADS}, SWIGLU, d_model=32, num_layers=2, vocab_size=VOCAB, bias=True)
PARALLEL = decoder({"softmax": HEADS}, SWIGLU, d_model=32, num_layers=2, vocab_size=VOCAB, residual="parallel")
TOKENS = torch.arange(40).remainder(VOCAB)[None] * 7 % VOCAB


def trained_on(folder: Path, tables: dict[str, Any], seed: int | None, **options: Any) -> Path:
    """A model a little, but in every parameter, away from the one of no seed."""
    weights = random_weights(architecture_of(tables))
    if seed is not None:
        apart = random_weights(architecture_of(tables), seed)
        weights = {name: x + 0.2 * apart[name] for name, x in weights.items()}
    return write_step(folder, tables, weights, **options)


@pytest.fixture(scope="module", params=["sequential", "parallel"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A seed, and two that were trained on."""
    folder = tmp_path_factory.mktemp("models")
    tables = DENSE if request.param == "sequential" else PARALLEL
    return [trained_on(folder / name, tables, seed) for name, seed in (("seed", None), ("code", 1), ("law", 2))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


def mixed(models: list[Path], out: Path, *flags: str) -> Path:
    done("upcycle", "bam", str(models[0]), str(out), "--experts", *map(str, models[1:]), *flags)
    return out


def average(stored: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([weights[name] for weights in stored]).mean(0)


# ----------------------------------------------------------------------------------------- where weights come from


@pytest.mark.parametrize("with_seed", [True, False])
@pytest.mark.parametrize("shared_kv", [True, False])
def test_each_expert_is_one_models_and_the_rest_an_average(
    models: list[Path], tmp_path: Path, with_seed: bool, shared_kv: bool
) -> None:
    flags = [*([] if with_seed else ["--no-with-seed"]), *(["--shared-kv"] if shared_kv else [])]
    model, tables = load(mixed(models, tmp_path / "out", *flags))
    experts = [stored_weights(path) for path in (models if with_seed else models[1:])]
    count = len(experts)
    assert tables["mixers"]["bam"]["num_experts"] == tables["feedforwards"]["moe"]["num_experts"] == count
    found, compared = dict(model.named_parameters()), set()
    for name in experts[0]:
        part = name.split(".")
        of_experts = part[0] == "layers" and part[2] in ("mixer", "feedforward")
        if not of_experts or (shared_kv and part[3] in ("k", "v", "k_norm")):
            torch.testing.assert_close(found[name], average(experts, name), rtol=1e-6, atol=1e-7, msg=name)
            compared.add(name)
            continue
        for number, weights in enumerate(experts):
            new = ".".join((*part[:3], "experts", str(number), *part[3:]))
            wanted = weights[name] * (count if part[3] == "down" else 1)
            torch.testing.assert_close(found[new], wanted, rtol=1e-7, atol=0, msg=new)
            compared.add(new)
    routers = {name for name in found if name not in compared}
    assert routers == {f"layers.{layer}.{part}.router.weight" for layer in (0, 1) for part in ("mixer", "feedforward")}
    for name in routers:
        if "feedforward" in name:
            assert (found[name] == 0).all()
        else:
            assert 0.01 < found[name].std() < 0.03


def test_what_it_computes_is_the_equation(models: list[Path], tmp_path: Path) -> None:
    """Layer by layer from dense models: attentions weighed by a router, and the feed-forward that it chooses."""
    out = mixed(models, tmp_path / "out", "--ffn-gate-norm", "none", "--router-std", "0.5")
    model, _ = load(out)
    dense = [load(path)[0] for path in models]
    stored = [stored_weights(path) for path in models]
    for other in dense:
        for name, parameter in other.named_parameters():
            if name.split(".")[0] != "layers" or name.split(".")[2].endswith("_norm"):
                parameter.data.copy_(average(stored, name))
    plain = dense[0]
    ctx = plain.context(TOKENS)
    x = plain.embedding(TOKENS)
    choices = []
    for layer in ("0", "1"):
        block, blocks = model.layers[layer], [other.layers[layer] for other in dense]
        normed = blocks[0].mixer_norm(x)
        gates = (normed @ block.mixer.router.weight.T).softmax(-1)
        mixed_in = sum(gates[..., e, None] * other.mixer(normed, ctx) for e, other in enumerate(blocks))
        if block.residual == "sequential":
            x = x + mixed_in
            normed, mixed_in = blocks[0].feedforward_norm(x), 0
        gates = (normed @ block.feedforward.router.weight.T).softmax(-1)
        choice = gates.argmax(-1)
        choices.append(choice)
        outs = torch.stack([gates[..., e, None] * other.feedforward(normed, ctx) for e, other in enumerate(blocks)])
        x = x + mixed_in + outs.gather(0, choice[None, ..., None].expand(1, *x.shape))[0]
    assert all(len(choice.unique()) == 3 for choice in choices)
    wanted = plain.logits(x)
    torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--shared-kv", "--router-std", "3"),
        ("--top-k", "2", "--ffn-gate-norm", "selected", "--router-std", "3"),
        ("--top-k", "3"),
        ("--dtype", "bfloat16", "--no-with-seed"),
    ],
    ids=" ".join,
)
def test_models_that_are_alike_make_the_seed(
    models: list[Path], tmp_path: Path, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    seed = models[0]
    model, _ = load(mixed([seed, seed, seed], tmp_path / "out", *flags))
    assert "all models are alike: logits as it begins, and of the seed: largest difference" in capsys.readouterr().out
    if "--dtype" not in flags:
        wanted = load(seed)[0](TOKENS)
        torch.testing.assert_close(model(TOKENS), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_it_says_how_far_models_are_apart(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed(models, tmp_path / "out")
    said = capsys.readouterr().out
    stored = [stored_weights(path) for path in models]
    for path, weights in zip(models[1:], stored[1:], strict=True):
        far = []
        for wanted in (True, False):
            names = [n for n in weights if (n.split(".")[0] == "layers" and "norm" not in n.split(".")[2]) == wanted]
            apart = torch.cat([(weights[name] - stored[0][name]).flatten() for name in names]).norm()
            far.append((apart / torch.cat([stored[0][name].flatten() for name in names]).norm()).item())
        line = f"{path}: {far[0]:.2%} from the seed in what becomes an expert, {far[1]:.2%} in what is averaged"
        assert line in said
    sequential = load(models[0])[1]["model"]["residual"] == "sequential"
    assert ("the paper's blocks are parallel; these are sequential" in said) == sequential
    for expert, path in enumerate(models):
        assert f"logits with all gates on expert {expert}, and of {path} between averages: largest difference" in said


# ------------------------------------------------------------------------------------------------ what comes then


def test_it_trains_and_goes_out_again(pool: Pool, data: str, models: list[Path], tmp_path: Path) -> None:
    out = mixed(models, tmp_path / "out")
    config = write_config(tmp_path, data, optimizer={"lr": 0.01})
    begin_with(config, out)
    results = pool.run(train, 2, config, "--parallel.tp", "2")
    assert [code for code, _ in results] == [0, 0], results
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    done("convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "tuned"))
    trained, again = load(tmp_path / "run")[0], load(tmp_path / "tuned")[0]
    for name, parameter in trained.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert (trained.layers["0"].feedforward.router.weight != 0).any()


# ---------------------------------------------------------------------------------------------------- refusals


def refused(models: list[Path], out: Path, *flags: str) -> str:
    code, said = headway("upcycle", "bam", str(models[0]), str(out), "--experts", *map(str, models[1:]), *flags)
    assert code == 2 and not out.exists() and not list(out.parent.glob("*.partial*")), said
    return said


def test_models_that_differ_are_refused_each_difference_named(tmp_path: Path) -> None:
    seed = trained_on(tmp_path / "seed", DENSE, None)
    wide = decoder({"own": {"kind": "softmax"} | HEADS | {"num_kv_heads": 4}}, {"swiglu": {"d_ff": 48}}, vocab_size=33)
    other = trained_on(tmp_path / "other", wide, 1)
    shallow = trained_on(tmp_path / "shallow", DENSE | {"model": DENSE["model"] | {"num_layers": 1}}, 2)
    same = DENSE | {
        "mixers": {"own": {"kind": "softmax", "head_dim": 8} | HEADS},
        "model": DENSE["model"] | {"pattern": ["own"]},
    }
    alike = trained_on(tmp_path / "alike", same, 3)
    said = refused([seed, other, shallow, alike], tmp_path / "out", "--top-k", "9")
    for words in (
        f"{other}: model.vocab_size = 33, expected {VOCAB}",
        f"{other}: model.num_layers = 3, expected 2",
        f"{other}: model.bias = False, expected True",
        f"{shallow}: model.num_layers = 1, expected 2",
        "top_k = 9 of num_experts = 4 cannot be chosen: the nearest that can is 4",
    ):
        assert words in said, words
    assert str(alike) not in said
    wide["model"] |= {"num_layers": 2, "vocab_size": VOCAB, "bias": True}
    said = refused([seed, trained_on(tmp_path / "same depth", wide, 1)], tmp_path / "out")
    assert "mixers.own.num_kv_heads = 4, expected 2, as the seed has." in said
    assert "feedforwards.swiglu.d_ff = 48, expected 24, as the seed has." in said
    assert said.count("expected") == 2, "once for all layers of one name"


@pytest.mark.parametrize(
    ("mixers", "feedforwards", "words"),
    [
        ({"bam": HEADS | {"num_experts": 2}}, SWIGLU, "mixers.bam is a mixture of attentions already"),
        ({"lightning": {"num_heads": 2}}, SWIGLU, "mixers.lightning is Lightning: only softmax attention can be"),
        ({"softmax": HEADS | {"sink": True}}, SWIGLU, "mixers.softmax has a key bias or a sink, which a mixture of"),
        (
            {"softmax": HEADS},
            SWIGLU | {"moe": {"num_experts": 2, "top_k": 2, "expert": "swiglu"}},
            "feedforwards.moe is a mixture of experts already",
        ),
    ],
)
def test_what_is_no_dense_softmax_model_is_refused(
    mixers: dict[str, Any], feedforwards: dict[str, Any], words: str, tmp_path: Path
) -> None:
    step = write_step(tmp_path / "step", decoder(mixers, feedforwards, num_layers=2, vocab_size=VOCAB))
    assert words in refused([step, step], tmp_path / "out")


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    seed, out = trained_on(tmp_path / "seed", DENSE, None), tmp_path / "out"
    assert "1 of 2 experts at least: name more with --experts" in refused([seed, seed], out, "--no-with-seed")
    assert 'gate_norm = "selected" with top_k = 1' in refused([seed, seed], out, "--ffn-gate-norm", "selected")
    assert "router_init_std = -1" in refused([seed, seed], out, "--router-std", "-1")
    said = refused([seed, tmp_path / "nowhere", tmp_path / "gone"], out, "--dtype", "int8")
    assert "nowhere does not exist" in said and "gone does not exist" in said and "--dtype 'int8'" in said


def test_what_computes_something_else_is_not_written(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer.mixing.Parts.of_expert

    def one_for_another(self: Any, expert: int, name: str) -> Tensor:
        mixed_up = name.endswith("1.mixer.k.weight") and not proving
        return plain(self, 0 if mixed_up else expert, name)

    proving: list[bool] = []
    read = trainer.mixing.OneExpert.weights

    def dense(self: Any, architecture: Any) -> Any:
        proving.append(True)
        return read(self, architecture)

    monkeypatch.setattr(trainer.mixing.Parts, "of_expert", one_for_another)
    monkeypatch.setattr(trainer.mixing.OneExpert, "weights", dense)
    assert "it computes something else than its models" in refused(models, tmp_path / "out")
