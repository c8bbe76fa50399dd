"""Weights per modality: the equalities that hold whatever the mixer (fp64 unless said)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.grouped
from kernels.grouped import Groups, each_its_own
from model.cache import Cache
from model.decoding import Sampling, decode
from model.settings import build_architecture
from model.stack import Model
from model.towers import LinearTowers, Towers, tied
from model.untie import UntieConfig
from tests.conformance.models import CASES, D_MODEL, VOCAB, built, mixer_class, positions_of, random_documents

Tables = dict[str, Any]
RANGES = [[0, 20, 55, VOCAB], [20, 40], [40, 55]]
THREE = {"modalities": 3, "ranges": RANGES}
MOE = {"moe": {"num_experts": 4, "top_k": 2, "expert": "swiglu", "router_init_std": 0.5}, "swiglu": {"d_ff": 24}}


def tables(kind: str = "softmax", example: int = 0, **model: Any) -> Tables:
    settings = {"d_model": D_MODEL, "num_layers": 2, "vocab_size": VOCAB, "pattern": ["it"], "bias": True}
    return {
        "model": settings | {"init_std": 0.3} | model,
        "mixers": {"it": {"kind": kind} | mixer_class(kind).examples[example]},
        "feedforwards": {"swiglu": {"d_ff": 48}},
    }


def with_norms_drawn(model: Model, seed: int = 5) -> Model:
    """Norms and biases begin alike everywhere: here they do not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def tie(untied: Model, dense: Model, modality: int | None = None) -> None:
    """Give towers the dense model's weights: all of them, or those of one modality."""
    theirs = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in untied.named_parameters():
            mine = modality is None or ".towers." not in name or f".towers.{modality}." in name
            if mine:
                parameter.copy_(theirs[tied(name)])


def sample(n: int = 19, rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("position", ["pre", "sandwich_out"])
@pytest.mark.parametrize(("kind", "example"), CASES)
def test_tied_towers_are_the_dense_model(kind: str, example: int, position: str) -> None:
    shape = tables(kind, example, norm_position=position)
    dense, untied = with_norms_drawn(built(shape)), built(shape | {"untie": THREE})
    tie(untied, dense)
    tokens, documents = sample(n=24), random_documents(3, 24)
    wanted = dense(tokens, documents=documents, positions=positions_of(documents))
    found = untied(tokens, documents=documents, positions=positions_of(documents))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    found.square().mean().backward()
    wanted.square().mean().backward()
    theirs: dict[str, Tensor] = {}
    for name, parameter in untied.named_parameters():
        assert parameter.grad is not None, name
        theirs[tied(name)] = theirs.get(tied(name), 0) + parameter.grad
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(theirs[name], parameter.grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in CASES}))
def test_tokens_of_one_modality_see_its_weights_alone(kind: str) -> None:
    """Bit for bit: nothing is put in another order, and no shape is another."""
    shape = tables(kind)
    untied = with_norms_drawn(built(shape | {"untie": THREE}))
    dense = built(shape)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            mine = [p for other, p in untied.named_parameters() if tied(other) == name]
            parameter.copy_(mine[1 if len(mine) > 1 else 0])
    tokens = sample(n=24) % 20 + 20
    assert torch.equal(untied(tokens), dense(tokens))
    assert not torch.allclose(untied(tokens, modalities=torch.zeros_like(tokens)), dense(tokens))


def test_one_modality_is_the_dense_model() -> None:
    dense, untied = built(tables()), built(tables() | {"untie": {"modalities": 1}})
    tie(untied, dense)
    tokens = sample()
    assert torch.equal(untied(tokens, modalities=torch.zeros_like(tokens)), dense(tokens))


