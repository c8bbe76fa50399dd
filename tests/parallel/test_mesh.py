"""Which layouts are legal: every reason at once, each with its numbers and a choice that works."""

from __future__ import annotations

from typing import Any

import pytest

from model.config import Architecture
from model.settings import build_architecture
from parallel.config import ParallelConfig
from parallel.mesh import layout_faults, resolve_layout, unbuilt_faults


def architecture() -> Architecture:
    tables = {
        "model": {"d_model": 48, "num_layers": 4, "vocab_size": 100, "pattern": ["lightning", "softmax"]},
        "mixers": {"lightning": {"num_heads": 12}, "softmax": {"num_heads": 12, "num_kv_heads": 3}},
        "feedforwards": {"swiglu": {"d_ff": 96}},
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
        (2, {"tp": 2}, ["tp = 2", "num_kv_heads = 3", "largest tp that does is 1"]),
        (5, {"pp": 5}, ["pp = 5 is more than model.num_layers = 4", "at most 4"]),
        (4, {"pp": 4, "microbatches": 2}, ["microbatches = 2", "take at least 4"]),
        (2, {"cp": 2, "ep": 4}, ["ep = 4 does not divide dp_shard x cp = 1 x 2", "largest ep that does is 2"]),
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


def test_what_is_not_built_is_refused() -> None:
    said = unbuilt_faults(ParallelConfig(tp=2, cp=2, engine="deepspeed"))
    assert len(said) == 3
    assert all("this version" in fault for fault in said)
