"""Lightning attention: its three forms are one function, in every way the trainer cuts a sequence."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.lightning import (
    decay_slopes,
    lightning_attention,
    lightning_attention_recurrent,
    lightning_attention_reference,
)

# Slopes from no decay at all to a state that is gone after three tokens.
SLOPES = torch.tensor([0.9, 0.05, 0.0], dtype=torch.float64)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Case(NamedTuple):
    """Leaves of one call, and the cotangents that are sent back through its two results."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor
    state: Tensor
    d_out: Tensor
    d_final: Tensor


def make_case(batch=2, length=37, key_width=4, value_width=6, slopes=SLOPES, seed=0, dtype=torch.float64) -> Case:
    generator = torch.Generator().manual_seed(seed)
    heads = len(slopes)

    def draw(*shape: int, leaf: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(leaf)

    q, k = (draw(batch, length, heads, key_width) for _ in range(2))
    v = draw(batch, length, heads, value_width)
    state = draw(batch, heads, key_width, value_width)
    d_out = draw(batch, length, heads, value_width, leaf=False)
    d_final = draw(batch, heads, key_width, value_width, leaf=False)
    return Case(q, k, v, slopes, state, d_out, d_final)


def make_documents(batch: int, length: int, mean: float = 5.0) -> Tensor:
    """Draw documents of `mean` tokens on average, from one token upwards; ids jump, as shuffled corpora make them."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < 1 / mean
    return starts.long().mul(3).cumsum(dim=1)


def run(form, case: Case, *, with_state: bool = True, **options) -> list[Tensor]:
    """Return out, final state, and the gradients of q, k, v and, where there is one, the initial state."""
    leaves = [case.q, case.k, case.v, *([case.state] if with_state else [])]
    state = case.state if with_state else None
    out, final = form(case.q, case.k, case.v, case.slopes, initial_state=state, **options)
    assert out.dtype == case.v.dtype and out.shape == case.v.shape
    assert final.dtype == (torch.float64 if case.q.dtype == torch.float64 else torch.float32)
    return [out, final, *torch.autograd.grad([out, final], leaves, [case.d_out, case.d_final.to(final.dtype)])]


def assert_same(actual: list[Tensor], expected: list[Tensor], **tolerance) -> None:
    for name, a, b in zip(["out", "final state", "dq", "dk", "dv", "d initial"], actual, expected, strict=False):
        torch.testing.assert_close(a, b, **(tolerance or CLOSE), msg=lambda text, name=name: f"{name}: {text}")
    assert len(actual) == len(expected)


# -------------------------------------------------------------------------------- the forms agree


def test_the_recurrence_is_the_equation():
    """The reference of the references: three lines of Python on one head, with numbers small enough to follow."""
    case = make_case(batch=1, length=5, slopes=torch.tensor([0.3], dtype=torch.float64))
    state = case.state[0, 0]
    for form in (lightning_attention_recurrent, lightning_attention_reference, lightning_attention):
        out, final = form(case.q, case.k, case.v, case.slopes, initial_state=case.state)
        s = state
        for t in range(5):
            s = math.exp(-0.3) * s + torch.outer(case.k[0, t, 0], case.v[0, t, 0])
            torch.testing.assert_close(out[0, t, 0], case.q[0, t, 0] @ s, **CLOSE)
        torch.testing.assert_close(final[0, 0], s, **CLOSE)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("with_state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("length", [1, 2, 64, 131])
def test_forms_agree(length, with_state, packed):
    """Outputs, final states and every gradient, with random cotangents for both results; chunks that don't divide N."""
    case = make_case(length=length)
    documents = make_documents(2, length) if packed else None
    expected = run(lightning_attention_reference, case, with_state=with_state, documents=documents)
    assert_same(run(lightning_attention_recurrent, case, with_state=with_state, documents=documents), expected)
    for chunk_size in (None, 1, 7, 64, 100, length):
        actual = run(lightning_attention, case, with_state=with_state, documents=documents, chunk_size=chunk_size)
        assert_same(actual, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("length", [16 * 16 * 2, 16 * 16 * 2 + 1, 601])
def test_states_travel_through_groups_of_groups(length, packed):
    """Chunks of two tokens at these lengths need two levels of groups, then three, full and ragged."""
    case = make_case(length=length, slopes=torch.tensor([0.01, 0.0], dtype=torch.float64))
    documents = make_documents(2, length, mean=100) if packed else None
    expected = run(lightning_attention_reference, case, documents=documents)
    assert_same(run(lightning_attention, case, documents=documents, chunk_size=2), expected)


@pytest.mark.parametrize("heads", [4, 8, 40])
@pytest.mark.parametrize("layer", [0, 11, 23])
def test_forms_agree_on_real_slopes(heads, layer):
    slopes = torch.tensor(decay_slopes("alibi_layer", heads, layer, 24), dtype=torch.float64)
    case = make_case(batch=1, length=150, slopes=slopes)
    assert_same(run(lightning_attention, case), run(lightning_attention_reference, case))


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_gradients_against_differences(packed):
    """First and second derivatives, against finite differences."""
    case = make_case(batch=1, length=6, key_width=2, value_width=3)
    documents = torch.tensor([[0, 0, 2, 2, 2, 5]]) if packed else None

    def function(q, k, v, state):
        return lightning_attention(q, k, v, SLOPES, initial_state=state, documents=documents, chunk_size=4)

    leaves = (case.q, case.k, case.v, case.state)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


# -------------------------------------------------------------------------------- cutting and packing


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("cut", [1, 16, 20, 49])
def test_split_anywhere(cut, packed):
    """run(x[:a]), then run(x[a:]) from its state, is run(x), and gradients flow back through the state.

    The state belongs to the document at the cut: where the second part opens a new one, its caller passes zeros.
    """
    case, length = make_case(length=50), 50
    documents = make_documents(2, length, mean=12) if packed else torch.zeros(2, length, dtype=torch.long)

    def in_two(q, k, v, slopes, *, initial_state, documents):
        head, tail = slice(None, cut), slice(cut, None)
        first, state = lightning_attention(
            q[:, head], k[:, head], v[:, head], slopes, initial_state=initial_state, documents=documents[:, head]
        )
        goes_on = documents[:, cut] == documents[:, cut - 1]
        second, final = lightning_attention(
            q[:, tail],
            k[:, tail],
            v[:, tail],
            slopes,
            initial_state=state * goes_on[:, None, None, None],
            documents=documents[:, tail],
            chunk_size=16,
        )
        return torch.cat([first, second], dim=1), final

    assert_same(run(in_two, case, documents=documents), run(lightning_attention, case, documents=documents))


def test_prefill_then_decode():
    """One call for the prompt and one per token is the call on everything, in float32."""
    case = make_case(length=80, key_width=16, value_width=16, dtype=torch.float32, slopes=SLOPES.float())
    expected, expected_state = lightning_attention(case.q, case.k, case.v, case.slopes)
    out, state = lightning_attention(case.q[:, :60], case.k[:, :60], case.v[:, :60], case.slopes)
    parts = [out]
    for t in range(60, 80):
        step = slice(t, t + 1)
        out, state = lightning_attention(
            case.q[:, step], case.k[:, step], case.v[:, step], case.slopes, initial_state=state
        )
        parts.append(out)
    scale = expected.abs().max().item()
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5 * scale)


def test_packed_documents_are_separate_documents():
    lengths = [1, 63, 64, 65, 1, 7, 30]
    case = make_case(batch=1, length=sum(lengths))
    documents = torch.repeat_interleave(torch.tensor([2, 3, 5, 8, 9, 20, 21]), torch.tensor(lengths))[None]
    packed = run(lightning_attention, case, documents=documents)

    pieces, start = [], 0
    for index, length in enumerate(lengths):
        part = slice(start, start + length)
        last = index == len(lengths) - 1
        piece = Case(
            *(x[:, part].detach().clone().requires_grad_() for x in case[:3]),
            case.slopes,
            (case.state if index == 0 else torch.zeros_like(case.state)).detach().requires_grad_(),
            case.d_out[:, part],
            case.d_final if last else torch.zeros_like(case.d_final),
        )
        pieces.append(run(lightning_attention, piece))
        start += length
    joined = [torch.cat([piece[i] for piece in pieces], dim=1) for i in (0, 2, 3, 4)]
    assert_same(packed, [joined[0], pieces[-1][1], *joined[1:], pieces[0][5]])


def test_left_padding_of_zeros_changes_nothing():
    case = make_case(length=70)
    padded = [torch.cat([torch.zeros_like(x[:, :13]), x], dim=1) for x in (case.q, case.k, case.v)]
    out, final = lightning_attention(*padded, case.slopes)
    assert_same([out[:, 13:], final], list(lightning_attention(case.q, case.k, case.v, case.slopes)))


def test_left_padding_as_its_own_document_changes_nothing():
    """Padding need not be zero if it is another document; rows of a batch may be padded differently."""
    case = make_case(length=70)
    documents = torch.ones(2, 70, dtype=torch.long)
    documents[0, :13] = documents[1, :50] = 0
    out, final = lightning_attention(case.q, case.k, case.v, case.slopes, documents=documents, chunk_size=16)
    for row, padding in enumerate([13, 50]):
        alone = lightning_attention(*(x[row : row + 1, padding:] for x in case[:3]), case.slopes)
        assert_same([out[row : row + 1, padding:], final[row : row + 1]], list(alone))


def test_a_token_sees_no_later_one():
    case = make_case(length=50)
    changed = [x.detach().clone() for x in case[:3]]
    for x in changed:
        x[:, 29:] += 1.0
    before = lightning_attention(case.q, case.k, case.v, case.slopes, chunk_size=8)[0]
    after = lightning_attention(*changed, case.slopes, chunk_size=8)[0]
    assert torch.equal(before[:, :29], after[:, :29])
    assert (before[:, 29:] != after[:, 29:]).any(dim=(0, 2, 3)).all()


# -------------------------------------------------------------------------------- limits and precision


def test_no_decay_is_plain_causal_linear_attention():
    case = make_case(length=90, slopes=torch.zeros(3, dtype=torch.float64))
    out, final = lightning_attention(case.q, case.k, case.v, case.slopes, chunk_size=16)
    scores = torch.einsum("bthd,bshd->bhts", case.q, case.k).tril()
    torch.testing.assert_close(out, torch.einsum("bhts,bshe->bthe", scores, case.v), **CLOSE)
    torch.testing.assert_close(final, torch.einsum("bshd,bshe->bhde", case.k, case.v), **CLOSE)


def test_endless_decay_leaves_the_token_itself():
    case = make_case(length=90, slopes=torch.full((3,), 1e6, dtype=torch.float64))
    out, _ = lightning_attention(case.q, case.k, case.v, case.slopes, initial_state=case.state, chunk_size=16)
    torch.testing.assert_close(out, (case.q * case.k).sum(-1, keepdim=True) * case.v, **CLOSE)


def test_a_hundred_thousand_tokens_stay_finite():
    """A causal decay factored as (q exp(-s t)) (k exp(s t)) overflows after some hundred tokens."""
    slopes = torch.tensor([max(decay_slopes("alibi_layer", 40, 0, 24)), 8.0, 1e-7])
    case = make_case(batch=1, length=100_000, key_width=4, value_width=4, slopes=slopes, dtype=torch.float32)
    results = run(lightning_attention, case)
    assert all(torch.isfinite(x).all() for x in results)
    precise = run(lightning_attention, Case(*(x.double().detach().requires_grad_() for x in case)), chunk_size=50)
    for actual, expected in zip(results, precise, strict=True):
        assert relative_error(actual, expected) < 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.detach().double() - expected.detach()).norm() / expected.detach().norm()).item()


