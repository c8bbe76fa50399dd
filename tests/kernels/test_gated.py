"""Gated attention: skipping heads is computing all of them with zeros, in every way in which keys are hidden."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.attention.parts as parts
import kernels.attention.selected as selected
from kernels.attention import Visible
from kernels.attention.gated import gated_attention, gated_attention_reference

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
SCALE = 0.4
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def inputs(n: int = 45, m: int | None = None, heads: int = 4, groups: int = 4, d: int = 6, e: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = [(2, n, heads, d), (2, m or n, groups, d), (2, m or n, groups, e)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def choice(n: int, active: int, heads: int = 4, shared: int = 0, rows: int = 2) -> Tensor:
    """Heads of each token, in no order: the first `shared`, and others by chance."""
    drawn = torch.rand(rows, n, heads, generator=torch.Generator().manual_seed(n + active))
    drawn[..., :shared] += 1
    index = drawn.topk(active).indices
    return index.gather(2, torch.rand(index.shape, generator=torch.Generator().manual_seed(3)).argsort(-1))


def some_gate(*shape: int) -> Tensor:
    """Of both signs, with exact zeros among them."""
    gate = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return gate.masked_fill(gate.abs() < 0.3, 0).requires_grad_()


def packed(n: int, m: int | None = None) -> dict[str, Tensor]:
    """Documents of about ten tokens; the queries are the last of the keys."""
    ids = (torch.rand(2, m or n, generator=torch.Generator().manual_seed(1)) < 0.1).long().cumsum(1)
    return {"documents": ids[:, -n:], "key_documents": ids}


Form = Callable[..., Tensor]


def with_gradients(form: Form, leaves: list[Tensor], index: Tensor | None, visible: Visible) -> list[Tensor]:
    gate = leaves[3] if len(leaves) > 3 else None
    out = form(*leaves[:3], gate, index, visible=visible, scale=SCALE)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def assert_forms_agree(leaves: list[Tensor], index: Tensor | None, visible: Visible) -> None:
    ours = with_gradients(gated_attention, leaves, index, visible)
    theirs = with_gradients(gated_attention_reference, leaves, index, visible)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dgate"), ours, theirs, strict=False):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences skip too, in many small squares, and parts without a mask are short."""
    monkeypatch.setattr(selected, "_FEWEST_QUERIES", 1)
    monkeypatch.setattr(selected, "_QUERIES_OF_A_SQUARE", 3)
    monkeypatch.setattr(parts, "_FEWEST_KEYS", 4)