def by_hand(model: Model, tokens: Tensor, modalities: Tensor) -> Tensor:
    """Softmax attention with q_t = W_Q^m x_t and so on, token by token, as the paper's equations stand (Alg. 1)."""
    ours = dict(model.named_parameters())
    x = ours["embedding.weight"][tokens]
    heads, width = 4, D_MODEL // 4
    places = torch.arange(tokens.shape[1], dtype=torch.float64)
    angles = places[:, None] / 10000.0 ** (torch.arange(0, width, 2) / width)

    def of(name: str, x: Tensor) -> Tensor:
        before, _, kind = name.rpartition(".")
        out = []
        for row, numbers in zip(x, modalities.tolist(), strict=True):
            for token, m in zip(row, numbers, strict=True):
                if kind == "norm":
                    weight = ours[f"{before}.towers.{m}.weight"]
                    out.append(token / (token.square().mean() + 1e-6).sqrt() * weight)
                elif before.endswith("feedforward"):
                    gate, up, down = (ours[f"{before}.towers.{m}.{k}.weight"] for k in ("gate", "up", "down"))
                    out.append(down @ (torch.nn.functional.silu(gate @ token) * (up @ token)))
                else:
                    out.append(ours[f"{before}.towers.{m}.weight"] @ token)
        return torch.stack(out).view(*x.shape[:2], -1)

    def turned(y: Tensor) -> Tensor:
        y = y.unflatten(-1, (heads, width))
        a, b = y.chunk(2, -1)
        # The table of rotations is fp32.
        cos, sin = (angles.cos().float().double()[:, None], angles.sin().float().double()[:, None])
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    for layer in ("layers.0", "layers.1"):
        q, k = turned(of(f"{layer}.mixer.q.map", x)), turned(of(f"{layer}.mixer.k.map", x))
        v = of(f"{layer}.mixer.v.map", x).unflatten(-1, (heads, width))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / width**0.5
        a = torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(2)
        x = x + of(f"{layer}.mixer_norm.norm", of(f"{layer}.mixer.o.map", a))
        x = x + of(f"{layer}.feedforward_norm.norm", of(f"{layer}.feedforward.map", x))
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * ours["final_norm.weight"]
    return x @ ours["head.weight"].T


@pytest.mark.parametrize("present", [[0, 1, 2], [0, 2], [1]])
def test_the_equations(present: list[int]) -> None:
    """Forward and every gradient, with a modality absent; a gradient of zero is there."""
    model = with_norms_drawn(built(tables(norm_position="sandwich_out", bias=False) | {"untie": THREE}))
    tokens = sample(n=9, rows=2)
    choice = torch.randint(len(present), tokens.shape, generator=torch.Generator().manual_seed(3))
    modalities = torch.tensor(present)[choice]
    wanted = by_hand(model, tokens, modalities)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad((wanted * weights).sum(), list(model.parameters()), allow_unused=True)
    found = model(tokens, modalities=modalities)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    (found * weights).sum().backward()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert parameter.grad is not None, name
        expected = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9, msg=name)
    absent = [n for n in names if ".towers." in n and not any(f".towers.{m}." in n for m in present)]
    assert all(not model.get_parameter(name).grad.any() for name in absent)
    assert len(absent) == (3 - len(present)) * 2 * 9


def test_rows_and_their_modalities_change_places_together() -> None:
    """Without a causal order, tokens may come in any, with their modalities and positions."""
    model = with_norms_drawn(built(tables() | {"untie": {"modalities": 3}}))
    tokens, positions = sample(n=11), torch.arange(11).expand(3, -1)
    modalities = torch.randint(3, tokens.shape, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(2))
    plain = model(tokens, positions=positions, modalities=modalities, causal=False)
    moved = model(tokens[:, order], positions=positions[:, order], modalities=modalities[:, order], causal=False)
    torch.testing.assert_close(moved, plain[:, order], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        model(tokens.flip(0), modalities=modalities.flip(0)), model(tokens, modalities=modalities).flip(0)
    )


