"""BAM's mixture of attentions against softmax attention and its equation, one property at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.attention import AttentionMap
from model.cache import Cache
from model.context import Context
from model.hf.names import from_hf, to_hf
from model.layer import Site
from model.mixers.bam import BAM, BAMConfig
from model.mixers.softmax import Softmax, SoftmaxConfig
from model.observer import Observer
from model.settings import build_architecture
from tests.conformance.models import VOCAB, built, random_documents

WIDTH, N = 24, 13
SHARED = ("k.", "v.", "k_norm.")
LIKE = {"rtol": 1e-12, "atol": 1e-13}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"num_kv_heads": 3},
    {"num_kv_heads": 2, "shared_kv": True},
    {"num_kv_heads": 3, "shared_kv": True, "qk_norm": True, "window": 4},
    {"num_kv_heads": 1, "qk_norm": True, "qkv_bias": True, "head_dim": 6},
]


def site(**settings: Any) -> Site:
    return Site(**({"layer": 0, "num_layers": 1, "d_model": WIDTH} | settings))


def filled(mixer: nn.Module) -> Any:
    """With large random weights in fp64, every parameter other ones."""
    mixer = mixer.double()
    for number, (_, parameter) in enumerate(sorted(mixer.named_parameters())):
        nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(number))
    return mixer


def alone(num_experts: int = 3, bias: bool = False, **settings: Any) -> BAM:
    config = BAMConfig(**({"num_heads": 6, "num_experts": num_experts} | settings))
    found: BAM = filled(BAM(config, site(bias=bias)))
    return found


def expert_of(mixer: BAM, expert: int) -> Softmax:
    """Softmax attention with the weights of one of the experts."""
    kept = ("num_heads", "num_kv_heads", "head_dim", "qk_norm", "window", "qkv_bias")
    config = SoftmaxConfig(**{key: getattr(mixer.config, key) for key in kept})
    twin = Softmax(config, mixer.site).double()
    prefix = f"experts.{expert}."
    weights = {
        name.removeprefix(prefix): x for name, x in mixer.state_dict().items() if name.startswith((prefix, *SHARED))
    }
    twin.load_state_dict(weights)
    return twin


def make_alike(mixer: BAM) -> None:
    """Give every expert the weights of the first."""
    for expert in mixer.experts[1:]:
        expert.load_state_dict(mixer.experts[0].state_dict())


def inputs(documents: bool = False) -> tuple[Tensor, Context]:
    x = torch.randn(2, N, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = random_documents(2, N) if documents else None
    return x, Context(positions=torch.arange(N).expand(2, N), documents=ids, key_documents=ids)


def run(mixer: Any, x: Tensor, ctx: Context, **options: Any) -> Tensor:
    mixer.prepare(ctx)
    out: Tensor = mixer(x, ctx, **options)
    return out


every_layout = pytest.mark.parametrize("settings", LAYOUTS, ids=str)


# ----------------------------------------------------------------------------------------- equal to one attention


@every_layout
@pytest.mark.parametrize("bias", [False, True])
def test_one_expert_is_softmax_attention(settings: dict[str, Any], bias: bool) -> None:
    mixer, (x, ctx) = alone(1, bias, **settings), inputs(documents=True)
    torch.testing.assert_close(run(mixer, x, ctx), run(expert_of(mixer, 0), x, ctx), **LIKE)


@every_layout
@pytest.mark.parametrize("bias", [False, True])
def test_experts_that_are_alike_are_one_whatever_the_router(settings: dict[str, Any], bias: bool) -> None:
    mixer, (x, ctx) = alone(3, bias, **settings), inputs(documents=True)
    make_alike(mixer)
    torch.testing.assert_close(run(mixer, x, ctx), run(expert_of(mixer, 0), x, ctx), **LIKE)
    nn.init.zeros_(mixer.router.weight)
    torch.testing.assert_close(run(mixer, x, ctx), run(expert_of(mixer, 2), x, ctx), **LIKE)


@every_layout
@pytest.mark.parametrize("chosen", [0, 2])
def test_a_gate_of_one_is_that_expert(settings: dict[str, Any], chosen: int) -> None:
    """Positive inputs, and a router whose row for one expert is far above the others."""
    mixer, (x, ctx) = alone(3, True, **settings), inputs(documents=True)
    x = x.abs()
    with torch.no_grad():
        mixer.router.weight.fill_(0.0)
        mixer.router.weight[chosen] = 1e4
    torch.testing.assert_close(run(mixer, x, ctx), run(expert_of(mixer, chosen), x, ctx), **LIKE)


@every_layout
def test_one_attention_for_all_heads_is_the_loop_over_experts(settings: dict[str, Any]) -> None:
    """Forward and every gradient, by the softmax attentions of the experts."""
    mixer, (x, ctx) = alone(3, True, **settings), inputs(documents=True)
    cotangent = torch.randn(2, N, WIDTH, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    twins = [expert_of(mixer, expert) for expert in range(3)]
    gates = (x @ mixer.router.weight.T).softmax(-1)
    looped = sum(gates[..., e : e + 1] * run(twin, x, ctx) for e, twin in enumerate(twins))
    found = run(mixer, x, ctx)
    torch.testing.assert_close(found, looped, **LIKE)
    found.backward(cotangent)
    ours = {name: parameter.grad.clone() for name, parameter in mixer.named_parameters()}
    mixer.zero_grad()
    looped.backward(cotangent)
    torch.testing.assert_close(ours.pop("router.weight"), mixer.router.weight.grad, rtol=1e-10, atol=1e-11)
    for name, gradient in ours.items():
        *expert, module, kind = name.split(".")
        owners = [twins[int(expert[1])]] if expert else twins
        wanted = sum(owner.get_parameter(f"{module}.{kind}").grad for owner in owners)
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-11, msg=name)


# ----------------------------------------------------------------------------------------------------- gates


def test_gates_are_positive_and_add_up_to_one() -> None:
    """What is given is a mean of what the experts give: experts that give a constant give it whatever the router."""
    mixer, (x, ctx) = alone(3, bias=True), inputs()
    for expert in mixer.experts:
        nn.init.zeros_(expert.o.weight)
        nn.init.constant_(expert.o.bias, 3.0)
    torch.testing.assert_close(run(mixer, x, ctx), torch.full_like(x, 3.0), **LIKE)
    for number, expert in enumerate(mixer.experts):
        nn.init.constant_(expert.o.bias, float(number))
    mean = run(mixer, x, ctx)
    assert (mean > 0).all() and (mean < 2).all() and mean.unique().numel() > N


def test_what_all_rows_of_the_router_have_in_common_changes_nothing() -> None:
    mixer, (x, ctx) = alone(), inputs()
    before = run(mixer, x, ctx)
    before.square().sum().backward()
    gradient_ED = mixer.router.weight.grad
    assert gradient_ED.abs().max() > 1e-3
    torch.testing.assert_close(gradient_ED.sum(0), torch.zeros(WIDTH, dtype=x.dtype), rtol=0, atol=1e-10)
    with torch.no_grad():
        mixer.router.weight += torch.linspace(-3, 3, WIDTH)
    torch.testing.assert_close(run(mixer, x, ctx), before, rtol=1e-11, atol=1e-12)


def test_gates_are_fp32_in_a_bf16_model() -> None:
    """They weigh in fp32, too: only what experts give, and the sum of it, is rounded."""
    mixer, (x, ctx) = alone(3, bias=True).float().to(torch.bfloat16), inputs()
    assert mixer.router.weight.dtype == torch.float32 and mixer.experts[0].q.weight.dtype == torch.bfloat16
    x = x.to(torch.bfloat16)
    outs: list[Tensor] = []
    for expert in mixer.experts:
        expert.o.register_forward_hook(lambda _, args, out: outs.append(out))
    found = run(mixer, x, ctx)
    gates = (x.float() @ mixer.router.weight.T).softmax(-1)
    wanted = sum(gates[..., e : e + 1] * out.float() for e, out in enumerate(outs))
    assert found.dtype == torch.bfloat16
    apart = (found.float() - wanted).abs() / wanted.abs().clamp(min=1e-3)
    assert apart.max() <= 2**-8 + 1e-5, "more than the rounding of the sum"


# ---------------------------------------------------------------------------------------------- heads and cache


@pytest.mark.parametrize("settings", [{"num_kv_heads": 3}, {"num_kv_heads": 3, "shared_kv": True}], ids=str)
def test_heads_are_numbered_expert_by_expert(settings: dict[str, Any]) -> None:
    """At place i are the queries and keys of head `head_numbers[i]`, of which equal parts have as many of each."""

    class Looking(Observer):
        maps: list[AttentionMap] = []

        def attention(self, layer: int, weights: AttentionMap) -> Tensor:
            self.maps.append(weights)
            return super().attention(layer, weights)

    mixer, (x, ctx) = alone(2, qk_norm=True, **settings), inputs()
    assert mixer.head_numbers == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    ctx.observer = looking = Looking()
    run(mixer, x, ctx)
    for expert in range(2):
        run(expert_of(mixer, expert), x, ctx)
    (together, *apart), every = looking.maps, torch.arange(N)
    for place, number in enumerate(mixer.head_numbers):
        wanted = apart[number // 6].log_weights(every)[:, number % 6]
        torch.testing.assert_close(together.log_weights(every)[:, place], wanted, **LIKE)
    assert together.k_BMGd.shape[2] == (3 if mixer.config.shared_kv else 6)


@pytest.mark.parametrize("shared_kv", [False, True])
@pytest.mark.parametrize("pieces", [[N], [5, *[1] * (N - 5)], [1] * N, [4, 4, 5]], ids=len)
def test_prefill_and_steps_are_the_whole(shared_kv: bool, pieces: list[int]) -> None:
    tables = {
        "model": {"d_model": WIDTH, "num_layers": 2, "vocab_size": VOCAB, "pattern": ["bam"], "init_std": 0.3},
        "mixers": {"bam": {"num_heads": 6, "num_kv_heads": 2, "num_experts": 3, "shared_kv": shared_kv}},
        "feedforwards": {"swiglu": {"d_ff": 16}},
    }
    model, cache = built(tables), Cache()
    tokens = torch.randint(VOCAB, (2, N), generator=torch.Generator().manual_seed(0))
    parts = [model(part, cache=cache) for part in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-11, atol=1e-12)
    keys = cache.layer(0)["k"].append(torch.empty(2, 0, 2 if shared_kv else 6, 4, dtype=torch.float64))
    assert keys.shape == (2, N, 2 if shared_kv else 6, 4), "what is remembered is that of one where it is shared"


def test_operations_are_those_of_all_experts() -> None:
    """Six heads of four channels, three of keys: two experts are twice one; the router comes on top."""
    one = Softmax(SoftmaxConfig(num_heads=6, num_kv_heads=3), site()).flops(100)
    router, keys_values = 2 * 2 * WIDTH, 2 * 2 * WIDTH * 12
    assert alone(2, num_kv_heads=3).flops(100) == 2 * one + router
    assert alone(2, num_kv_heads=3, shared_kv=True).flops(100) == 2 * one + router - keys_values


def test_every_expert_is_a_matrix_of_its_own() -> None:
    names = {name for name, _ in alone(2, shared_kv=True, qk_norm=True).named_parameters()}
    each = {f"experts.{e}.{name}.weight" for e in range(2) for name in ("q", "o", "q_norm")}
    assert names == each | {"router.weight", "k.weight", "v.weight", "k_norm.weight"}
    names = {name for name, _ in alone(2, bias=True).named_parameters()}
    wanted = {f"experts.{e}.{x}.{kind}" for e in range(2) for x in "qkvo" for kind in ("weight", "bias")}
    assert names == wanted | {"router.weight"}


@pytest.mark.parametrize("family", ["llama", "headway"])
def test_names_there_and_back(family: str) -> None:
    tables = {
        "model": {"d_model": WIDTH, "num_layers": 2, "vocab_size": VOCAB, "pattern": ["bam", "moh"]},
        "mixers": {
            "bam": {"num_heads": 6, "num_experts": 2, "shared_kv": True},
            "moh": {"num_heads": 6, "shared_heads": 2, "active_heads": 2},
        },
        "feedforwards": {"swiglu": {"d_ff": 16}},
    }
    model = built(tables)
    here = dict(model.named_parameters())
    there = to_hf({name: x.detach() for name, x in here.items()}, model.architecture, family)
    if family == "llama":
        assert {"model.layers.0.self_attn.experts.1.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"} <= set(
            there
        )
    for name, x in from_hf(there, model.architecture, family).items():
        assert torch.equal(x, here[name]), name


# --------------------------------------------------------------------------------------------------- settings


def test_what_cannot_be_is_refused_all_at_once() -> None:
    faults: list[str] = []
    tables = {
        "model": {"d_model": 32, "num_layers": 1, "vocab_size": 12, "pattern": ["bam"]},
        "mixers": {
            "bam": {
                "num_heads": 8,
                "num_kv_heads": 3,
                "num_experts": 0,
                "window": 0,
                "router_init_std": float("nan"),
            }
        },
        "feedforwards": {"swiglu": {"d_ff": 16}},
    }
    assert build_architecture(tables, faults)[1] is None
    for words in (
        "num_kv_heads = 3 does not divide num_heads = 8: the nearest that does is 2",
        "num_experts = 0 must be at least 1",
        "window = 0 must be at least 1",
        "router_init_std = nan must be a number",
    ):
        assert sum(f"mixers.bam.{words}" in fault for fault in faults) == 1, words
    assert len(faults) == 4
