"""Runs of a flattened tensor, as boxes and in checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from model.fragments import Fragment, SavePlanner
from model.shards import read_tensors
from parallel.data import fill
from tests.pool import Pool

SHAPES = [(7,), (4, 5), (1, 6), (6, 1), (3, 2, 4)]


def counting(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_are_the_run_in_its_order(shape: tuple[int, ...]) -> None:
    whole = counting(shape)
    for begin, end in itertools.combinations_with_replacement(range(whole.numel() + 1), 2):
        fragment = Fragment(whole.shape, begin, whole.flatten()[begin:end].clone())
        boxes = list(fragment.boxes())
        assert len(boxes) <= 2 * len(shape) - 1
        for offsets, values in boxes:
            where = tuple(slice(o, o + size) for o, size in zip(offsets, values.shape, strict=True))
            assert torch.equal(whole[where], values)
            assert torch.equal(fragment.box_at(offsets), values)
        assert [x for box in boxes for x in box.values.flatten().tolist()] == list(range(begin, end))


def test_boxes_share_the_memory_of_the_run() -> None:
    values = torch.zeros(7)
    fill({"x": Fragment(torch.Size((4, 3)), 2, values)}, {"x": counting((4, 3))}.__getitem__)
    assert values.tolist() == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def own(shape: tuple[int, ...], ends: tuple[int, ...]) -> Fragment:
    """This rank's run, to its own end."""
    whole, rank = counting(shape), dist.get_rank()
    begin = (0, *ends)[rank]
    return Fragment(whole.shape, begin, whole.flatten()[begin : ends[rank]].clone())


def written(folder: Path, ends: dict[tuple[int, ...], tuple[int, ...]]) -> None:
    state = {"model": {str(shape): own(shape, cut) for shape, cut in ends.items()}}
    dcp.async_save(state, storage_writer=dcp.FileSystemWriter(folder), planner=SavePlanner()).result()


def read(folder: Path, ends: dict[tuple[int, ...], tuple[int, ...]]) -> dict[str, Any]:
    found = {str(shape): own(shape, cut) for shape, cut in ends.items()}
    for fragment in found.values():
        fragment.values.fill_(-1.0)
    read_tensors({"model": found}, folder)
    return {name: (fragment.begin, fragment.values.tolist()) for name, fragment in found.items()}


def test_any_cut_is_read_from_any_other(pool: Pool, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    pool.run(written, 3, folder, {(7,): (0, 3, 7), (4, 5): (7, 7, 20), (3, 2, 4): (3, 13, 24)})
    alone = {str(shape): torch.full(shape, -1.0) for shape in ((7,), (4, 5), (3, 2, 4))}
    read_tensors({"model": alone}, folder, alone=True)
    for shape in ((7,), (4, 5), (3, 2, 4)):
        assert torch.equal(alone[str(shape)], counting(shape))
    for rank_of_two in pool.run(read, 2, folder, {(7,): (6, 7), (4, 5): (11, 20), (3, 2, 4): (9, 24)}):
        for begin, values in rank_of_two.values():
            assert values == [float(begin + index) for index in range(len(values))]
