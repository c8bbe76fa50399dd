"""What crosses a cut of the sequence, piece by piece; whole models stand in tests/conformance/test_layouts.py."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.lightning import lightning_attention, lightning_attention_recurrent, lightning_final_state
from model.stack import Model
from parallel.config import ParallelConfig
from parallel.context import SequenceCut, crossing_faults, reaching_heads
from parallel.mesh import layout_faults
from tests.conformance.layouts import BOUNDS, Case, assert_equal, build, share_of, two_steps, updater_of
from tests.conformance.models import small_model
from tests.pool import Pool

BATCH, PIECE, WIDTH, VALUE = 3, 12, 4, 5
SLOPES = [0.0, 1e-5, 0.3, 2.0, 5.0]
"""No decay, hardly any, some; a state gone after two pieces (2 x 24 > 40), and one gone after a single one."""
ENDLESS = [[0] * 48] * BATCH
AT_THE_CUTS = [[t // PIECE for t in range(48)], [t // 24 for t in range(48)], [int(t >= 36) for t in range(48)]]
BESIDE_THE_CUTS = [[int(t >= 11) for t in range(48)], [int(t >= 13) for t in range(48)], [t // 5 for t in range(48)]]
DOCUMENTS = {"none": None, "one": ENDLESS, "at the cuts": AT_THE_CUTS, "beside the cuts": BESIDE_THE_CUTS}


def sequence_cut(**settings: Any) -> SequenceCut:
    return SequenceCut(dist.group.WORLD.group_name, dist.get_rank(), dist.get_world_size(), **settings)


def leaves(length: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    shapes = [WIDTH, WIDTH, VALUE, VALUE]
    return [
        torch.randn(BATCH, length, len(SLOPES), width, generator=generator, dtype=torch.float64) for width in shapes
    ]


def lightning_on_pieces(documents: list[list[int]] | None, send_all: bool) -> dict[str, float]:
    """Largest differences of output and gradients on this piece to those of the recurrence over whole rows."""
    length = PIECE * dist.get_world_size()
    slopes = torch.tensor(SLOPES)
    rows = None if documents is None else torch.tensor(documents)[:, :length]
    *whole, d_out = leaves(length)
    whole = [x.requires_grad_() for x in whole]
    wanted, _ = lightning_attention_recurrent(*whole, slopes, documents=rows)
    wanted.backward(d_out)

    cut = sequence_cut(send_all=send_all)
    q, k, v = mine = [cut.piece(x.detach()).clone().requires_grad_() for x in whole]
    here = None if rows is None else cut.piece(rows)
    entering = cut.over(rows).states(lightning_final_state(k, v, slopes, here), slopes, PIECE)
    found, _ = lightning_attention(q, k, v, slopes, initial_state=entering, documents=here)
    found.backward(cut.piece(d_out))
    compared = {"out": (found, wanted)} | {
        name: (a.grad, b.grad) for name, a, b in zip("qkv", mine, whole, strict=True)
    }
    return {name: (a - cut.piece(b)).abs().max().item() for name, (a, b) in compared.items()}


@pytest.mark.parametrize("send_all", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_states_cross_as_in_the_recurrence(pool: Pool, documents: str, ranks: int, send_all: bool) -> None:
    for apart in pool.run(lightning_on_pieces, ranks, DOCUMENTS[documents], send_all):
        assert max(apart.values()) < 2e-12, apart


def test_the_state_alone_is_that_of_the_recurrence() -> None:
    """In fp64, its gradients too; and from bf16 it is made in fp32."""
    _, k, v, _ = (x.requires_grad_() for x in leaves(29))
    slopes, documents = torch.tensor(SLOPES), torch.tensor(BESIDE_THE_CUTS)[:, :29]
    _, wanted = lightning_attention_recurrent(torch.zeros_like(k), k, v, slopes, documents=documents)
    found = lightning_final_state(k, v, slopes, documents)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    d_state = torch.randn_like(wanted)
    gradients = (torch.autograd.grad(state, [k, v], d_state) for state in (found, wanted))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    low = lightning_final_state(k.detach().bfloat16(), v.detach().bfloat16(), slopes)
    assert low.dtype == torch.float32


def numbers_sent() -> list[list[int]]:
    """How many numbers this rank sends to each, forward and backward."""
    seen = []
    plain = dist.all_to_all_single

    def noting(received: Tensor, sent: Tensor, out_sizes: Any, in_sizes: Any, group: Any) -> None:
        seen.append(list(in_sizes))
        plain(received, sent, out_sizes, in_sizes, group=group)

    slopes = torch.tensor(SLOPES)
    state = torch.ones(1, len(SLOPES), 2, 3, dtype=torch.float64, requires_grad=True)
    with patch.object(dist, "all_to_all_single", noting):
        sequence_cut().states(state, slopes, PIECE).sum().backward()
    return seen


def test_a_state_that_has_vanished_goes_to_the_neighbour_only(pool: Pool) -> None:
    """With pieces of 12 tokens, 5.0 x 12 is gone after one piece in between, 2.0 x 12 not before two."""
    assert reaching_heads(SLOPES, 0, torch.float64) == [0, 1, 2, 3, 4]
    assert reaching_heads(SLOPES, 12, torch.float64) == [0, 1, 2, 3]
    assert reaching_heads(SLOPES, 24, torch.float64) == [0, 1, 2]
    assert reaching_heads(SLOPES, 12, torch.float32) == [0, 1, 2]
    each = 2 * 3
    forward = [[0, 5, 4, 3], [0, 0, 5, 4], [0, 0, 0, 5], [0, 0, 0, 0]]
    for rank, seen in enumerate(pool.run(numbers_sent, 4)):
        backward = forward[3 - rank][::-1]
        assert seen == [[heads * each for heads in forward[rank]], [heads * each for heads in backward]]


def exchanges_in_a_step(parallel: ParallelConfig) -> int:
    case = Case("lightning", isolated=False)
    model = build(case, parallel, "fp64")
    calls = []
    plain = dist.all_to_all_single

    def noting(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        plain(*args, **kwargs)

    with patch.object(dist, "all_to_all_single", noting):
        model.train(share_of(model, 1, isolated=False), updater_of(model, case).objective, 1.0)
    return len(calls)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_exchange_for_each_layer_and_direction(pool: Pool, recompute: Any) -> None:
    """Recomputation asks for no state a second time."""
    assert pool.run(exchanges_in_a_step, 2, ParallelConfig(cp=2, recompute=recompute)) == [8, 8]


def traded() -> bool:
    """Whether heads are traded for pieces and back, values and gradients."""
    size, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(2, 3 * size, 2 * size, 4, generator=generator)
    factor = torch.randn(2, 3 * size, 2 * size, 4, generator=generator)
    cut = sequence_cut()
    mine = cut.piece(whole).clone().requires_grad_()
    heads = cut.to_heads(mine)
    right = torch.equal(heads, whole[:, :, 2 * rank : 2 * rank + 2])
    right &= torch.equal(cut.heads_here(torch.arange(2 * size)), torch.tensor([2 * rank, 2 * rank + 1]))
    back = cut.from_heads(heads)
    right &= torch.equal(back, mine)
    (heads * factor[:, :, 2 * rank : 2 * rank + 2]).sum().backward()
    return right and torch.equal(mine.grad, cut.piece(factor))


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_are_traded_for_pieces(pool: Pool, ranks: int) -> None:
    assert all(pool.run(traded, ranks))


SEQUENTIAL = "tests.conformance.sequential:Sequential"


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(2, ParallelConfig(cp=2)), (4, ParallelConfig(cp=2, tp=2)), (4, ParallelConfig(cp=4))]
)
def test_a_users_sequential_mixer_equals_one_process(pool: Pool, ranks: int, parallel: ParallelConfig) -> None:
    case = Case(SEQUENTIAL, num_layers=2)
    alone = pool.run(two_steps, 1, case, ParallelConfig())[0]
    assert_equal(pool.run(two_steps, ranks, case, parallel), alone, BOUNDS["fp64"])


def looking_both_ways(window: int | None) -> float:
    """Largest difference of logits where softmax layers see the whole row, and its cut."""
    model = small_model("softmax", 1 if window else 0)
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[t // 9 for t in range(24)], [0] * 24])
    wanted = model(tokens, documents=documents, causal=False)
    model.cut = sequence_cut()
    found = model(model.cut.piece(tokens), documents=documents, causal=False)
    return (found - model.cut.piece(wanted)).abs().max().item()


@pytest.mark.parametrize("window", [None, 5])
def test_softmax_may_look_both_ways_over_cuts(pool: Pool, window: int | None) -> None:
    assert max(pool.run(looking_both_ways, 4, window)) < 1e-12


def positions_by_default() -> list[int]:
    model = small_model("softmax")
    model.cut = sequence_cut()
    return model.context(torch.zeros(1, 3, dtype=torch.int64)).positions[0].tolist()


def test_positions_go_on_over_cuts(pool: Pool) -> None:
    assert pool.run(positions_by_default, 2) == [[0, 1, 2], [3, 4, 5]]


def refused(kind: str, cp: int, isolated: bool = True, seq_len: int = 24) -> list[str]:
    architecture = Case(kind).architecture()
    sizes = {"seq_len": seq_len, "global_batch_size": 16, "isolate_documents": isolated}
    return layout_faults(ParallelConfig(cp=cp), cp, architecture, **sizes)


def test_blocks_that_cuts_fall_into_are_refused() -> None:
    (said,) = refused("diag_block", 2)
    assert "documents begin anywhere" in said and "isolate_documents = false" in said
    (said,) = refused("diag_block", 3, isolated=False)
    assert "data.seq_len / cp = 8 tokens are no multiple of block = 6" in said and "nearest seq_len / cp is 6" in said
    assert refused("diag_block", 2, isolated=False) == refused("diag_block", 4, isolated=False) == []


def test_heads_that_are_too_few_to_trade_are_refused() -> None:
    (said,) = refused(SEQUENTIAL, 3)
    assert "tp x cp = 1 x 3 does not divide num_heads = 4: the largest cp that fits is 2" in said


def test_a_mixer_that_says_nothing_of_cuts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conformance import sequential

    monkeypatch.delattr(sequential.Sequential, "context")
    (said,) = refused(SEQUENTIAL, 2)
    assert 'Sequential does not say what crosses a cut of the sequence: its context has to be one of "state"' in said


def test_a_mixer_that_forgets_what_crosses_is_refused() -> None:
    (said,) = refused("tests.conformance.sequential:Forgetful", 2)
    assert 'Forgetful says "heads" crosses a cut of the sequence, but its forward never calls ctx.cut.to_heads' in said


@pytest.mark.parametrize("kind", ["softmax", "lightning", "minimax", "norm_linear", SEQUENTIAL])
def test_a_mixer_that_asks_for_what_crosses_is_not(kind: str) -> None:
    with torch.device("meta"):
        assert crossing_faults(Model(Case(kind).architecture())) == []
