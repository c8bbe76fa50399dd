"""apex: what is of that name on the path, and whether it is used. Stand-ins for NVIDIA's, which needs a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import apex

Make = Callable[[dict[str, str]], None]

# As NVIDIA's FusedAdam is called and keeps its state: it counts in its groups, and its zero_grad takes no argument.
OPTIMIZERS = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True, capturable=False, master_weights=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].mul_(b1).add_(p.grad, alpha=1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                m = state["exp_avg"] / (1 - b1 ** group["step"])
                v = state["exp_avg_sq"] / (1 - b2 ** group["step"])
                p.sub_(group["lr"] * (m / (v.sqrt() + group["eps"]) + group["weight_decay"] * p * DECAYED))
"""


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Writes files of a package `apex` to where Python looks for packages first."""

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in [name for name in sys.modules if name == "apex" or name.startswith("apex.")]:
        del sys.modules[name]


def nvidias(make: Make, text: str) -> None:
    make({"apex/__init__.py": "", "apex/optimizers/__init__.py": text})


def grouped(parameters: list[torch.Tensor]) -> list[dict[str, Any]]:
    return [{"params": parameters[:1], "weight_decay": 0.3}, {"params": parameters[1:], "weight_decay": 0.0}]


def test_nothing_is_installed() -> None:
    if importlib.util.find_spec("apex") is not None:
        pytest.skip("an apex is installed")
    found = apex.examine("cpu")
    assert (found.state, found.adam) == ("missing", None) and "not installed" in found.said


def test_a_right_one_is_taken_and_updates_as_torch_does(make: Make) -> None:
    """Three updates, one parameter without a gradient, another run that goes on from the state of the first."""
    nvidias(make, OPTIMIZERS.replace("DECAYED", "1"))
    found = apex.examine("cpu")
    assert found.state == "taken" and found.adam is not None, found.said
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-8}
    start = [torch.randn(5, 3), torch.randn(4), torch.randn(2)]
    ends = []
    for kind in (found.adam, torch.optim.AdamW):
        torch.manual_seed(3)
        parameters = [one.clone().requires_grad_() for one in start]
        optimizer = kind(grouped(parameters), **settings)
        for step in range(4):
            if step == 2:
                # A checkpoint is read into state that is there, as the trainer does it.
                again = kind(grouped(parameters), **settings)
                for parameter in parameters[:2]:
                    again.state[parameter] = {name: one.clone() for name, one in optimizer.state[parameter].items()}
                optimizer = again
            for parameter in parameters[:2]:
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ends.append(parameters)
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(*ends, strict=True))
    assert torch.equal(ends[0][2], start[2])


@pytest.mark.parametrize("decayed", ["0", "1.01", "float('nan')"])
def test_wrong_numbers_are_noticed(decayed: str, make: Make) -> None:
    nvidias(make, OPTIMIZERS.replace("DECAYED", decayed))
    found = apex.examine("cpu")
    assert (found.state, found.adam) == ("wrong", None) and "off torch's AdamW" in found.said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ImportError('libcudart.so.11.0: cannot open shared object file')", "libcudart.so.11.0"),
        ("FusedNothing = None", "FusedAdam"),
        (
            "class FusedAdam:\n    def __init__(self, *a, **k):\n        raise RuntimeError('needs cuda extensions')",
            "needs",
        ),
    ],
)
def test_one_that_does_not_run_is_said(text: str, said: str, make: Make) -> None:
    nvidias(make, text)
    found = apex.examine("cpu")
    assert (found.state, found.adam) == ("broken", None) and said in found.said


def test_without_a_device_nothing_is_imported(make: Make) -> None:
    nvidias(make, "raise AssertionError('imported')")
    found = apex.examine(None)
    assert (found.state, found.adam) == ("unchecked", None) and "no CUDA device" in found.said


def test_the_other_project_is_named_and_not_run(make: Make) -> None:
    """As the package index has it: a toolkit for Pyramid, whose import would run its code."""
    about = "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\nSummary: Pyramid toolkit to add Velruse\n"
    make({"apex/__init__.py": "raise AssertionError('imported')", "apex-0.9.10.dist-info/METADATA": about})
    found = apex.examine("cpu")
    assert (found.state, found.adam) == ("another", None)
    assert "apex 0.9.10 (Pyramid toolkit to add Velruse) is another project, not NVIDIA's" in found.said


def test_what_is_decided_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str | None] = []
    taken = apex.Apex("missing", "")
    monkeypatch.setattr(apex, "examine", lambda device: calls.append(device) or taken)
    apex.apex.cache_clear()
    try:
        assert apex.fused_adam() is None and apex.fused_adam() is None and len(calls) == 1
    finally:
        apex.apex.cache_clear()
