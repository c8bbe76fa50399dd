"""The layout matrix as tables: which test stands behind each cell, and which sentence behind each refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from model.config import Architecture
from parallel.config import ParallelConfig
from parallel.mesh import layout_faults
from tests.conformance.layouts import EXPERT_LAYOUTS, EXPERTS, LAYOUTS, LENGTH, PRODUCTS, ROWS, Case
from tests.conformance.models import CASES, mixer_class
from tests.conformance.test_experts import CROSSINGS as EXPERT_CROSSINGS
from tests.conformance.test_experts import QUICK
from tests.conformance.test_layout_checkpoints import BIT_EQUAL, CROSSINGS, MUON_BIT_EQUAL, MUON_CROSSINGS
from tests.conformance.test_layouts import CELLS, FOURS, FP32, KINDS, OTHER_LAYOUTS, OTHERS, PAIRS, faults
from tests.conformance.test_towers import FP32 as TOWERS_FP32
from tests.conformance.zero import ZERO_LAYOUTS

Rows = list[tuple[str, ...]]
FILE = "tests/conformance/test_layouts.py"
FILES = [FILE, *(f"tests/conformance/test_{name}.py" for name in ("experts", "towers", "zero"))]


def tables() -> dict[str, Rows]:
    """Every table of docs/layouts.md by its name."""
    return {
        "layouts": _cells(LAYOUTS, FP32),
        "products": _cells(PRODUCTS),
        "experts": _expert_cells(),
        "towers": _tower_cells(),
        "zero": _zero_cells(),
        "other settings": _other_settings(),
        "crossings": _crossings(),
        "refusals": _refusals(),
    }


def settings_of(parallel: ParallelConfig) -> str:
    """What a layout sets, less what is left at its default."""
    default = ParallelConfig()
    changed = {f.name: getattr(parallel, f.name) for f in fields(parallel)}
    return ", ".join(f"{key} {value}" for key, value in changed.items() if value != getattr(default, key)) or "defaults"


def _cells(layouts: dict[str, tuple[int, ParallelConfig]], in_fp32: Sequence[str] = ()) -> Rows:
    rows: Rows = [("layout", "processes", "settings", *KINDS), ("---", "--:", *["---"] * (1 + len(KINDS)))]
    for name, (world_size, parallel) in layouts.items():
        held = "fp64, 1e-9" + "; fp32, 1e-5" * (name in in_fp32)
        cells = [_cell(replace(Case.of(kind, name, "fp64"), num_layers=8), name, held) for kind in KINDS]
        rows.append((name, str(world_size), settings_of(parallel), *cells))
    return rows


def _expert_cells() -> Rows:
    rows: Rows = [("layout", "processes", "settings", "held to"), ("---", "--:", "---", "---")]
    for name, (world_size, parallel) in EXPERT_LAYOUTS.items():
        held = "fp64, 1e-9" + "; fp32, 1e-5" * (name in QUICK)
        rows.append((name, str(world_size), settings_of(parallel), held))
    return rows


def _tower_cells() -> Rows:
    rows: Rows = [("layout", "processes", "settings", "held to"), ("---", "--:", "---", "---")]
    for name, (world_size, parallel) in (LAYOUTS | EXPERT_LAYOUTS).items():
        held = "fp64, 1e-9" + "; fp32, 1e-5" * (name in TOWERS_FP32)
        rows.append((name, str(world_size), settings_of(parallel), held))
    return rows


def _zero_cells() -> Rows:
    rows: Rows = [("layout", "processes", "settings", "held to"), ("---", "--:", "---", "---")]
    for name, (world_size, parallel) in ZERO_LAYOUTS.items():
        rows.append((name, str(world_size), settings_of(parallel), "fp32, 1e-5"))
    return rows


def _cell(case: Case, name: str, held: str) -> str:
    """What a test holds this mixer to in this layout, or why it is refused."""
    why = faults(case, name)
    if why:
        return f"refused: {' '.join(why).replace('mixers.it', f'mixers.{case.kind}')}"
    return held if case.isolated else f"{held}; rows of one document"


def _other_settings() -> Rows:
    rows: Rows = [("mixer", "settings", *OTHER_LAYOUTS), ("---",) * (2 + len(OTHER_LAYOUTS))]
    for kind, example in OTHERS:
        settings = ", ".join(f"{key} {value}" for key, value in mixer_class(kind).examples[example].items())
        cells = [_cell(Case(kind, example), name, "fp64, 1e-9") for name in OTHER_LAYOUTS]
        rows.append((kind, settings, *cells))
    return rows


def _crossings() -> Rows:
    rows: Rows = [("written by", "read by", "the run that goes on equals"), ("---",) * 3]
    rows += [(by, then, "one process, fp64, 1e-9; parameters and moments") for by, then in CROSSINGS]
    rows += [(by, then, "the same with experts") for by, then in EXPERT_CROSSINGS]
    rows += [(by, then, "the same with Muon, lightning") for by, then in MUON_CROSSINGS]
    rows += [(name, name, f"the run that was not stopped, {precision}, bit for bit") for name, precision in BIT_EQUAL]
    rows += [(name, name, f"the same with Muon, {precision}") for name, precision in MUON_BIT_EQUAL]
    return rows


def _refusals() -> Rows:
    """Layouts that are refused, and the sentences."""
    asked: list[tuple[int, dict[str, Any], bool]] = [
        (6, {"dp_replicate": 4}, False),
        (8, {"dp_shard": 2}, False),
        (3, {}, False),
        (8, {"tp": 8}, False),
        (5, {"tp": 5, "dp_shard": 1}, False),
        (8, {"pp": 8}, False),
        (4, {"pp": 4, "pp_schedule": "zbv"}, False),
        (4, {"pp": 4, "microbatches": 2}, False),
        (2, {"pp": 2, "pp_schedule": "interleaved1f1b", "microbatches": 5, "dp_shard": 1}, False),
        (2, {"pp": 2, "pp_schedule": "zbv", "recompute": "full"}, False),
        (2, {"pp": 2, "pp_schedule": "zbv"}, True),
        (7, {"cp": 7}, False),
        (2, {"ep": 2}, False),
        (4, {"ep": 3}, False),
        (8, {"ep": 8}, False),
        (8, {"engine": "deepspeed", "zero_stage": 3, "tp": 2, "dp_replicate": 2}, False),
        (2, {"engine": "deepspeed", "zero_stage": 2, "offload_parameters": "cpu"}, False),
        (2, {"engine": "deepspeed", "zero_stage": 3}, True),
    ]
    architecture: Architecture = Case("softmax").architecture()
    with_experts = Case("softmax", experts=EXPERTS).architecture()
    rows: Rows = [("asked for", "refused with"), ("---", "---")]
    for world_size, settings, compiled in asked:
        config = ParallelConfig(**settings)
        sizes = {"seq_len": LENGTH, "global_batch_size": ROWS}
        found = with_experts if settings.get("ep", 1) > 2 else architecture
        said = layout_faults(config, world_size, found, **sizes, compiled=compiled)
        assert said, f"{settings} is legal now"
        what = f"{settings_of(config)}{', run.compile' if compiled else ''} on {world_size} processes"
        rows.append((what, "<br>".join(said).replace("mixers.it", "mixers.softmax")))
    return rows


def test_ids() -> set[str]:
    """Every test that the tables speak of, as pytest calls it."""
    cells = [cell.values if hasattr(cell, "values") else cell for cell in CELLS]
    ids = {f"{FILE}::test_a_layout_equals_one_process[{kinds}-{name}]" for kinds, name in cells}
    ids |= {f"{FILE}::test_a_layout_equals_one_process_in_fp32[{kinds}-{name}]" for kinds in PAIRS for name in FP32}
    ids |= {f"{FILE}::test_a_product_equals_one_process[{kinds}-{name}]" for kinds in FOURS for name in PRODUCTS}
    ids |= {f"{FILE}::test_other_settings_of_a_mixer[{k}-{e}-{name}]" for k, e in OTHERS for name in OTHER_LAYOUTS}
    ids |= {f"{FILES[1]}::test_experts_are_spread[{name}]" for name in EXPERT_LAYOUTS}
    ids |= {f"{FILES[2]}::test_towers_of_two_mixers[{name}]" for name in LAYOUTS}
    ids |= {f"{FILES[2]}::test_towers_with_experts[{name}]" for name in EXPERT_LAYOUTS}
    ids |= {f"{FILES[2]}::test_towers_in_fp32[{name}]" for name in TOWERS_FP32}
    ids |= {f"{FILES[3]}::test_zero_equals_one_process[{name}]" for name in ZERO_LAYOUTS}
    return ids


assert len(CASES) == len(KINDS) + len(OTHERS)
