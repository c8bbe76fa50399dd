"""Versions, what can be imported, and which fast paths are taken or why they are not."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from trainer.clashes import FLOORS, clashing_distributions
from trainer.doctor.finding import Finding, ask_python

NEEDED = {
    "torch": "2.11",
    "numpy": "",
    "megatron-core": "0.16.1",
    "sentencepiece": "",
    "safetensors": "",
    "transformers": "5.23",
    "pydantic": "2",
    "tyro": "",
    "tensorboard": "",
}
"""Distributions without which nothing trains, and the oldest version that will do."""

EXTRA = {
    "triton": "compiled kernels on a GPU; comes with torch for CUDA, or with the extra gpu",
    "deepspeed": "extra deepspeed",
    "lm-eval": "extra eval: headway eval --tasks",
    "kubernetes-validate": "extra cluster",
    "wandb": "a sink of metrics",
}

_MEGATRON = "import json, megatron.core.datasets.indexed_dataset; print(json.dumps(True))"
_DEEPSPEED = """
import json
from deepspeed.ops.op_builder.all_ops import ALL_OPS
real = {name: builder for name, builder in ALL_OPS.items() if "not_implemented" not in name}
print(json.dumps({name: bool(builder.is_compatible(verbose=False)) for name, builder in real.items()}))
"""


def look() -> list[Finding]:
    """All of it; the imports take seconds."""
    return [*versions(), *names(), *kernels(), *fast_paths(), megatron(), *deepspeed()]


def versions() -> list[Finding]:
    """Of Python, of what is needed, and of what may be there."""
    found = [Finding("python", platform.python_version())]
    for name, oldest in NEEDED.items():
        has = installed(name)
        fault = ""
        if has is None:
            fault = f"{name} is not installed: `pip install -e .` in Headway's folder installs what is needed."
        elif oldest and _parts(has) < _parts(oldest):
            fault = f"{name} {has} is too old, {oldest} or newer is needed: `pip install '{name}>={oldest}'`."
        found.append(
            Finding(name, has or "not installed", f"needed, {oldest} or newer" if oldest else "needed", "", fault)
        )
    return found + [Finding(name, installed(name) or "not installed", what) for name, what in EXTRA.items()]


def names() -> list[Finding]:
    """Whether something else has the names of our packages, or apex's."""
    clashes = clashing_distributions()
    found = [Finding("names of packages", ", ".join(FLOORS), "no other distribution has them")]
    if clashes:
        found = [Finding("names of packages", "taken", fault=sentence) for sentence in clashes]
    from kernels.apex import apex

    seen = apex()
    hint = ""
    if seen.state in ("another", "broken", "wrong"):
        hint = f"apex: {seen.said}. `pip uninstall apex`, or build NVIDIA's from its repository for this torch."
    return [*found, Finding("apex", seen.state, seen.said, hint)]


def kernels() -> list[Finding]:
    """Which form of each operation will run here, in the dtype that a run has by default, and why."""
    import torch

    from kernels.dispatch import OPERATIONS, VARIABLE, choose
    from parallel.spread import DTYPES
    from trainer.config import default_precision

    x = torch.empty(0, dtype=DTYPES[default_precision(None)], device="cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for operation in OPERATIONS:
        what = f"kernels: {operation}"
        try:
            form, why = choose(operation, x)
            found.append(Finding(what, form, why))
        except ValueError as error:
            hint = f"{VARIABLE}={os.environ.get(VARIABLE, '')} is set in the environment: {error}"
            found.append(Finding(what, "refused", "asked for by name, and cannot run", hint))
    return found


def fast_paths() -> list[Finding]:
    """What computes the layers here that has no forms to choose from, and what compiles."""
    import torch

    cuda = torch.cuda.is_available()
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    hint = (
        "" if compiler else "there is no C++ compiler, which run.compile needs on a CPU: install g++, or leave it off."
    )
    triton = importlib.util.find_spec("triton") is not None
    if cuda and not triton:
        hint = "run.compile needs triton on a GPU, and it is not installed: `pip install triton`."
    can_compile = triton if cuda else compiler is not None
    fused = "flash or memory-efficient, as the mask allows" if cuda else "fused for CPUs"
    return [
        Finding("softmax attention", "torch", f"its own: {fused}"),
        Finding(
            "experts", "grouped products" if cuda else "a loop", "all in one call" if cuda else "one after the other"
        ),
        Finding("run.compile", "can" if can_compile else "cannot", compiler or "", hint),
    ]


def megatron() -> Finding:
    """Whether datasets can be read."""
    imported, said = ask_python(_MEGATRON)
    if imported:
        return Finding("import of megatron-core", "works", "indexed datasets")
    fault = f"megatron-core cannot be imported ({said}), which reads datasets: `pip install 'megatron-core>=0.16.1'`."
    return Finding("import of megatron-core", "fails", said, fault=fault)


def deepspeed() -> list[Finding]:
    """Which of its operations can be built here; nothing where it is not installed."""
    if installed("deepspeed") is None:
        return []
    operations, said = ask_python(_DEEPSPEED)
    if operations is None:
        hint = (
            f"deepspeed is installed and cannot be imported ({said}): `pip install deepspeed==0.19.8`, or uninstall it."
        )
        return [Finding("import of deepspeed", "fails", said, hint)]
    can = [name for name, good in operations.items() if good]
    cannot = [name for name, good in operations.items() if not good]
    return [
        Finding("deepspeed can build", str(len(can)), ", ".join(can)),
        Finding("deepspeed cannot build", str(len(cannot)), ", ".join(cannot)),
    ]


def installed(name: str) -> str | None:
    """Version of a distribution."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _parts(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    numbers = text.partition("+")[0].split(".")
    return tuple(int(part) for part in numbers if part.isdigit())
