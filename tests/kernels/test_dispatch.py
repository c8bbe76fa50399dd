"""Which form of an operation runs: the rule, each of its reasons, and what may overrule it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import OPERATIONS, choose, force, forced, parse_wishes, uses_triton


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    force({})
    yield
    force({})


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and triton, as far as the rule looks."""
    monkeypatch.setattr(dispatch, "_find_missing", lambda operation: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    dispatch._find_device_fault.cache_clear()


def on_gpu(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Of a tensor the rule sees no more than this."""
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


@pytest.mark.usefixtures("hopper")
def test_triton_runs_on_a_gpu_in_what_it_takes():
    for operation in OPERATIONS:
        assert choose(operation, on_gpu()).form == choose(operation, on_gpu(torch.float32)).form == "triton"


@pytest.mark.usefixtures("hopper")
def test_every_reason_against_it_is_said():
    assert choose("lightning", torch.zeros(1)) == ("torch", "tensors are on cpu, and Triton's forms are for GPUs")
    assert choose("lightning", on_gpu(torch.float64)) == ("torch", "torch.float64 is left to the portable form")
    assert choose("lightning", on_gpu(), "a head is 512 wide") == ("torch", "a head is 512 wide")


def test_old_gpus_and_machines_without_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    dispatch._find_device_fault.cache_clear()
    monkeypatch.setattr(dispatch, "_find_missing", lambda operation: "")
    assert "7.5" in choose("glu", on_gpu()).why
    dispatch._find_device_fault.cache_clear()
    monkeypatch.setattr(dispatch, "_find_missing", lambda operation: "triton is not installed")
    assert choose("glu", on_gpu()) == ("torch", "triton is not installed")


def test_where_a_module_is_missing_the_portable_form_runs(monkeypatch):
    """As in an exported model, where `kernels` may be nobody's package, or somebody else's."""
    for elsewhere in ("kernels.not_here", "not_here.at_all"):
        monkeypatch.setitem(OPERATIONS, "glu", elsewhere)
        dispatch._find_missing.cache_clear()
        assert dispatch._find_missing("glu") == "its module is not here"
    dispatch._find_missing.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_what_is_asked_for_runs():
    with forced(lightning="torch"):
        assert choose("lightning", on_gpu()) == ("torch", "asked for")
        assert choose("attention", on_gpu()).form == "triton"
        with forced(lightning="triton"):
            assert choose("lightning", on_gpu()) == ("triton", "asked for")
        assert not uses_triton("lightning", on_gpu())
    assert uses_triton("lightning", on_gpu())


@pytest.mark.usefixtures("hopper")
def test_a_wish_ends_where_it_was_made_whatever_happens():
    with pytest.raises(RuntimeError), forced(lightning="torch"):
        raise RuntimeError
    assert uses_triton("lightning", on_gpu())


@pytest.mark.usefixtures("hopper")
def test_what_is_asked_for_and_cannot_run_is_refused(monkeypatch):
    with forced(lightning="triton"):
        with pytest.raises(ValueError, match=r"lightning was asked for, and cannot run: torch\.float64 is left"):
            choose("lightning", on_gpu(torch.float64))
        with pytest.raises(ValueError, match="512 wide"):
            choose("lightning", on_gpu(), "a head is 512 wide")
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="tensors are on cpu"):
            choose("lightning", torch.zeros(1))
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert uses_triton("lightning", torch.zeros(1))


@pytest.mark.usefixtures("hopper")
def test_all_that_cannot_run_is_known_beforehand_whoever_asked(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "glu=triton,attention=triton,norm_gate=torch")
    found = dispatch.refusals({"lightning": "triton", "attention": "torch"}, on_gpu(torch.float64))
    assert [fault.split()[4] for fault in found] == ["glu", "lightning"]
    assert dispatch.refusals({"lightning": "triton"}, on_gpu()) == []


def test_wishes_are_read():
    assert parse_wishes(["lightning=torch", " glu=triton"]) == {"lightning": "torch", "glu": "triton"}
    assert parse_wishes(["torch"]) == dict.fromkeys(OPERATIONS, "torch")
    assert parse_wishes(["torch", "glu=triton"])["glu"] == "triton"
    with pytest.raises(ValueError) as error:
        parse_wishes(["lightning=cuda", "lightening=torch"])
    assert '"lightning=cuda"' in str(error.value) and '"lightening=torch"' in str(error.value)
    assert "lightning, attention" in str(error.value)


def test_the_environment_is_asked_and_a_run_overrules_it(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "lightning=torch, glu=torch")
    force({"glu": "triton"})
    assert dispatch._WISHES == {"lightning": "torch", "glu": "triton"}
    force({})
    assert dispatch._WISHES == {"lightning": "torch", "glu": "torch"}
    monkeypatch.setenv(dispatch.VARIABLE, "lightning")
    with pytest.raises(ValueError, match=f"{dispatch.VARIABLE}: "):
        force({})
    monkeypatch.delenv(dispatch.VARIABLE)
