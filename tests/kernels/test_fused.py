"""Norm and gate, gated products, head and cross-entropy: against their equations in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.dispatch import forced
from kernels.fused.cross_entropy import linear_cross_entropy
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


# ------------------------------------------------------------------------------------ head and cross-entropy


def head(
    tokens: int, vocab_size: int, ignored: float = 0.3, width: int = 12, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """A stream, a weight, and targets of which a part is ignored."""
    targets = torch.randint(vocab_size, (tokens,))
    targets[torch.rand(tokens) < ignored] = -100
    return scale * torch.randn(tokens, width), torch.randn(vocab_size, width), targets


def nats_equation(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    own = logits[torch.arange(len(targets)), targets.clamp(min=0)]
    return (logits.logsumexp(-1) - own) * (targets != -100)


@pytest.mark.parametrize("chunk", [None, 1, 7, 50, 1000])
@pytest.mark.parametrize(("vocab_size", "scale"), [(37, 1.0), (5000, 1.0), (37, 100.0)])
def test_linear_cross_entropy_is_its_equation(form: str, chunk: int | None, vocab_size: int, scale: float) -> None:
    """Chunks that divide the tokens and that do not; logits far beyond where exp overflows."""
    hidden, weight, targets = head(50, vocab_size, scale=scale)
    nats: list[Tensor] = []

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        total, nats_T = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
        assert not nats_T.requires_grad
        nats.append(nats_T)
        return total

    assert_alike(ours, lambda h, w: nats_equation(h, w, targets).sum(), [hidden, weight])
    assert nats[0].dtype == torch.float32
    assert apart(nats[0], nats_equation(hidden.double(), weight.double(), targets)) < 1e-6
    assert torch.equal(nats[0] == 0, targets == -100)


def test_in_fp64_chunks_make_no_difference() -> None:
    hidden, weight, targets = head(50, 37)
    assert_alike(
        lambda h, w: linear_cross_entropy(h, w, targets, chunk=11)[0],
        lambda h, w: nats_equation(h, w, targets).sum(),
        [hidden.double(), weight.double()],
        1e-13,
    )


def test_another_number_is_ignored(form: str) -> None:
    hidden, weight, targets = head(9, 5, ignored=0.0)
    total, nats = linear_cross_entropy(hidden, weight, targets, ignored=3)
    wanted = nats_equation(hidden, weight, torch.where(targets == 3, -100, targets))
    assert torch.allclose(nats, wanted, rtol=1e-5)
    assert torch.allclose(total, wanted.sum(), rtol=1e-5)


@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_counts(form: str, tokens: int) -> None:
    hidden, weight, targets = head(tokens, 11, ignored=2.0)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    total, nats = linear_cross_entropy(hidden, weight, targets, chunk=4)
    gradients = torch.autograd.grad(total, leaves)
    assert total == 0
    assert torch.equal(nats, torch.zeros(tokens))
    assert all(torch.equal(gradient, torch.zeros_like(leaf)) for gradient, leaf in zip(gradients, leaves, strict=True))


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_of_the_two_is_frozen(form: str, frozen: int) -> None:
    hidden, weight, targets = head(9, 11)
    both = [hidden, weight]
    free = both[1 - frozen].requires_grad_()
    linear_cross_entropy(*both, targets)[0].backward()
    assert both[frozen].grad is None
    (wanted,) = torch.autograd.grad(nats_equation(hidden, weight, targets).sum(), [free])
    assert torch.allclose(free.grad, wanted, rtol=1e-4, atol=1e-5)


def test_cotangents_are_taken_as_often_as_they_come(form: str) -> None:
    """What forward has left is not used up by a first backward."""
    hidden, weight, targets = head(9, 11)
    total, _ = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    first = torch.autograd.grad(total, [hidden, weight], torch.tensor(0.5), retain_graph=True)
    second = torch.autograd.grad(3 * total, [hidden, weight])
    assert all(torch.allclose(6 * a, b) for a, b in zip(first, second, strict=True))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation has made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


@pytest.mark.parametrize("grad", [True, False])
def test_logits_are_never_whole(form: str, grad: bool) -> None:
    """No tensor has T x V numbers, nor more than the chunk's logits; the plain way, seen by the same eye, has."""
    from kernels.fused import cross_entropy

    # A mode does not see into an operator: its parts are called as they are.
    hidden, weight, targets = head(64, 100, width=4)
    with Largest() as seen:
        cross_entropy._linear_cross_entropy(hidden, weight, targets, -100, 8, grad, grad)
    # Triton's interpreter copies tensors byte by byte.
    assert seen.numbers == 8 * 100 * (4 if form == "triton" else 1)
    with Largest() as plain:
        nats_equation(hidden, weight, targets)
    assert plain.numbers == 64 * 100


def test_bfloat16_sums_over_chunks_in_fp32() -> None:
    """The weight's gradient is as good with many chunks as with one."""
    hidden, weight, targets = (x.bfloat16() if x.is_floating_point() else x for x in head(2048, 17, width=8))
    leaf = weight.requires_grad_()
    wanted = torch.autograd.grad(nats_equation(hidden.double(), leaf.double(), targets).sum(), [leaf])[0]
    for chunk in (8, 2048):
        total, nats = linear_cross_entropy(hidden, leaf, targets, chunk=chunk)
        assert total.dtype == nats.dtype == torch.float32
        (gradient,) = torch.autograd.grad(total, [leaf])
        assert gradient.dtype == torch.bfloat16
        assert apart(gradient, wanted.double()) < 8e-3, chunk


def test_compiled_head(form: str) -> None:
    hidden, weight, targets = head(9, 11)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets)[0] * 2

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_operators_are_well_formed(form: str) -> None:
    hidden, weight, targets = head(9, 11)
    wanted = (hidden.requires_grad_(), weight.requires_grad_(), targets, -100, 4, True, True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.headway.linear_cross_entropy.default, wanted, test_utils=tests)
    if form == "triton":
        inner = (hidden, hidden.detach().clone(), None, 1e-6, "silu")
        torch.library.opcheck(torch.ops.headway.norm_gate.default, inner, test_utils=tests)
        torch.library.opcheck(torch.ops.headway.glu.default, (*inner[:2], "silu"), test_utils=tests)


def test_refusals_of_the_head() -> None:
    hidden, weight, targets = head(9, 11)
    with pytest.raises(ValueError, match=r"received \[9, 12\], \[12, 11\] and \[9\]"):
        linear_cross_entropy(hidden, weight.T, targets)
    with pytest.raises(ValueError, match=r"float32, torch.float64 and torch.int32.*chunk = 0"):
        linear_cross_entropy(hidden, weight.double(), targets.int(), chunk=0)


# ---------------------------------------------------------------------------------------------------- on a GPU


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


@pytest.mark.gpu
@pytest.mark.parametrize("form_on_gpu", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "vocab_size"), [(1000, 32000), (257, 50257)])
def test_head_on_a_gpu(dtype: torch.dtype, form_on_gpu: str, tokens: int, vocab_size: int) -> None:
    hidden, weight, targets = (x.cuda() for x in head(tokens, vocab_size, width=256, scale=0.1))
    given = [hidden.to(dtype), weight.to(dtype)]
    with forced(cross_entropy=form_on_gpu):
        assert_alike(
            lambda h, w: linear_cross_entropy(h, w, targets, chunk=300)[0],
            lambda h, w: nats_equation(h, w, targets).sum(),
            given,
            1e-5 if dtype == torch.float32 else 1e-2,
        )
        first, second = (linear_cross_entropy(*given, targets)[0] for _ in range(2))
    assert torch.equal(first, second)
