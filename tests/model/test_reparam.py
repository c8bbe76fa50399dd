"""sigmaReparam on whole matrices: the released layer's arithmetic, an exact start, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import Architecture
from model.layer import Mixer
from model.reparam import (
    Matrix,
    ReparamConfig,
    effective_weights,
    largest_singular,
    matrices,
    power_iteration,
    reparam_faults,
)
from model.settings import build_architecture
from model.stack import Model
from tests.conformance.models import CASES, architecture


def meta(built: Architecture) -> Model:
    with torch.device("meta"):
        return Model(built)


def released(weight: Tensor, gain: Tensor, u: Tensor, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    """One training forward and backward of the released layer, from its equations: y = gain (W / sigma) x.

    v = normalise(W u), u <- normalise(W^T v), both without gradients; sigma = v^T W u is in the graph.
    """
    weight, gain = weight.clone().requires_grad_(), gain.clone().requires_grad_()
    with torch.no_grad():
        v = weight @ u
        v = v / (v * v).sum().sqrt()
        u = weight.t() @ v
        u = u / (u * u).sum().sqrt()
    sigma = (v[:, None] * weight * u[None, :]).sum()
    y = x @ (weight / sigma * gain).t()
    (y * cotangent).sum().backward()
    return {"y": y.detach(), "weight": weight.grad, "gain": gain.grad, "u": u, "sigma": sigma.detach()}


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (5, 7), (1, 4), (6, 6)])
def test_the_arithmetic_is_that_of_the_released_layer(rows: int, columns: int) -> None:
    weight, x = torch.randn(rows, columns, dtype=torch.float64), torch.randn(11, columns, dtype=torch.float64)
    gain, cotangent = torch.tensor([1.7], dtype=torch.float64), torch.randn(11, rows, dtype=torch.float64)
    u = torch.nn.functional.normalize(torch.randn(columns, dtype=torch.float64), dim=0)
    wanted = released(weight, gain, u, x, cotangent)

    sigma, v, (new_u,) = *(found := power_iteration(weight, u[:, None]))[:2], found[2].T
    sign = torch.sign(new_u @ wanted["u"])
    v, new_u = sign * v, sign * new_u
    torch.testing.assert_close(sigma, wanted["sigma"])
    torch.testing.assert_close(new_u, wanted["u"])
    raw, learned = weight.clone().requires_grad_(), gain.clone().requires_grad_()
    matrix = Matrix("it", ("it.weight",), (rows,), columns)
    effective = effective_weights({"it.weight": raw}, {"it": learned}, {"it": (v, new_u)}, [matrix])["it.weight"]
    y = x @ effective.T
    (y * cotangent).sum().backward()
    torch.testing.assert_close(y.detach(), wanted["y"])
    torch.testing.assert_close(raw.grad, wanted["weight"])
    torch.testing.assert_close(learned.grad, wanted["gain"])


def test_gradients_are_at_right_angles_to_the_matrix() -> None:
    """The function does not depend on how large W is: with the exact sigma, <W, dL/dW> = 0."""
    weight = torch.randn(9, 6, dtype=torch.float64)
    _, v, u = largest_singular(weight)
    u = u[:, 0]
    x, cotangent = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 9, dtype=torch.float64)
    for through_sigma, right_angle in ((True, True), (False, False)):
        raw = weight.clone().requires_grad_()
        matrix = Matrix("it", ("it.weight",), (9,), 6)
        gains = {"it": torch.ones(1, dtype=torch.float64)}
        found = effective_weights({"it.weight": raw}, gains, {"it": (v, u)}, [matrix], through_sigma=through_sigma)
        (x @ found["it.weight"].T * cotangent).sum().backward()
        along = (raw.grad * weight).sum() / (raw.grad.norm() * weight.norm())
        assert (along.abs() < 1e-14) == right_angle


@pytest.mark.parametrize("shape", [(8, 8), (40, 12), (12, 40), (1, 9), (9, 1)])
def test_the_start_is_exact(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    sigma, v, u = largest_singular(matrix, 4)
    left, norms, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert sigma.item() == pytest.approx(norms[0].item(), rel=1e-12)
    pairs = [(v, left[:, 0])] + [(u[:, place], right[place]) for place in range(min(4, *shape))]
    for ours, theirs in pairs:
        assert (ours @ theirs).abs().item() == pytest.approx(1.0, rel=1e-10)
    assert (v @ matrix.double() @ u[:, 0]).item() == pytest.approx(sigma.item(), rel=1e-12)
    assert (u[:, min(4, *shape) :] == 0).all()


def test_odd_matrices_stay_finite() -> None:
    one_rank = torch.outer(torch.randn(6), torch.randn(4))
    repeated = torch.linalg.qr(torch.randn(6, 4)).Q * 2.0
    for matrix, norm in ((one_rank, torch.linalg.matrix_norm(one_rank, 2).item()), (repeated, 2.0)):
        sigma, _, u = largest_singular(matrix)
        assert sigma.item() == pytest.approx(norm, rel=1e-5)
        again, v, u = power_iteration(matrix.double(), u)
        assert again.item() == pytest.approx(norm, rel=1e-5)
        assert u.isfinite().all()
        assert v.isfinite().all()
    sigma, v, u = largest_singular(torch.zeros(3, 2))
    assert sigma == 0
    assert v.isfinite().all()
    assert u.isfinite().all()


@pytest.mark.parametrize(("kind", "example"), CASES)
def test_every_linear_map_of_every_layer_is_a_target(kind: str, example: int) -> None:
    model = meta(architecture(kind, example))
    found = matrices(model, ReparamConfig(kind="sigma"))
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("layers.")
    }
    assert {part for matrix in found for part in matrix.parts} == linear
    for matrix in found:
        assert (sum(matrix.rows), matrix.columns) == tuple(model.get_parameter(matrix.parts[0]).shape)


def test_queries_keys_and_values_may_be_one_matrix() -> None:
    model = meta(architecture("softmax", 1, num_layers=1))
    names = {
        grouping: [matrix.name for matrix in matrices(model, ReparamConfig(kind="sigma", qkv_grouping=grouping))][:-3]
        for grouping in ("separate", "qk+v", "fused")
    }
    mixer = "layers.0.mixer"
    assert names == {
        "separate": [f"{mixer}.{x}" for x in "qkvo"],
        "qk+v": [f"{mixer}.qk", f"{mixer}.v", f"{mixer}.o"],
        "fused": [f"{mixer}.qkv", f"{mixer}.o"],
    }
    joined = matrices(model, ReparamConfig(kind="sigma", qkv_grouping="fused"))[0]
    # Grouped queries: 4 query heads of 8, 2 of keys and of values.
    assert (joined.parts, joined.rows, joined.columns) == (
        tuple(f"{mixer}.{x}.weight" for x in "qkv"),
        (32, 16, 16),
        32,
    )


class ZeroOutput(Mixer):
    """A user's own, whose output projection begins as zeros."""

    from model.mixers.softmax import SoftmaxConfig as Config

    context = "none"

    def __init__(self, config: Any, site: Any):
        super().__init__(config, site)
        self.o = torch.nn.Linear(site.d_model, site.d_model, bias=False)

    def init_weights(self) -> dict[str, Any]:
        from model.initialisation import Constant

        return {"o.weight": Constant(0.0)}