@pytest.mark.parametrize("kind", ["softmax", "lightning", "minimax", "moh", "bam"])
def test_a_later_modality_changes_nothing_before(kind: str) -> None:
    model = with_norms_drawn(built(tables(kind) | {"untie": {"modalities": 3}}))
    tokens = sample(n=16)
    modalities = torch.randint(3, tokens.shape, generator=torch.Generator().manual_seed(1))
    other = modalities.clone()
    other[:, 10] = (other[:, 10] + 1) % 3
    one, two = model(tokens, modalities=modalities), model(tokens, modalities=other)
    torch.testing.assert_close(one[:, :10], two[:, :10], rtol=1e-12, atol=1e-12)
    assert ((one - two)[:, 10:].abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("sizes", [[5, 0, 9], [0, 14, 0], [4, 5, 5]])
def test_one_grouped_product_is_the_loop(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """As a GPU does it, where the shapes allow: here in fp32, forward and gradients, an empty modality included."""
    numbers = torch.arange(3).repeat_interleave(torch.tensor(sizes)).view(2, 7).roll(3, dims=1)
    groups = Groups(numbers, 3)
    assert groups.sizes == sizes
    maps = [torch.nn.Linear(16, 32, bias=False) for _ in range(3)]
    x = torch.randn(2, 7, 16, requires_grad=True)
    looped = groups.restore(each_its_own(maps, groups.sort(x), groups))
    one_by_one = torch.stack(
        [maps[m].weight @ token for m, token in zip(numbers.flatten(), x.flatten(0, 1), strict=True)]
    )
    torch.testing.assert_close(looped, one_by_one.view(2, 7, 32))
    parameters = [x, *(each.weight for each in maps)]
    wanted = torch.autograd.grad(looped.square().sum(), parameters)
    monkeypatch.setattr(kernels.grouped, "one_product_serves", lambda *_: True)
    groups.forget()
    grouped = groups.restore(each_its_own(maps, groups.sort(x), groups))
    torch.testing.assert_close(grouped, looped)
    for found, expected in zip(torch.autograd.grad(grouped.square().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_sorted_once_is_not_sorted_again() -> None:
    groups = Groups(torch.tensor([[0, 1, 0, 1]]), 2)
    assert groups.order is not None and groups.order.tolist() == [0, 2, 1, 3]
    assert groups.rows_of(1).tolist() == [1, 3]
    x = torch.randn(1, 4, 8)
    rows = groups.sort(x)
    assert groups.sort(x) is rows and groups.sort(x.clone()) is not rows
    back = groups.restore(rows)
    assert torch.equal(back, x) and groups.sort(back) is rows
    groups.forget()
    assert groups.sort(back) is not rows


@pytest.mark.parametrize("kind", ["softmax", "lightning", "moh", "bam"])
def test_one_cache_serves_all_modalities(kind: str) -> None:
    """A token at a time across boundaries of modalities, as the whole at once; and batches of uneven prompts."""
    model = with_norms_drawn(built(tables(kind) | {"untie": THREE}))
    tokens = sample(n=14)
    wanted, cache = model(tokens), Cache()
    assert UntieConfig(**THREE).of_tokens(tokens).unique(dim=1).shape[1] > 3
    steps = [model(tokens[:, :5], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(5, 14))]
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=1e-9, atol=1e-9)
    prompts = [tokens[0, :7].tolist(), tokens[1, :3].tolist()]
    both = decode(model, prompts, 8, Sampling())
    assert both == [decode(model, [prompt], 8, Sampling())[0] for prompt in prompts]


def test_a_model_whose_ids_do_not_say_wants_to_be_told() -> None:
    model = built(tables() | {"untie": {"modalities": 2}})
    with pytest.raises(ValueError, match=r"weights for each of 2 modalities, and ids do not say .* give `modalities`"):
        model(sample())


def test_what_is_untied_and_what_is_not() -> None:
    """Routers, norms over all heads, angles and the vocabulary stay one; the norm of queries is per modality."""
    model = built(tables("softmax", 1) | {"untie": THREE})
    own = {tied(name) for name, _ in model.named_parameters() if ".towers." in name}
    assert {"layers.0.mixer.q_norm.weight", "layers.1.mixer.k.bias", "layers.0.mixer_norm.weight"} <= own
    assert {"embedding.weight", "head.weight", "final_norm.weight"}.isdisjoint(own)
    routed = built(tables("moh") | {"untie": THREE})
    assert not [n for n, _ in routed.named_parameters() if ".towers." in n and "rout" in n]
    minimax = built(tables("minimax") | {"untie": THREE})
    assert "layers.0.mixer.norm.weight" in dict(minimax.named_parameters())


@pytest.mark.parametrize("parts", [["qkv"], ["o"], ["feedforward"], ["norms"], ["qkv", "norms"]])
def test_parts(parts: list[str]) -> None:
    model = built(tables() | {"untie": THREE | {"parts": parts}})
    linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LinearTowers)}
    norms = {name for name, m in model.layers["0"].named_modules() if type(m) is Towers}
    assert linear == {*("qkv" if "qkv" in parts else ""), *("o" if "o" in parts else "")}
    assert norms == ({"mixer_norm", "feedforward_norm"} if "norms" in parts else set())
    assert any("feedforward.towers" in n for n, _ in model.named_parameters()) == ("feedforward" in parts)


def test_without_parts_modalities_are_told_apart_in_metrics_alone() -> None:
    dense, told = built(tables()), built(tables() | {"untie": THREE | {"parts": []}})
    assert [name for name, _ in told.named_parameters()] == [name for name, _ in dense.named_parameters()]
    assert torch.equal(told(sample()), dense(sample()))
    assert torch.equal(told(sample(), modalities=sample() % 3), dense(sample()))


def test_towers_draw_their_own_values() -> None:
    """From their names; norms and biases begin alike."""
    model = built(tables() | {"untie": THREE})
    first, second = (model.get_parameter(f"layers.0.mixer.q.towers.{m}.weight") for m in (0, 1))
    assert first.std().item() == pytest.approx(0.3, rel=0.1) and not torch.allclose(first, second)
    assert (model.get_parameter("layers.0.mixer_norm.towers.2.weight") == 1).all()


def test_as_many_operations_as_the_dense_model() -> None:
    dense, untied = built(tables()), built(tables() | {"untie": THREE})
    assert untied.flops(64) == dense.flops(64)
    parts = [parameter.numel() for name, parameter in dense.named_parameters() if name.startswith("layers.")]
    more = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in dense.parameters())
    assert more == 2 * sum(parts)


