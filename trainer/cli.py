"""The command line: names commands, calls them, and turns refusals into sentences and exit codes.

Exit codes: 0 done, 2 refused, 70 failed.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback

REFUSED, FAILED = 2, 70

COMMANDS = {
    "data tokenizer": ("trainer.commands.data:tokenizer", "train a SentencePiece tokenizer"),
    "data patches": ("trainer.commands.data:patches", "images in jsonl -> lists of codes, and a codebook"),
    "data prepare": ("trainer.commands.data:prepare", "text, jsonl, parquet -> PREFIX.bin/.idx"),
    "data inspect": ("trainer.commands.data:inspect", "what a dataset holds"),
    "train": ("trainer.commands.train:train", "train; resumes by itself"),
    "plan": ("trainer.commands.plan:plan", "is the layout legal, will it fit, how fast will it be"),
    "eval": ("trainer.commands.eval:evaluate", "loss, perplexity, bits per byte"),
    "diagnose": ("trainer.commands.diagnose:diagnose", "attention by layer and head: entropy, sinks, logits"),
    "generate": ("trainer.commands.generate:generate", "continue a prompt"),
    "convert to-hf": ("trainer.commands.convert:to_hf", "a model as a Hugging Face folder, checked"),
    "convert from-hf": ("trainer.commands.convert:from_hf", "a Hugging Face folder as a step folder, checked"),
    "convert to-megatron": ("trainer.commands.megatron:to_megatron", "a model as Megatron's GPT checkpoint, checked"),
    "convert from-megatron": ("trainer.commands.megatron:from_megatron", "Megatron's GPT as a step folder, checked"),
    "upcycle moh": ("trainer.commands.upcycle:moh", "a dense model with heads that are chosen for each token"),
    "upcycle moe": ("trainer.commands.upcycle_moe:moe", "a dense model with copies of its feed-forwards as experts"),
    "upcycle bam": ("trainer.commands.upcycle:bam", "several dense models of one seed as one model of experts"),
    "upcycle mot": ("trainer.commands.upcycle_mot:mot", "a dense model with weights for each modality"),
    "report": ("trainer.commands.report:report", "one HTML page about a run"),
    "doctor": ("trainer.commands.doctor:doctor", "what is installed and fast, what stands in the way"),
}


def usage(commands: dict[str, tuple[str, str]]) -> str:
    """What `headway --help` prints."""
    width = max(len(name) for name in commands)
    listed = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in commands.items())
    return (
        "usage: headway COMMAND ...\n\n"
        "Train large transformers whose attention is a choice.\n\n"
        f"commands:\n{listed}\n\n"
        "`headway COMMAND --help` says more. Under torchrun: torchrun ... -m trainer train CONFIG.toml"
    )


def main(argv: list[str] | None = None, commands: dict[str, tuple[str, str]] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    commands = commands or COMMANDS
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(commands))
        return 0
    name = next((name for name in (" ".join(argv[:2]), argv[0]) if name in commands), None)
    if name is None:
        return _unknown(argv, commands)
    from trainer.clashes import clashing_distributions

    if clashes := clashing_distributions():
        print("\n".join(clashes), file=sys.stderr)
        return REFUSED
    module, _, function = commands[name][0].partition(":")
    try:
        return getattr(importlib.import_module(module), function)(argv[len(name.split()) :])
    except ValueError as error:
        print(error, file=sys.stderr)
        if os.environ.get("HEADWAY_TRACEBACK"):
            traceback.print_exc()
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED


def _unknown(argv: list[str], commands: dict[str, tuple[str, str]]) -> int:
    import difflib

    if argv[0] in {name.split()[0] for name in commands if " " in name}:
        inner = {name: what for name, what in commands.items() if name.startswith(argv[0] + " ")}
        print(usage(inner), file=sys.stdout if argv[1:] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if argv[1:] in (["-h"], ["--help"]) else REFUSED
    near = difflib.get_close_matches(" ".join(argv[:2]), commands, n=1, cutoff=0.0)
    print(f"{argv[0]!r} is no command of headway; the nearest is {near[0]!r}. See headway --help.", file=sys.stderr)
    return REFUSED
