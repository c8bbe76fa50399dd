"""Lightning as TransNormerLLM's released code has it: what depends on global indices, and the parts of its block."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.lightning import decay_slopes
from model.context import Context
from model.layer import Site
from model.mixers.lightning import Lightning, LightningConfig
from model.positions import LRPE, lrpe_ladder
from model.settings import build_architecture
from model.stack import Model


def model_of(num_layers: int, num_heads: int, pattern: list[str], decay: str = "alibi_layer") -> Model:
    tables = {
        "model": {"d_model": 8 * num_heads, "num_layers": num_layers, "vocab_size": 8, "pattern": pattern},
        "mixers": {"lightning": {"num_heads": num_heads, "decay": decay}, "softmax": {"num_heads": num_heads}},
        "feedforwards": {"sglu": {"d_ff": 8}},
    }
    faults: list[str] = []
    _, architecture = build_architecture(tables, faults)
    assert architecture is not None, faults
    return Model(architecture)


@pytest.mark.parametrize("num_layers", [1, 4, 8])
def test_slopes_are_those_of_the_global_layer(num_layers: int) -> None:
    model = model_of(num_layers, 8, ["lightning"])
    for layer in range(num_layers):
        factor = 1 - (layer / (num_layers - 1) if num_layers > 1 else 0) + 1e-5
        wanted = [2.0 ** -(head + 1) * factor for head in range(8)]
        assert model.layers[str(layer)].mixer.slopes.tolist() == pytest.approx(wanted, rel=1e-6)


def test_softmax_layers_count_too() -> None:
    model = model_of(8, 4, ["lightning*3", "softmax"])
    for layer in (0, 1, 2, 4, 5, 6):
        wanted = decay_slopes("alibi_layer", 4, layer, 8)
        assert model.layers[str(layer)].mixer.slopes.tolist() == pytest.approx(wanted, rel=1e-6)


def test_forty_heads_are_not_in_monotone_order() -> None:
    slopes = model_of(2, 40, ["lightning"]).layers["0"].mixer.slopes.log2().neg()
    wanted = [0.25 * head for head in range(1, 33)] + [0.125 + 0.25 * head for head in range(8)]
    assert slopes.tolist() == pytest.approx(wanted, abs=1e-4)


def test_positions_enter_the_first_layer_only() -> None:
    model = model_of(3, 4, ["lightning"])
    assert [model.layers[str(layer)].mixer.lrpe is not None for layer in range(3)] == [True, False, False]


def test_the_block_is_the_papers_equation() -> None:
    """y = W_o (SRMSNorm(O) * U), O = (Q K^T * M) V over all heads together, phi = SiLU on q and k alone."""
    heads, dim, n = 2, 4, 7
    site = Site(layer=1, num_layers=3, d_model=heads * dim)
    mixer = Lightning(LightningConfig(num_heads=heads), site).double()
    x = torch.randn(1, n, heads * dim, dtype=torch.float64)
    out = torch.empty(n, heads, dim, dtype=torch.float64)
    for head in range(heads):
        rows = slice(head * dim, (head + 1) * dim)
        q, k = (torch.nn.functional.silu(x[0] @ m.weight[rows].T) for m in (mixer.q, mixer.k))
        v = x[0] @ mixer.v.weight[rows].T
        slope = 2.0 ** (-8 * (head + 1) / heads) * (1 - 1 / 2 + 1e-5)
        decay = torch.tensor([[math.exp(-slope * (t - s)) if t >= s else 0.0 for s in range(n)] for t in range(n)])
        out[:, head] = ((q @ k.T) * decay.double()) @ v
    wide = out.flatten(1)
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    wanted = (normed * (x[0] @ mixer.u.weight.T)) @ mixer.o.weight.T
    found = mixer(x, Context(positions=torch.arange(n)[None]))
    torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=1e-8)


def test_lrpe_is_the_cosine_of_the_distance_and_forgets_common_offsets() -> None:
    lrpe = LRPE(2, 5).double()
    with torch.no_grad():
        lrpe.theta.copy_(torch.rand(2, 5))
    q, k = torch.randn(2, 1, 1, 2, 5, dtype=torch.float64)
    for t, s in [(0, 0), (7, 3), (1_000_000, 999_000)]:
        product = (lrpe(q, torch.tensor([[t]])) * lrpe(k, torch.tensor([[s]]))).sum(-1)
        wanted = (q * k * torch.cos(lrpe.theta * (t - s))).sum(-1)
        torch.testing.assert_close(product, wanted, rtol=1e-7, atol=1e-8)


def test_lrpe_angles_hold_at_a_million_tokens_in_bf16() -> None:
    lrpe = LRPE(1, 4)
    with torch.no_grad():
        lrpe.theta.copy_(torch.tensor([[1.0, 0.1, 0.01, 0.001]]))
    x = torch.ones(1, 1, 1, 4, dtype=torch.bfloat16)
    found = lrpe(x, torch.tensor([[1_000_003]]))[0, 0, 0, :4].double()
    wanted = torch.cos(1_000_003 * lrpe.theta[0].double())
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)


def test_the_ladder_runs_over_all_heads() -> None:
    ladder = lrpe_ladder(torch.Size((4, 8)))
    assert ladder[0, 0] == 1
    assert ladder[2, 3].item() == pytest.approx(10000 ** (-2 * 19 / 32))


def test_a_zero_row_gives_zero_and_finite_gradients() -> None:
    mixer = Lightning(LightningConfig(num_heads=2), Site(layer=0, num_layers=1, d_model=8))
    # Memory that nobody has written to may hold what is no number.
    mixer.lrpe.theta.data = lrpe_ladder(mixer.lrpe.theta.shape).float()
    x = torch.zeros(1, 3, 8, requires_grad=True)
    out = mixer(x, Context(positions=torch.arange(3)[None]))
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert x.grad.isfinite().all()
