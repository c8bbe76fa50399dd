"""Reparametrised matrices in training: the fast form equals plain autograd, and nothing else is disturbed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.reparam import Matrix, ReparamConfig, effective_weights, largest_singular, power_iteration
from model.stack import Model
from parallel.config import ParallelConfig
from parallel.reparam import SigmaReparam
from parallel.spread import Spread
from tests.conformance.layouts import CLIP, LENGTH, LR, ROWS, Case, build, share_of, updater_of
from tests.conformance.models import random_batch
from tests.pool import Pool

SIGMA: dict[str, Any] = {"kind": "sigma"}
ALONE = ParallelConfig()
BETAS, EPS, DECAY = (0.9, 0.95), 1e-6, 0.1


class Reference:
    """A model trained with `effective_weights`, by plain autograd and torch's own AdamW."""

    def __init__(self, case: Case, config: ReparamConfig, reparametrised: tuple[Matrix, ...]):
        spread = build(replace(case, reparam={}), ALONE, "fp64")
        self.model: Model = spread.stages[0]
        self.config, self.matrices = config, reparametrised
        self.raw = {name: p.detach().clone().requires_grad_() for name, p in self.model.named_parameters()}
        self.vectors: dict[str, tuple[Tensor, Tensor]] = {}
        self.gains: dict[str, Tensor] = {}
        for matrix in reparametrised:
            sigma, v, u = largest_singular(self.whole(matrix), config.vectors)
            self.vectors[matrix.name] = v, u
            first = {"sigma": sigma.item(), "one": 1.0}.get(config.gain_init, config.gain_init)
            self.gains[matrix.name] = torch.tensor([first], dtype=torch.float64, requires_grad=True)
        decayed = [p for name, p in self.raw.items() if p.ndim == 2]
        others = [p for p in self.raw.values() if p.ndim < 2] + list(self.gains.values())
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)

    def whole(self, matrix: Matrix) -> Tensor:
        return torch.cat([self.raw[part].detach() for part in matrix.parts])

    def weights(self) -> dict[str, Tensor]:
        through = self.config.through_sigma
        vectors = {name: (v, u[:, 0]) for name, (v, u) in self.vectors.items()}
        return self.raw | effective_weights(self.raw, self.gains, vectors, self.matrices, through_sigma=through)

    def step(self, number: int, microbatches: int) -> tuple[float, float]:
        batch = random_batch(ROWS, LENGTH, seed=number)
        counted, total = batch.counted.sum(), 0.0
        for part in batch.micro_batches(microbatches):
            inputs = {"documents": part.documents, "positions": part.positions}
            logits = torch.func.functional_call(self.model, self.weights(), (part.tokens,), inputs)
            loss = F.cross_entropy(logits[part.counted], part.targets[part.counted], reduction="sum") / counted
            loss.backward()
            total += loss.item()
        gradients = [p.grad for p in (*self.raw.values(), *self.gains.values())]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        torch._foreach_mul_(gradients, min(1.0, CLIP / norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for matrix in self.matrices:
            _, v, u = power_iteration(self.whole(matrix), self.vectors[matrix.name][1])
            self.vectors[matrix.name] = v, u
        return total, norm


def fast_and_plain(case: Case, microbatches: int, steps: int) -> dict[str, Any]:
    """Both, trained for some steps: losses, norms, what is multiplied at the end, gains."""
    model = build(case, ParallelConfig(microbatches=microbatches), "fp64")
    updater = updater_of(model, case)
    config = ReparamConfig(**case.reparam)
    plain = Reference(case, config, model.reparam.matrices)
    ours, theirs = [], []
    for number in range(1, steps + 1):
        outcome = updater.update(share_of(model, number), number, lr=LR)
        ours.append((outcome.loss, outcome.grad_norm))
        theirs.append(plain.step(number, microbatches))
    return {
        "ours": ours,
        "theirs": theirs,
        "parameters": {name: p.detach() for name, p in model.parameters.items()},
        "weights": {name: p.detach() for name, p in plain.weights().items()},
        "gains": {name.removesuffix(".spectral_gain"): p.item() for name, p in model.beside.items()},
        "their gains": {name: p.item() for name, p in plain.gains.items()},
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gain_init": "one"},
        {"gain_init": 0.7, "qkv_grouping": "fused"},
        {"qkv_grouping": "qk+v"},
        {"vectors": 1},
        {"through_sigma": False},
        {"targets": ["layers.*.mixer.[qk].weight"]},
    ],
    ids=lambda settings: ",".join(map(str, settings.values())) or "defaults",
)
def test_the_fast_form_equals_plain_autograd(pool: Pool, settings: dict[str, Any]) -> None:
    """Losses, norms, weights and gains of five AdamW steps with four micro-batches, clipping and decay."""
    case = Case("softmax", 1, num_layers=2, reparam=SIGMA | settings)
    (found,) = pool.run(fast_and_plain, 1, case, 4, 5)
    for ours, theirs in zip(found["ours"], found["theirs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
        assert ours[1] > CLIP, "the clipping was idle"
    for name, weight in found["weights"].items():
        torch.testing.assert_close(found["parameters"][name], weight, rtol=1e-8, atol=1e-10, msg=name)
    assert found["gains"] == pytest.approx(found["their gains"], rel=1e-9)


def begun(case: Case) -> dict[str, Any]:
    """Whether a model that has just been reparametrised is the plain one; and its norms."""
    model, plain = build(case, ALONE, "fp32"), build(replace(case, reparam={}), ALONE, "fp32")
    same = {name: torch.equal(p, plain.parameters[name]) for name, p in model.parameters.items()}
    return {"same": same, "norms": model.reparam.norms(), "measured": measured_norms(model)}


def measured_norms(model: Spread) -> dict[str, float]:
    """The largest singular value of everything that is multiplied, by a full decomposition."""
    return {
        matrix.name: torch.linalg.matrix_norm(
            torch.cat([model.parameters[part].detach().double() for part in matrix.parts]), 2
        ).item()
        for matrix in model.reparam.matrices
    }


def test_with_gain_init_sigma_a_model_begins_as_the_plain_one(pool: Pool) -> None:
    (found,) = pool.run(begun, 1, Case("lightning", reparam=SIGMA))
    assert all(found["same"].values()), "bit for bit"
    for name, (sigma, gain) in found["norms"].items():
        assert sigma == gain == pytest.approx(found["measured"][name], rel=1e-6)


@pytest.mark.parametrize(("gain_init", "norm"), [("one", 1.0), (2.5, 2.5)])
def test_other_gains_are_the_norms_at_the_start(pool: Pool, gain_init: Any, norm: float) -> None:
    (found,) = pool.run(begun, 1, Case("softmax", reparam=SIGMA | {"gain_init": gain_init}))
    assert found["measured"] == pytest.approx(dict.fromkeys(found["measured"], norm), rel=1e-6)


def hundred_steps(case: Case, parallel: ParallelConfig) -> dict[str, Any]:
    model = build(case, parallel, "fp32")
    updater = updater_of(model, case)
    for number in range(1, 101):
        lr = 1e-3 * (1 + math.cos(math.pi * number / 100)) / 2
        updater.update(share_of(model, number), number, lr=lr)
    whole = {name: model.whole(name, p).full_tensor() for name, p in model.parameters.items()}
    norms = {
        matrix.name: torch.linalg.matrix_norm(torch.cat([whole[part].double() for part in matrix.parts]), 2).item()
        for matrix in model.reparam.matrices
    }
    return {"norms": norms, "gains": {name: gain for name, (_, gain) in model.reparam.norms().items()}}


def test_after_a_hundred_steps_the_spectral_norm_is_the_gain(pool: Pool) -> None:
    found = pool.run(hundred_steps, 2, Case("softmax", num_layers=2, reparam=SIGMA), ParallelConfig(tp=2))[0]
    for name, gain in found["gains"].items():
        assert found["norms"][name] == pytest.approx(gain, rel=1e-3), name


def frozen_parts(case: Case) -> dict[str, Any]:
    model = build(case, ALONE, "fp32")
    before = {name: p.detach().clone() for name, p in model.learned.items()}
    updater = updater_of(model, case, frozen=("layers.0.*.weight", "layers.1.mixer.q.spectral_gain"))
    for number in (1, 2, 3):
        updater.update(share_of(model, number), number, lr=LR)
    same = {name for name, p in model.learned.items() if torch.equal(p, before[name])}
    # With a gradient of zero, momentum from before would carry a gain on.
    assert same == {name for name, p in model.learned.items() if not p.requires_grad}
    return {"same": same, "all": set(before), "norms": model.reparam.norms(), "measured": measured_norms(model)}


def test_frozen_matrices_stay_bit_for_bit_and_frozen_gains_too(pool: Pool) -> None:
    (found,) = pool.run(frozen_parts, 1, Case("softmax", num_layers=2, reparam=SIGMA, model={"bias": False}))
    frozen = {name for name in found["all"] if name.startswith("layers.0.")} | {"layers.1.mixer.q.spectral_gain"}
    assert found["same"] == frozen
    for name, (_, gain) in found["norms"].items():
        assert found["measured"][name] == pytest.approx(gain, rel=2e-2), name


def skipped_update(case: Case) -> bool:
    """Whether a step with a loss that is no number leaves everything as it was."""
    model = build(case, ALONE, "fp32")
    updater = updater_of(model, case)
    updater.update(share_of(model, 1), 1, lr=LR)
    before = {name: p.detach().clone() for name, p in (model.learned | model.kept).items()}
    plain = updater.objective.head_nats
    updater.objective.head_nats = lambda *given: [x * math.nan for x in plain(*given)]  # type: ignore[method-assign]
    assert updater.update(share_of(model, 2), 2, lr=LR).skipped
    return all(torch.equal(p, before[name]) for name, p in (model.learned | model.kept).items())


def test_a_skipped_update_leaves_vectors_gains_and_weights(pool: Pool) -> None:
    assert pool.run(skipped_update, 1, Case("softmax", num_layers=2, reparam=SIGMA)) == [True]


def count_work(case: Case, parallel: ParallelConfig) -> dict[str, int]:
    """Collectives over all processes in one step, with and without, and power iterations."""
    import torch.distributed as dist

    counts = {}
    for name, reparam in (("plain", {}), ("sigma", case.reparam)):
        model = build(replace(case, reparam=reparam), parallel, "fp32")
        updater = updater_of(model, case)
        calls = {"all_reduce": 0, "iterate": 0}
        reduce, iterate = dist.all_reduce, SigmaReparam._iterate

        def counting_reduce(*args: Any, **kwargs: Any) -> Any:
            calls["all_reduce"] += 1  # noqa: B023
            return reduce(*args, **kwargs)  # noqa: B023

        def counting_iterate(self: SigmaReparam) -> None:
            calls["iterate"] += 1  # noqa: B023
            iterate(self)  # noqa: B023

        dist.all_reduce, SigmaReparam._iterate = counting_reduce, counting_iterate  # type: ignore[method-assign]
        updater.update(share_of(model, 1), 1, lr=LR)
        dist.all_reduce, SigmaReparam._iterate = reduce, iterate  # type: ignore[method-assign]
        counts |= {f"{name} {what}": count for what, count in calls.items()}
    return counts


def test_one_iteration_a_step_and_three_reductions_however_many_matrices(pool: Pool) -> None:
    for microbatches in (1, 4):
        parallel = ParallelConfig(microbatches=microbatches, recompute="full")
        counts = pool.run(count_work, 2, Case("softmax", num_layers=4, reparam=SIGMA), parallel)[0]
        assert counts["sigma iterate"] == 1
        assert counts["sigma all_reduce"] - counts["plain all_reduce"] == 3


def drift(case: Case, steps: int) -> float:
    """How far W has come from what it was, relatively, through so many updates with a learning rate of 0."""
    model = build(case, ALONE, "fp32")
    updater = updater_of(model, case)
    scales = model.reparam._scales()
    name, index = model.reparam.matrices[0].parts[0], 0
    before = model.parameters[name].detach() / scales[index]
    for number in range(1, steps + 1):
        updater.update(share_of(model, number), number, lr=0.0)
    after = model.parameters[name].detach() / model.reparam._scales()[index]
    return ((after - before).norm() / before.norm()).item()


def test_dividing_and_multiplying_again_wears_nothing_away(pool: Pool) -> None:
    """W is not stored: it is what is multiplied, divided by one number. Rounding of 50 steps stays rounding."""
    (found,) = pool.run(drift, 1, Case("softmax", num_layers=2, reparam=SIGMA | {"gain_init": 0.37}), 50)
    assert found < 1e-6
