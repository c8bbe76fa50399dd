"""The stack's own parts: embedding, norms, residual forms, positions, initial values, feed-forwards, decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from model.decoding import Sampling, choose, decode
from model.initialisation import ROWS_PER_BLOCK, Constant, Normal, draw
from model.norms import make_norm
from model.settings import build_architecture
from model.stack import Model
from parallel.data import initialise


def build(**model: Any) -> Model:
    tables = {
        "model": {"d_model": 16, "num_layers": 2, "vocab_size": 50, "pattern": ["softmax"], "init_std": 0.3} | model,
        "mixers": {"softmax": {"num_heads": 2}, "lightning": {"num_heads": 2}},
        "feedforwards": {"swiglu": {"d_ff": 24}, "sglu": {"d_ff": 24}, "gelu": {"d_ff": 24}},
    }
    tables["model"].setdefault("feedforward_pattern", ["swiglu"])
    faults: list[str] = []
    _, architecture = build_architecture(tables, faults)
    assert architecture is not None, faults
    with torch.device("meta"):
        built = Model(architecture).double()
    initialise(built, seed=0, device=torch.device("cpu"))
    return built


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def test_a_norm_is_its_formula() -> None:
    x = torch.randn(3, 7, dtype=torch.float64)
    rms = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(make_norm("srmsnorm", 7, 1e-6)(x), x / rms)
    weighted = make_norm("rmsnorm", 7, 1e-6).double()
    torch.nn.init.normal_(weighted.weight)
    torch.testing.assert_close(weighted(x), x / rms * weighted.weight)
    layer = make_norm("layernorm", 7, 1e-5).double()
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    centred = x - x.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("kind", ["srmsnorm", "rmsnorm", "layernorm"])
def test_norm_statistics_of_bf16_are_fp32(kind: str) -> None:
    x = (torch.randn(2, 4096) * 100).to(torch.bfloat16)
    norm = make_norm(kind, 4096, 1e-6)
    for parameter in norm.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    exact = norm.double()(x.double())
    found = norm.to(torch.bfloat16)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("feedforward", ["swiglu", "sglu", "gelu"])
def test_a_feedforward_is_its_formula(feedforward: str) -> None:
    model = build(feedforward_pattern=[feedforward], bias=True)
    part, ctx = model.layers["0"].feedforward, model.context(TOKENS)
    x = torch.randn(2, 3, 16, dtype=torch.float64)

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ getattr(part, name).weight.T + getattr(part, name).bias

    hidden = {
        "swiglu": lambda: torch.nn.functional.silu(linear("gate", x)) * linear("up", x),
        "sglu": lambda: linear("gate", x) * linear("up", x),
        "gelu": lambda: torch.nn.functional.gelu(linear("up", x), approximate="tanh"),
    }[feedforward]()
    torch.testing.assert_close(part(x, ctx), linear("down", hidden))
    assert part.flops(1) == 2 * 16 * 24 * (2 if feedforward == "gelu" else 3)
    assert {name for name, _ in part.named_parameters()} <= part.sharding.keys()


def test_sequential_and_parallel_residuals() -> None:
    for residual in ("sequential", "parallel"):
        model = build(residual=residual, num_layers=1)
        block, ctx = model.layers["0"], model.context(TOKENS)
        x = model.embedding(TOKENS)
        normed = block.mixer_norm(x)
        after = x + block.mixer(normed, ctx)
        if residual == "parallel":
            wanted = after + block.feedforward(normed, ctx)
        else:
            wanted = after + block.feedforward(block.feedforward_norm(after), ctx)
        torch.testing.assert_close(block(x, ctx), wanted)


def test_tied_and_scaled_embeddings() -> None:
    model = build(tie_embeddings=True, embedding_scale="sqrt")
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    ctx = model.context(TOKENS)
    torch.testing.assert_close(model.embed(TOKENS, ctx), model.embedding.weight[TOKENS] * math.sqrt(16))
    x = torch.randn(1, 2, 16, dtype=torch.float64)
    torch.testing.assert_close(model.logits(x), model.final_norm(x) @ model.embedding.weight.T)
    assert build(embedding_scale=3.0).embedding_scale == 3.0


def test_positions_matter_as_they_should() -> None:
    swapped = TOKENS[:, [1, 0, *range(2, 8)]]
    for positions, differs in (("rope", True), ("learned", True), ("none", False)):
        # In one layer without positions, the last token cannot tell the order of those before it.
        model = build(positions=positions, max_positions=16 if positions == "learned" else 0, num_layers=1)
        same = torch.allclose(model(TOKENS)[0, -1], model(swapped)[0, -1], rtol=1e-9)
        assert same != differs, positions


def test_biases_are_there_when_asked_for() -> None:
    def biased(**settings: Any) -> set[str]:
        names = [name for name, _ in build(**settings).named_parameters()]
        return {name.split(".")[-2] for name in names if name.endswith(".bias")}

    assert biased() == set()
    assert biased(bias=True) == {"q", "k", "v", "o", "gate", "up", "down"}


def test_depth_scaled_outputs_start_smaller() -> None:
    plain, scaled = build(num_layers=8), build(num_layers=8, init_depth_scaled=True)
    for name in ("layers.3.mixer.o.weight", "layers.3.feedforward.down.weight"):
        torch.testing.assert_close(dict(scaled.named_parameters())[name] * 4, dict(plain.named_parameters())[name])


def test_rows_are_drawn_alike_whoever_draws_them() -> None:
    shape = torch.Size((2 * ROWS_PER_BLOCK + 37, 3))
    whole = draw("a.weight", Normal(0.02), shape, seed=5)
    for rows in (range(10), range(250, 520), range(511, 549), range(7, 7)):
        assert torch.equal(draw("a.weight", Normal(0.02), shape, 5, rows), whole[rows.start : rows.stop])
    assert whole.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(whole, draw("b.weight", Normal(0.02), shape, seed=5))
    assert not torch.equal(whole, draw("a.weight", Normal(0.02), shape, seed=6))
    assert not torch.equal(whole[:ROWS_PER_BLOCK], whole[ROWS_PER_BLOCK : 2 * ROWS_PER_BLOCK])
    assert draw("a.bias", Constant(1.0), torch.Size((4,)), 5).tolist() == [1.0] * 4


def test_declared_flops_of_a_model_are_its_parts_and_head() -> None:
    model = build()
    layers = sum(block.mixer.flops(8) + block.feedforward.flops(8) for block in model.layers.values())
    assert model.flops(8) == layers + 2 * 16 * 50


@pytest.mark.parametrize("pattern", [["softmax"], ["lightning"], ["lightning", "softmax"]])
def test_a_batch_of_prompts_decodes_as_each_alone(pattern: list[str]) -> None:
    model = build(pattern=pattern)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = decode(model, prompts, 12, Sampling())
    assert together == [decode(model, [prompt], 12, Sampling())[0] for prompt in prompts]
    # Greedy decoding is the argmax of the plain forward, one token after the other.
    tokens = list(prompts[0])
    for _ in range(12):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert together[0] == tokens[3:]


def test_decoding_ends_at_the_end_token() -> None:
    model = build()
    whole = decode(model, [[1, 2, 3]], 12, Sampling())[0]
    end = whole[5]
    assert decode(model, [[1, 2, 3]], 12, Sampling(), end_token=end)[0] == whole[: whole.index(end)]


def test_learned_positions_bound_decoding() -> None:
    model = build(positions="learned", max_positions=8)
    with pytest.raises(ValueError, match="at most 5 new tokens"):
        decode(model, [[1, 2, 3]], 6, Sampling())


def test_top_p_keeps_the_likeliest_tokens() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    shares = choose(logits, Sampling(1.0, 0.7), generator).bincount(minlength=4) / 4000
    assert shares[2:].sum() == 0
    assert shares[0].item() == pytest.approx(0.5 / 0.8, abs=0.03)
    cold = choose(logits, Sampling(0.5, 1.0), generator).bincount(minlength=4) / 4000
    assert cold[0].item() == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)
