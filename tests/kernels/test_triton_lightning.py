"""The Triton form of Lightning attention against the equation in float64: in the interpreter, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.dispatch import forced
from kernels.lightning import lightning_attention, lightning_attention_reference, lightning_final_state
from tests.kernels.test_lightning import Case, assert_same, make_case, make_documents, run

pytest.importorskip("triton", reason="the Triton forms need triton")

from kernels.lightning import triton_form

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
SLOPES = torch.tensor([0.9, 0.05, 0.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    with forced(lightning="triton"):
        yield


def narrow(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    """The same numbers as a kernel takes them."""
    q, k, v = (x.detach().to(device, dtype).requires_grad_() for x in (case.q, case.k, case.v))
    state = case.state.detach().to(device, torch.float32).requires_grad_()
    return Case(q, k, v, case.slopes.to(device), state, case.d_out.to(device, dtype), case.d_final.to(device))


def assert_right(case: Case, **options) -> None:
    """Outputs, states and gradients, beside the equation in float64."""
    actual = run(lightning_attention, narrow(case), **options)
    expected = run(lightning_attention_reference, case, **options)
    # Of the size of the numbers compared: sums over 200 tokens without decay are not near 1.
    for name, a, b in zip(["out", "final", "dq", "dk", "dv", "d initial"], actual, expected, strict=False):
        error = (a.double() - b).norm() / b.norm()
        assert error < 2e-6, f"{name}: {error:.1e}"
    assert_same([a.double() / b.abs().max() for a, b in zip(actual, expected, strict=True)],
                [b / b.abs().max() for b in expected], **CLOSE)  # fmt: skip


@pytest.mark.parametrize(
    ("key_width", "value_width", "length"),
    [
        (16, 16, 130),
        (16, 16, 64),
        (16, 16, 7),
        (32, 64, 130),
        (64, 32, 70),
        (96, 96, 70),
        (40, 24, 130),
        (40, 24, 1 + 64),
    ],
)
def test_it_is_the_equation(key_width, value_width, length):
    assert_right(make_case(length=length, key_width=key_width, value_width=value_width, batch=1))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_in_one_launch(monkeypatch, packed):
    """As numbers of two bytes have it, which the interpreter cannot multiply."""
    monkeypatch.setattr(triton_form, "WIDE_PLAN", triton_form.PLANS[64])
    documents = make_documents(2, 130, 40.0) if packed else None
    assert_right(make_case(length=130, key_width=16, value_width=24), documents=documents)


@pytest.mark.parametrize(("key_width", "value_width"), [(192, 192), (256, 128), (128, 256)])
def test_wide_heads_are_cut(key_width, value_width):
    assert_right(make_case(length=70, key_width=key_width, value_width=value_width, batch=1, slopes=SLOPES[1:2]))


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("mean", [3.0, 40.0, 400.0])
def test_documents(with_state, mean):
    assert_right(
        make_case(length=140, key_width=16, value_width=16),
        documents=make_documents(2, 140, mean),
        with_state=with_state,
    )


def test_a_document_that_begins_with_a_chunk():
    documents = torch.tensor([[0] * 64 + [1] * 64 + [2] * 5, [0] * 63 + [4] * 65 + [5] * 5])
    assert_right(make_case(length=133, key_width=16, value_width=16), documents=documents)


@pytest.mark.parametrize("segments", [1, 2, 3, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_the_sequence_hand_on_their_states(monkeypatch, segments, packed):
    monkeypatch.setattr(triton_form, "_segments", lambda case, programs, device: segments)
    documents = make_documents(2, 330, 90.0) if packed else None
    assert_right(make_case(length=330, key_width=16, value_width=24), documents=documents)


def test_few_rows_and_heads_are_cut_into_segments_and_many_are_not():
    case = triton_form._Case.of(torch.zeros(1, 4096, 1, 16), torch.zeros(1, 4096, 1, 16), torch.zeros(1), None)
    assert triton_form._segments(case, 1, torch.device("cpu")) == 16
    assert triton_form._segments(case, 1000, torch.device("cpu")) == 1


def test_channels_that_are_not_beside_each_other():
    case = make_case(length=70, key_width=16, value_width=16)
    wide = narrow(case)
    turned = wide._replace(**{
        name: getattr(wide, name).detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
        for name in ("q", "k", "v")
    })  # fmt: skip
    assert turned.q.stride(3) != 1
    assert_same(run(lightning_attention, turned), run(lightning_attention, wide), rtol=0, atol=0)


def test_packed_projections_are_read_where_they_lie():
    qkv = torch.randn(2, 70, 3, 3, 16)
    q, k, v = qkv.unbind(3)
    assert not q.is_contiguous() and q.stride(3) == 1
    slopes = SLOPES.float()
    out, _ = lightning_attention(q, k, v, slopes)
    expected, _ = lightning_attention_reference(q.double(), k.double(), v.double(), slopes)
    torch.testing.assert_close(out.double(), expected, **CLOSE)


def test_the_same_bits_every_time():
    case = narrow(make_case(length=200, key_width=32, value_width=32))
    assert_same(run(lightning_attention, case), run(lightning_attention, case), rtol=0, atol=0)


def test_a_sequence_in_two_halves():
    case = narrow(make_case(length=150, key_width=16, value_width=16))
    with torch.no_grad():
        whole, final = lightning_attention(case.q, case.k, case.v, case.slopes)
        first, state = lightning_attention(case.q[:, :83], case.k[:, :83], case.v[:, :83], case.slopes)
        second, last = lightning_attention(
            case.q[:, 83:], case.k[:, 83:], case.v[:, 83:], case.slopes, initial_state=state
        )
    torch.testing.assert_close(torch.cat((first, second), 1), whole, **CLOSE)
    torch.testing.assert_close(last, final, **CLOSE)


def test_a_fast_head_over_many_tokens_stays_finite():
    case = narrow(make_case(batch=1, length=1000, key_width=16, value_width=16, slopes=torch.tensor([5.0, 0.0])))
    assert all(x.isfinite().all() for x in run(lightning_attention, case))


@pytest.mark.parametrize("packed", [False, True])
def test_the_final_state_alone(packed):
    case = make_case(length=150, key_width=16, value_width=24)
    documents = make_documents(2, 150, 40.0) if packed else None
    k, v = (x.detach().float().requires_grad_() for x in (case.k, case.v))
    state = lightning_final_state(k, v, case.slopes, documents)
    with forced(lightning="torch"):
        expected = lightning_final_state(case.k, case.v, case.slopes, documents)
    torch.testing.assert_close(state.double(), expected, **CLOSE)
    actual = torch.autograd.grad(state, (k, v), case.d_final.float())
    wanted = torch.autograd.grad(expected, (case.k, case.v), case.d_final)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, **CLOSE)


def test_the_operators_keep_their_promises_to_a_compiler():
    q, k, v = (torch.randn(2, 40, 2, 16, requires_grad=True) for _ in range(3))
    state = torch.randn(2, 2, 16, 16, requires_grad=True)
    documents = make_documents(2, 40).int()
    slopes = SLOPES[:2].float()
    torch.library.opcheck(torch.ops.headway.lightning, (q, k, v, slopes, state, documents))
    torch.library.opcheck(torch.ops.headway.lightning_final_state, (k, v, slopes, documents))


# ------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("key_width", "value_width"), [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (128, 64)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_on_a_gpu(dtype, key_width, value_width, packed):
    case = make_case(length=1037, key_width=key_width, value_width=value_width)
    documents = make_documents(2, 1037, 200.0) if packed else None
    on_gpu = narrow(case, "cuda", dtype)
    actual = run(lightning_attention, on_gpu, documents=None if documents is None else documents.cuda())
    expected = run(lightning_attention_reference, case, documents=documents)
    for name, a, b in zip(["out", "final", "dq", "dk", "dv", "d initial"], actual, expected, strict=True):
        error = (a.double().cpu() - b).norm() / b.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5), f"{name}: {error:.1e}"