def refused(model: Model, **settings: Any) -> str:
    options = {key: settings.pop(key) for key in ("has_weights", "frozen") if key in settings}
    return "\n".join(reparam_faults(model, ReparamConfig(kind="sigma", **settings), **options))


def test_what_cannot_be_is_refused_in_sentences() -> None:
    model = meta(architecture("softmax"))
    tied = meta(architecture("softmax", tie_embeddings=True))
    assert refused(model) == refused(tied) == ""
    assert refused(model, targets=["layers.*", "head.weight"]) == ""
    assert "'layers.*.mixer.r.weight', which matches no parameter; the nearest is" in refused(
        model, targets=["layers.*.mixer.r.weight"]
    )
    assert "matches no linear map" in refused(model, targets=["final_norm.*"])
    assert "looked up (and is the head, too)" in refused(tied, targets=["*"])
    assert "matches no parameter" in refused(tied, targets=["head.weight"])
    assert "must be above 0" in refused(model, gain_init=0.0)
    assert "must be above 0" in refused(model, gain_init=-1.0)
    assert "would change the model of model.init_from" in refused(model, gain_init="one", has_weights=True)
    partly = {"qkv_grouping": "fused", "frozen": ["layers.0.mixer.q.*"]}
    assert 'freeze all of them, or take "separate"' in refused(model, **partly)
    assert refused(model, **partly | {"frozen": ["layers.0.mixer.*"]}) == ""
    faults = refused(model, targets=["nothing", "*"], gain_init=-1.0)
    assert len(faults.splitlines()) == 3, "all at once"


def test_a_matrix_that_begins_as_zeros_is_refused() -> None:
    tables = {
        "model": {"d_model": 8, "num_layers": 1, "vocab_size": 11, "pattern": ["it"]},
        "mixers": {"it": {"kind": f"{__name__}:ZeroOutput", "num_heads": 1}},
        "feedforwards": {"swiglu": {"d_ff": 8}},
    }
    faults: list[str] = []
    _, built = build_architecture(tables, faults, allow_code=True)
    assert built is not None, faults
    model = meta(built)
    assert "layers.0.mixer.o.weight: initial values are all zero" in refused(model)
    assert refused(model, has_weights=True) == ""
    assert refused(model, targets=["*.feedforward.*"]) == ""
