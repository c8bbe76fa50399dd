"""DeepSpeed's ZeRO against one process, and against torch's own data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from model.entropy import EntropyPenalty
from parallel.config import ParallelConfig
from tests.conformance.layouts import BOUNDS, EXPERTS, Bounds, Case, assert_equal, differences, merged, two_steps
from tests.conformance.test_layouts import PAIRS
from tests.conformance.zero import ZERO_LAYOUTS, two_steps_by_zero
from tests.pool import Pool

Alone = Callable[..., dict[str, Any]]
MATRIX = pytest.mark.matrix
QUICK = {"zero 1 on 2", "zero 2 on 4", "zero 3 on 2", "zero 3 on 4, all offloaded", "zero 2 on 2, optimizer offloaded"}
"""What `make test` takes; the matrix has the rest, and all mixers."""

# Of all experts each token has some share: the nearness of scores would choose, where rounding differs.
WITH_EXPERTS = EXPERTS | {"top_k": EXPERTS["num_experts"]}
OTHERS = {
    "experts": Case("moh+lightning", num_layers=2, experts=WITH_EXPERTS | {"bias_rate": 0.01}),
    "experts, batch balance": Case("softmax", num_layers=2, experts=WITH_EXPERTS | {"balance_over": "global_batch"}),
    "modalities": Case("softmax", num_layers=2, untie={"modalities": 3, "ranges": []}),
    "entropy penalty": Case("softmax+lightning", num_layers=2, entropy=EntropyPenalty(0.3)),
    "learned angles, untied": Case("norm_linear", num_layers=2, model={"tie_embeddings": False}),
}


def compare(pool: Pool, alone: Alone, case: Case, world_size: int, parallel: ParallelConfig) -> None:
    results = pool.run(two_steps_by_zero, world_size, case, parallel)
    assert_equal(results, alone(case, "fp32"), BOUNDS["fp32"])


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=MATRIX) for n in ZERO_LAYOUTS])
def test_zero_equals_one_process(pool: Pool, alone: Alone, name: str) -> None:
    compare(pool, alone, Case("softmax+lightning", num_layers=2), *ZERO_LAYOUTS[name])


@MATRIX
@pytest.mark.parametrize("name", ["zero 2 on 2", "zero 3 on 2"])
@pytest.mark.parametrize("kinds", PAIRS)
def test_zero_equals_one_process_with_every_mixer(pool: Pool, alone: Alone, kinds: str, name: str) -> None:
    compare(pool, alone, Case(kinds, num_layers=2), *ZERO_LAYOUTS[name])


@pytest.mark.parametrize("name", ["zero 1 on 2", "zero 3 on 4"])
@pytest.mark.parametrize("what", OTHERS)
def test_zero_of_other_models(pool: Pool, alone: Alone, what: str, name: str) -> None:
    """What stays out of DeepSpeed: routers, angles, thresholds; and what is not a gradient's."""
    compare(pool, alone, OTHERS[what], *ZERO_LAYOUTS[name])


TORCH_IN_BF16 = Bounds(1e-7, 1e-6, 2e-6)
"""Both engines see the same bf16 numbers in forward and backward; fp32 sums over processes differ in their order."""


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_bf16_is_that_of_torch(pool: Pool, stage: int, offload: str) -> None:
    """Masters in fp32 from the first step on, gradients reduced in fp32, routers in fp32: as FSDP2 does it."""
    case = Case("moh+minimax", num_layers=2, experts=WITH_EXPERTS | {"bias_rate": 0.01})
    torch_s = pool.run(two_steps, 2, case, ParallelConfig(microbatches=2), "bf16")
    zero = ParallelConfig(engine="deepspeed", zero_stage=stage, offload_optimizer=offload, microbatches=2)
    found = pool.run(two_steps_by_zero, 2, case, zero, "bf16")
    for what in ("losses", "auxiliary", "evaluated"):
        assert found[0][what] == pytest.approx(torch_s[0][what], rel=TORCH_IN_BF16.losses, abs=0), what
    assert found[0]["norms"] == pytest.approx(torch_s[0]["norms"], rel=TORCH_IN_BF16.norms, abs=0)
    for what in ("gradients", "parameters"):
        for error, name in differences(merged(found, what), merged(torch_s, what), floor=1e-3):
            assert error <= TORCH_IN_BF16.tensors, f"{what}: {name}: {error:.1e}"
