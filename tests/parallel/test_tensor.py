"""What tensor parallelism is made of, piece by piece; the whole is compared in tests/conformance/test_layouts.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from model.objective import IGNORED, cross_entropy
from model.stack import Model
from parallel.config import ParallelConfig
from parallel.data import local
from parallel.norms import SumWithSquares, exact_terms
from parallel.region import Region
from parallel.tensor import cut
from parallel.vocabulary import VocabularyCrossEntropy
from tests.conformance.layouts import Case, build, share_of, updater_of
from tests.conformance.models import VOCAB
from tests.pool import Pool


def region(cuts_sequence: bool = False) -> Region:
    return Region(dist.group.WORLD.group_name, dist.get_rank(), dist.get_world_size(), cuts_sequence)


def test_shares_follow_the_true_size() -> None:
    shares = [Region("", rank, 4, False).share(61) for rank in range(4)]
    assert shares == [range(16), range(16, 32), range(32, 48), range(48, 61)]


def vocabulary_parallel() -> list[float]:
    """Largest differences of loss and gradient to the plain ones: ordinary logits, and huge ones."""
    generator = torch.Generator().manual_seed(0)
    apart = []
    for scale in (1.0, 1e4):
        logits = (torch.randn(40, VOCAB, generator=generator, dtype=torch.float64) * scale).requires_grad_()
        targets = torch.randint(VOCAB, (40,), generator=generator)
        targets[::3] = IGNORED
        weights = torch.rand(40, generator=generator, dtype=torch.float64)
        nats = cross_entropy(logits, targets)
        (nats * weights).sum().backward()
        here = region()
        share = here.share(VOCAB)
        mine = logits.detach()[:, share.start : share.stop].clone().requires_grad_()
        found = VocabularyCrossEntropy(here, VOCAB)(mine, targets)
        (found * weights).sum().backward()
        apart.append((found.detach() - nats.detach()).abs().max().item() / nats.max().item())
        apart.append((mine.grad - logits.grad[:, share.start : share.stop]).abs().max().item())
    return apart


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_loss_over_parts_of_the_vocabulary(pool: Pool, ranks: int) -> None:
    for apart in pool.run(vocabulary_parallel, ranks):
        assert max(apart) < 1e-12


def parts_of_a_model() -> tuple[torch.Size, list[torch.Size]]:
    model = build(Case("softmax", num_layers=2), ParallelConfig(tp=4), "fp32")
    batch = share_of(model, 1)
    logits = model.stages[0](batch.tokens, documents=batch.documents, positions=batch.positions)
    return logits.shape, [model.parameters[name].shape for name in ("embedding.weight", "layers.0.mixer.q.weight")]


def test_no_rank_holds_or_computes_more_than_its_part(pool: Pool) -> None:
    """No row is added to make tp divide the vocabulary, and logits are not gathered."""
    rows = [16, 16, 16, 13]
    for rank, (logits, shapes) in enumerate(pool.run(parts_of_a_model, 4)):
        assert logits == (16, 24, rows[rank])
        assert shapes == [(rows[rank], 32), (8, 32)]


class Counting(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and "wait" not in func._opname:
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def collectives(kind: str, sequence_parallel: bool) -> dict[str, int]:
    """How many collectives a forward and backward take, by what they do."""
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    model = build(Case(kind, num_layers=2), parallel, "fp32")
    batch = share_of(model, 1)
    with Counting() as mode:
        logits = model.stages[0](batch.tokens, documents=batch.documents, positions=batch.positions)
        logits.sum().backward()
    return dict(mode.counts)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_full_width_norm_has_no_collective_of_its_own(pool: Pool, sequence_parallel: bool) -> None:
    """Two parts a layer, in and out, embedding and head: each once forward and once backward, whatever the mixer."""
    for kind in ("softmax", "lightning", "minimax", "norm_linear"):
        found = pool.run(collectives, 2, kind, sequence_parallel)[0]
        if sequence_parallel:
            assert found == {"all_gather_into_tensor": 10, "reduce_scatter_tensor": 10}
        else:
            # In: backward sums; out: forward sums.
            assert found == {"all_reduce": 10}


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_terms_of_a_narrower_type_add_up_exactly(narrow: torch.dtype) -> None:
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    assert torch.equal(sum(term.float() for term in exact_terms(x, narrow)), x)


def statistic_in_a_bf16_message(cuts_sequence: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    here = region(cuts_sequence)
    generator = torch.Generator().manual_seed(here.rank)
    squares = (torch.rand(2, 4, 1, generator=generator) * 1000).requires_grad_()
    out, total = SumWithSquares.apply(torch.ones(2, 4, 3, dtype=torch.bfloat16), squares, here)
    (total * torch.tensor(1.2345678)).sum().backward()
    assert torch.equal(out, torch.full_like(out, 4.0))
    return squares.detach(), total.detach(), squares.grad


@pytest.mark.parametrize("cuts_sequence", [True, False])
def test_statistics_are_fp32_though_the_message_is_bf16(pool: Pool, cuts_sequence: bool) -> None:
    results = pool.run(statistic_in_a_bf16_message, 4, cuts_sequence)
    wanted = sum(squares.double() for squares, _, _ in results)
    for rank, (_, total, gradient) in enumerate(results):
        mine = wanted[:, rank : rank + 1] if cuts_sequence else wanted
        torch.testing.assert_close(total.double(), mine, rtol=3e-7, atol=0)
        assert torch.equal(gradient, torch.full_like(gradient, 1.2345678))


def gated(parallel: ParallelConfig, kind: str, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the gates, of a model whose heads are gated."""
    model = build(Case(kind, num_layers=2), parallel, "fp64")
    batch = share_of(model, 1)
    gates = torch.linspace(0.1, 2.0, heads, dtype=torch.float64).requires_grad_()
    logits = model.stages[0](batch.tokens, head_gates={1: gates})
    logits.square().sum().backward()
    return logits.detach(), gates.grad