def test_a_mixture_of_experts_in_one_tower() -> None:
    """It routes the tokens of its modality alone: with all experts alike, the others' outputs are the plain ones."""
    shape = tables(bias=False) | {"feedforwards": MOE}
    shape["untie"] = THREE | {"feedforwards": {"1": "moe"}, "names": []}
    shape["model"]["feedforward_pattern"] = ["swiglu"]
    model = built(shape)
    assert [type(t).__name__ for t in model.layers["0"].feedforward.by_tower.values()] == ["SwiGLU", "MoE", "SwiGLU"]
    tokens = sample()
    modalities = UntieConfig(**THREE).of_tokens(tokens)
    x = torch.randn(3, 19, D_MODEL, dtype=torch.float64)
    ctx = model.context(tokens, modalities=modalities)
    found = model.layers["0"].feedforward(x, ctx)
    for m, tower in model.layers["0"].feedforward.by_tower.items():
        torch.testing.assert_close(found[modalities == m], tower(x, ctx)[modalities == m], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("untie", "said"),
    [
        ({"modalities": 2, "ranges": [[0, 30], [31, 61]]}, ["id 30 is in no range"]),
        ({"modalities": 2, "ranges": [[0, 30], [35, 61]]}, ["ids 30 to 34 are in no range"]),
        ({"modalities": 2, "ranges": [[0, 30], [30, 50]]}, ["ids 50 to 60 are in no range"]),
        (
            {"modalities": 2, "names": ["text", "image"], "ranges": [[0, 31], [29, 61]]},
            ["ids 29 to 30 are text's and image's: ranges may not overlap"],
        ),
        ({"modalities": 2, "ranges": [[0, 30], [30, 70]]}, ["ids 30 to 69 of 1 reach beyond model.vocab_size = 61"]),
        ({"modalities": 2, "ranges": [[0, 30, 30], [30, 61]]}, ["[0, 30, 30] of 0 must be pairs"]),
        ({"modalities": 3, "ranges": [[0, 61]]}, ["untie.ranges has 1 entries for modalities = 3"]),
        (
            {"modalities": 0},
            ["untie.modalities = 0 must be at least 1"],
        ),
        (
            {"modalities": 2, "parts": ["qkv"], "names": ["a/b"], "feedforwards": {"image": "swiglo"}},
            [
                "untie.names has 1 names for modalities = 2",
                "untie.names has 'a/b'",
                "untie.feedforwards names 'image', which is no modality",
                '"feedforward" is not among untie.parts',
                "untie.feedforwards.image = 'swiglo' is no [feedforwards.NAME]; the nearest is 'swiglu'",
            ],
        ),
        ({"modalities": 2, "parts": ["kv"]}, ["untie.parts.0 = 'kv': expected 'qkv', 'o', 'feedforward' or 'norms'"]),
    ],
)
def test_refusals(untie: Tables, said: list[str]) -> None:
    faults: list[str] = []
    build_architecture(tables() | {"untie": untie}, faults)
    together = "\n".join(faults)
    assert all(sentence in together for sentence in said), together


def test_norms_stand_in_one_place() -> None:
    faults: list[str] = []
    build_architecture(tables(norm_position="sandwich_out", residual="parallel"), faults)
    assert len(faults) == 1 and 'take residual = "sequential", or norm_position = "pre"' in faults[0]
