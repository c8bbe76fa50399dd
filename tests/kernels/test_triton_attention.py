"""Attention by Triton is the equation, in every way in which keys are hidden and heads selected, with its gradients.

Without a GPU the kernels are interpreted, in float32 and in small tiles; the widths of heads and what is said of a GPU
need one.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import Visible
from kernels.attention.gated import gated_attention, gated_attention_reference
from kernels.attention.sigmoid import sigmoid_attention, sigmoid_attention_reference
from kernels.attention.triton_tables import Ranges
from kernels.dispatch import forced, triton_form

triton = pytest.importorskip("triton")

SCALE = 0.3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# fp32 sums of some hundred terms, against fp64.
WITHIN = 5e-6
NAMES = ("out", "dq", "dk", "dv", "dgate")


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """float32 is float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype).requires_grad_()


def inputs(
    n: int, m: int | None = None, heads: int = 2, groups: int = 1, d: int = 16, e: int = 16, rows: int = 1, **kind: Any
) -> list[Tensor]:
    shapes = [(rows, n, heads, d), (rows, m or n, groups, d), (rows, m or n, groups, e)]
    return [drawn(*shape, seed=seed, **kind) for seed, shape in enumerate(shapes)]


def some(*shape: int, share: float = 0.5) -> Tensor:
    """Which heads tokens select."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share).to(DEVICE)


def packed(n: int, m: int | None = None, rows: int = 1, often: float = 0.06) -> dict[str, Tensor]:
    """Documents of about sixteen tokens; the queries are the last of the keys."""
    ids = (torch.rand(rows, m or n, generator=torch.Generator().manual_seed(1)) < often).long().cumsum(1).to(DEVICE)
    return {"documents": ids[:, -n:], "key_documents": ids}


def cotangent(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(DEVICE)


def gated(leaves: list[Tensor], selected: Tensor | None, visible: Visible) -> list[Tensor]:
    gate = leaves[3] if len(leaves) > 3 else None
    with forced(attention="triton"):
        out = gated_attention(*leaves[:3], gate, selected=selected, visible=visible, scale=SCALE)
        return [out, *torch.autograd.grad(out, leaves, cotangent(out).to(out.dtype))]


def gated_exactly(leaves: list[Tensor], selected: Tensor | None, visible: Visible) -> list[Tensor]:
    """In float64: with a gate of 0 where a head is not selected."""
    exact = [x.detach().double().requires_grad_() for x in leaves]
    gate = exact[3] if len(exact) > 3 else torch.ones_like(exact[0][..., 0])
    gate = gate if selected is None else gate * selected
    out = gated_attention_reference(*exact[:3], gate, visible=visible, scale=SCALE)
    return [out, *torch.autograd.grad(out, exact, cotangent(out))]


def assert_near(found: list[Tensor], wanted: list[Tensor], within: float = WITHIN) -> None:
    """Each by its norm, if that is not small: an element may be a small difference of large ones."""
    for name, ours, theirs in zip(NAMES, found, wanted, strict=False):
        assert ours.isfinite().all(), name
        fault = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1.0)
        assert fault < within, f"{name}: {fault:.1e}"


def assert_gated_is_right(leaves: list[Tensor], selected: Tensor | None, visible: Visible) -> list[Tensor]:
    found = gated(leaves, selected, visible)
    assert_near(found, gated_exactly(leaves, selected, visible))
    return found


# --------------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("n", [1, 37, 64, 130])
@pytest.mark.parametrize("share", [None, 0.5])
def test_lengths_that_tiles_do_not_divide(n: int, share: float | None) -> None:
    selected = None if share is None else some(1, n, 2)
    if selected is not None:
        selected[0, -1, 0] = True
    found = assert_gated_is_right([*inputs(n), drawn(1, n, 2, seed=5)], selected, Visible(n, n))
    if selected is not None:
        assert (found[0][~selected] == 0).all() and (found[1][~selected] == 0).all()


@pytest.mark.parametrize(("d", "e"), [(32, 16), (64, 96), (6, 20)])
def test_widths_of_heads(d: int, e: int) -> None:
    """Powers of two and others, and values of another width."""
    assert_gated_is_right([*inputs(37, d=d, e=e), drawn(1, 37, 2, seed=5)], some(1, 37, 2), Visible(37, 37))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
def test_heads_that_share_keys(heads: int, groups: int) -> None:
    """Gradients of keys are sums over the heads, and rows of the batch are apart."""
    leaves = [*inputs(45, heads=heads, groups=groups, rows=2), drawn(2, 45, heads, seed=5)]
    assert_gated_is_right(leaves, some(2, 45, heads), Visible(45, 45))


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 1), (True, 30), (False, None), (False, 20)])
def test_what_is_hidden(causal: bool, window: int | None, documents: bool) -> None:
    visible = Visible(90, 90, 0, causal, window, **(packed(90) if documents else {}))
    assert_gated_is_right([*inputs(90), drawn(1, 90, 2, seed=5)], some(1, 90, 2), visible)


def test_windows_and_documents_with_all_heads() -> None:
    for visible in (Visible(70, 70, window=9), Visible(70, 70, **packed(70)), Visible(70, 70, causal=False)):
        assert_gated_is_right(inputs(70), None, visible)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("n", "m", "first"), [(1, 60, 59), (25, 60, 35), (25, 60, 3), (40, 20, 10)])
def test_queries_among_more_keys(n: int, m: int, first: int, documents: bool) -> None:
    """Or among fewer: the last come after all of them."""
    hidden = packed(n, m) if documents and n <= m else {}
    for window in (None, 11):
        assert_gated_is_right(inputs(n, m), some(1, n, 2, share=0.7), Visible(n, m, first, True, window, **hidden))


def test_loads_that_are_not_even() -> None:
    """A head that nobody selects has no output and no gradient; others all tokens, one, the first, the last."""
    selected = torch.zeros(1, 48, 5, dtype=torch.bool, device=DEVICE)
    selected[:, :, 1] = True
    selected[:, 33, 2] = True
    selected[:, :20, 3] = True
    selected[:, 40:, 4] = True
    leaves = inputs(48, heads=5, groups=5)
    for hidden in ({}, packed(48)):
        found = assert_gated_is_right(leaves, selected, Visible(48, 48, **hidden))
        assert all((x[:, :, 0] == 0).all() for x in found)
    nobody = gated(leaves, torch.zeros_like(selected), Visible(48, 48))
    assert all((x == 0).all() for x in nobody)


def test_nothing_comes_of_no_keys() -> None:
    """And documents whose numbers do not rise, of some rows or of all."""
    ids = torch.arange(48, device=DEVICE).expand(2, -1) // 10
    leaves = inputs(48, rows=2)
    turned = torch.stack((-ids[0], ids[1]))
    for documents, keys in ((ids + (ids == 4), ids), (ids, ids.masked_fill(ids == 2, 9)), (turned, turned)):
        visible = Visible(48, 48, documents=documents, key_documents=keys)
        assert_gated_is_right(leaves, some(2, 48, 2), visible)
    turning = Visible(48, 48, 0, False, documents=turned, key_documents=turned)
    assert_gated_is_right(leaves, some(2, 48, 2), turning)
    elsewhere = Visible(48, 48, documents=ids + 8, key_documents=ids)
    assert all((x == 0).all() for x in gated(leaves, None, elsewhere))


def test_equal_bits_and_any_memory() -> None:
    leaves, selected, visible = inputs(37, groups=2), some(1, 37, 2), Visible(37, 37)
    first, again = (gated(leaves, selected, visible) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    strided = [x.detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_() for x in leaves]
    assert not any(x.is_contiguous() for x in strided)
    for a, b in zip(gated(strided, selected, visible), first, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def poisoned_memory() -> Any:
    """What nobody has written is not a number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_is_read_that_was_not_written() -> None:
    leaves, visible = inputs(37, e=24), Visible(37, 37)
    for selected in (None, some(1, 37, 2)):
        assert_gated_is_right(leaves, selected, visible)
    assert_sigmoid_is_right(leaves, visible, bias=-1.0)


