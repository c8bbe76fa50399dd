"""Sigmoid attention: its blocks are the whole map, in every way in which keys are hidden, shared and offset."""

from __future__ import annotations

import importlib.util
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.attention.sigmoid as sigmoid
from kernels.attention import Visible
from kernels.attention.sigmoid import sigmoid_attention, sigmoid_attention_reference

SLOPES = torch.tensor([0.7, 0.1, 0.0, 1.3], dtype=torch.float64)
CLOSE = {"rtol": 1e-11, "atol": 1e-12}


def inputs(n: int = 37, m: int | None = None, heads: int = 4, groups: int = 2, d: int = 6, e: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = [(2, n, heads, d), (2, m or n, groups, d), (2, m or n, groups, e)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def packed(n: int, m: int | None = None) -> dict[str, Tensor]:
    """Documents of about six tokens; the queries are the last of the keys."""
    begins = torch.rand(2, m or n, generator=torch.Generator().manual_seed(1)) < 0.15
    ids = begins.long().cumsum(1)
    return {"documents": ids[:, -n:], "key_documents": ids}


def settings(**changes: Any) -> dict[str, Any]:
    return {"scale": 6**-0.5, "bias": -2.0} | changes


def with_gradients(form: Any, leaves: list[Tensor], visible: Visible, **options: Any) -> list[Tensor]:
    out = form(*leaves, visible, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def assert_forms_agree(leaves: list[Tensor], visible: Visible, **options: Any) -> None:
    ours = with_gradients(sigmoid_attention, leaves, visible, **options)
    theirs = with_gradients(sigmoid_attention_reference, leaves, visible, **options)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7 queries: many in a short sequence, and the last is not full."""
    monkeypatch.setattr(sigmoid, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(sigmoid, "_MOST_ROWS", 7)


def test_the_reference_is_the_equation() -> None:
    """Three loops, with numbers small enough to follow."""
    q, k, v = (x.detach() for x in inputs(5))
    out = sigmoid_attention_reference(q, k, v, Visible(5, 5), slopes_H=SLOPES, **settings())
    for head in range(4):
        for i in range(5):
            row = torch.zeros(5, dtype=torch.float64)
            for j in range(i + 1):
                score = q[1, i, head] @ k[1, j, head // 2] / math.sqrt(6) - 2.0 - SLOPES[head] * (i - j)
                row = row + v[1, j, head // 2] / (1 + math.exp(-score))
            torch.testing.assert_close(out[1, i, head], row)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_are_the_whole_map(causal: bool, window: int | None, documents: bool) -> None:
    """With everything that can be offset, at a length that no block divides."""
    hidden = packed(37) if documents else {}
    visible = Visible(37, 37, 0, causal, window, **hidden)
    assert_forms_agree(inputs(), visible, **settings())
    assert_forms_agree(inputs(), visible, **settings(slopes_H=SLOPES, per_row=True))


@pytest.mark.parametrize("n", [1, 2, 16, 150])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_lengths_and_shared_keys(n: int, groups: int) -> None:
    """In blocks as long as they come, one token among them."""
    assert_forms_agree(inputs(n, groups=groups), Visible(n, n), **settings(slopes_H=SLOPES))


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize(("n", "m"), [(1, 30), (9, 30), (30, 30)])
def test_queries_after_cached_keys_are_the_last_rows(n: int, m: int) -> None:
    """`first_index`: decoding, and pieces of a sequence."""
    q, k, v = inputs(m)
    options = settings(slopes_H=SLOPES, per_row=True)
    for window in (None, 5):
        whole = sigmoid_attention_reference(q, k, v, Visible(m, m, 0, True, window, **packed(m)), **options)
        visible = Visible(n, m, m - n, True, window, **packed(n, m))
        torch.testing.assert_close(sigmoid_attention(q[:, m - n :], k, v, visible, **options), whole[:, m - n :])
        assert_forms_agree([q[:, m - n :].detach().requires_grad_(), k, v], visible, **options)


def test_sums_over_parts_of_the_keys_are_the_sum_over_all() -> None:
    q, k, v = inputs(20)
    whole = sigmoid_attention(q, k, v, Visible(20, 20, causal=False), **settings())
    parts = [
        sigmoid_attention(q, k[:, first:end], v[:, first:end], Visible(20, end - first, causal=False), **settings())
        for first, end in ((0, 3), (3, 4), (4, 20))
    ]
    torch.testing.assert_close(sum(parts), whole, **CLOSE)


def test_nothing_comes_of_no_keys_or_of_no_weight() -> None:
    """Rows that see nothing, and a bias of -inf: 0, and gradients of 0."""
    leaves = inputs(6)
    elsewhere = {"documents": torch.full((2, 6), 7), "key_documents": torch.zeros(2, 6, dtype=torch.int64)}
    for visible, options in (
        (Visible(6, 6, **elsewhere), settings(per_row=True)),
        (Visible(6, 6), settings(bias=-math.inf)),
    ):
        for found in with_gradients(sigmoid_attention, leaves, visible, **options):
            assert torch.equal(found, torch.zeros_like(found))


def test_a_bias_by_row_is_that_of_the_keys_seen() -> None:
    """With scores of 0 every row's weights are sigmoid(-log n) = 1 / (1 + n): n of them sum up to n / (1 + n)."""
    q, k = torch.zeros(1, 9, 1, 4), torch.zeros(1, 9, 1, 4)
    ones = torch.ones(1, 9, 1, 1)
    count = torch.arange(1.0, 10)
    out = sigmoid_attention(q, k, ones, Visible(9, 9), scale=0.5, bias=0.0, per_row=True)
    torch.testing.assert_close(out.flatten(), count / (1 + count))
    out = sigmoid_attention(q, k, ones, Visible(9, 9, window=4), scale=0.5, bias=0.0, per_row=True)
    torch.testing.assert_close(out.flatten(), count.clamp(max=4) / (1 + count.clamp(max=4)))


@pytest.mark.usefixtures("short_blocks")
def test_gradients_are_those_of_differences() -> None:
    leaves = inputs(9, d=2, e=2)
    visible = Visible(9, 9, window=6, **packed(9))
    torch.autograd.gradcheck(
        lambda *x: sigmoid_attention(*x, visible, slopes_H=SLOPES, per_row=True, **settings()), leaves
    )


def test_small_weights_keep_their_digits() -> None:
    """0.5 + 0.5 tanh(x / 2) in fp32 gives 0 below -17; the weights here are far smaller, and exact to fp32."""
    q = torch.full((1, 1, 1, 1), -40.0)
    out = sigmoid_attention(q, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), Visible(1, 1), scale=1.0, bias=-9.0)
    assert out.item() == pytest.approx(math.exp(-49.0), rel=1e-5, abs=0)


def test_bf16_is_near_fp64() -> None:
    """Weights and sums are fp32, so what is left is about the rounding of inputs and outputs, 2^-9 each."""
    rough = [x.detach().bfloat16().requires_grad_() for x in inputs(300, d=16, e=16)]
    exact = [x.detach().double().requires_grad_() for x in rough]
    options = settings(bias=-math.log(300), slopes_H=SLOPES.float(), scale=0.25)
    found = with_gradients(sigmoid_attention, rough, Visible(300, 300), **options)
    wanted = with_gradients(sigmoid_attention_reference, exact, Visible(300, 300), **options)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() / theirs.norm() < 4e-3
    with torch.autocast("cpu", torch.bfloat16):
        narrow = [x.detach().float() for x in rough]
        under = sigmoid_attention(*narrow, Visible(300, 300), **options)
    assert (under.double() - wanted[0]).norm() / wanted[0].norm() < 1e-5, "products were rounded under autocast"


class Largest(TorchDispatchMode):
    """Notes the most elements that one tensor has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_no_map_is_kept_and_none_is_made() -> None:
    n, heads = 1200, 4
    leaves, visible = inputs(n, heads=heads, d=4, e=4), Visible(n, n)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = sigmoid_attention(*leaves, visible, slopes_H=SLOPES, **settings())
    assert {tuple(x.shape) for x in kept} == {tuple(x.shape) for x in [*leaves, SLOPES]}
    whole = sigmoid._Map(visible, SLOPES, 0.5, -2.0, False)
    with torch.no_grad(), Largest() as made:
        sigmoid._sigmoid_forward(*leaves, whole)
        sigmoid._sigmoid_backward(torch.ones_like(out), *leaves, whole)
    assert made.elements <= 2 * heads * 64 * n < 2 * heads * n * n / 16


def test_keys_that_no_query_of_a_block_sees_are_skipped() -> None:
    whole = Visible(100, 100, window=10)
    assert whole.reach(0, 16) == (0, 16)
    assert whole.reach(32, 48) == (23, 48)
    assert Visible(100, 100).reach(32, 48) == (0, 48)
    assert Visible(16, 100, first_index=50).reach(0, 16) == (0, 66)
    assert Visible(100, 100, causal=False, window=3).reach(32, 48) == (30, 50)
    assert Visible(100, 100, causal=False).reach(32, 48) == (0, 100)
    queries = torch.arange(32, 48)
    assert torch.equal(whole.of(queries, (23, 48)), whole.of(queries)[..., 23:48])


def test_a_second_copy_of_the_file_leaves_the_operators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that is loaded beside Headway: both compute, and the first is not taken away from its users."""
    before = torch.ops.headway.sigmoid_attention.default
    spec = importlib.util.spec_from_file_location("a_copy_of_sigmoid", sigmoid.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_copy_of_sigmoid", copy)
    spec.loader.exec_module(copy)
    assert torch.ops.headway.sigmoid_attention.default is before
    leaves, visible = inputs(5), Visible(5, 5)
    ours, theirs = (with_gradients(x.sigmoid_attention, leaves, visible, **settings()) for x in (sigmoid, copy))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": (2, 8, 3, 6), "v": (2, 8, 3, 6)}, "3 heads of keys cannot be shared equally by 4 heads of queries"),
        ({"k": (2, 8, 2, 5)}, "do not fit q"),
        ({"k": (2, 9, 2, 6), "v": (2, 9, 2, 6)}, "visible speaks of 8 queries and 8 keys, q and k have 8 and 9"),
        ({"q": (2, 8, 24)}, r"q must be \[B, N, H, d\]"),
        ({"slopes_H": torch.ones(2)}, r"for each of 4 heads, received \[2\]"),
        ({"slopes_H": torch.ones(4, dtype=torch.bfloat16)}, "of torch.bfloat16"),
        ({"dtype": torch.float16}, "must share one floating-point dtype"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changed: dict[str, Any], said: str) -> None:
    shapes = {"q": (2, 8, 4, 6), "k": (2, 8, 2, 6), "v": (2, 8, 2, 6)} | changed
    q, k, v = (torch.ones(shapes[name]) for name in "qkv")
    v = v.to(changed.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=said):
        sigmoid_attention(q, k, v, Visible(8, 8), scale=1.0, bias=0.0, slopes_H=changed.get("slopes_H"))