@pytest.mark.parametrize(("kind", "heads"), [("lightning", 4), ("bam", 12)])
def test_gates_by_head_are_those_of_the_global_heads(pool: Pool, kind: str, heads: int) -> None:
    ((wanted, wanted_gradient),) = pool.run(gated, 1, ParallelConfig(), kind, heads)
    for sequence_parallel in (True, False):
        results = pool.run(gated, 2, ParallelConfig(tp=2, sequence_parallel=sequence_parallel), kind, heads)
        found = torch.cat([logits for logits, _ in results], dim=-1)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        for _, gradient in results:
            torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-12)


def uncut_after_a_step(case: Case, cut_sequence: bool) -> dict[str, torch.Tensor]:
    model = build(case, ParallelConfig(tp=2, sequence_parallel=cut_sequence), "fp64")
    updater_of(model, case).update(share_of(model, 1), 1, lr=0.01)
    uncut = [name for name, dimension in model.cuts.dimensions.items() if dimension is None]
    return {name: local(model.parameters[name]).detach().clone() for name in uncut}


@pytest.mark.parametrize("cut_sequence", [True, False])
@pytest.mark.parametrize(
    ("kind", "untie", "bias"),
    [("softmax", {}, ".o.bias"), ("bam", {}, ".o.bias"), ("softmax", {"modalities": 3}, ".o.towers.0.bias")],
)
def test_what_is_not_cut_stays_alike_on_all_ranks(
    pool: Pool, kind: str, untie: dict[str, Any], bias: str, cut_sequence: bool
) -> None:
    """Biases of output projections, too, whose gradient one rank alone may have found."""
    one, other = pool.run(uncut_after_a_step, 2, Case(kind, num_layers=2, untie=untie), cut_sequence)
    assert any(name.endswith(bias) for name in one)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_slopes_are_cut_from_those_of_all_heads() -> None:
    """Also after the module has moved, which makes them anew."""
    architecture = Case("lightning").architecture()
    with torch.device("meta"):
        whole: Any = Model(architecture)
    whole.to_empty(device="cpu")
    found = []
    for rank in range(2):
        with torch.device("meta"):
            model: Any = Model(architecture)
        cut(model, Region("", rank, 2, True))
        model.to_empty(device="cpu").double()
        found.append([block.mixer.slopes for block in model.layers.values()])
    for layer, block in enumerate(whole.layers.values()):
        assert torch.equal(torch.cat([found[0][layer], found[1][layer]]), block.mixer.slopes)
        assert len(set(block.mixer.slopes.tolist())) == 4
