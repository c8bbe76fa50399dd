"""The sigmoid mixer against its equation: the bias, slopes by global head, the norm on its output, decoding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.attention.sigmoid import sigmoid_attention
from model.attention import AttentionMap
from model.context import Context
from model.decoding import Sampling, decode
from model.hf.names import places
from model.layer import Site
from model.mixers.sigmoid import Sigmoid, SigmoidConfig
from model.settings import build_architecture
from model.stack import Model
from parallel.recompute import recompute_blocks
from parallel.region import Region
from parallel.tensor import cut
from tests.conformance.models import built

WIDTH, TOKENS = 24, torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def build(faults: list[str] | None = None, *, mixer: dict[str, Any] | None = None, **model: Any) -> Any:
    tables = {
        "model": {"d_model": WIDTH, "num_layers": 2, "vocab_size": 12, "pattern": ["sigmoid"], "init_std": 0.3} | model,
        "mixers": {"sigmoid": {"num_heads": 4, "length": 8} | (mixer or {})},
        "feedforwards": {"swiglu": {"d_ff": 16}},
    }
    if faults is not None:
        return build_architecture(tables, faults)[1]
    return built(tables)


def plain(n: int, offset: int = 0) -> Context:
    return Context(positions=torch.arange(n)[None] + offset)


def alone(**settings: Any) -> Sigmoid:
    """A mixer without positions but its own."""
    config = SigmoidConfig(**({"num_heads": 4, "length": 8} | settings))
    mixer = Sigmoid(config, Site(layer=1, num_layers=2, d_model=WIDTH, positions="none")).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return mixer


@pytest.mark.parametrize(("bias_mode", "alibi"), [("const", False), ("per_row", False), ("const", True)])
def test_the_layer_is_its_equation(bias_mode: str, alibi: bool) -> None:
    """y = W_o of sum_j sigmoid(q_i k_j / sqrt(d) + b_i - slope (i - j)) v_j; queries 0, 1 and 2, 3 share keys."""
    mixer = alone(num_kv_heads=2, bias_mode=bias_mode, alibi=alibi)
    n, d = 7, 6
    x = torch.randn(1, n, WIDTH, dtype=torch.float64)
    out = torch.zeros(n, 4, d, dtype=torch.float64)
    for head in range(4):
        q = x[0] @ mixer.q.weight[head * d : (head + 1) * d].T
        k, v = (x[0] @ m.weight[head // 2 * d : (head // 2 + 1) * d].T for m in (mixer.k, mixer.v))
        slope = 2.0 ** (-8 * (head + 1) / 4) if alibi else 0.0
        for i in range(n):
            bias = -math.log(8 if bias_mode == "const" else i + 1)
            for j in range(i + 1):
                out[i, head] += torch.sigmoid(q[i] @ k[j] / math.sqrt(d) + bias - slope * (i - j)) * v[j]
    ctx = plain(n)
    mixer.prepare(ctx)
    torch.testing.assert_close(mixer(x, ctx)[0], out.flatten(1) @ mixer.o.weight.T)


def test_rows_weigh_about_one_where_the_bias_is_that_of_their_keys() -> None:
    """With weights near 0 the scores are: a constant bias gives early rows little, a bias by row gives each 1/2..1."""
    n = 64
    for bias_mode, wanted in (
        ("const", torch.arange(1.0, n + 1) / (n + 1)),
        ("per_row", torch.arange(1.0, n + 1) / torch.arange(2.0, n + 2)),
    ):
        mixer = alone(num_heads=1, length=n, bias_mode=bias_mode)
        with torch.no_grad():
            mixer.q.weight.zero_()
            mixer.v.weight.zero_()
            mixer.v.weight[0, 0] = 1.0
            mixer.o.weight.copy_(torch.eye(WIDTH))
        x = torch.zeros(1, n, WIDTH, dtype=torch.float64)
        x[..., 0] = 1.0
        ctx = plain(n)
        mixer.prepare(ctx)
        torch.testing.assert_close(mixer(x, ctx)[0, :, 0], wanted.double())


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_slopes_are_those_of_alibi(heads: int) -> None:
    """As the released function of arXiv 2108.12409 makes them, also where heads are no power of two; and in bf16."""

    def released(n: int) -> list[float]:
        def power_of_2(n: int) -> list[float]:
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]

        if math.log2(n).is_integer():
            return power_of_2(n)
        nearest = 2 ** math.floor(math.log2(n))
        return power_of_2(nearest) + released(2 * nearest)[0::2][: n - nearest]

    mixer = alone(num_heads=heads, head_dim=4, alibi=True).bfloat16()
    assert mixer.slopes is not None and mixer.slopes.dtype == torch.float32
    torch.testing.assert_close(mixer.slopes, torch.tensor(released(heads)))


def test_a_tensor_parallel_rank_has_the_slopes_of_its_global_heads() -> None:
    """Two of six heads on the second of three ranks; cast and moved, too."""
    architecture = build([], mixer={"num_heads": 6, "head_dim": 4, "alibi": True}, bias=True)
    with torch.device("meta"):
        model = Model(architecture)
    cut(model, Region("", 1, 3, False))
    here = model.to_empty(device="cpu").bfloat16().layers["0"].mixer
    assert torch.equal(here.slopes, alone(num_heads=6, head_dim=4, alibi=True).slopes[2:4])
    assert here.q.weight.shape == (8, WIDTH)


def test_alibi_takes_the_place_of_the_rotation() -> None:
    """What counts is the distance; without either, the last token cannot tell the order of those before it."""
    swapped = TOKENS[:, [1, 0, *range(2, 8)]]
    for mixer, positions, differs in (
        ({"alibi": True}, "rope", True),
        ({}, "rope", True),
        ({}, "none", False),
    ):
        model = build(mixer=mixer, positions=positions, num_layers=1)
        assert model.layers["0"].mixer._rotary is None or (positions == "rope" and not mixer)
        same = torch.allclose(model(TOKENS)[0, -1], model(swapped)[0, -1], rtol=1e-9)
        assert same != differs
    assert build(mixer={"num_heads": 8, "head_dim": 3, "alibi": True}) is not None


@pytest.mark.parametrize("residual", ["sequential", "parallel", "normalised"])
@pytest.mark.parametrize("hybrid", [True, False])
def test_the_norm_on_the_output_stands_before_the_residual(residual: str, hybrid: bool) -> None:
    model = build(mixer={"hybrid_norm": hybrid}, residual=residual, num_layers=1)
    block, ctx = model.layers["0"], model.context(TOKENS)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = model.embedding(TOKENS)
    normed = block.mixer_norm(x)
    mixed = block.mixer(normed, ctx)
    if hybrid:
        mixed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.mixer_out_norm.weight
    if residual == "parallel":
        wanted = x + mixed + block.feedforward(normed, ctx)
    elif residual == "sequential":
        wanted = x + mixed + block.feedforward(block.feedforward_norm(x + mixed), ctx)
    else:
        normed = block.feedforward_norm(normed + mixed)
        wanted = normed + block.feedforward(normed, ctx)
    torch.testing.assert_close(block(x, ctx), wanted)
    assert ("layers.0.mixer_out_norm.weight" in dict(model.named_parameters())) is hybrid


@pytest.mark.parametrize("mixer", [{"alibi": True}, {"bias_mode": "per_row"}, {"window": 3, "length": 3}], ids=str)
def test_a_batch_of_prompts_decodes_as_each_alone(mixer: dict[str, Any]) -> None:
    model = build(mixer=mixer)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together = decode(model, prompts, 4, Sampling())
    assert together == [decode(model, [prompt], 4, Sampling())[0] for prompt in prompts]
    tokens = list(prompts[0])
    for _ in range(4):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert together[0] == tokens[3:]


class Looking:
    """Notes the weights of every layer, and hands on the queries."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, AttentionMap]] = []

    def attention(self, layer: int, weights: AttentionMap) -> Tensor:
        self.seen.append((layer, weights))
        return weights.q_BNHd

    def residual(self, layer: int, x: Tensor) -> None: ...