@pytest.fixture
def only_skipping(skipping: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No head is computed in full, not even one that all tokens select."""
    monkeypatch.setattr(selected, "_LARGEST_SHARE", 2.0)


def test_the_reference_is_the_equation() -> None:
    """Loops, with numbers small enough to follow."""
    q, k, v = (x.detach() for x in inputs(5, groups=2))
    index, gate = choice(5, 2), some_gate(2, 5, 2).detach()
    out = gated_attention_reference(q, k, v, gate, index, visible=Visible(5, 5), scale=SCALE)
    for i in range(5):
        wanted = torch.zeros(4, 6, dtype=torch.float64)
        for place, head in enumerate(index[1, i].tolist()):
            weights = torch.stack([q[1, i, head] @ k[1, j, head // 2] * SCALE for j in range(i + 1)]).softmax(0)
            wanted[head] = gate[1, i, place] * sum(weights[j] * v[1, j, head // 2] for j in range(i + 1))
        torch.testing.assert_close(out[1, i], wanted)


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("window", [None, 1, 5, 20, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_skipping_is_a_mask_after_all_heads(causal: bool, window: int | None, documents: bool) -> None:
    """At a length that no square divides, with keys of their own and shared ones."""
    visible = Visible(45, 45, 0, causal, window, **(packed(45) if documents else {}))
    for groups in (4, 2):
        assert_forms_agree([*inputs(groups=groups), some_gate(2, 45, 2)], choice(45, 2), visible)


@pytest.mark.usefixtures("only_skipping")
@pytest.mark.parametrize("active", [1, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 17, 64, 130])
def test_lengths_and_numbers_of_heads(n: int, active: int) -> None:
    assert_forms_agree([*inputs(n, groups=2), some_gate(2, n, active)], choice(n, active), Visible(n, n))


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize(("n", "m"), [(1, 60), (9, 60), (45, 60)])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_queries_after_cached_keys_are_the_last_rows(n: int, m: int, documents: bool) -> None:
    """`first_index`: decoding, and pieces of a sequence."""
    q, k, v = inputs(m)
    index, gate = choice(m, 2), some_gate(2, m, 2)
    for window in (None, 7):
        hidden = [packed(m), packed(n, m)] if documents else [{}, {}]
        whole = Visible(m, m, 0, True, window, **hidden[0])
        wanted = gated_attention_reference(q, k, v, gate, index, visible=whole, scale=SCALE)[:, m - n :]
        piece = Visible(n, m, m - n, True, window, **hidden[1])
        last = [q[:, m - n :].detach().requires_grad_(), k, v, gate[:, m - n :].detach().requires_grad_()]
        found = gated_attention(*last, index[:, m - n :], visible=piece, scale=SCALE)
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert_forms_agree(last, index[:, m - n :], piece)
    before_others = Visible(n, m, 3, True, None)
    assert_forms_agree([*inputs(n, m), some_gate(2, n, 2)], choice(n, 2), before_others)


@pytest.mark.parametrize("shares", [0.0, 0.85, 2.0], ids=["in full", "as the rule says", "skipping"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_shared_heads(groups: int, shares: float, monkeypatch: pytest.MonkeyPatch, skipping: None) -> None:
    """Heads that all tokens select, with others beside them: in full or not is the same."""
    monkeypatch.setattr(selected, "_LARGEST_SHARE", shares)
    assert_forms_agree([*inputs(groups=groups), some_gate(2, 45, 3)], choice(45, 3, shared=2), Visible(45, 45))
    whole = selected._heads_in_full(
        torch.ones(2, 45, 4).bool().index_fill(2, torch.tensor([3]), False), Visible(45, 45), 4
    )
    assert whole.tolist() == {0.0: [0, 1, 2, 3], 0.85: [0, 1, 2], 2.0: []}[shares]


def test_short_sequences_are_computed_in_full() -> None:
    """As decoding steps are, with and without a mask."""
    for visible in (Visible(45, 45), Visible(45, 45, window=9), Visible(45, 45, **packed(45))):
        assert selected._heads_in_full(None, visible, 4).tolist() == [0, 1, 2, 3]
        assert_forms_agree([*inputs(groups=2), some_gate(2, 45, 2)], choice(45, 2), visible)
        # Without a gate nothing else makes what was not selected zero.
        assert_forms_agree(inputs(groups=2), choice(45, 2), visible)
    assert_forms_agree([*inputs(1, 60), some_gate(2, 1, 2)], choice(1, 2), Visible(1, 60, 59))


@pytest.mark.parametrize("hidden", [{}, {"window": 9}, {"causal": False}])
@pytest.mark.parametrize("skip", [False, True])
def test_all_heads_with_a_gate(hidden: dict[str, Any], skip: bool, request: pytest.FixtureRequest) -> None:
    """A gate of exactly 0 has the gradient <dy, H>."""
    if skip:
        request.getfixturevalue("only_skipping")
    gate = some_gate(2, 45, 4)
    assert (gate == 0).any()
    assert_forms_agree([*inputs(), gate], None, Visible(45, 45, **hidden))
    found = with_gradients(gated_attention, [*inputs(), gate], None, Visible(45, 45, **hidden))
    assert (found[4][gate == 0] != 0).all()


@pytest.mark.usefixtures("skipping")
def test_without_a_gate() -> None:
    """All heads are plain attention, selected ones that and 0."""
    leaves, visible, index = inputs(), Visible(45, 45), choice(45, 2)
    assert_forms_agree(leaves, None, visible)
    assert_forms_agree(leaves, index, visible)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), is_causal=True, scale=SCALE
    ).transpose(1, 2)
    torch.testing.assert_close(gated_attention(*leaves, None, visible=visible, scale=SCALE), plain, **CLOSE)
    found = gated_attention(*leaves, None, index, visible=visible, scale=SCALE)
    chosen = torch.zeros(2, 45, 4, dtype=torch.bool).scatter(2, index, True)
    torch.testing.assert_close(found, plain * chosen[..., None], **CLOSE)
    assert (found[~chosen] == 0).all()


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize(("d", "e"), [(6, 3), (3, 6)])
def test_values_of_another_width(d: int, e: int) -> None:
    assert_forms_agree([*inputs(d=d, e=e), some_gate(2, 45, 2)], choice(45, 2), Visible(45, 45))


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize("load", ["nobody", "one", "few and many"])
def test_loads_that_are_not_even(load: str) -> None:
    """A head that no token selects has gradients of 0; others take few queries, or nearly all."""
    if load == "nobody":
        index = torch.tensor([0, 3]).expand(2, 45, 2)
    elif load == "one":
        index = torch.full((2, 45, 1), 2)
        index[1, 30] = 1
    else:
        many = torch.rand(2, 45, 1, generator=torch.Generator().manual_seed(5)) < 0.8
        index = torch.where(many, 1, torch.where(choice(45, 1) == 1, 0, choice(45, 1)))
    leaves = [*inputs(), some_gate(2, 45, index.shape[2])]
    assert_forms_agree(leaves, index, Visible(45, 45))
    assert_forms_agree(leaves, index, Visible(45, 45, **packed(45)))
    if load == "nobody":
        _, dq, dk, dv, _ = with_gradients(gated_attention, leaves, index, Visible(45, 45))
        assert all(torch.equal(x[:, :, 1:3], torch.zeros_like(x[:, :, 1:3])) for x in (dq, dk, dv))


@pytest.mark.parametrize("skip", [False, True])
def test_nothing_comes_of_no_keys(skip: bool, request: pytest.FixtureRequest) -> None:
    """Some rows that see nothing: 0, and gradients of 0; and documents whose numbers do not rise."""
    if skip:
        request.getfixturevalue("only_skipping")
    ids = torch.arange(45).expand(2, -1) // 10
    leaves, index = [*inputs(), some_gate(2, 45, 2)], choice(45, 2)
    for documents, key_documents in ((ids + (ids == 4), ids), (ids, ids.masked_fill(ids == 2, 9)), (-ids, -ids)):
        visible = Visible(45, 45, documents=documents, key_documents=key_documents)
        assert_forms_agree(leaves, index, visible)
    elsewhere = Visible(45, 45, documents=ids + 7, key_documents=ids)
    for found in with_gradients(gated_attention, leaves, index, elsewhere):
        assert torch.equal(found, torch.zeros_like(found))


@pytest.mark.usefixtures("skipping")
def test_inputs_in_any_memory_and_equal_bits() -> None:
    leaves, index, visible = [*inputs(groups=2), some_gate(2, 45, 2)], choice(45, 2), Visible(45, 45)
    first = with_gradients(gated_attention, leaves, index, visible)
    again = with_gradients(gated_attention, leaves, index, visible)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in leaves]
    assert not any(x.is_contiguous() for x in strided)
    crossed = index.transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(with_gradients(gated_attention, strided, crossed, visible), first, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.usefixtures("skipping")
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_narrow_numbers_are_near(dtype: torch.dtype, within: float) -> None:
    """What is left is about the rounding of inputs, outputs and parts; a dtype that is not skipped in is among them."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in [*inputs(150, groups=2), some_gate(2, 150, 2)]]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    index, visible = choice(150, 2), Visible(150, 150)
    wanted = with_gradients(gated_attention_reference, exact, index, visible)
    for name, a, b in zip(
        ("out", "dq", "dk", "dv", "dgate"), with_gradients(gated_attention, leaves, index, visible), wanted, strict=True
    ):
        assert a.dtype == dtype
        assert (a.double() - b).norm() / b.norm() < within, name


class Watched(TorchDispatchMode):
    """Notes the most elements that one tensor has, and how many pairs of queries and keys are handed on."""

    elements, pairs = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (FLASH, FLASH_BACKWARD):
            q, k = args[:2] if func is FLASH else args[1:3]
            causal = any(x is True for x in args)
            self.pairs += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] // (2 if causal else 1)
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def watch(n: int, heads: int, index: Tensor | None, visible: Visible) -> Watched:
    q, k, v = (torch.randn(1, n, heads, 8) for _ in range(3))
    chosen = None if index is None else torch.zeros(1, n, heads, dtype=torch.bool).scatter(2, index, True)
    with torch.no_grad(), Watched() as watched:
        out, lse = selected._selected_forward(q, k, v, chosen, visible, SCALE)
        selected._selected_backward(torch.ones_like(out), q, k, v, out, lse, chosen, visible, SCALE)
    return watched


