"""Mixture-of-head attention against its equations, as printed and as released; which heads are chosen; their order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import AttentionMap
from model.cache import Cache
from model.context import Context
from model.hf.names import from_hf, places
from model.layer import Site
from model.mixers.moh import MoH, MoHConfig, balanced_order
from model.mixers.softmax import Softmax, SoftmaxConfig
from model.observer import Observer
from model.routing import Routing, choose_units
from model.settings import build_architecture
from tests.conformance.models import VOCAB, built

WIDTH, N = 24, 11


def site(**settings: Any) -> Site:
    return Site(**({"layer": 0, "num_layers": 1, "d_model": WIDTH} | settings))


def alone(dtype: torch.dtype = torch.float64, **settings: Any) -> MoH:
    """A mixer with large random weights."""
    mixer = MoH(MoHConfig(**({"num_heads": 6, "shared_heads": 2, "active_heads": 2} | settings)), site()).to(dtype)
    for name, parameter in mixer.named_parameters():
        nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(len(name)))
    return mixer


def dense_twin(mixer: MoH) -> Softmax:
    """Softmax attention with the same weights, heads as they are numbered."""
    kept = {key: getattr(mixer.config, key) for key in ("num_heads", "num_kv_heads", "qk_norm", "window")}
    twin = Softmax(SoftmaxConfig(**kept), site()).to(mixer.q.weight.dtype)
    weights = {name: x for name, x in numbered(mixer).items() if name.split(".")[0] not in MoH.routers}
    twin.load_state_dict(weights)
    return twin


def numbered(mixer: MoH) -> dict[str, Tensor]:
    """Its parameters with heads as they are numbered, whatever the order in which they are kept."""
    places_G = torch.tensor(mixer.config.group_order).argsort()
    groups = len(places_G)
    found = dict(mixer.state_dict())
    for name in ("q.weight", "k.weight", "v.weight"):
        found[name] = found[name].unflatten(0, (groups, -1))[places_G].flatten(0, 1)
    found["o.weight"] = found["o.weight"].unflatten(1, (groups, -1))[:, places_G].flatten(1, 2)
    return found


def inputs(dtype: torch.dtype = torch.float64, n: int = N, seed: int = 0) -> tuple[Tensor, Context]:
    x = torch.randn(2, n, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return x, Context(positions=torch.arange(n).expand(2, n))


def run(mixer: Any, x: Tensor, ctx: Context, observer: Observer | None = None) -> Tensor:
    ctx.observer = observer
    mixer.prepare(ctx)
    return mixer(x, ctx)


class Looking(Observer):
    def __init__(self) -> None:
        self.routings: list[Routing] = []
        self.maps: list[AttentionMap] = []

    def attention(self, layer: int, weights: AttentionMap) -> Tensor:
        self.maps.append(weights)
        return super().attention(layer, weights)

    def routing(self, layer: int, found: Routing) -> Tensor:
        self.routings.append(found)
        return super().routing(layer, found)


# ------------------------------------------------------------------------------------------- all heads, and some


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{"router": "norm"}, {"router": "learned"}, {"num_kv_heads": 3, "qk_norm": True}])
def test_with_all_heads_and_zero_routers_it_is_softmax_attention(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    mixer = alone(dtype, active_heads=4, **settings)
    for name in MoH.routers:
        if (router := getattr(mixer, name)) is not None:
            nn.init.zeros_(router.weight)
    x, ctx = inputs(dtype)
    torch.testing.assert_close(
        run(mixer, x, ctx), run(dense_twin(mixer), x, ctx), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13
    )


@pytest.mark.parametrize("settings", [{}, {"num_kv_heads": 3}, {"qk_norm": True}, {"num_kv_heads": 2, "window": 4}])
def test_with_the_norm_router_it_is_softmax_attention_with_heads_left_out(settings: dict[str, Any]) -> None:
    """Those of the K largest norms of queries, before their norm and rotation; by hand, head by head."""
    mixer = alone(router="norm", **settings)
    twin, (x, ctx) = dense_twin(mixer), inputs()
    norms = (x @ twin.q.weight.T).unflatten(-1, (6, -1)).square().sum(-1).sqrt()
    runs = torch.zeros(2, N, 6, dtype=torch.bool)
    for row, place in itertools.product(range(2), range(N)):
        routed = sorted(range(2, 6), key=lambda head: -norms[row, place, head].item())
        runs[row, place, [0, 1, *routed[:2]]] = True
    assert len({tuple(row.tolist()) for row in runs.flatten(0, 1)}) > 3, "all tokens choose alike"
    twin.o.register_forward_pre_hook(lambda _, args: (args[0] * runs.repeat_interleave(WIDTH // 6, dim=-1),))
    torch.testing.assert_close(run(mixer, x, ctx), run(twin, x, ctx), rtol=1e-12, atol=1e-13)


def gated(mixer: MoH, gates_BNH: Tensor, x: Tensor, ctx: Context) -> Tensor:
    """Softmax attention of the twin, each head of each token times its gate."""
    twin = dense_twin(mixer)
    twin.o.register_forward_pre_hook(lambda _, args: (args[0] * gates_BNH.repeat_interleave(WIDTH // 6, dim=-1),))
    return run(twin, x, ctx)


@pytest.mark.parametrize("shared", [1, 2, 3])
def test_unit_mean_gates_are_those_of_the_released_code(shared: int) -> None:
    """Of the classes for images, wg, wg_0 and wg_1: renormalised over the heads chosen, and rescaled thrice."""
    mixer, (x, ctx) = alone(shared_heads=shared, active_heads=2), inputs()
    p = (x @ mixer.route.weight.T).softmax(-1)
    m = F.one_hot(p.topk(2, dim=-1).indices, 6 - shared).sum(-2)
    routed = 2 * (p * m) / (p * m).sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)
    everyone = torch.ones(2, N, 1, dtype=x.dtype)
    always = everyone if shared == 1 else shared * (x @ mixer.weigh_shared.weight.T).softmax(-1)
    w = 2 * (x @ mixer.weigh_stages.weight.T).softmax(-1)
    gates = torch.cat((w[..., :1] * always, w[..., 1:] * routed), dim=-1)
    torch.testing.assert_close(run(mixer, x, ctx), gated(mixer, gates, x, ctx), rtol=1e-12, atol=1e-13)


def test_paper_gates_are_those_printed() -> None:
    mixer, (x, ctx) = alone(gate_scaling="paper"), inputs()
    a1, a2 = (x @ mixer.weigh_stages.weight.T).softmax(-1).unbind(-1)
    logits = x @ mixer.route.weight.T
    chosen = logits >= logits.topk(2, dim=-1).values[..., -1:]
    gates = torch.cat(
        (
            a1[..., None] * (x @ mixer.weigh_shared.weight.T).softmax(-1),
            a2[..., None] * logits.softmax(-1) * chosen,
        ),
        dim=-1,
    )
    torch.testing.assert_close(run(mixer, x, ctx), gated(mixer, gates, x, ctx), rtol=1e-12, atol=1e-13)


def test_groups_are_chosen_as_wholes() -> None:
    """By the norm of all their queries together; a learned router has one row for each."""
    mixer, looking = alone(num_kv_heads=3, router="norm", route_unit="kv_group"), Looking()
    x, ctx = inputs()
    run(mixer, x, ctx, looking)
    (found,) = looking.routings
    norms = (x @ numbered(mixer)["q.weight"].T).unflatten(-1, (3, -1)).norm(dim=-1)[..., 1:]
    assert torch.equal(found.chosen_BNU, F.one_hot(norms.argmax(-1), 2).bool())
    pairs = found.active_BNH[..., mixer.places].unflatten(-1, (3, 2))
    assert torch.equal(pairs[..., 0], pairs[..., 1]) and pairs[..., 0, :].all()
    assert alone(num_kv_heads=3, route_unit="kv_group").route.weight.shape == (2, WIDTH)


# --------------------------------------------------------------------------------------------- gradients


def test_straight_through_reaches_chosen_heads_or_all() -> None:
    """dL/dp_i = dL/dg_i: of the heads that run, or of all, with what those would have given."""
    found = {}
    for through in ("selected", "all"):
        mixer, (x, ctx), looking = alone(router="norm", straight_through=through), inputs(), Looking()
        out = run(mixer, x, ctx, looking)
        (routing,) = looking.routings
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        (by_score,) = torch.autograd.grad(out, routing.scores_BNU, cotangent, retain_graph=True)
        twin = dense_twin(mixer)
        heads: list[Tensor] = []
        twin.o.register_forward_pre_hook(lambda _, args, heads=heads: heads.append(args[0]))
        run(twin, x, ctx)
        by_gate = ((cotangent @ twin.o.weight).unflatten(-1, (6, -1)) * heads[0].unflatten(-1, (6, -1))).sum(-1)[
            ..., 2:
        ]
        if through == "selected":
            by_gate = by_gate * routing.chosen_BNU
        scores = routing.scores_BNU.detach().requires_grad_()
        (wanted,) = torch.autograd.grad(scores.softmax(-1), scores, by_gate)
        torch.testing.assert_close(by_score, wanted, rtol=1e-10, atol=1e-12)
        found[through] = out
    torch.testing.assert_close(found["selected"], found["all"], rtol=1e-12, atol=1e-13)


def test_a_router_learns_from_the_heads_it_has_chosen() -> None:
    mixer, (x, ctx) = alone(), inputs()
    run(mixer, x, ctx).square().sum().backward()
    for name in MoH.routers:
        assert getattr(mixer, name).weight.grad.abs().min() > 0, name


# ---------------------------------------------------------------------------------------------- choosing


def test_of_equal_scores_the_first_are_chosen() -> None:
    scores = torch.tensor([[[1.0, 3, 3, 3, 0], [2, 2, 2, 2, 2], [0, 0, 1, 0, 1]]])
    assert choose_units(scores, 2).int().tolist() == [[[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 1]]]


def test_scores_of_one_head_and_of_equal_ones_are_numbers() -> None:
    mixer, (x, ctx) = alone(router="norm", num_heads=2, shared_heads=1, active_heads=1), inputs()
    assert run(mixer, x, ctx).isfinite().all()
    mixer = alone(router="norm")
    nn.init.zeros_(mixer.q.weight)
    out = run(mixer, x.requires_grad_(), ctx)
    out.square().sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all() and mixer.q.weight.grad.isfinite().all()


@pytest.mark.parametrize("routed", [2, 3, 6])
def test_scores_are_norms_over_their_spread(routed: int) -> None:
    """Two norms have no spread to speak of, only a distance; gradients are moderate, near ties too."""
    mixer = alone(router="norm", num_heads=routed + 2, active_heads=1, head_dim=4)
    x, ctx = inputs(n=400)
    looking = Looking()
    run(mixer, x.requires_grad_(), ctx, looking)
    scores = looking.routings[0].scores_BNU
    norms = mixer.q(x).unflatten(-1, (routed + 2, 4))[..., mixer.places, :].norm(dim=-1)[..., 2:]
    unit = norms.mean(-1, keepdim=True) if routed == 2 else norms.std(-1, keepdim=True)
    torch.testing.assert_close(scores, norms / unit, rtol=1e-4, atol=0)
    if routed == 2:
        (gradient,) = torch.autograd.grad(scores.softmax(-1)[..., 0].sum(), x)
        assert gradient.abs().max() < 5


@pytest.mark.parametrize("router", ["norm", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_and_steps_choose_alike(router: str, dtype: torch.dtype) -> None:
    """Bit for bit, in low precision too: an untrained router has many near ties, and of zeros all are."""
    tables = {
        "model": {"d_model": 32, "num_layers": 1, "vocab_size": VOCAB, "pattern": ["moh"], "init_std": 0.3},
        "mixers": {"moh": {"num_heads": 8, "shared_heads": 2, "active_heads": 3, "router": router}},
        "feedforwards": {"swiglu": {"d_ff": 16}},
    }
    model = built(tables).to(dtype)
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    chosen = []
    for pieces in ([40], [9, *[1] * 31]):
        model.observer, cache = Looking(), Cache()
        for part in tokens.split(pieces, dim=1):
            model(part, cache=cache)
        chosen.append(torch.cat([found.chosen_BNU for found in model.observer.routings], dim=1))
    assert torch.equal(*chosen)
    assert (chosen[0].sum(-1) == 3).all()


def test_a_router_computes_in_fp32_whatever_the_model_is_cast_to() -> None:
    mixer = alone(torch.float32)
    before = mixer.route.weight.detach().clone()
    mixer = mixer.to(torch.bfloat16)
    assert torch.equal(mixer.route.weight, before) and mixer.q.weight.dtype == torch.bfloat16
    x, ctx = inputs(torch.bfloat16)
    run(mixer, x, ctx, looking := Looking())
    assert looking.routings[0].scores_BNU.dtype == torch.float32
    assert torch.equal(looking.routings[0].scores_BNU, F.linear(x.float(), before))
    wanted = F.linear(x.float(), before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer.route(x), wanted)


def test_norms_are_squares_summed_in_fp32() -> None:
    mixer = alone(torch.float32, router="norm").to(torch.bfloat16)
    x, ctx = inputs(torch.bfloat16)
    run(mixer, x, ctx, looking := Looking())
    norms = mixer.q(x).float().unflatten(-1, (6, -1)).norm(dim=-1)[..., mixer.places][..., 2:]
    assert torch.equal(looking.routings[0].chosen_BNU, choose_units(norms, 2))


def test_operations_are_those_of_the_heads_that_run() -> None:
    """Of six heads of four channels four run: scores and sums over n / 2 keys. All else is done for all heads."""
    mixer = alone(num_kv_heads=3)
    maps = 2 * WIDTH * (24 + 12 + 12 + 24) + 2 * WIDTH * (4 + 2 + 2)
    assert mixer.flops(100) == maps + 4 * 50 * 4 * 4


# ------------------------------------------------------------------------------------------ the order of heads


@pytest.mark.parametrize(
    ("groups", "shared", "parts"), [(16, 4, 4), (16, 6, 2), (32, 16, 16), (9, 3, 3), (3, 1, 1), (8, 0, 1)]
)
def test_equal_parts_have_equally_many_shared_heads(groups: int, shared: int, parts: int) -> None:
    order = balanced_order(groups, shared)
    assert sorted(order) == list(range(groups))
    for part in torch.tensor(order).chunk(parts):
        assert (part < shared).sum() == shared // parts
    assert parts > 1 or order == list(range(groups))


def test_the_order_of_heads_changes_nothing() -> None:
    """Weights that change places with their heads; routers stay as they are numbered."""
    x, ctx = inputs()
    for settings in ({"num_kv_heads": 3}, {"router": "norm", "num_kv_heads": 3, "qk_norm": True}, {"num_kv_heads": 6}):
        mixer = alone(**settings)
        outs = [run(mixer, x, ctx)]
        groups = mixer.config.groups
        for order in ([*range(groups)], [*reversed(range(groups))]):
            other = MoH(replace(mixer.config, group_order=order), site()).double()
            moved = numbered(mixer)
            for name in ("q.weight", "k.weight", "v.weight"):
                moved[name] = moved[name].unflatten(0, (groups, -1))[order].flatten(0, 1)
            moved["o.weight"] = moved["o.weight"].unflatten(1, (groups, -1))[:, order].flatten(1, 2)
            other.load_state_dict(moved)
            outs.append(run(other, x, ctx))
        for out in outs[1:]:
            torch.testing.assert_close(out, outs[0], rtol=1e-12, atol=1e-13)


def test_checkpoints_of_others_have_heads_as_they_are_numbered() -> None:
    mixer = {"num_heads": 8, "num_kv_heads": 4, "shared_heads": 4, "active_heads": 2, "router": "norm"}
    model = built(
        {
            "model": {"d_model": 32, "num_layers": 1, "vocab_size": 12, "pattern": ["moh"], "bias": True},
            "mixers": {"moh": mixer},
            "feedforwards": {"swiglu": {"d_ff": 16}},
        }
    )
    attention = model.layers["0"].mixer
    assert attention.config.group_order == [0, 2, 1, 3] and attention.head_numbers == [0, 1, 4, 5, 2, 3, 6, 7]
    for family, prefix in (("llama", "model.layers.0.self_attn."), ("headway", "model.layers.0.mixer.")):
        known = places(model.architecture, family)
        whole = {
            place.name: torch.arange(torch.Size(place.shape(tuple(p.shape))).numel()).reshape(
                place.shape(tuple(p.shape))
            )
            for (name, p), place in zip(model.named_parameters(), known.values(), strict=True)
        }
        taken = from_hf(whole, model.architecture, family)
        suffix = "_proj" if family == "llama" else ""
        for name, rows in (("q.weight", 8), ("k.weight", 4), ("v.bias", 4), ("q.bias", 8)):
            part, kind = name.split(".")
            there = whole[f"{prefix}{part}{suffix}.{kind}"].unflatten(0, (rows, -1))
            order = attention.head_numbers if rows == 8 else attention.config.group_order
            assert torch.equal(taken[f"layers.0.mixer.{name}"], there[order].flatten(0, 1)), name
        there = whole[f"{prefix}o{suffix}.weight"].unflatten(1, (8, -1))
        assert torch.equal(taken["layers.0.mixer.o.weight"], there[:, attention.head_numbers].flatten(1, 2))
        for name, place in known.items():
            assert torch.equal(place.lay_out([taken[name]]), whole[place.name]), "there and back"


# --------------------------------------------------------------------------------------------------- settings


def faults_of(**mixer: Any) -> list[str]:
    faults: list[str] = []
    tables = {
        "model": {"d_model": 32, "num_layers": 1, "vocab_size": 12, "pattern": ["moh"]},
        "mixers": {"moh": {"num_heads": 8, "shared_heads": 2, "active_heads": 3} | mixer},
        "feedforwards": {"swiglu": {"d_ff": 16}},
    }
    assert (build_architecture(tables, faults)[1] is None) == bool(faults)
    return faults


def test_what_cannot_be_is_refused_all_at_once() -> None:
    said = faults_of(
        num_kv_heads=4,
        shared_heads=3,
        active_heads=7,
        route_unit="kv_group",
        balance_over="micro_batch",
        router="norm",
        two_stage=True,
        gate_scaling="paper",
        balance_weight=-1.0,
    )
    for words in (
        "active_heads = 7 of 5 routed heads (num_heads - shared_heads) cannot run: take 5",
        'shared_heads = 3 with route_unit = "kv_group": 2 query heads share',
        'active_heads = 7 with route_unit = "kv_group"',
        'balance_over = "micro_batch" would make the loss depend on parallel.microbatches',
        'two_stage = true with router = "norm"',
        'gate_scaling = "paper" with router = "norm"',
        "balance_weight = -1 must be a number",
    ):
        assert sum(words in sentence for sentence in said) == 1, words
    assert len(said) == 7


@pytest.mark.parametrize(
    ("mixer", "words"),
    [
        ({"shared_heads": 0}, "shared_heads = 0 with two-stage routing"),
        ({"shared_heads": 8}, "must lie in [0, num_heads - 1 = 7]"),
        ({"active_heads": 0}, "active_heads = 0 of 6 routed heads"),
        ({"active_heads": 1}, "a learned router would not learn from the loss. Take 2"),
        ({"straight_through": "all"}, 'straight_through = "all" is for router = "norm"'),
        ({"group_order": [0, 1, 2]}, "must have each of the 8 key and value heads once"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3 does not divide num_heads = 8"),
        ({"num_kv_heads": 4, "route_unit": "kv_group"}, "active_heads = 3"),
        ({"router_init_std": float("inf")}, "router_init_std = inf"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_a_way_out(mixer: dict[str, Any], words: str) -> None:
    (said,) = faults_of(**mixer)
    assert words in said


def test_what_runs_without_shared_heads() -> None:
    assert faults_of(shared_heads=0, two_stage=False) == []
    assert faults_of(shared_heads=0, router="norm") == []
