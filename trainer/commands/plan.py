"""`headway plan CONFIG.toml --world N [--section.key VALUE ...]`"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

NOT_FORECAST = 'Memory and time are forecast for parallel.engine = "torch" alone.'


@dataclass
class Arguments:
    """Whether a layout is legal and will fit, what its ranks send, and how fast it might be; nothing is started.

    A step of every pipeline rank is traced, on tensors without values: no GPU, no data and no other process is needed.
    Settings are overridden as for `headway train`: --section.key VALUE. Exit code 2: the layout is not legal.
    """

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG")]
    """A preset (see configs/) or your own file."""
    world: int
    """Processes."""
    device: Literal["cpu", "v100", "a100", "h100", "h200"] | None = None
    """What each of them has. Default: what this machine has."""
    node_size: int = 8
    """Devices in a node; neighbouring ranks are in one."""
    peak: float | None = None
    """TFLOP/s of a device. Default: from its data sheet."""
    attained: float = 0.4
    """The part of the peak that layers attain while they compute."""
    link: float | None = None
    """GB/s that a device sends inside its node. Default: from its data sheet."""
    network: float | None = None
    """GB/s that a device sends out of its node. Default: that of the maker's own servers."""
    links_attained: float = 0.8
    """The part of both that is attained."""
    overlap: float = 0.9
    """The part of data-parallel messages that hides behind computing."""
    reserve: float | None = None
    """GiB of a device's memory that are no tensors. Default: 3 on a GPU, 0.5 on a CPU."""
    json: bool = False
    """Print one JSON object instead of tables; bytes, seconds, FLOP/s."""


def plan(argv: list[str]) -> int:
    """Print a plan; returns the exit code.

    Raises:
        ValueError: the layout, or something else in the configuration, is not legal: all faults.
    """
    own, overrides = split(argv)
    arguments = tyro.cli(Arguments, args=own, prog="headway plan", config=(tyro.conf.FlagCreatePairsOff,))
    _check(arguments)
    from parallel.zero_config import resolve_zero
    from trainer.config import load_config
    from trainer.planning.devices import GIB, assume
    from trainer.planning.forecast import forecast
    from trainer.planning.remedies import remedies
    from trainer.planning.show import as_data, show

    assumptions = assume(
        arguments.device,
        arguments.world,
        node_size=arguments.node_size,
        peak=_scaled(arguments.peak, 1e12),
        attained=arguments.attained,
        link=_scaled(arguments.link, 1e9),
        network=_scaled(arguments.network, 1e9),
        links_attained=arguments.links_attained,
        overlap=arguments.overlap,
        reserve=_scaled(arguments.reserve, GIB),
    )
    config = load_config(arguments.config, overrides, world_size=arguments.world)
    if (zero := resolve_zero(config.parallel)) is not None:
        # What DeepSpeed holds is not traced.
        facts = {"legal": True, "engine": "deepspeed", "zero_stage": zero.stage, "world_size": arguments.world}
        said = f"The layout is legal: ZeRO {zero.stage} over {arguments.world} processes. "
        print(json.dumps(facts) if arguments.json else said + NOT_FORECAST)
        return 0
    found = forecast(config, arguments.world, assumptions)
    helping = []
    if found.fits is False:
        now, gloo = found.costliest.peak, not assumptions.on_gpu
        helping = list(remedies(config, arguments.world, now=now, precision=found.precision, gloo=gloo))
    if arguments.json:
        print(json.dumps(as_data(found, helping)))
    else:
        show(found, helping)
    return 0


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the overrides: `--section.key VALUE`, whose names have a dot."""
    own: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        name, given, _ = word.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(word)
            continue
        overrides.append(word)
        if not given and (value := next(words, None)) is not None:
            overrides.append(value)
    return own, overrides


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _check(arguments: Arguments) -> None:
    faults = [
        f"--{name.replace('_', '-')} {value} must be {'at least 1' if least else 'above 0'}."
        for name, least in (("world", 1), ("node_size", 1), ("peak", 0), ("link", 0), ("network", 0))
        if (value := getattr(arguments, name)) is not None and (value < least or value <= 0)
    ]
    faults += [
        f"--{name.replace('_', '-')} {value} must be {'from' if least else 'above'} 0, and at most 1, the whole."
        for name, least in (("attained", False), ("links_attained", False), ("overlap", True))
        if not 0 <= (value := getattr(arguments, name)) <= 1 or (value == 0 and not least)
    ]
    if arguments.reserve is not None and arguments.reserve < 0:
        faults.append(f"--reserve {arguments.reserve} must not be negative.")
    if faults:
        raise ValueError(" ".join(faults))
