"""What takes weight in softmax attention and gives nothing: key biases and sinks, against the eager softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.attention import Visible
from kernels.attention.softmax import softmax_attention
from model.attention import AttentionMap
from model.cache import Cache
from model.decoding import Sampling, decode
from model.hf.formats import choose_format
from model.settings import build_architecture
from model.stack import undecayed_names
from parallel.recompute import recompute_blocks
from tests.conformance.models import built, positions_of, random_documents

WIDTH = 24
OPTIONS: list[dict[str, Any]] = [{"key_bias": "head"}, {"key_bias": "shared"}, {"sink": True}]
every_option = pytest.mark.parametrize("option", OPTIONS, ids=str)
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def build(faults: list[str] | None = None, **mixer: Any) -> Any:
    tables = {
        "model": {"d_model": WIDTH, "num_layers": 1, "vocab_size": 12, "init_std": 0.3},
        "mixers": {"softmax": {"num_heads": 4, "num_kv_heads": 2} | mixer},
        "feedforwards": {"swiglu": {"d_ff": 16}},
    }
    if faults is not None:
        return build_architecture(tables, faults)[1]
    model = built(tables)
    for name, parameter in model.named_parameters():
        if name.endswith(("key_bias", "sink")):
            nn.init.normal_(parameter)
    return model


def leaves(n: int = 9, m: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = [(2, n, 4, 6), (2, m, 2, 6), (2, m, 2, 6), (2, n, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def eager(q: Tensor, k: Tensor, v: Tensor, extra: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over M + 1 keys, the value of one of which is zero; and the logarithm of the sums without it."""
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(6)).masked_fill(~seen, -math.inf)
    weights = torch.cat((scores, extra.transpose(1, 2)[..., None]), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhnm,bmhd->bnhd", weights, v), scores.logsumexp(-1).transpose(1, 2)


def masks(n: int, m: int) -> dict[str, tuple[Visible, Tensor | None, bool]]:
    """What is visible, and how fused attention is told of it."""
    documents = random_documents(2, m)
    packed = Visible(n, m, m - n, documents=documents[:, m - n :], key_documents=documents)
    found: dict[str, tuple[Visible, Tensor | None, bool]] = {"packed": (packed, packed.of(torch.arange(n)), False)}
    found["both ways"] = (Visible(n, m, m - n, causal=False), None, False)
    if n == m:
        found["causal"] = (Visible(n, m), None, True)
    return found


@pytest.mark.parametrize(("n", "m"), [(9, 9), (3, 9), (1, 9), (2, 2)])
def test_fused_attention_with_an_extra_logit_is_the_eager_softmax(n: int, m: int) -> None:
    """Outputs and every gradient, that of the logit included: under a mask, causal without one, and looking both
    ways; and both are the plain attention times sigmoid(lse - logit)."""
    for name, (visible, mask, is_causal) in masks(n, m).items():
        q, k, v, extra = inputs = leaves(n, m)
        seen = visible.of(torch.arange(n))
        longer = None if mask is None else nn.functional.pad(mask, (1, 0), value=True)
        found = softmax_attention(q, k, v, mask=longer, is_causal=is_causal, extra_BNH=extra)
        wanted, lse = eager(q, k, v, extra, seen)
        cotangent = torch.randn_like(wanted)
        torch.testing.assert_close(found, wanted, msg=name)
        for a, b in zip(
            torch.autograd.grad(found, inputs, cotangent), torch.autograd.grad(wanted, inputs, cotangent), strict=True
        ):
            torch.testing.assert_close(a, b, msg=name)
        plain = softmax_attention(q, k, v, mask=mask, is_causal=is_causal)
        torch.testing.assert_close(plain * torch.sigmoid(lse - extra)[..., None], found, msg=name)
        nothing = softmax_attention(q, k, v, mask=longer, is_causal=is_causal, extra_BNH=torch.full_like(extra, -1e4))
        torch.testing.assert_close(nothing, plain, rtol=1e-12, atol=1e-14, msg=name)


def eager_layer(mixer: Any, x: Tensor, ctx: Any) -> Tensor:
    """The mixer with its extra logit written out, after arXiv 2410.10781: k* joins the keys after the rotation."""
    q, (k, v) = mixer.turned(mixer._queries(x), ctx), mixer._keys_values(x, ctx)
    seen = Visible(x.shape[1], x.shape[1], documents=ctx.documents, key_documents=ctx.documents)
    if mixer.sink is not None:
        extra = mixer.sink.expand(*q.shape[:3])
    else:
        bias = mixer.shared_key_bias.expand(4, 6) if mixer.key_bias is None else mixer.key_bias
        extra = torch.stack([q[:, :, head] @ bias[head] / math.sqrt(6) for head in range(4)], dim=-1)
    out, _ = eager(q, k, v, extra, seen.of(torch.arange(x.shape[1])))
    return mixer.o(out.flatten(2))


@every_option
@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_is_the_eager_softmax_over_one_key_more(option: dict[str, Any], packed: bool) -> None:
    model = build(qk_norm=True, **option)
    mixer = model.layers["0"].mixer
    documents = random_documents(2, 8) if packed else None
    positions = positions_of(documents) if packed else None
    ctx = model.context(TOKENS, documents, positions)
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    found, wanted = mixer(x, ctx), eager_layer(mixer, x, ctx)
    torch.testing.assert_close(found, wanted)
    cotangent = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, [*mixer.parameters()], cotangent),
        torch.autograd.grad(wanted, [*mixer.parameters()], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_shared_key_bias_is_one_for_each_head_that_are_all_alike() -> None:
    shared, apart = build(key_bias="shared").layers["0"].mixer, build(key_bias="head").layers["0"].mixer
    with torch.no_grad():
        apart.key_bias.copy_(shared.shared_key_bias.expand(4, 6))
        x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
        ctx = build().context(TOKENS)
        for mixer in (shared, apart):
            mixer.prepare(ctx)
        torch.testing.assert_close(shared(x, ctx), apart(x, ctx))


def test_without_weight_it_is_plain_attention() -> None:
    """A sink of -1e4; and a key bias that every query multiplies to nothing takes the weight of a score of 0."""
    plain, sunk = build(), build(sink=True)
    nn.init.constant_(sunk.layers["0"].mixer.sink, -1e4)
    torch.testing.assert_close(sunk(TOKENS), plain(TOKENS), rtol=1e-12, atol=1e-13)
    biased, zero = build(key_bias="head"), build(sink=True)
    nn.init.zeros_(biased.layers["0"].mixer.key_bias)
    nn.init.zeros_(zero.layers["0"].mixer.sink)
    torch.testing.assert_close(biased(TOKENS), zero(TOKENS), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(zero(TOKENS), plain(TOKENS), rtol=1e-3)


@every_option
def test_what_is_no_token_is_in_no_cache(option: dict[str, Any]) -> None:
    model, cache = build(**option), Cache()
    whole = model(TOKENS)
    parts = [model(TOKENS[:, first:end], cache=cache) for first, end in ((0, 3), (3, 4), (4, 5), (5, 8))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.layer(0)["k"].append(torch.empty(2, 0, 2, 6, dtype=torch.float64)).shape[1] == 8
    prompts = [[1, 2, 3], [4]]
    together = decode(model, prompts, 3, Sampling())
    assert together == [decode(model, [prompt], 3, Sampling())[0] for prompt in prompts]


class Looking:
    """Notes the weights, and hands on the queries."""

    found: AttentionMap

    def attention(self, layer: int, weights: AttentionMap) -> Tensor:
        self.found = weights
        return weights.q_BNHd

    def residual(self, layer: int, x: Tensor) -> None: ...


@every_option
def test_observers_are_told_what_takes_weight(option: dict[str, Any]) -> None:
    model, looking = build(**option), Looking()
    model.observer = looking
    model(TOKENS)
    shown = looking.found
    assert shown.normalised and shown.extra_BNH is not None
    weights = shown.log_weights(torch.arange(8)).exp()
    divided = weights / (weights.sum(-1, keepdim=True) + shown.extra_BNH.transpose(1, 2).exp()[..., None])
    values = torch.randn(2, 8, 2, 6, dtype=torch.float64)
    wanted = softmax_attention(shown.q_BNHd, shown.k_BMGd, values, mask=None, is_causal=True, extra_BNH=shown.extra_BNH)
    torch.testing.assert_close(torch.einsum("bhnm,bmhd->bnhd", divided, values.repeat_interleave(2, dim=2)), wanted)


@every_option
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_blocks_compute_the_same(option: dict[str, Any], packed: bool) -> None:
    """Under selective recomputation; the conformance suite compiles the first example only."""
    torch._dynamo.reset()
    model, compiled = build(**option), build(**option)
    compiled.load_state_dict(model.state_dict())
    recompute_blocks(compiled, "selective")
    for block in compiled.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    documents = random_documents(2, 8) if packed else None
    for one in (model, compiled):
        one(TOKENS, documents=documents).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_initial_values_and_decay() -> None:
    model = build(key_bias="head")
    inits = model.layers["0"].mixer.init_weights()
    assert inits["key_bias"].std == 0.02
    assert build(sink=True).layers["0"].mixer.init_weights()["sink"].value == 0.0
    assert undecayed_names(model) >= {"layers.0.mixer.key_bias"}


def test_both_at_once_are_refused() -> None:
    faults: list[str] = []
    assert build(faults, sink=True, key_bias="shared") is None
    assert faults == [
        'mixers.softmax.sink = true and key_bias = "shared" take weight both, and one of them is enough: '
        'take key_bias = "none", or sink = false.'
    ]


@every_option
def test_an_export_is_our_own_kind(option: dict[str, Any]) -> None:
    """The classes of transformers attend to tokens alone."""
    assert choose_format(build([]), None).model_type == "llama"
    assert choose_format(build([], **option), None).model_type == "headway"
    with pytest.raises(ValueError, match="softmax is over tokens alone there, without key_bias and sink"):
        choose_format(build([], **option), "llama")
