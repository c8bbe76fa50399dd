"""The mixture of experts: against its equation in plain loops, and what must hold whatever the weights are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kernels.grouped import Gather, GroupedLinear, can_group, inverse_of
from model.cache import Cache
from model.context import Context
from model.feedforward import experts
from model.feedforward.moe import MoE, MoEConfig
from model.observer import Observer
from model.routing import Routing
from model.settings import build_architecture
from model.stack import Model
from tests.conformance.models import built

D_MODEL, TOKENS = 32, 14


def tables(feedforwards: dict[str, Any], **model: Any) -> dict[str, Any]:
    shape = {"d_model": D_MODEL, "num_layers": 1, "vocab_size": 61, "init_std": 0.3}
    return {"model": shape | model, "mixers": {"softmax": {"num_heads": 4}}, "feedforwards": feedforwards}


def mixture(settings: dict[str, Any], expert: dict[str, Any] | None = None, **model: Any) -> tuple[MoE, Context]:
    """One layer's, in fp64, and the context of a few rows."""
    whole = built(tables({"moe": {"expert": "swiglu"} | settings, "swiglu": expert or {"d_ff": 24}}, **model))
    return moe_of(whole), whole.context(torch.zeros(2, TOKENS, dtype=torch.int64))


def moe_of(model: Model) -> MoE:
    found = model.layers["0"].feedforward
    assert isinstance(found, MoE)
    return found