def test_what_is_not_selected_is_not_computed() -> None:
    """Pairs of queries and keys: in proportion to the heads of a token, and what is shared is not doubled."""
    n, heads, visible = 4096, 8, Visible(4096, 4096)
    everything = watch(n, heads, None, visible).pairs
    assert everything == 2 * heads * n * n // 2
    for active, shared, most in ((1, 0, 0.2), (2, 0, 0.32), (4, 0, 0.6), (4, 2, 0.6)):
        index = choice(n, active, heads, shared, rows=1)
        assert watch(n, heads, index, visible).pairs < most * everything


def test_what_no_query_sees_is_not_computed() -> None:
    n, heads = 4096, 4
    index = choice(n, 2, heads, rows=1)
    whole = 2 * heads * n * n // 2
    assert watch(n, heads, None, Visible(n, n, window=256)).pairs < 0.4 * whole
    assert watch(n, heads, index, Visible(n, n, window=256)).pairs < 0.25 * whole
    ids = torch.arange(n)[None] // 512
    assert watch(n, heads, index, Visible(n, n, documents=ids, key_documents=ids)).pairs < 0.2 * whole


def test_one_busy_head_does_not_slow_the_others() -> None:
    """Padded to its queries, the others would cost as much as it."""
    n, heads = 4096, 8
    index = torch.where(torch.rand(1, n, 1) < 0.7, 0, choice(n, 1, heads, rows=1))
    assert watch(n, heads, index, Visible(n, n)).pairs < 0.2 * 2 * heads * n * n // 2