@pytest.mark.parametrize(
    "mixer", [{}, {"alibi": True, "num_kv_heads": 2}, {"bias_mode": "per_row", "window": 5, "length": 5}], ids=str
)
def test_observers_are_shown_the_weights_that_mix_values(mixer: dict[str, Any]) -> None:
    model, looking = build(mixer=mixer), Looking()
    model.observer = looking
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    model(TOKENS, documents=documents)
    assert [layer for layer, _ in looking.seen] == [0, 1]
    here = model.layers["1"].mixer
    found = looking.seen[1][1]
    assert not found.normalised and found.extra_BNH is None
    weights_BHNM = found.log_weights(torch.arange(8)).exp()
    values = torch.randn(1, 8, found.k_BMGd.shape[2], 6, dtype=torch.float64)
    wanted = sigmoid_attention(
        found.q_BNHd,
        found.k_BMGd,
        values,
        found.visible,
        scale=found.scale,
        bias=here._bias,
        slopes_H=here.slopes,
        per_row=here.config.bias_mode == "per_row",
    )
    of_heads = values.repeat_interleave(4 // values.shape[2], dim=2)
    torch.testing.assert_close(torch.einsum("bhnm,bmhd->bnhd", weights_BHNM, of_heads), wanted)
    # A few queries at a time are the same rows.
    torch.testing.assert_close(found.log_weights(torch.tensor([2, 5])).exp(), weights_BHNM[:, :, [2, 5]])


@pytest.mark.parametrize("mixer", [{"alibi": True, "num_kv_heads": 2, "bias_mode": "per_row"}], ids=str)
@pytest.mark.parametrize("recomputed", ["none", "selective"])
def test_compiled_blocks_compute_the_same(mixer: dict[str, Any], recomputed: str) -> None:
    """Slopes and biases by row included; the conformance suite compiles the first example only."""
    torch._dynamo.reset()
    model, compiled = build(mixer=mixer, num_layers=1), build(mixer=mixer, num_layers=1)
    recompute_blocks(compiled, recomputed)
    for block in compiled.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    for one in (model, compiled):
        one(TOKENS).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("mixer", "said"),
    [
        ({"length": 0}, "mixers.sigmoid.length = 0 must be at least 1"),
        ({"window": 4}, "length = 8 is more than a token sees with window = 4: take length = 4"),
        ({"bias_mode": "row"}, "bias_mode = 'row': expected 'const' or 'per_row'"),
        ({"head_dim": 5}, "head_dim = 5 must be even"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3 does not divide num_heads = 4"),
        ({"key_bias": "head"}, "mixers.sigmoid.key_bias is no key of [mixers.sigmoid]"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(mixer: dict[str, Any], said: str) -> None:
    faults: list[str] = []
    assert build(faults, mixer=mixer) is None
    assert len(faults) == 1 and said in faults[0]


def test_the_length_has_no_default() -> None:
    faults: list[str] = []
    tables = {"model": {"d_model": 8, "num_layers": 1, "vocab_size": 8, "pattern": ["sigmoid"]}}
    build_architecture(tables | {"mixers": {"sigmoid": {"num_heads": 2}}, "feedforwards": {}}, faults)
    assert "mixers.sigmoid.length is missing." in faults


def test_families_of_hugging_face_have_no_name_for_the_norm() -> None:
    architecture = build([])
    with pytest.raises(ValueError, match=r"llama have no name for layers\.0\.mixer_out_norm\.weight"):
        places(architecture, "llama")
    assert (
        places(architecture, "headway")["layers.1.mixer_out_norm.weight"].name == "model.layers.1.mixer_out_norm.weight"
    )
