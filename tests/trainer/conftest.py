"""What tests of conversions share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import ask_in_this_process, write_step
from tests.trainer.conversions import KINDS, done


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Conversions ask transformers without a process of its own for each: it is imported once for all tests."""
    import transformers

    import trainer.convert

    monkeypatch.setattr(trainer.convert, "ask_transformers", ask_in_this_process)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    step, out = write_step(tmp_path / "step", KINDS["llama"][1]), tmp_path / "out"
    done("convert", "to-hf", str(step), str(out), "--max-shard-size", "30KB")
    return out


OWN_MIXER = '''
from dataclasses import dataclass
from mixing.helpers import half
from model.mixers.softmax import Softmax


class Halved(Softmax):
    """Softmax attention of half the strength."""

    def forward(self, x, ctx, cache=None, head_gate=None):
        return half(super().forward(x, ctx, cache, head_gate))
'''


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "code" / "mixing"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "mixers.py").write_text(OWN_MIXER)
    (package / "helpers.py").write_text("def half(x):\n    return 0.5 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mixing"]:
        del sys.modules[name]
