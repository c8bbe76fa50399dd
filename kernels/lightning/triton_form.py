"""Lightning attention on a GPU: the launches of its two kernels, as operators that a compiler does not look into."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.lightning.triton_kernels import gradients_kernel, outputs_kernel, states_kernel
from kernels.triton_launches import block_of, in_rows, on_their_gpu


class Tiles(NamedTuple):
    """How a kernel is cut: the blocks of the two widths (d and e of states; contracted and other of outputs)."""

    inner: int
    outer: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """What is fixed for a width of heads: tokens of a chunk, and how each kernel is cut.

    `gradients`: None where a head does not fit into one block; its gradients are three launches for outputs.
    """

    chunk: int
    states: Tiles
    outputs: Tiles
    gradients: Tiles | None


PLANS = {
    32: Plan(64, Tiles(32, 32, 4, 3), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
    64: Plan(64, Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1)),
    96: Plan(64, Tiles(32, 64, 4, 3), Tiles(128, 64, 4, 1), Tiles(128, 128, 4, 1)),
    128: Plan(64, Tiles(32, 64, 4, 3), Tiles(128, 64, 4, 1), Tiles(128, 128, 4, 1)),
    192: Plan(64, Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 1), None),
    256: Plan(64, Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 1), None),
}
"""By the larger of the widths (the next one here), of numbers of two bytes. By measurement on a GPU; there is no search
when a run starts."""

WIDE_PLAN = Plan(64, Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 1), None)
"""Of float32. Its products are of three times as many parts, which larger blocks have no room for."""

# A segment is a piece of the sequence whose states one program sums up. More of them keep a GPU busy where there are
# few rows and heads; k and v are then read twice.
MOST_SEGMENTS = 32
_FEWEST_CHUNKS = 4
_PROGRAMS_A_PROCESSOR = 2


def lightning(
    q: Tensor, k: Tensor, v: Tensor, slopes_H: Tensor, initial_BHde: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`lightning_attention` of checked arguments: `[B, N, H, e]`, and the final state `[B, H, d, e]` in float32.

    Differentiable once, in q, k, v and the initial state.
    """
    if documents is not None:
        documents = documents.to(torch.int32)
    return torch.ops.headway.lightning(q, k, v, slopes_H, initial_BHde, documents)


def final_state(k: Tensor, v: Tensor, slopes_H: Tensor, documents: Tensor | None) -> Tensor:
    """`lightning_final_state` of checked arguments. Differentiable once, in k and v."""
    if documents is not None:
        documents = documents.to(torch.int32)
    return torch.ops.headway.lightning_final_state(k, v, slopes_H, documents)


# --------------------------------------------------------------------------------------------- launches


class _Case(NamedTuple):
    """What all launches of one call share."""

    slopes_H: Tensor
    documents: Tensor | None
    batch: int
    length: int
    heads: int
    key_width: int
    value_width: int
    plan: Plan

    @classmethod
    def of(cls, k: Tensor, v: Tensor, slopes_H: Tensor, documents: Tensor | None) -> _Case:
        if documents is not None:
            documents = documents.contiguous()
        widest = max(k.shape[3], v.shape[3])
        narrow = next(plan for width, plan in PLANS.items() if width >= widest)
        plan = narrow if k.dtype.itemsize == 2 else WIDE_PLAN
        batch, length, heads, key_width = k.shape
        return cls(slopes_H.contiguous(), documents, batch, length, heads, key_width, v.shape[3], plan)

    @property
    def num_chunks(self) -> int:
        return triton.cdiv(self.length, self.plan.chunk)