def test_scores_that_are_large() -> None:
    """Weights stay finite where their powers would not."""
    q, k, v = inputs(40)
    leaves = [(100 * q).detach().requires_grad_(), k, v]
    assert_near(gated(leaves, None, Visible(40, 40)), gated_exactly(leaves, None, Visible(40, 40)), 2e-5)


def test_both_forms_hand_on_the_same_logarithms() -> None:
    q, k, v = (x.detach() for x in inputs(40))
    arguments = (q.cpu(), k.cpu(), v.cpu(), None, *Visible(40, 40).arguments, SCALE)
    _, wanted = torch.ops.headway.selected_attention(*arguments)
    found = triton_form("attention").selected_forward(q, k, v, None, Visible(40, 40), SCALE)[1]
    torch.testing.assert_close(found.cpu(), wanted)


def test_what_the_kernels_do_not_take() -> None:
    q, k, v = inputs(5, d=300)
    with forced(attention="triton"), pytest.raises(ValueError, match="cannot run"):
        gated_attention(q, k, v, None, visible=Visible(5, 5), scale=SCALE)
    with forced(attention="triton"), pytest.raises(ValueError, match="cannot run"):
        sigmoid_attention(*inputs(5), Visible(5, 5), scale=0.0, bias=0.0)


# --------------------------------------------------------------------------------------------- sigmoid


