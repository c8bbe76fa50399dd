"""What the next token costs behind contexts of different lengths: Lightning layers beside softmax layers.

    python benchmarks/decode_length.py

Two models that differ in their mixer alone decode one token at a time through their caches, behind a context that was
consumed before. The settings take turns in every round, so a busy machine slows all of them alike; medians are shown,
and the ratio to the first length. Appends one JSON line to `--out`.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from lightning_length import describe_hardware
from rich.console import Console
from rich.table import Table

from model.cache import Cache
from model.settings import build_architecture
from model.stack import Model
from parallel.data import initialise

VOCAB, PREFILL = 512, 1024
MIXERS = ("lightning", "softmax")


def make_model(mixer: str, options: argparse.Namespace) -> Model:
    """A model with new weights whose layers all have this mixer."""
    shape = {"d_model": options.width, "num_layers": options.layers, "vocab_size": VOCAB, "pattern": [mixer]}
    feedforward = {"swiglu": {"d_ff": 3 * options.width}}
    tables = {"model": shape, "mixers": {mixer: {"num_heads": options.heads}}, "feedforwards": feedforward}
    _, architecture = build_architecture(tables, [])
    assert architecture is not None
    with torch.device("meta"):
        model = Model(architecture)
    initialise(model, seed=0, device=torch.device("cpu"))
    return model.eval()


def consume(model: Model, length: int) -> Cache:
    """A cache that stands behind `length` tokens."""
    cache = Cache()
    tokens = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(0))
    for part in tokens.split(PREFILL, dim=1):
        model.hidden(part, cache=cache)
    return cache


def decode(model: Model, cache: Cache, tokens: int) -> float:
    """Seconds for so many tokens, each the likeliest behind the one before."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(tokens):
        token = model(token, cache=cache)[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - start


@torch.no_grad()
def measure(options: argparse.Namespace) -> dict[tuple[str, int], list[float]]:
    """The seconds of every round for every setting, after one round that is thrown away."""
    models = {mixer: make_model(mixer, options) for mixer in MIXERS}
    settings = [(mixer, length) for length in options.lengths for mixer in MIXERS]
    caches = {(mixer, length): consume(models[mixer], length) for mixer, length in settings}
    seconds: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
    for _ in range(options.rounds + 1):
        for mixer, length in settings:
            seconds[mixer, length].append(decode(models[mixer], caches[mixer, length], options.tokens))
    return {setting: rounds[1:] for setting, rounds in seconds.items()}


def summarise(options: argparse.Namespace, seconds: dict[tuple[str, int], list[float]]) -> list[dict[str, Any]]:
    """One row per setting: the median cost of a token and its ratio to the first length."""
    medians = {setting: statistics.median(rounds) / options.tokens for setting, rounds in seconds.items()}
    return [
        {
            "mixer": mixer,
            "context": length,
            "milliseconds_per_token": round(medians[mixer, length] * 1e3, 3),
            "ratio_to_first_length": round(medians[mixer, length] / medians[mixer, options.lengths[0]], 3),
            "softmax_over_this": round(medians["softmax", length] / medians[mixer, length], 2),
        }
        for mixer in MIXERS
        for length in options.lengths
    ]


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"one token, float32, {options.layers} layers of {options.width}, {options.heads} heads, "
        f"median of {options.rounds} rounds of {options.tokens}"
    )
    for column in ("mixer", "context", "ms / token", "to first context", "softmax / this"):
        table.add_column(column, justify="left" if column == "mixer" else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()), end_section=row["context"] == options.lengths[-1])
    Console(width=110).print(table)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=32, help="decoded in every round")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode_length.jsonl")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    rows = summarise(options, measure(options))
    show(rows, options)
    record = {
        "benchmark": "decode_length",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {key: getattr(options, key) for key in ("lengths", "tokens", "layers", "width", "heads", "rounds")},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as out:
        out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
