"""Small real runs: a dataset, a configuration, and training it in the pool's workers as `headway train` does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.folders import newest_complete, step_folder
from model.shards import read_tensors, tensor_shapes
from trainer.metrics import read_metrics

VOCAB = 64


def write_tokens(prefix: Path, documents: int = 40, seed: int = 0) -> str:
    """A Megatron dataset without a sidecar: documents of 30 to 120 tokens in which each tells much of the next."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        jumps = generator.choice([1, 2, 7], size=generator.integers(30, 120), p=[0.7, 0.2, 0.1])
        tokens = (generator.integers(VOCAB) + np.cumsum(jumps)) % VOCAB
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_config(folder: Path, prefix: str, **sections: dict[str, Any]) -> Path:
    """A hybrid of two layers, ten steps, a checkpoint every four; `sections` change it."""
    import tomli_w

    tables: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "precision": "fp32"},
        "model": {"d_model": 16, "num_layers": 2, "vocab_size": VOCAB, "pattern": ["lightning", "softmax"]},
        "mixers": {"lightning": {"num_heads": 2}, "softmax": {"num_heads": 2}},
        "feedforwards": {"swiglu": {"d_ff": 32}},
        "data": {"train": [prefix], "split": [0.8, 0.2], "seq_len": 32, "global_batch_size": 8},
        "optimizer": {"lr": 0.01},
        "schedule": {"steps": 10, "warmup_steps": 2},
        "checkpoint": {"every_steps": 4},
        "metrics": {"sinks": ["jsonl"]},
    }
    for name, section in sections.items():
        tables[name] = tables.get(name, {}) | section
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


def begin_with(config: Path, source: Path) -> None:
    """Exchange a configuration's model for `model.init_from`."""
    parts = config.read_text().split("\n[")
    kept = [part for part in parts if not part.lstrip("[").startswith(("model", "mixers", "feedforwards"))]
    config.write_text("\n[".join(kept) + f'\n[model]\ninit_from = "{source}"\n')


def headway(*argv: str) -> tuple[int, str]:
    """Run a command in this process; its exit code and what it said on stderr."""
    from trainer.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(list(argv))
    return code, said.getvalue()


def train(config: Path, *overrides: str, patch: Callable[[], Any] | None = None) -> tuple[int, str]:
    """`headway train` on a rank of the pool; `patch` returns a context manager in which it runs."""
    with patch() if patch is not None else contextlib.nullcontext():
        return headway("train", str(config), *overrides)


class Signalled:
    """Send a signal to rank `rank` when it calls `module.name` (a method as `Class.name`) for the `call`-th time."""

    def __init__(self, number: signal.Signals, rank: int, module: str, name: str, call: int = 1):
        self.number, self.rank, self.module, self.name, self.call = number, rank, module, name, call

    def __call__(self) -> Any:
        import importlib

        found: Any = importlib.import_module(self.module)
        *owners, name = self.name.split(".")
        for owner in owners:
            found = getattr(found, owner)
        return _patched(found, name, self._wrap(getattr(found, name)))

    def _wrap(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        calls = 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call and int(os.environ["RANK"]) == self.rank:
                os.kill(os.getpid(), self.number)
            return plain(*args, **kwargs)

        return wrapped


@contextlib.contextmanager
def _patched(owner: Any, name: str, value: Any) -> Any:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class NotFinite:
    """Make the loss of this rank not a number in these steps (counted over the updates of this process)."""

    def __init__(self, rank: int, steps: tuple[int, ...]):
        self.rank, self.steps = rank, steps

    def __call__(self) -> Any:
        import parallel.spread

        plain = parallel.spread.batch_nats
        calls = 0

        def poisoned(*args: Any) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled()
            bad = calls in self.steps and dist.get_rank() == self.rank
            return [found * (float("nan") if bad else 1.0) for found in plain(*args)]

        return _patched(parallel.spread, "batch_nats", poisoned)


def status(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "status.json").read_text())


def events(run_dir: Path, *names: str) -> list[dict[str, Any]]:
    lines = (run_dir / "logs" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if not names or event["event"] in names]


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    """What a twin must repeat bit for bit."""
    auxiliary = ("entropy_loss", "head_balance_loss", "expert_balance_loss", "router_z_loss")
    keys = ("step", "loss", *auxiliary, "grad_norm", "tokens", "lr", "skipped", "val_loss")
    return [tuple(record.get(key) for key in keys) for record in read_metrics(run_dir)]


def stored(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    folder = step_folder(run_dir, step)
    state = {name: torch.empty(shape) for name, shape in tensor_shapes(folder, "").items()}
    for name in state:
        if name.startswith("counters."):
            state[name] = state[name].long()
    read_tensors(state, folder, alone=True)
    return state


def assert_twins(run_dir: Path, twin: Path, step: int = 10) -> None:
    """Loss, gradient norm, learning rate, parameters, optimizer state and counters are equal bit for bit."""
    assert curve(run_dir) == curve(twin)
    ours, theirs = stored(run_dir, step), stored(twin, step)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 40
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert newest_complete(run_dir)[0] == step_folder(run_dir, step)