def sigmoid(form: Any, leaves: list[Tensor], visible: Visible, **options: Any) -> list[Tensor]:
    with forced(attention="triton"):
        out = form(*leaves, visible, scale=SCALE, **options)
        return [out, *torch.autograd.grad(out, leaves, cotangent(out).to(out.dtype))]


def assert_sigmoid_is_right(leaves: list[Tensor], visible: Visible, within: float = WITHIN, **options: Any) -> None:
    exact = [x.detach().double().requires_grad_() for x in leaves]
    wanted = sigmoid(sigmoid_attention_reference, exact, visible, **options)
    assert_near(sigmoid(sigmoid_attention, leaves, visible, **options), wanted, within)


def slopes(heads: int = 2) -> Tensor:
    return torch.tensor([0.7, 0.01, 0.0, 1.3], dtype=torch.float64, device=DEVICE)[:heads]


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 30), (False, None), (False, 20)])
def test_sigmoid_weights(causal: bool, window: int | None, documents: bool) -> None:
    visible = Visible(70, 70, 0, causal, window, **(packed(70) if documents else {}))
    assert_sigmoid_is_right(inputs(70), visible, bias=-2.0)
    assert_sigmoid_is_right(inputs(70), visible, bias=-1.0, slopes_H=slopes(), per_row=True)


@pytest.mark.parametrize(("n", "m", "first"), [(1, 60, 59), (25, 60, 35), (25, 60, 3)])
def test_sigmoid_weights_of_queries_among_more_keys(n: int, m: int, first: int) -> None:
    for hidden in ({}, packed(n, m)):
        visible = Visible(n, m, first, **hidden)
        leaves = inputs(n, m, heads=4, groups=2, d=32, e=24)
        assert_sigmoid_is_right(leaves, visible, bias=-2.0, slopes_H=slopes(4), per_row=True)


