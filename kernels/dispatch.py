"""Which form of an operation runs: one rule, and one place to say otherwise.

Most operations here have a portable form in PyTorch, exact on any device, and some have a Triton form beside it. The
Triton form runs where the tensors are on a GPU that it is written for, in a dtype and shape that it takes, and where
triton is installed; else the portable one. Whoever wants another says so: `with forced(lightning="torch")`, or
`HEADWAY_KERNELS="lightning=torch,attention=triton"` in the environment, or `run.kernels` in a configuration. A Triton
form that was asked for by name and cannot run is an error, not a silent other one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRITON, PORTABLE = "triton", "torch"

OPERATIONS = {
    "lightning": "kernels.lightning.triton_form",
    "attention": "kernels.attention.triton_form",
    "norm_gate": "kernels.fused.triton_norm_gate",
    "glu": "kernels.fused.triton_glu",
    "cross_entropy": "kernels.fused.triton_cross_entropy",
}
"""The operations with a Triton form, and the module that has it. Loaded when first needed: it imports triton."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)
VARIABLE = "HEADWAY_KERNELS"


class Choice(NamedTuple):
    """What runs, and why, in words."""

    form: str
    why: str


def choose(operation: str, x: Tensor, unfit: str = "") -> Choice:
    """What runs for these tensors.

    Args:
        x: one of them: its device and dtype count.
        unfit: why the Triton form does not take their shapes, in words; "" if it does.

    Raises:
        ValueError: the Triton form was asked for by name, and cannot run.
    """
    assert operation in OPERATIONS, operation
    wish = _WISHES.get(operation)
    if wish == PORTABLE:
        return Choice(PORTABLE, "asked for")
    why = _missing(operation) or _device_fault(x.device.type, x.device.index) or _dtype_fault(x.dtype) or unfit
    if wish == TRITON:
        if why and not (interpreting() and x.device.type == "cpu" and not (_missing(operation) or unfit)):
            raise ValueError(
                f"the Triton form of {operation} was asked for, and cannot run: {why}. "
                f'Ask for "{operation}={PORTABLE}", or for nothing.'
            )
        return Choice(TRITON, "asked for")
    return Choice(PORTABLE, why) if why else Choice(TRITON, "a GPU, and dtype and shapes that it takes")


def uses_triton(operation: str, x: Tensor, unfit: str = "") -> bool:
    """Whether the Triton form runs for these tensors: `choose`, for an if."""
    return choose(operation, x, unfit).form == TRITON


def triton_form(operation: str) -> Any:
    """The module with the Triton form."""
    return importlib.import_module(OPERATIONS[operation])


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on a CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ------------------------------------------------------------------------------------------- the rule


# The compiler need not look into what cannot change while a program runs.
@torch.compiler.assume_constant_result
def _missing(operation: str) -> str:
    return _find_missing(operation)


@torch.compiler.assume_constant_result
def _device_fault(kind: str, index: int | None) -> str:
    return _find_device_fault(kind, index)


@cache
def _find_missing(operation: str) -> str:
    # In an exported model there are portable forms alone, and `kernels` may be somebody else's package.
    for module in ("triton", OPERATIONS[operation]):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return "triton is not installed" if module == "triton" else "its module is not here"
    return ""


@cache
def _find_device_fault(kind: str, index: int | None) -> str:
    if kind != "cuda":
        return f"tensors are on {kind}, and Triton's forms are for GPUs"
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 or newer is needed"
    return ""


def _dtype_fault(dtype: torch.dtype) -> str:
    return "" if dtype in DTYPES else f"{dtype} is left to the portable form"


# ------------------------------------------------------------------------------------ saying otherwise


def parse_wishes(wishes: Sequence[str]) -> dict[str, str]:
    """Operation -> form, from `"operation=form"`, or from a form alone, which then is for all.

    Raises:
        ValueError: a name that does not exist; all of them, in sentences.
    """
    found: dict[str, str] = {}
    faults = []
    for wish in wishes:
        operation, _, form = wish.strip().rpartition("=")
        if form not in (TRITON, PORTABLE):
            faults.append(f'"{wish}" does not end in a form that there is: {TRITON}, {PORTABLE}.')
        if operation and operation not in OPERATIONS:
            faults.append(f'"{wish}" begins with no operation that has forms: {", ".join(OPERATIONS)}.')
        found |= dict.fromkeys([operation] if operation else OPERATIONS, form)
    if faults:
        raise ValueError(" ".join(faults))
    return found


def refusals(wishes: Mapping[str, str], x: Tensor) -> list[str]:
    """Why forms that are asked for cannot run for such tensors, whatever their shapes, in sentences: all of them.

    Those of the environment, too, where the wishes say nothing else.
    """
    found = []
    for operation, form in (_of_environment() | dict(wishes)).items():
        with forced(**{operation: form}):
            try:
                choose(operation, x)
            except ValueError as fault:
                found.append(str(fault))
    return found


def force(wishes: Mapping[str, str]) -> None:
    """From now on these forms run, and for all other operations what the environment or the rule says."""
    _WISHES.clear()
    _WISHES.update(_of_environment() | dict(wishes))


@contextmanager
def forced(**forms: str) -> Iterator[None]:
    """Within, `forced(lightning="torch")` runs that form; what is not named stays as it is."""
    before = dict(_WISHES)
    _WISHES.update(parse_wishes([f"{operation}={form}" for operation, form in forms.items()]))
    try:
        yield
    finally:
        _WISHES.clear()
        _WISHES.update(before)


def _of_environment() -> dict[str, str]:
    text = os.environ.get(VARIABLE, "")
    try:
        return parse_wishes([wish for wish in text.split(",") if wish.strip()])
    except ValueError as fault:
        raise ValueError(f"{VARIABLE}: {fault}") from None


_WISHES: dict[str, str] = _of_environment()
