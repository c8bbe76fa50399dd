"""Megatron's pickled files, read as data: tensors, numbers, arguments; nothing in them is run.

Arguments hold settings of Megatron's and TransformerEngine's own types. None of these is imported: something that does
nothing stands in for each.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import signal
import types
from pathlib import Path
from typing import Any

import torch

# Packages of Megatron's own: what stands in their place cannot do anything.
_STOOD_IN_FOR = ("megatron", "transformer_engine", "nemo")


class _Nothing:
    """In place of an object of a type that is not imported."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _harmless() -> dict[str, Any]:
    """Types that hold values and do nothing, by the names that files have for them."""
    import numpy

    plain: list[Any] = [argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, io.BytesIO, signal.Signals]
    plain += [numpy.ndarray, numpy.dtype, *(getattr(numpy.dtypes, name) for name in numpy.dtypes.__all__)]
    found = {f"{one.__module__}.{one.__name__}": one for one in plain}
    # The first version of numpy and the second have another name for the same module.
    makers: list[Any] = [numpy.zeros(0).__reduce__()[0], numpy.float64(0).__reduce__()[0]]
    for made in makers:
        found |= {f"numpy.{core}.multiarray.{made.__name__}": made for core in ("core", "_core")}
    return found | {"_io.BytesIO": io.BytesIO}


def load(path: Path) -> dict[str, Any]:
    """What a file of torch.save holds; tensors stay on disk until they are used.

    Raises:
        ValueError: it is damaged, or asks for what is neither a plain value nor Megatron's; nothing of it was run.
    """
    harmless = _harmless()
    try:
        asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(harmless)
        stand_ins = {name for name in asked if name.partition(".")[0] in _STOOD_IN_FOR}
        if foreign := sorted(asked - stand_ins):
            raise ValueError(
                f"{path} asks for {', '.join(foreign)}, which is no plain value and not Megatron's, so the file is not "
                "read, and nothing in it was run. If you trust it, load it where it was written, take out of its "
                "args what is of that kind, and save it again."
            )
        allowed: list[Any] = [(one, name) for name, one in (harmless | dict.fromkeys(stand_ins, _Nothing)).items()]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{path} is damaged or cut short ({path.stat().st_size:,} bytes): {said}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a table.")
    return content
