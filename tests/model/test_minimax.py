"""MiniMax-01's attention and residual, against the equations and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from model.context import Context
from model.layer import Site
from model.mixers.minimax import MiniMax, MiniMaxConfig
from model.settings import build_architecture
from model.stack import Model
from parallel.data import initialise

WIDTH, TOKENS = 24, torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def build(faults: list[str], **model: Any) -> Model | None:
    tables = {
        "model": {"d_model": WIDTH, "num_layers": 2, "vocab_size": 12, "pattern": ["minimax", "softmax"]} | model,
        "mixers": {"minimax": {"num_heads": 3}, "softmax": {"num_heads": 2}},
        "feedforwards": {"swiglu": {"d_ff": 16}, "gelu": {"d_ff": 16}},
    }
    tables["model"].setdefault("feedforward_pattern", ["swiglu", "gelu"])
    _, architecture = build_architecture(tables, faults)
    if architecture is None:
        return None
    with torch.device("meta"):
        built = Model(architecture).double()
    initialise(built, seed=0, device=torch.device("cpu"))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0.0, 0.3)
    return built


def test_the_layer_is_its_equation() -> None:
    """y = W_o (RMSNorm(O) * sigmoid(W_u x)), O = (Q K^T * M) V, SiLU on q, k and v, a weight in the norm.

    The norm's eps is 1e-6 whatever that of the block's norms is.
    """
    heads, dim, n = 3, 4, 7
    site = Site(layer=1, num_layers=3, d_model=10, norm_eps=0.5)
    mixer = MiniMax(MiniMaxConfig(num_heads=heads, head_dim=dim), site).double()
    torch.nn.init.normal_(mixer.norm.weight)
    x = torch.randn(1, n, 10, dtype=torch.float64)
    out = torch.empty(n, heads, dim, dtype=torch.float64)
    for head in range(heads):
        rows = slice(head * dim, (head + 1) * dim)
        q, k, v = (silu(x[0] @ m.weight[rows].T) for m in (mixer.q, mixer.k, mixer.v))
        slope = 2.0 ** (-8 * (head + 1) / heads) * (1 - 1 / (2 + 1e-5) + 1e-5)
        decay = torch.tensor([[math.exp(-slope * (t - s)) if t >= s else 0.0 for s in range(n)] for t in range(n)])
        out[:, head] = ((q @ k.T) * decay.double()) @ v
    wide = out.flatten(1)
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    wanted = (normed * torch.sigmoid(x[0] @ mixer.u.weight.T)) @ mixer.o.weight.T
    found = mixer(x, Context(positions=torch.arange(n)[None]))
    torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("heads", [6, 8])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = modeling.MiniMaxConfig(hidden_size=48, num_attention_heads=heads, num_hidden_layers=5, block_size=4)
    for layer in range(5):
        mixer = MiniMax(MiniMaxConfig(num_heads=heads), Site(layer=layer, num_layers=5, d_model=48))
        theirs = modeling.MiniMaxLightningAttention(config, layer).slope_rate.flatten()
        # Their factor of the last layer, 1e-5 left over from 1, has lost digits in fp32.
        torch.testing.assert_close(mixer.slopes, theirs, rtol=1e-6, atol=1e-9)


def test_settings_that_cannot_be_built_are_refused() -> None:
    assert MiniMaxConfig(num_heads=3).faults(24) == MiniMaxConfig(num_heads=5, head_dim=6).faults(24) == []
    assert "num_heads = 5 does not divide model.d_model = 24" in MiniMaxConfig(num_heads=5).faults(24)[0]
    assert MiniMaxConfig(num_heads=3, head_dim=0).faults(24) == ["head_dim = 0 must be at least 1."]


def residual(block: Any, x: Tensor, ctx: Context, factors: list[tuple[float, float]]) -> Tensor:
    for norm, layer, (alpha, beta) in zip(
        (block.mixer_norm, block.feedforward_norm),
        (lambda x: block.mixer(x, ctx), lambda x: block.feedforward(x, ctx)),
        factors,
        strict=True,
    ):
        x = norm(x)
        x = alpha * x + beta * layer(x)
    return x


def test_the_normalised_residual_is_its_equation() -> None:
    """x <- norm(x); x <- alpha x + beta layer(x), for the mixer and then for the feed-forward, factors by name."""
    faults: list[str] = []
    factors = {"minimax": [3.5, 0.5], "softmax": [2.0, 0.75], "gelu": [1.5, 1.25]}
    model = build(faults, residual="normalised", residual_factors=factors)
    assert model is not None, faults
    ctx, x = model.context(TOKENS), model.embedding(TOKENS)
    for layer, wanted in (("0", [(3.5, 0.5), (1.0, 1.0)]), ("1", [(2.0, 0.75), (1.5, 1.25)])):
        torch.testing.assert_close(model.layers[layer](x, ctx), residual(model.layers[layer], x, ctx, wanted))


def test_a_block_of_the_normalised_residual_does_not_see_the_scale_of_its_input() -> None:
    model = build([], residual="normalised", norm_eps=0.0)
    assert model is not None
    ctx, x = model.context(TOKENS), model.embedding(TOKENS)
    torch.testing.assert_close(model.layers["0"](7 * x, ctx), model.layers["0"](x, ctx))


@pytest.mark.parametrize(
    ("factors", "settings", "said"),
    [
        ({"minimax": [2.0, 1.0]}, {"residual": "sequential"}, 'it is "sequential": leave the factors out, or take'),
        ({"minmax": [2.0, 1.0]}, {}, "names 'minmax', which is in no layer"),
        ({"minmax": [2.0, 1.0]}, {}, "the nearest is 'minimax'"),
        ({"softmax": [2.0, 1.0]}, {"pattern": ["minimax"]}, "names 'softmax', which is in no layer"),
        ({"minimax": [2.0]}, {}, "model.residual_factors.minimax.1 is missing"),
        ({"minimax": ["big", 1.0]}, {}, "model.residual_factors.minimax.0 = 'big': expected"),
    ],
)
def test_factors_that_would_do_nothing_are_refused(
    factors: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    faults: list[str] = []
    assert build(faults, **({"residual": "normalised", "residual_factors": factors} | settings)) is None
    assert len(faults) == 1 and said in faults[0]


def test_a_factor_for_two_things_of_one_name_is_refused() -> None:
    tables = {
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 8, "pattern": ["it"], "residual": "normalised"},
        "mixers": {"it": {"kind": "softmax", "num_heads": 1}},
        "feedforwards": {"it": {"kind": "gelu", "d_ff": 8}},
    }
    tables["model"]["residual_factors"] = {"it": [2.0, 1.0]}
    faults: list[str] = []
    build_architecture(tables, faults)
    assert [fault for fault in faults if "both a mixer and a feed-forward" in fault] == faults != []
