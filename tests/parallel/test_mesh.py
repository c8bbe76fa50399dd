"""Which layouts are legal: every reason at once, each with its numbers and a choice that works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import Architecture
from model.layer import Site
from model.mixers.lightning import Lightning
from model.mixers.softmax import Softmax
from model.settings import build_architecture
from parallel.config import ParallelConfig
from parallel.mesh import layout_faults, resolve_layout


def architecture() -> Architecture:
    tables = {
        "model": {"d_model": 48, "num_layers": 4, "vocab_size": 100, "pattern": ["lightning", "softmax"]},
        "mixers": {"lightning": {"num_heads": 12}, "softmax": {"num_heads": 12, "num_kv_heads": 3}},
        "feedforwards": {"moe": {"num_experts": 4, "top_k": 2, "expert": "swiglu"}, "swiglu": {"d_ff": 96}},
    }
    _, built = build_architecture(tables, [])
    assert built is not None
    return built


def faults(world_size: int, seq_len: int = 64, global_batch_size: int = 8, **parallel: Any) -> list[str]:
    return layout_faults(
        ParallelConfig(**parallel), world_size, architecture(), seq_len=seq_len, global_batch_size=global_batch_size
    )


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (8, {}),
        (4, {"dp_replicate": 2}),
        (2, {"dp_replicate": 2, "dp_shard": 1}),
        (6, {"tp": 3, "microbatches": 2, "sequence_parallel": False}),
        (8, {"pp": 4, "dp_shard": 2, "microbatches": 4}),
        (4, {"cp": 2, "ep": 4}),
    ],
)
def test_legal_layouts(world_size: int, parallel: dict[str, Any]) -> None:
    assert faults(world_size, **parallel) == []


def test_what_is_left_goes_to_dp_shard() -> None:
    layout = resolve_layout(ParallelConfig(dp_replicate=2, pp=2), 8)
    assert (layout.dp_shard, layout.microbatches, layout.data_parallel, layout.world_size) == (2, 4, 4, 8)


@pytest.mark.parametrize(
    ("world_size", "parallel", "words"),
    [
        (6, {"dp_replicate": 4}, ["dp_replicate 4 x dp_shard 1", "= 4, but 6 processes", "a multiple of 4"]),
        (8, {"dp_shard": 2}, ["dp_shard 2", "but 8 processes", "dp_shard = 8"]),
        (3, {}, ["global_batch_size = 8", "1 x 3 x 1 = 3 equal parts", "nearest size that can is 9"]),
        (2, {"tp": 2}, ["tp = 2", "num_kv_heads = 3", "largest tp that fits this model is 1"]),
        (5, {"pp": 5}, ["pp = 5 is more than model.num_layers = 4", "pp of at most 4"]),
        (4, {"pp": 4, "microbatches": 2}, ["microbatches = 2", "take at least 4"]),
        (
            2,
            {"cp": 2, "ep": 4},
            ["ep = 4 does not divide dp_shard x cp = 1 x 2", "largest ep that fits this model is 2"],
        ),
        (3, {"ep": 3}, ["ep = 3 does not divide feedforwards.moe.num_experts = 4", "fits this model is 1"]),
        (3, {"pp": 3, "pp_schedule": "zbv"}, ['pp = 3 with pp_schedule = "zbv" makes 6 stages', "at most 2", '"1f1b"']),
        (2, {"pp": 2, "pp_schedule": "zbv", "recompute": "full"}, ['recompute = "full" with pp_schedule = "zbv"']),
        (2, {"pp": 2, "pp_schedule": "interleaved1f1b", "microbatches": 5}, ["5 in 2 rounds", "take 4 or 6"]),
        (1, {"tp": 0}, ["tp = 0 must be at least 1"]),
        (1, {"microbatches": -2}, ["microbatches = -2"]),
    ],
)
def test_illegal_layouts_say_why(world_size: int, parallel: dict[str, Any], words: list[str]) -> None:
    said = " ".join(faults(world_size, **parallel))
    for word in words:
        assert word in said


def test_a_sequence_that_cannot_be_cut() -> None:
    assert "largest cp that does is 1" in faults(2, seq_len=33, cp=2)[0]
    assert "sequence_parallel" in faults(3, seq_len=64, tp=3)[0]
    assert faults(3, seq_len=64, tp=3, sequence_parallel=False) == []


def test_all_reasons_come_at_once() -> None:
    said = faults(7, seq_len=33, global_batch_size=5, tp=2, pp=6, cp=2, microbatches=3)
    assert len(said) >= 6


def test_experts_are_spread_only_where_there_are_some() -> None:
    (said,) = small({}, 2, ep=2)
    assert "ep = 2, but no feed-forward of this model has experts: set ep = 1" in said


def small(tables: dict[str, Any], world_size: int, compiled: bool = False, **parallel: Any) -> list[str]:
    base: dict[str, Any] = {
        "model": {"d_model": 48, "num_layers": 4, "vocab_size": 9, "pattern": ["softmax"]},
        "mixers": {"softmax": {"num_heads": 12}},
        "feedforwards": {"swiglu": {"d_ff": 96}},
    }
    _, built = build_architecture(base | tables, [], allow_code=True)
    assert built is not None
    config = ParallelConfig(**parallel)
    return layout_faults(config, world_size, built, seq_len=64, global_batch_size=8, compiled=compiled)


def test_a_rank_needs_a_part_of_the_vocabulary() -> None:
    assert small({}, 3, tp=3, sequence_parallel=False, dp_shard=1) == []
    (said,) = small({}, 4, tp=4)
    assert "tp = 4 leaves a rank without any of model.vocab_size = 9 rows" in said
    assert "the largest tp that fits this model is 3" in said


def test_zero_bubbles_are_not_compiled() -> None:
    assert small({}, 2, pp=2, compiled=True) == []
    (said,) = small({}, 2, pp=2, pp_schedule="zbv", compiled=True)
    assert "run.compile" in said


class Silent(Softmax):
    """A mixer that forgets a parameter and a buffer, and has another parameter summed in the middle."""

    sharding = {name: how for name, how in Softmax.sharding.items() if name != "v.weight"} | {"k.weight": "row"}

    def __init__(self, config: Any, site: Site):
        super().__init__(config, site)
        self.register_buffer("slopes", torch.zeros(12), persistent=False)


class Uncut(Softmax):
    """A mixer that would not be cut: every rank would compute all of it, and the sum would be too much."""

    sharding = dict.fromkeys(Softmax.sharding, "replicate")


class Odd(Lightning):
    """A mixer with another norm over all heads, and a projection that is more than linear."""

    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    sharding = Lightning.sharding | {"norm.weight": "column", "norm.bias": "column"}

    def __init__(self, config: Any, site: Site):
        super().__init__(config, site)
        self.norm = torch.nn.LayerNorm(48)
        self.o = self.Scaled(48, 48, bias=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "Silent",
            ["does not say how v.weight is cut", "does not say how slopes is cut", 'says "row" for k, but only'],
        ),
        ("Uncut", ["says 'replicate' for o.weight, but what o gives is summed over ranks: say \"row\""]),
        ("Odd", ["has a Scaled for its output projection, o", "has a LayerNorm for its norm over all heads"]),
    ],
)
def test_a_layer_that_cannot_be_cut_as_it_says(name: str, words: list[str]) -> None:
    own = {"mixers": {"softmax": {"kind": f"{__name__}:{name}", "num_heads": 12}}}
    assert small(own, 1) == []
    said = small(own, 2, tp=2)
    assert len(said) == len(words), said
    for sentence, word in zip(said, words, strict=True):
        assert sentence.startswith(f"parallel.tp: {name} ") and word in sentence