@pytest.mark.parametrize("layer", [0, 23])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_bfloat16_stays_near_float64(layer, packed):
    slopes = torch.tensor(decay_slopes("alibi_layer", 4, layer, 24))
    case = make_case(batch=1, length=1000, key_width=32, value_width=32, slopes=slopes, dtype=torch.bfloat16)
    case = case._replace(state=case.state.detach().float().requires_grad_())
    documents = make_documents(1, 1000, mean=300) if packed else None
    precise = Case(*(x.double().detach().requires_grad_() for x in case))
    expected = run(lightning_attention_reference, precise, documents=documents)
    for actual, exact in zip(run(lightning_attention, case, documents=documents), expected, strict=True):
        assert relative_error(actual, exact) < 1e-2


def test_autocast_does_not_reach_the_sums():
    case = make_case(length=100, slopes=SLOPES.float(), dtype=torch.float32)
    expected = run(lightning_attention, case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(lightning_attention, case), expected)
        one = [x[:, :1] for x in (case.q, case.k, case.v)]
        out, _ = lightning_attention(*one, case.slopes, initial_state=case.state)
    torch.testing.assert_close(out, expected[0][:, :1])


# -------------------------------------------------------------------------------- cost


class LargestTensor(TorchDispatchMode):
    """Remember the most elements that any operation inside has put out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_nothing_grows_faster_than_the_length(packed):
    """The largest tensor of forward and backward, and what is kept between them, per token."""
    heads, width, per_token, kept = 2, 16, [], []
    for length in (4096, 8192):
        case = make_case(1, length, width, width, slopes=torch.tensor([0.5, 0.0]), dtype=torch.float32)
        documents = make_documents(1, length) if packed else None
        saved: list[int] = []

        def note(x: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(x.numel())
            return x

        with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            run(lightning_attention, case, documents=documents)
        per_token.append(largest.elements / length)
        kept.append(sum(saved) / length)
    assert per_token == [heads * 64] * 2  # scores of a chunk of 64
    assert kept[0] < 3 * heads * width + 2 and kept[1] <= kept[0]


def test_operations_per_token_do_not_grow():
    """Forward and backward, at four times the length: the states travel in groups, not through one big matrix."""
    per_token = []
    for length in (4096, 16384):
        case = make_case(1, length, 16, 16, slopes=torch.tensor([0.5]), dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            run(lightning_attention, case)
        per_token.append(counter.get_total_flops() / length)
    assert per_token[1] < 1.01 * per_token[0]


def test_declared_operations_are_counted_operations():
    """4 d e per token and head, on the recurrence, whatever the counter sees of the chunked form."""
    case = make_case(batch=2, length=9, key_width=4, value_width=6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lightning_attention_recurrent(case.q, case.k, case.v, case.slopes, initial_state=case.state)
    assert counter.get_total_flops() == 4 * 4 * 6 * (2 * 9 * 3)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("length", [1, 150])
def test_compiles_without_a_break(length, packed):
    case = make_case(length=length)
    documents = make_documents(2, length) if packed else None
    torch.compiler.reset()
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="aot_eager")
    expected = run(lightning_attention, case, documents=documents, chunk_size=16)
    assert_same(run(compiled, case, documents=documents, chunk_size=16), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms():
    """torch.func sees through the written-out backward: a gradient per sequence is the gradient of each sequence."""
    case = make_case(batch=3, length=20)

    def loss(q, k, v):
        return lightning_attention(q[None], k[None], v[None], SLOPES)[0].square().sum()

    per_sequence = torch.func.vmap(torch.func.grad(loss))(case.q, case.k, case.v)
    (expected,) = torch.autograd.grad(lightning_attention(*case[:3], SLOPES)[0].square().sum(), case.q)
    torch.testing.assert_close(per_sequence, expected, **CLOSE)


# -------------------------------------------------------------------------------- schedules and refusals


def test_ladder_of_eight_heads():
    factor = 1.0 + 1e-5
    assert decay_slopes("alibi_layer", 8, 0, 24) == pytest.approx([2.0**-i * factor for i in range(1, 9)], rel=1e-15)


def test_ladder_of_forty_heads_is_not_monotone():
    exponents = [-math.log2(s / (1 + 1e-5)) for s in decay_slopes("alibi_layer", 40, 0, 24)]
    assert exponents[:32] == pytest.approx([0.25 * (h + 1) for h in range(32)])
    assert exponents[32:] == pytest.approx([0.125, 0.375, 0.625, 0.875, 1.125, 1.375, 1.625, 1.875])


def test_last_layer_hardly_forgets():
    ladder = [2.0**-i for i in range(1, 9)]
    assert decay_slopes("alibi_layer", 8, 23, 24) == pytest.approx([1e-5 * r for r in ladder], rel=1e-9)


def test_minimax_and_paper_schedules():
    minimax = decay_slopes("alibi_layer_minimax", 12, 3, 10)
    factor = 1 - 3 / (9 + 1e-5) + 1e-5
    assert minimax == pytest.approx([2 ** (-8 * (h + 1) / 12) * factor for h in range(12)], rel=1e-15)
    assert minimax != pytest.approx(decay_slopes("alibi_layer", 12, 3, 10), rel=1e-3)
    assert decay_slopes("paper", 4, 1, 4) == [0.0, 1.5, 3.0, 4.5]


@pytest.mark.parametrize("schedule", ["alibi_layer", "alibi_layer_minimax", "paper"])
def test_one_layer_is_a_first_layer(schedule):
    assert decay_slopes(schedule, 8, 0, 1) == pytest.approx(decay_slopes(schedule, 8, 0, 24), rel=1e-12)


def test_schedule_refusals():
    with pytest.raises(ValueError, match="'alibi_layers'; the nearest is 'alibi_layer'"):
        decay_slopes("alibi_layers", 8, 0, 24)
    with pytest.raises(ValueError, match="received 24"):
        decay_slopes("alibi_layer", 8, 24, 24)
    with pytest.raises(ValueError, match="num_heads = 0"):
        decay_slopes("alibi_layer", 0, 0, 24)


def test_refusals_name_what_was_received():
    case = make_case()
    q, k, v, slopes = case[:4]
    refused = [
        ({"q": q[0]}, r"received \[37, 3, 4\]"),
        ({"k": k[:, :5]}, r"received \[2, 5, 3, 4\]"),
        ({"v": v[:, :5]}, r"received \[2, 5, 3, 6\]"),
        ({"q": q.float()}, "torch.float32, torch.float64, torch.float64"),
        ({"slopes": slopes[:2]}, r"received \[2\]"),
        ({"slopes": slopes.bfloat16()}, "received torch.bfloat16"),
        ({"initial_state": case.state[:1]}, r"received \[1, 3, 4, 6\]"),
        ({"initial_state": case.state.bfloat16()}, "received torch.bfloat16"),
        ({"documents": torch.zeros(2, 36, dtype=torch.long)}, r"received \[2, 36\]"),
        ({"documents": torch.zeros(2, 37)}, "received torch.float32"),
        ({"q": q[:, :0], "k": k[:, :0], "v": v[:, :0]}, "no empty dimension"),
        ({"chunk_size": 0}, "received 0"),
    ]
    for change, message in refused:
        with pytest.raises(ValueError, match=message):
            lightning_attention(**{"q": q, "k": k, "v": v, "slopes": slopes, **change})