def test_no_map_is_kept_and_none_is_made() -> None:
    n, heads = 2048, 4
    index, visible = choice(n, 2, heads, rows=1), Visible(n, n)
    leaves = [torch.randn(1, n, heads, 8, requires_grad=True) for _ in range(3)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_attention(*leaves, None, index, visible=visible, scale=SCALE)
    assert max(x.numel() for x in kept) == n * heads * 8
    assert watch(n, heads, index, visible).elements < heads * n * n / 16


def test_parts_are_every_pair_once() -> None:
    """Of queries and keys that can see each other; without a mask only where all can."""
    ids = torch.tensor([0] * 20 + [1] * 30 + [2] * 13)
    sightings = [(63, 63, 0, True, None), (63, 63, 0, True, 9), (63, 63, 0, False, 9), (40, 63, 23, True, None)]
    for n, m, first_index, causal, window in sightings:
        for documents in (None, ids[None]):
            own = None if documents is None else documents[:, m - n :]
            visible = Visible(n, m, first_index, causal, window, own, documents)
            _, sight = next(parts.sights(visible, 1))
            count = torch.zeros(n, m, dtype=torch.int64)
            seen = visible.of(torch.arange(n))[0, 0]
            for part in sight.parts(0, n, (0, m), 8):
                place = slice(part.first, part.end), slice(part.first_key, part.end_key)
                count[place] += 1
                assert part.masked or seen[place].all()
                assert part.end - part.first <= 8 or not part.masked
            assert count.max() == 1
            assert (count[seen] == 1).all()


@pytest.mark.usefixtures("skipping")
def test_the_operators_are_what_torch_expects() -> None:
    q, k, v = inputs(groups=2)
    chosen = torch.zeros(2, 45, 4, dtype=torch.bool).scatter(2, choice(45, 2), True)
    ids = packed(45)["documents"]
    for rest in ((chosen, None, None, 0, True, None, SCALE), (None, ids, ids, 0, True, 9, SCALE)):
        torch.library.opcheck(torch.ops.headway.selected_attention.default, (q, k, v, *rest))


@pytest.mark.usefixtures("skipping")
def test_a_compiler_does_not_look_inside() -> None:
    """One graph, at any length."""
    compiled = torch.compile(gated_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (45, 70):
        leaves, index, visible = [*inputs(n), some_gate(2, n, 2)], choice(n, 2), Visible(n, n)
        ours = with_gradients(compiled, leaves, index, visible)
        for a, b in zip(ours, with_gradients(gated_attention, leaves, index, visible), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_a_second_copy_of_the_file_leaves_the_operators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that is loaded beside Headway: both compute, and the first is not taken away from its users."""
    before = torch.ops.headway.selected_attention.default
    spec = importlib.util.spec_from_file_location("a_copy_of_selected", selected.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_copy_of_selected", copy)
    spec.loader.exec_module(copy)
    assert torch.ops.headway.selected_attention.default is before
    q, k, v = inputs(9)
    ours, theirs = (x.selected_attention(q, k, v, None, Visible(9, 9), SCALE) for x in (selected, copy))
    assert torch.equal(ours, theirs)


def test_a_mask_selects_as_an_index_does() -> None:
    """And heads of which tokens select different numbers, as a tensor-parallel rank has them."""
    q, k, v = inputs(37)
    heads = q.shape[2]
    gate = torch.rand(q.shape[:3], dtype=q.dtype, generator=torch.Generator().manual_seed(3))
    index = torch.rand(gate.shape, generator=torch.Generator().manual_seed(4)).argsort(-1)[..., :2]
    selected = torch.zeros(gate.shape, dtype=torch.bool).scatter(2, index, True)
    visible = Visible(37, 37)
    by_mask = gated_attention(q, k, v, gate, selected=selected, visible=visible, scale=SCALE)
    by_index = gated_attention(q, k, v, gate.gather(2, index), index, visible=visible, scale=SCALE)
    assert torch.equal(by_mask, by_index)
    share = [x[:, :, : heads // 2] for x in (q, gate, selected)]
    assert len(share[2].sum(-1).unique()) > 1
    groups = k.shape[2] // 2
    part = gated_attention(
        share[0], k[:, :, :groups], v[:, :, :groups], share[1], selected=share[2], visible=visible, scale=SCALE
    )
    torch.testing.assert_close(part, by_mask[:, :, : heads // 2], rtol=1e-12, atol=1e-13)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k = torch.ones(2, 8, 4, 6), torch.ones(2, 8, 3, 6)
    with pytest.raises(ValueError) as error:
        gated_attention(q, k, k.half(), torch.ones(2, 8, 3), torch.ones(2, 8, 5).long(), visible=Visible(8, 9), scale=1)
    for said in (
        "3 heads of keys cannot be shared equally by 4 heads of queries",
        "must share one floating-point dtype",
        "visible speaks of 8 queries and 9 keys, q and k have 8 and 8",
        "head_index selects 5 distinct heads, and there are 4",
        "gate must be floating-point numbers [2, 8, 5], received [2, 8, 3]",
    ):
        assert said in str(error.value)
    for changed, said in (
        ({"q": torch.ones(2, 8, 24)}, r"q must be \[B, N, H, d\]"),
        ({"k": torch.ones(2, 8, 4, 5)}, "do not fit q"),
        ({"head_index": torch.ones(2, 8, 2)}, "head_index must be int64"),
        ({"gate": torch.ones(2, 8, 4).long()}, "gate must be floating-point numbers"),
        ({"selected": torch.ones(2, 8, 3).bool()}, r"selected must be bool \[2, 8, 4\], without head_index"),
        ({"selected": torch.ones(2, 8, 4).bool(), "head_index": torch.ones(2, 8, 2).long()}, "and head_index"),
    ):
        arguments = {"q_BNHd": q, "k_BMGd": q, "v_BMGe": q, "gate": None} | {
            {"q": "q_BNHd", "k": "k_BMGd"}.get(name, name): value for name, value in changed.items()
        }
        with pytest.raises(ValueError, match=said):
            gated_attention(**arguments, visible=Visible(8, 8), scale=1)