def _run_states(
    case: _Case, x: Tensor, y: Tensor, carry_BHde: Tensor | None, *, backwards: bool, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """States at the edges of all chunks `[B, H, T, d, e]` (nothing without `keep`), and the last one, float32."""
    tiles = case.plan.states
    d, e = case.key_width, case.value_width
    shape = (case.batch, case.heads)
    block_d, block_e = (min(tiles.inner, block_of(d)), min(tiles.outer, block_of(e)))
    blocks = triton.cdiv(d, block_d) * triton.cdiv(e, block_e)
    segments = _segments(case, blocks * case.batch * case.heads, x.device)
    chunks_a_segment = triton.cdiv(case.num_chunks, segments)
    segments = triton.cdiv(case.num_chunks, chunks_a_segment)
    last = torch.empty(*shape, d, e, device=x.device, dtype=torch.float32)
    states = torch.empty(*shape, case.num_chunks, d, e, device=x.device, dtype=x.dtype) if keep else last
    totals = torch.empty(*shape, segments, d, e, device=x.device, dtype=torch.float32) if segments > 1 else last
    carry = None if carry_BHde is None else carry_BHde.contiguous()

    def launch(*, totals_only: bool) -> None:
        states_kernel[(blocks, segments, case.batch * case.heads)](
            x, y, case.slopes_H, case.documents, carry, totals, states, last,
            case.length, case.heads, segments, chunks_a_segment, *x.stride()[:3], *y.stride()[:3],
            D=d, E=e, C=case.plan.chunk, BLOCK_D=block_d, BLOCK_E=block_e,
            PACKED=case.documents is not None, HAS_CARRY=carry is not None and not totals_only, BACKWARDS=backwards,
            TOTALS_ONLY=totals_only, HAS_TOTALS=segments > 1 and not totals_only,
            KEEP=keep and not totals_only, PRECISION=_precision(x),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    if segments > 1:
        launch(totals_only=True)
    launch(totals_only=False)
    return states, last


def _run_outputs(
    case: _Case, x: Tensor, y: Tensor, z: Tensor, states_BHTde: Tensor, *, backwards: bool, turned: bool = False
) -> Tensor:
    """`[B, N, H, Z]`, contiguous. `turned`: x and y are as wide as values, and z as keys."""
    tiles = case.plan.outputs
    wide_x, wide_z = x.shape[3], z.shape[3]
    block_x, block_z = min(tiles.inner, block_of(wide_x)), min(tiles.outer, block_of(wide_z))
    out = torch.empty(z.shape, device=z.device, dtype=z.dtype)
    outputs_kernel[(triton.cdiv(wide_z, block_z) * case.num_chunks, case.batch * case.heads)](
        x, y, z, case.slopes_H, case.documents, states_BHTde, out, case.length, case.heads,
        *x.stride()[:3], *y.stride()[:3], *z.stride()[:3], *out.stride()[:3],
        *((1, case.value_width) if turned else (case.value_width, 1)),
        X=wide_x, Z=wide_z, C=case.plan.chunk, BLOCK_X=block_x, BLOCK_Z=block_z,
        PACKED=case.documents is not None, BACKWARDS=backwards, PRECISION=_precision(x),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out


def _run_gradients(
    case: _Case, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, states_BHTde: Tensor, d_states_BHTde: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous."""
    tiles = case.plan.gradients
    if tiles is None:
        dq = _run_outputs(case, d_out, v, k, states_BHTde, backwards=False, turned=True)
        dk = _run_outputs(case, v, d_out, q, d_states_BHTde, backwards=True, turned=True)
        return dq, dk, _run_outputs(case, k, q, d_out, d_states_BHTde, backwards=True)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    gradients_kernel[(case.num_chunks, case.batch * case.heads)](
        q, k, v, d_out, case.slopes_H, case.documents, states_BHTde, d_states_BHTde, dq, dk, dv, case.length,
        case.heads, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3],
        D=case.key_width, E=case.value_width, C=case.plan.chunk,
        BLOCK_D=block_of(case.key_width), BLOCK_E=block_of(case.value_width),
        PACKED=case.documents is not None, PRECISION=_precision(q), num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dq, dk, dv


def _segments(case: _Case, programs: int, device: torch.device) -> int:
    wanted = triton.cdiv(_PROGRAMS_A_PROCESSOR * _processors(device), programs)
    return max(1, min(wanted, MOST_SEGMENTS, case.num_chunks // _FEWEST_CHUNKS))


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision(x: Tensor) -> str:
    """Of products of float32: as torch's own are set to. Exact ones are made of three of the matrix units' (to 1e-6 or
    so): without those units they would take minutes to compile, and longer to run."""
    if x.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# ------------------------------------------------------------- as operators, into which a compiler does not look


@on_their_gpu
def _forward(
    q: Tensor, k: Tensor, v: Tensor, slopes_H: Tensor, initial: Tensor | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = (in_rows(x) for x in (q, k, v))
    case = _Case.of(k, v, slopes_H, documents)
    states, last = _run_states(case, k, v, initial, backwards=False)
    return _run_outputs(case, q, k, v, states, backwards=False), last


@on_their_gpu
def _backward(
    d_out: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes_H: Tensor,
    initial: Tensor | None,
    documents: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_out, q, k, v = (in_rows(x) for x in (d_out, q, k, v))
    case = _Case.of(k, v, slopes_H, documents)
    states, _ = _run_states(case, k, v, initial, backwards=False)
    d_states, d_initial = _run_states(case, q, d_out, d_final, backwards=True)
    return *_run_gradients(case, q, k, v, d_out, states, d_states), d_initial


@on_their_gpu
def _state(k: Tensor, v: Tensor, slopes_H: Tensor, documents: Tensor | None) -> Tensor:
    k, v = (in_rows(x) for x in (k, v))
    return _run_states(_Case.of(k, v, slopes_H, documents), k, v, None, backwards=False, keep=False)[1]


def _define_operators() -> None:
    rest = "Tensor slopes, Tensor? initial, Tensor? documents"
    forward = torch.library.custom_op(
        "headway::lightning",
        _forward,
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {rest}) -> (Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        "headway::lightning_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor d_out, Tensor d_final, Tensor q, Tensor k, Tensor v, {rest}) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    )
    forward.register_fake(lambda q, k, v, *rest: (v.new_empty(v.shape), _empty_state(k, v)))
    backward.register_fake(
        lambda d_out, d_final, q, k, v, *rest: (*(x.new_empty(x.shape) for x in (q, k, v)), _empty_state(k, v))
    )
    forward.register_autograd(_differentiate, setup_context=_keep_inputs)

    state = torch.library.custom_op(
        "headway::lightning_final_state",
        _state,
        mutates_args=(),
        schema="(Tensor k, Tensor v, Tensor slopes, Tensor? documents) -> Tensor",
    )
    state.register_fake(lambda k, v, *rest: _empty_state(k, v))
    state.register_autograd(_differentiate_state, setup_context=_keep_inputs)


def _empty_state(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d_out: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, slopes_H, initial, documents = ctx.saved_tensors
    dq, dk, dv, d_initial = torch.ops.headway.lightning_backward(d_out, d_final, q, k, v, slopes_H, initial, documents)
    return dq, dk, dv, None, None if initial is None else d_initial, None


def _differentiate_state(ctx: Any, d_state: Tensor) -> tuple[Tensor | None, ...]:
    """dk_r = lambda^(N-1-r) v_r dS^T and dv_r = lambda^(N-1-r) k_r dS, of the last document."""
    k, v, slopes_H, documents = ctx.saved_tensors
    distance_N1 = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)[:, None]
    left_BNH1 = torch.exp(-slopes_H * distance_N1)[None, :, :, None]
    if documents is not None:
        left_BNH1 = left_BNH1 * (documents == documents[:, -1:])[:, :, None, None]
    d_state = d_state.to(k.dtype)
    dk = torch.einsum("bnhe,bhde->bnhd", (v * left_BNH1).to(v.dtype), d_state)
    dv = torch.einsum("bnhd,bhde->bnhe", (k * left_BNH1).to(k.dtype), d_state)
    return dk, dv, None, None


_define_operators()
