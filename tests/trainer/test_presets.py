"""The presets in configs/: legal, complete, and of the size that was published."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.stack import Model
from parallel.config import ParallelConfig
from parallel.mesh import layout_faults
from trainer.config import Config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def llama(layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocab: int, *, matrices: int) -> int:
    """Parameters of a Llama; `matrices` is 1 where embedding and head are one, else 2."""
    attention = 2 * width * width + 2 * width * (width // heads) * kv_heads
    return layers * (attention + 3 * width * hidden + 2 * width) + width + matrices * vocab * width


def transnormer(layers: int, width: int, hidden: int, vocab: int) -> int:
    """Parameters of a TransNormerLLM: q, k, v, u, o and three matrices of SGLU a layer, one set of angles, no norms."""
    return layers * (5 * width * width + 3 * width * hidden) + vocab * width + width


def gpt(layers: int, width: int, vocab: int, positions: int) -> int:
    """Parameters of a GPT-2, tied: 12 D^2 in matrices, 9 D in biases and 4 D in norms a layer."""
    return layers * (12 * width * width + 13 * width) + 2 * width + (vocab + positions) * width


def mixtral(layers: int, width: int, heads: int, kv_heads: int, hidden: int, vocab: int, *, experts: int) -> int:
    """Parameters of a Llama with several experts in place of each feed-forward, and a router in front of them."""
    more = 3 * width * hidden * (experts - 1) + experts * width
    return llama(layers, width, heads, kv_heads, hidden, vocab, matrices=2) + layers * more


def moh(layers: int, width: int, shared: int, routed: int, hidden: int, vocab: int) -> int:
    """Parameters of a Llama whose layers have three routers: of routed heads, of shared ones, and of the two kinds."""
    llama_alike = llama(layers, width, 1, 1, hidden, vocab, matrices=2)
    return llama_alike + layers * (routed + shared + 2) * width


def hybrid(groups: int, width: int, kv_width: int, hidden: int, vocab: int) -> int:
    """Parameters of groups of seven Lightning layers and one of softmax with grouped queries, untied."""
    each = 3 * width * hidden + 2 * width
    lightning, softmax = 5 * width * width, 2 * width * width + 2 * width * kv_width
    return groups * (7 * (lightning + each) + softmax + each) + width + 2 * vocab * width


def quickstart() -> int:
    """Three Lightning layers, one of which carries angles, and one of softmax, with norms that have no weights."""
    width, hidden, vocab = 128, 384, 512
    return 3 * 5 * width**2 + 4 * width**2 + width + 4 * 3 * width * hidden + vocab * width


@dataclass(frozen=True)
class Size:
    """What the model counts.

    `published` is the count in the source that the preset names (in its own comment, where the shape is Headway's),
    which says so many `digits` of it; None: all of them.
    """

    count: Callable[[], int]
    published: float
    digits: int | None = None


SIZES = {
    "quickstart": Size(quickstart, 1e6, 1),
    "llama-125m": Size(lambda: llama(30, 576, 9, 3, 1536, 49152, matrices=1), 134_515_008),
    "llama-1b": Size(lambda: llama(22, 2048, 32, 4, 5632, 32000, matrices=2), 1_100_048_384),
    "llama-7b": Size(lambda: llama(32, 4096, 32, 32, 11008, 32000, matrices=2), 6_738_415_616),
    "transnormer-385m": Size(lambda: transnormer(24, 1024, 2816, 50272), 384.9e6, 4),
    "transnormer-1b": Size(lambda: transnormer(16, 2048, 5632, 64000), 1.02e9, 3),
    "transnormer-7b": Size(lambda: transnormer(30, 4096, 11008, 64000), 6.8e9, 2),
    "hybrid-7to1-1b": Size(lambda: hybrid(2, 2048, 4 * 128, 5632, 32000), 999e6, 3),
    "moh-llm-s": Size(lambda: moh(12, 768, 4, 8, 2048, 65536), 186e6, 3),
    "moh-llm-b": Size(lambda: moh(24, 1536, 6, 10, 4096, 65536), 882e6, 3),
    "mixtral-8x7b": Size(lambda: mixtral(32, 4096, 32, 8, 14336, 32000, experts=8), 46_702_792_704),
    "gpt-8.3b": Size(lambda: gpt(72, 3072, 51200, 1024), 8.3e9, 2),
}

DENSE_SIZES = {"37m": 37e6, "94m": 94e6, "443m": 443e6, "880m": 881e6, "1.5b": 1.5e9, "7b": 7.0e9}
"""Of a Mixture-of-Transformers, what a token runs through, as in the dense model beside it (arXiv 2411.04996, table 1
has 880M for 880.9M)."""

every_preset = pytest.mark.parametrize("name", SIZES)


def preset(name: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_has_a_size_to_be_compared_with(path: Path) -> None:
    """In the table above, from a publication, or exactly in its own first comment: "12,345 parameters"."""
    if path.stem in SIZES:
        return
    stated = re.search(r"([\d,]+) parameters", path.read_text().split("\n\n")[0])
    assert stated is not None, f"{path.name}: its first comment does not say how many parameters it has"
    with torch.device("meta"):
        model = Model(load_config(path).architecture)
    assert sum(parameter.numel() for parameter in model.parameters()) == int(stated[1].replace(",", ""))


@every_preset
def test_it_says_what_it_is(name: str) -> None:
    first_lines = (CONFIGS / f"{name}.toml").read_text().splitlines()[:3]
    assert first_lines[0].startswith("# ")
    assert "" in first_lines, "a comment of one or two lines, then the sections"


@every_preset
def test_it_reads_back_as_written(name: str, tmp_path: Path) -> None:
    config = preset(name)
    assert config.warnings == []
    written = tmp_path / "config.toml"
    written.write_text(config.to_toml())
    again = load_config(written)
    assert again.tables() == config.tables()
    assert again.architecture == config.architecture
    assert again.samples == config.samples


@every_preset
def test_it_is_complete_but_for_paths(name: str) -> None:
    paths = ["--data.train", '["elsewhere/corpus"]', "--run.dir", "runs/elsewhere"]
    config = load_config(CONFIGS / f"{name}.toml", paths)
    assert [source.path for source in config.data.training_sources()] == ["elsewhere/corpus"]
    assert layout_faults_of(config, 1) == layout_faults_of(config, 8) == []


@every_preset
def test_it_has_as_many_parameters_as_published(name: str) -> None:
    with torch.device("meta"):
        model = Model(preset(name).architecture)
    found, size = sum(parameter.numel() for parameter in model.parameters()), SIZES[name]
    assert found == size.count()
    if size.digits is None:
        assert found == size.published
    else:
        assert rounded(found, size.digits) == pytest.approx(size.published)


@pytest.mark.parametrize("name", DENSE_SIZES)
def test_without_towers_it_is_the_published_dense_model(name: str) -> None:
    untied = preset(f"mot-{name}").architecture
    with torch.device("meta"):
        dense = Model(replace(untied, untie=None))
    found = sum(parameter.numel() for parameter in dense.parameters())
    assert rounded(found, 3 if found < 1e9 else 2) == pytest.approx(DENSE_SIZES[name], rel=5e-3)


def rounded(number: float, digits: int) -> float:
    """The number to so many significant digits."""
    return round(number, digits - 1 - math.floor(math.log10(number)))


def layout_faults_of(config: Config, world_size: int, **factors: Any) -> list[str]:
    parallel = ParallelConfig(microbatches=config.parallel.microbatches, **factors)
    data = config.data
    return layout_faults(
        parallel, world_size, config.architecture, seq_len=data.seq_len, global_batch_size=data.global_batch_size
    )


QUICKSTART_LAYOUTS = [
    dict(zip(("tp", "pp", "cp", "dp_shard"), sizes, strict=True)) for sizes in itertools.product((1, 2), repeat=4)
] + [
    dict(zip(("tp", "pp", "cp", "dp_replicate"), sizes, strict=True)) | {"dp_shard": 1}
    for sizes in itertools.product((1, 2), (1, 2), (1, 2), (2,))
]


@pytest.mark.parametrize("factors", QUICKSTART_LAYOUTS, ids=str)
def test_quickstart_fits_every_small_layout(factors: dict[str, int]) -> None:
    assert layout_faults_of(preset("quickstart"), math.prod(factors.values()), **factors) == []