def test_sigmoid_weights_of_nothing() -> None:
    """Documents that do not rise are counted too, and what sees nothing, or weighs nothing, gives 0."""
    ids = torch.tensor([[3, 3, 1, 1, 3, 2, 2, 1, 5, 5]], device=DEVICE).repeat_interleave(4, 1)
    leaves = inputs(40)
    for window in (None, 9):
        visible = Visible(40, 40, 0, True, window, documents=ids, key_documents=ids)
        assert_sigmoid_is_right(leaves, visible, bias=0.0, per_row=True)
    elsewhere = Visible(40, 40, documents=ids + 8, key_documents=ids)
    for visible, bias in ((elsewhere, 0.0), (Visible(40, 40), -math.inf)):
        assert all((x == 0).all() for x in sigmoid(sigmoid_attention, leaves, visible, bias=bias, per_row=True))


def test_counts_of_keys_that_are_seen() -> None:
    """Without a map, as a map has it."""
    ids = torch.tensor([[0, 0, 1, 1, 4, 4, 4, 9], [5, 2, 2, 5, 9, 1, 5, 5]], device=DEVICE)
    for causal in (True, False):
        for window in (None, 1, 3):
            for hidden in ({}, {"documents": ids[:, -5:], "key_documents": ids}):
                visible = Visible(5, 8, 3, causal, window, **hidden)
                wanted = visible.of(torch.arange(5, device=DEVICE)).sum(-1)[:, 0]
                assert torch.equal(Ranges.of(visible, ids.device).counts()[:, :5].long(), wanted)


def test_sigmoid_weights_that_are_small_keep_their_digits() -> None:
    one = torch.ones(1, 1, 1, 1, device=DEVICE)
    with forced(attention="triton"):
        out = sigmoid_attention(-40 * one, one, one, Visible(1, 1), scale=1.0, bias=-9.0)
    assert out.item() == pytest.approx(math.exp(-49.0), rel=1e-4, abs=0)


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("d", "e"), [(16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)]
)
def test_narrow_numbers_on_a_gpu(d: int, e: int, dtype: torch.dtype) -> None:
    """What is left is the rounding of inputs, outputs, weights and gradients of scores."""
    within = 1e-2 if dtype == torch.bfloat16 else 2e-3
    n, scale = 700, d**-0.5
    q, k, v = inputs(n, heads=4, groups=2, d=d, e=e, rows=2, dtype=dtype)
    leaves = [(q * scale / SCALE).detach().requires_grad_(), k, v, drawn(2, n, 4, seed=5, dtype=dtype)]
    for selected in (None, some(2, n, 4)):
        for visible in (
            Visible(n, n),
            Visible(n, n, window=150),
            Visible(n, n, causal=False),
            Visible(n, n, **packed(n, rows=2, often=0.01)),
        ):
            assert_near(gated(leaves, selected, visible), gated_exactly(leaves, selected, visible), within)
    for options in ({}, {"slopes_H": slopes(4), "per_row": True}):
        for visible in (Visible(n, n), Visible(n, n, window=150, **packed(n, rows=2, often=0.01))):
            assert_sigmoid_is_right(leaves[:3], visible, within, bias=-math.log(n), **options)


@pytest.mark.gpu
def test_float32_on_a_gpu() -> None:
    for d in (64, 128, 256):
        leaves = inputs(300, heads=4, groups=2, d=d, e=d)
        assert_near(
            gated(leaves, some(1, 300, 4), Visible(300, 300)),
            gated_exactly(leaves, some(1, 300, 4), Visible(300, 300)),
            1e-5,
        )
        assert_sigmoid_is_right(leaves, Visible(300, 300), 1e-5, bias=-5.0)


@pytest.mark.gpu
def test_the_gpu_is_not_waited_for() -> None:
    leaves = inputs(300, heads=4, groups=2, d=64, e=64, dtype=torch.bfloat16)
    selected, visible = some(1, 300, 4), Visible(300, 300, **packed(300))
    gated(leaves, selected, visible)
    given = torch.ones(1, 300, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = gated_attention(*leaves, None, selected=selected, visible=visible, scale=SCALE)
        torch.autograd.grad(out, leaves, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