def rows(seed: int = 0) -> Tensor:
    return torch.randn(2, TOKENS, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(layer: MoE, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    found = torch.autograd.grad((y * weights).sum(), [x, *map(layer.get_parameter, names)], allow_unused=True)
    return dict(zip(["x", *names], found, strict=True))


@pytest.mark.parametrize("example", range(len(MoE.examples)))
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_its_equation(example: int, bias: bool) -> None:
    """Forward and every gradient equal all experts for all tokens with gates that are mostly zero."""
    model = built(tables(MoE.examples[example], bias=bias))
    layer, ctx = moe_of(model), model.context(torch.zeros(2, TOKENS, dtype=torch.int64))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith(("bias", "selection_bias")):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    x = rows().requires_grad_()
    y, wanted = layer(x, ctx), layer.reference(x, ctx)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    theirs = gradients(layer, x, wanted)
    for name, gradient in gradients(layer, x, y).items():
        assert gradient is not None
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gate_norm", ["selected", "none"])
def test_gates_are_their_formula(score: str, gate_norm: str) -> None:
    settings = {"num_experts": 5, "top_k": 3, "score": score, "gate_norm": gate_norm, "gate_scale": 1.5}
    layer, ctx = mixture(settings)
    x = rows()
    for token in x.flatten(0, 1)[:5]:
        scores = layer.router.weight @ token
        chosen = sorted(range(5), key=lambda i: -scores[i].item())[:3]
        if score == "softmax":
            value = scores.exp() / (scores[chosen].exp().sum() if gate_norm == "selected" else scores.exp().sum())
        else:
            value = 1 / (1 + (-scores).exp())
            value = value / value[chosen].sum() if gate_norm == "selected" else value
        wanted = sum(1.5 * value[i] * layer.experts[str(i)](token, ctx) for i in chosen)
        torch.testing.assert_close(layer(token.expand(1, 1, -1), ctx)[0, 0], wanted)


def test_an_expert_without_tokens_has_zero_gradients() -> None:
    layer, ctx = mixture({"num_experts": 4, "top_k": 1, "gate_norm": "none"})
    with torch.no_grad():
        layer.router.weight.zero_()  # Of equal scores, the first.
    x = rows().requires_grad_()
    found = gradients(layer, x, layer(x, ctx))
    for number in (1, 2, 3):
        gradient = found[f"experts.{number}.up.weight"]
        assert gradient is not None and gradient.shape == (24, D_MODEL) and not gradient.any()
    assert found["experts.0.up.weight"] is not None and found["experts.0.up.weight"].any()


def alike(layer: MoE) -> None:
    """Give all experts the weights of the first."""
    with torch.no_grad():
        for expert in layer.experts.values():
            expert.load_state_dict(layer.experts["0"].state_dict())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_identical_experts_are_one_feedforward(score: str) -> None:
    """With gates over their sum, whatever the router says."""
    layer, ctx = mixture({"num_experts": 4, "top_k": 2, "score": score})
    alike(layer)
    x = rows()
    torch.testing.assert_close(layer(x, ctx), layer.experts["0"](x, ctx), rtol=1e-13, atol=1e-13)


def test_a_factor_on_down_makes_up_for_probabilities() -> None:
    """Gates of 1 / E each with a router of zeros, and E / K in the last matrix, which is linear."""
    layer, ctx = mixture({"num_experts": 4, "top_k": 2, "gate_norm": "none"})
    alike(layer)
    x = rows()
    wanted = layer.experts["0"](x, ctx)
    with torch.no_grad():
        layer.router.weight.zero_()
        for expert in layer.experts.values():
            expert.down.weight.mul_(4 / 2)
    torch.testing.assert_close(layer(x, ctx), wanted, rtol=1e-13, atol=1e-13)


def test_all_experts_with_equal_scores_are_their_mean() -> None:
    layer, ctx = mixture({"num_experts": 4, "top_k": 4})
    with torch.no_grad():
        layer.router.weight.zero_()
    x = rows()
    wanted = torch.stack([expert(x, ctx) for expert in layer.experts.values()]).mean(0)
    torch.testing.assert_close(layer(x, ctx), wanted, rtol=1e-13, atol=1e-13)


def test_one_expert_is_a_plain_feedforward() -> None:
    layer, ctx = mixture({"num_experts": 1, "top_k": 1})
    assert torch.equal(layer(rows(), ctx), layer.experts["0"](rows(), ctx))


def test_numbers_choose_and_gates_do_not_see_them() -> None:
    layer, ctx = mixture({"num_experts": 4, "top_k": 2, "score": "sigmoid", "bias_rate": 0.01})
    with torch.no_grad():
        layer.router.selection_bias.copy_(torch.tensor([-9.0, 0.0, 9.0, 9.0]))
    x = rows()
    scores = (x @ layer.router.weight.T)[..., 2:].sigmoid()
    parts = torch.stack([layer.experts[number](x, ctx) for number in "23"], dim=-1)
    wanted = (parts * (scores / scores.sum(-1, keepdim=True))[..., None, :]).sum(-1)
    torch.testing.assert_close(layer(x, ctx), wanted)
    assert not layer.router.selection_bias.requires_grad


class _Chosen(Observer):
    def __init__(self) -> None:
        self.found: list[Routing] = []

    def routing(self, layer: int, found: Routing) -> Tensor:
        self.found.append(found)
        return found.scores_BNU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prefill_and_steps_choose_alike(dtype: torch.dtype) -> None:
    model = built(tables(MoE.examples[0], num_layers=2)).to(dtype)
    tokens = torch.randint(61, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    model.observer = whole = _Chosen()
    logits = model(tokens)
    model.observer = stepwise = _Chosen()
    cache = Cache()
    steps = [model(tokens[:, n : n + 1], cache=cache) for n in range(TOKENS)]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        for layer in (0, 1):
            chosen = torch.cat([found.chosen_BNU for found in stepwise.found[layer::2]], 1)
            assert torch.equal(chosen, whole.found[layer].chosen_BNU)


def test_probabilities_of_equal_scores_balance() -> None:
    """E / K sum_i P_i f_i is 1 where all are chosen equally often."""
    chosen = torch.eye(4, dtype=torch.bool)[None]
    for score in ("softmax", "sigmoid"):
        routing = Routing("feedforward", torch.full((1, 4, 4), 0.3), chosen, score=score)
        assert (4 * (routing.probabilities().mean(1) * chosen.double().mean(1)).sum()).item() == pytest.approx(1)


def test_the_router_is_as_wide_as_fp32() -> None:
    layer = mixture({"num_experts": 4, "top_k": 2, "bias_rate": 0.1})[0].to(torch.bfloat16)
    assert {name for name, p in layer.named_parameters() if p.dtype != torch.bfloat16} == {
        "router.weight",
        "router.selection_bias",
    }
    assert layer.router(rows().bfloat16())[0].dtype == torch.float32


def test_operations_of_active_experts() -> None:
    layer, _ = mixture({"num_experts": 8, "top_k": 2, "shared": "swiglu"})
    each = 2 * 3 * D_MODEL * 24
    assert layer.flops(1) == 2 * 8 * D_MODEL + 3 * each


# Rows and grouped products.


def test_rows_go_and_come_back() -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    taken = Gather.apply(x, order, inverse_of(order), 2)
    assert torch.equal(taken, x[order // 2]) and torch.equal(taken[inverse_of(order)][::2], x)
    assert gradcheck(lambda x: Gather.apply(x, order, inverse_of(order), 2), x)


@pytest.mark.skipif(not can_group(torch.float32), reason="this torch has no grouped product")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[5, 0, 11, 8], [0, 0, 24, 0], [6, 6, 6, 6]])
def test_a_grouped_product_is_a_loop(sizes: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(24, 32).to(dtype).requires_grad_()
    weights = [torch.randn(16, 32).to(dtype).requires_grad_() for _ in sizes]
    ends = torch.tensor(sizes).cumsum(0).int()
    y = GroupedLinear.apply(x, ends, *weights)
    wanted = torch.cat([part @ weight.T for part, weight in zip(x.split(sizes), weights, strict=True)])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y, wanted, rtol=tolerance, atol=tolerance)
    given = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *weights], given)
    for gradient, other in zip(found, torch.autograd.grad(wanted, [x, *weights], given), strict=True):
        torch.testing.assert_close(gradient, other, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.skipif(not can_group(torch.float32), reason="this torch has no grouped product")
@pytest.mark.parametrize("example", range(len(MoE.examples)))
def test_joined_experts_are_a_loop(example: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of GPUs, on the CPU."""
    model = built(tables(MoE.examples[example])).float()
    layer, ctx = moe_of(model), model.context(torch.zeros(2, TOKENS, dtype=torch.int64))
    x = rows().float().requires_grad_()
    wanted = layer(x, ctx)
    theirs = gradients(layer, x, wanted)
    joined = []
    monkeypatch.setattr(experts, "one_product_serves", lambda x, weights: joined.append(weights) is None)
    y = layer(x, ctx)
    assert joined
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(layer, x, y).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-4, msg=name)


# What cannot be built.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 0, "top_k": 1}, ["num_experts = 0 must be at least 1"]),
        ({"num_experts": 4, "top_k": 5}, ["top_k = 5 of num_experts = 4", "nearest that can is 4"]),
        ({"num_experts": 4, "top_k": 0}, ["top_k = 0 of num_experts = 4", "nearest that can is 1"]),
        ({"num_experts": 4, "top_k": 1}, ['gate_norm = "selected" with top_k = 1', 'gate_norm = "none"']),
        ({"num_experts": 4, "top_k": 2, "balance_over": "micro_batch"}, ['take "sequence"']),
        ({"num_experts": 4, "top_k": 2, "z_loss_weight": -1.0}, ["z_loss_weight = -1 must be a number"]),
        ({"num_experts": 4, "top_k": 2, "gate_scale": 0.0}, ["gate_scale = 0 must be a number above 0"]),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: list[str]) -> None:
    said = " ".join(MoEConfig(**({"expert": "swiglu"} | settings)).faults(D_MODEL))
    assert all(word in said for word in words), said


def test_all_faults_come_at_once() -> None:
    faults: list[str] = []
    wrong = {"num_experts": 2, "top_k": 3, "expert": "swigul", "bias_rate": -0.1}
    build_architecture(tables({"moe": wrong, "two": {"kind": "moe"} | wrong | {"expert": "moe"}}), faults)
    said = " ".join(faults)
    assert "feedforwards.moe.expert = 'swigul' is no [feedforwards.NAME]: define one" in said
    assert "feedforwards.two.expert = 'moe' is made of others itself" in said
    assert "feedforwards.moe.top_k = 3 of num_experts = 2" in said and "feedforwards.moe.bias_rate = -0.1" in said
