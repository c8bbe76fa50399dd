"""Norm and gate, gated products, head and cross-entropy: against their equations in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.dispatch import forced
from kernels.fused.glu import glu
from kernels.fused.norm_gate import norm_gate

FORMS = ("torch", "triton")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(norm_gate=request.param, glu=request.param, cross_entropy=request.param):
        yield request.param


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative, over a whole tensor."""
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()


def assert_alike(
    ours: Callable[..., Tensor], equation: Callable[..., Tensor], inputs: list[Tensor], tolerance: float = 1e-5
) -> None:
    """Values and all gradients, of inputs in their dtype and in fp64."""
    results = []
    for function, given in ((ours, inputs), (equation, [x.double() for x in inputs])):
        leaves = [x.detach().clone().requires_grad_() for x in given]
        out = function(*leaves)
        gradients = torch.autograd.grad(out, leaves, torch.linspace(-1, 2, out.numel()).view(out.shape).to(out))
        assert all(gradient.dtype == leaf.dtype for gradient, leaf in zip(gradients, leaves, strict=True))
        results.append([out.detach(), *gradients])
    for number, (mine, wanted) in enumerate(zip(*results, strict=True)):
        assert apart(mine, wanted) < tolerance, f"value or gradient {number}"


def norm_gate_equation(x: Tensor, gate: Tensor, *weight: Tensor, eps: float, activation: str) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * (weight[0] if weight else 1) * ACTIVATIONS[activation](gate)


@pytest.mark.parametrize("activation", ["none", "sigmoid", "silu"])
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 1), (2, 1, 5000), (1500, 16)])
def test_norm_gate_is_its_equation(form: str, activation: str, weighed: bool, shape: tuple[int, ...]) -> None:
    """Odd widths, several rows a program, more rows than programs of backward take at once."""
    inputs = [3 * torch.randn(shape), torch.randn(shape), *([torch.randn(shape[-1])] if weighed else [])]
    how = {"eps": 0.25, "activation": activation}
    assert_alike(lambda *x: norm_gate(*x, **how), lambda *x: norm_gate_equation(*x, **how), inputs)


def test_rows_go_over_several_turns_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.fused import triton_norm_gate

    monkeypatch.setattr(triton_norm_gate, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(triton_norm_gate, "TILE", 64)
    how = {"eps": 1e-6, "activation": "silu"}
    inputs = [torch.randn(33, 24), torch.randn(33, 24), torch.randn(24)]
    with forced(norm_gate="triton"):
        assert_alike(lambda *x: norm_gate(*x, **how), lambda *x: norm_gate_equation(*x, **how), inputs)


def test_norm_gate_of_rows_of_zeros(form: str) -> None:
    x, gate, weight = torch.zeros(3, 8, requires_grad=True), torch.randn(3, 8), torch.ones(8, requires_grad=True)
    out = norm_gate(x, gate, weight, eps=1e-6, activation="silu")
    assert torch.equal(out, torch.zeros(3, 8))
    gradients = torch.autograd.grad(out.sum(), [x, weight])
    assert torch.equal(gradients[1], torch.zeros(8))
    wanted = ACTIVATIONS["silu"](gate.double()) * 1e3
    assert apart(gradients[0], wanted) < 1e-5


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("shape", [(2, 5, 24), (7,), (3, 3001)])
def test_glu_is_its_equation(form: str, activation: str, shape: tuple[int, ...]) -> None:
    inputs = [3 * torch.randn(shape), torch.randn(shape)]
    assert_alike(
        lambda gate, up: glu(gate, up, activation), lambda gate, up: ACTIVATIONS[activation](gate) * up, inputs
    )


def test_slices_are_taken_as_they_are(form: str) -> None:
    """What is not contiguous, and a gradient that is broadcast."""
    both = torch.randn(3, 4, 32)
    inputs = [*both.chunk(2, dim=-1)]
    assert not inputs[0].is_contiguous()
    for function in (glu, lambda x, gate: norm_gate(x, gate, eps=1e-6)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        function(*leaves).sum().backward()
        dense = [x.detach().contiguous().requires_grad_() for x in inputs]
        function(*dense).sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, dense, strict=True))


def test_no_rows(form: str) -> None:
    x = torch.randn(2, 0, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    (norm_gate(x, x, weight, eps=1e-6) + glu(x, x)).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))


def test_what_is_kept_for_backward() -> None:
    """The inputs, and no more: neither the normed rows nor an activated gate."""
    x, gate, weight = (torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True), torch.randn(8))
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        norm_gate(x, gate, weight, eps=1e-6, activation="silu")
        glu(x, gate, "silu")
    assert set(kept) == {x.data_ptr(), gate.data_ptr(), weight.data_ptr()}


def test_compiled(form: str) -> None:
    """Nothing breaks the graph; the portable form is there for the compiler to fuse, the other one operator."""
    x, gate, weight = (torch.randn(s, requires_grad=True) for s in ((4, 8), (4, 8), (8,)))
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    def both(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return glu(norm_gate(x, gate, weight, eps=1e-6, activation="sigmoid"), gate, "silu")

    compiled = torch.compile(both, backend=backend, fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(x, gate, weight).sum(), [x, gate, weight]) for f in (compiled, both))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    assert any("headway" in name for name in seen) == (form == "triton"), seen
    assert not any("autograd_function" in name for name in seen)


def test_refusals() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"of one shape and dtype.*\[2, 7\].*must be \[8\].*'relu' must be one of"):
        norm_gate(x, x[:, :7], x[0, :3], eps=1e-6, activation="relu")
    with pytest.raises(ValueError, match=r"of one shape and dtype.*float64"):
        glu(x, x.double())


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["none", "sigmoid", "silu"])
@pytest.mark.parametrize("width", [128, 768, 2048, 5120, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(width: int, dtype: torch.dtype, activation: str) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 6e-3
    x, gate = (torch.randn(777, width, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.randn(width, device="cuda", dtype=dtype)
    how = {"eps": 1e-6, "activation": activation}
    with forced(norm_gate="triton", glu="triton"):
        assert_alike(
            lambda *x: norm_gate(*x, **how), lambda *x: norm_gate_equation(*x, **how), [x, gate, weight], tolerance
        )
        if activation != "sigmoid":
            assert_alike(
                lambda gate, up: glu(gate, up, activation),
                lambda gate, up: ACTIVATIONS[activation](gate) * up,
                [gate, x],
                tolerance,
            )
