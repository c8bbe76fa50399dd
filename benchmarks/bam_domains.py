"""BAM on three real domains: a small seed, three experts trained on from it, and what becomes of them in one model.

    OMP_NUM_THREADS=1 python benchmarks/bam_domains.py

The way of arXiv 2408.08274, at a size that one core trains in half an hour, through `headway` commands:

1. Shakespeare, Python's own library and the GCIDE dictionary; every tenth document is held out. One tokenizer.
2. A seed with parallel blocks, trained on equal parts of all three.
3. Three experts: the seed trained on, on one domain each with a tenth of the other two, at equal tokens.
4. Mixed: `headway upcycle bam` makes a model in which the seed and the experts are four attentions and four
   feed-forwards. Beside it one in which feed-forwards alone are experts and attention is the average (as in BTX), of
   the same parts by the same code. The form of the feed-forwards' gates is the one whose BAM begins best.
5. Each is trained on equal batches of equal parts of all domains, and so is the seed (dense). Two more dense models get
   as many tokens of the mix as make BAM's operations, and as went into experts and mixture together.

Told are losses on held-out text by domain, of all models; parameters, operations a token and times of each. Equal
tokens are the rule, and BAM computes four attentions in each of them. The dictionary is a Debian package, which is
unpacked and not installed. Run it from the root of the repository; everything made lands in `--work`, where a second
run with the same settings finds what the first one made and may train arms more often (`--seeds`). Draws `--picture`
and appends a JSON line to `--out`. No figure is promised: it ends with 0 whatever comes out.
"""

import argparse
import gzip
import json
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moh_smollm2 import modules
from recording import append
from smollm2 import run, score, stay_in_this_environment, unpacked

from launch.quickstart import TEXTS, fetch_corpus
from model.files import new_folder
from model.hf import load
from model.hf.check import check_tokens, compare, native_logits
from model.hf.export import parse_size, write_folder
from model.hf.formats import choose_format
from model.hf.source import HuggingFaceFolder, open_model
from model.settings import architecture_tables, build_architecture
from model.stack import Model
from trainer.convert import complete_and_compare, facts_of
from trainer.mixing import Mixture, OneExpert, Parts, checked, logits_of_one

DOMAINS = ("shakespeare", "python", "dictionary")
PACKAGE = "dict-gcide"
PIECE = 16_384
"""Characters of the dictionary that are one document."""
OTHERS = 0.1
"""What part of an expert's batches is of the other domains."""
FORMS = (("none", 1), ("scale_n", 1), ("selected", 2))
"""Gates of the feed-forwards, and how many run, that are looked at right after mixing."""
BAM, FEED_FORWARDS, DENSE = "bam", "feed-forwards", "dense"
LONGER = {"dense-all-operations-1": "dense, equal operations", "dense-all-tokens-1": "dense, all tokens"}
Found = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ texts


def dictionary(work: Path, size: int) -> Iterator[str]:
    """Pieces of GCIDE, from its middle."""
    content = gzip.decompress((unpacked((PACKAGE,), work) / "usr/share/dictd/gcide.dict.dz").read_bytes())
    text = content.decode(errors="replace")
    start = (len(text) - size) // 2
    return (text[at : at + PIECE] for at in range(start, start + size, PIECE))


def documents(domain: str, work: Path) -> list[str]:
    if domain == "shakespeare":
        fetch_corpus()
        return [path.read_text() for path in sorted(TEXTS.glob("*.txt"))]
    if domain == "python":
        trained, held_out = modules()
        return [path.read_text() for path in sorted(trained + held_out)]
    return list(dictionary(work, 5_000_000))


def write_texts(work: Path, characters: int) -> None:
    """Documents to train on as files of `texts`/DOMAIN; of every tenth an equal part, from its middle, held out."""
    for domain in DOMAINS:
        found = documents(domain, work)
        trained, held_out = work / "texts" / domain, work / "texts" / f"held-out-{domain}"
        for folder in (trained, held_out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        share = characters // len(found[5::10])
        for number, text in enumerate(found):
            if number % 10 == 5:
                start = max(0, len(text) - share) // 2
                (held_out / f"{number:03}.txt").write_text(text[start : start + share])
            else:
                (trained / f"{number:03}.txt").write_text(text)


def prepare_all(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Prefixes to train on, and of what is held out, by domain."""
    work, tokenizer = options.work, options.work / "tokenizer"
    folders = [str(work / "texts" / domain) for domain in DOMAINS]
    if not tokenizer.exists():
        write_texts(work, options.held_out)
        run("headway", "data", "tokenizer", *folders, "--out", str(tokenizer), "--vocab-size", str(options.vocabulary))
    prefixes: list[dict[str, str]] = []
    for kind in ("", "held-out-"):
        prefixes.append({})
        for domain in DOMAINS:
            prefix = prefixes[-1][domain] = str(work / "datasets" / f"{kind}{domain}")
            texts = str(work / "texts" / f"{kind}{domain}")
            if not Path(f"{prefix}.idx").exists():
                run("headway", "data", "prepare", texts, "--tokenizer", str(tokenizer), "--out", prefix)
    return prefixes[0], prefixes[1]


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Setting:
    """What all have in common: prefixes to train on, and of what is held out, by domain."""

    train: dict[str, str]
    held_out: dict[str, str]
    options: argparse.Namespace

    @property
    def work(self) -> Path:
        return self.options.work

    def losses(self, model: Path) -> dict[str, float]:
        """Nats a token on each domain's held-out text."""
        rows = score(model, list(self.held_out.values()), self.options.length, self.work)
        return {domain: rows[Path(prefix).name]["nats_per_token"] for domain, prefix in self.held_out.items()}


def seed_tables(options: argparse.Namespace) -> str:
    width = options.width
    return (
        f"[model]\nd_model = {width}\nnum_layers = {options.layers}\nvocab_size = {options.vocabulary}\n"
        'residual = "parallel"\npattern = ["softmax"]\ntie_embeddings = true\nembedding_scale = "sqrt"\n\n'
        f"[mixers.softmax]\nnum_heads = {options.heads}\n\n[feedforwards.swiglu]\nd_ff = {width * 8 // 3 // 8 * 8}\n"
    )


def train(
    name: str, begin: str | Path, weights: dict[str, float], tokens: int, lr: float, seed: int, setting: Setting
) -> tuple[Path, Found]:
    """Train a model, from tables or a folder, on domains in these parts."""
    options, trained = setting.options, setting.work / "runs" / name
    if not trained.with_suffix(".json").exists():
        shutil.rmtree(trained, ignore_errors=True)
    trained.parent.mkdir(exist_ok=True)
    steps = max(2, round(tokens / (options.rows * options.length)))
    sources = ", ".join(f'{{ path = "{setting.train[domain]}", weight = {part} }}' for domain, part in weights.items())
    config = setting.work / "runs" / f"{name}.toml"
    config.write_text(
        f'[run]\ndir = "{trained}"\nprecision = "fp32"\nseed = {seed}\n\n'
        + (f'[model]\ninit_from = "{begin}"\n\n' if isinstance(begin, Path) else begin + "\n")
        + f"[data]\ntrain = [{sources}]\nseq_len = {options.length}\nglobal_batch_size = {options.rows}\n\n"
        f"[optimizer]\nlr = {lr}\nweight_decay = 0.1\ngrad_clip = 1.0\n\n"
        f'[schedule]\nkind = "cosine"\nsteps = {steps}\nwarmup_steps = {max(1, steps // 20)}\n\n'
        '[metrics]\nsinks = ["jsonl"]\ndiagnose_every_steps = 0\n'
    )

    def measured() -> Found:
        before = processor_seconds()
        run("headway", "train", str(config))
        used = round(processor_seconds() - before, 1)
        return describe(trained, setting) | {"processor_seconds": used}

    return trained, once(trained.with_suffix(".json"), measured)


def once(path: Path, make: Callable[[], Found]) -> Found:
    """What an earlier run of this script found, or what is found now."""
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def processor_seconds() -> float:
    """Of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def describe(trained: Path, setting: Setting) -> Found:
    """Losses, size, operations and times of a run."""
    with torch.device("meta"):
        model = Model(open_model(trained).architecture())
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    times = [line["step_time"] for line in lines]
    return {
        "name": trained.name,
        "held_out": setting.losses(trained),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_flops_per_token": model.flops(setting.options.length),
        "steps": len(lines),
        "seconds": round(sum(times), 1),
        "seconds_per_step": round(statistics.median(times), 3),
        "training_loss": [round(line["loss"], 4) for line in lines],
    }


# ----------------------------------------------------------------------------------------------------------- mixing


class FeedForwardParts(Parts):
    """The same parts of the same models, but of attention: that is averaged too."""

    def is_of_experts(self, name: str) -> bool:
        return ".feedforward." in name


def mix_feed_forwards(seed: Path, experts: list[Path], mixture: Mixture, out: Path) -> None:
    """Write a model whose feed-forwards are experts, and whose attention is the average, as BTX has it.

    Raises:
        AssertionError: an expert does not compute what it should.
    """
    sources, faults = [open_model(path) for path in (seed, *experts)], []
    dense = sources[0].architecture()
    with_bam, words = checked(sources, [source.architecture() for source in sources], mixture)
    tables, own = architecture_tables(with_bam), architecture_tables(dense)
    tables["mixers"], tables["model"]["pattern"] = own["mixers"], own["model"]["pattern"]
    _, mixed = build_architecture(tables, faults)
    assert mixed is not None, faults
    parts = FeedForwardParts([source.weights(dense) for source in sources], dense, mixed, mixture)
    layout, facts, dtype = choose_format(mixed, "headway"), facts_of(sources[0], words), torch.float32
    with new_folder(out) as partial:
        write_folder(partial, parts, mixed, layout, facts, dtype=dtype, max_shard_bytes=parse_size("5GB"))
        made, tokens = HuggingFaceFolder(partial), check_tokens(dense)
        for expert, source in enumerate(sources):
            alone = native_logits(OneExpert(source.folder, dense, parts, expert), tokens, dtype)
            found = compare(logits_of_one(made, tokens, dtype, expert), alone)
            print(
                f"      logits with all gates on feed-forward {expert}, and of it between averages: {found}", flush=True
            )
            assert found.holds
        complete_and_compare(partial, out, made, mixed, words, dtype)


def see_that_parts_are_alike(bam: Path, feed_forwards: Path) -> None:
    """Whatever is not attention is the same in both, bit for bit; attention is the average of BAM's.

    Raises:
        AssertionError: it is not.
    """
    theirs, ours = (dict(load(path)[0].named_parameters()) for path in (bam, feed_forwards))
    for name, parameter in ours.items():
        if name in theirs:
            assert torch.equal(parameter, theirs[name]), name
        else:
            before, _, after = name.partition(".mixer.")
            of_experts = [theirs[f"{before}.mixer.experts.{expert}.{after}"] for expert in range(len(DOMAINS) + 1)]
            torch.testing.assert_close(parameter, torch.stack(of_experts).mean(0), rtol=1e-5, atol=1e-6)
    print("      both mixtures are made of the same parts: attention of one is the average of the other's", flush=True)


def mean(losses: dict[str, float]) -> float:
    return statistics.mean(losses.values())


def mix(seed: Path, experts: list[Path], setting: Setting) -> Found:
    """BAM in each form of gates, and of the best, feed-forwards alone: folders, and losses right after mixing."""
    by_form, folders = {}, {}
    for norm, top_k in FORMS[-1:] if setting.options.quick else FORMS:
        form = f"{norm}, top {top_k}"
        out = setting.work / f"bam-{norm}-{top_k}"
        told = ("--ffn-gate-norm", norm, "--top-k", str(top_k), "--overwrite")
        run("headway", "upcycle", "bam", str(seed), str(out), "--experts", *map(str, experts), *told)
        by_form[form], folders[form] = setting.losses(out), (out, Mixture(ffn_gate_norm=norm, top_k=top_k))
    form = min(by_form, key=lambda form: mean(by_form[form]))
    bam, mixture = folders[form]
    plain = setting.work / "feed-forwards"
    mix_feed_forwards(seed, experts, mixture, plain)
    see_that_parts_are_alike(bam, plain)
    found = {"bam_by_form": by_form, "form": form, BAM: by_form[form], FEED_FORWARDS: setting.losses(plain)}
    return found | {"folders": {BAM: bam.name, FEED_FORWARDS: plain.name}}


# --------------------------------------------------------------------------------------------------------- the whole


def counted(seed: Path, setting: Setting) -> dict[str, float]:
    """Nats a token of unigram and bigram models, counted on all that is trained on, on all that is held out."""
    out, length = setting.work / "counted-scores.json", str(setting.options.length)
    data = ("--data", *setting.held_out.values(), "--seq-len", length)
    run("headway", "eval", str(seed), *data, "--baselines", "--out", str(out))
    rows = {row["name"]: row["nats_per_token"] for row in json.loads(out.read_text())}
    return {name: rows[name] for name in ("unigram", "bigram")}


def measure(options: argparse.Namespace) -> Found:
    """All phases, one after the other."""
    setting = Setting(*prepare_all(options), options)
    equal = dict.fromkeys(DOMAINS, 1.0)
    seed, of_seed = train("seed", seed_tables(options), equal, options.seed_tokens, options.lr, 0, setting)
    experts, of_experts, half = [], [], options.lr / 2
    for domain in DOMAINS:
        parts = {other: 1 - OTHERS if other == domain else OTHERS / (len(DOMAINS) - 1) for other in DOMAINS}
        expert, told = train(f"expert-{domain}", seed, parts, options.expert_tokens, half, 0, setting)
        experts.append(expert)
        of_experts.append(told)
    mixed = once(setting.work / "mixed.json", lambda: mix(seed, experts, setting))
    begins = {arm: setting.work / name for arm, name in mixed["folders"].items()}
    trained = []
    # Not 0: in the order of seed and experts the first batches would be texts that the experts have just seen.
    for number in range(1, options.seeds + 1):
        for arm, begin in (begins | {DENSE: seed}).items():
            _, told = train(f"{arm}-{number}", begin, equal, options.mixture_tokens, half, number, setting)
            trained.append(told | {"arm": arm, "seed": number})
    bam_costs = trained[0]["forward_flops_per_token"] / of_seed["forward_flops_per_token"]
    longer = {
        "operations": round(options.mixture_tokens * bam_costs),
        "tokens": len(DOMAINS) * options.expert_tokens + options.mixture_tokens,
    }
    more = [train(f"dense-all-{what}-1", seed, equal, tokens, half, 1, setting)[1] for what, tokens in longer.items()]
    of_seed["counted"] = once(setting.work / "counted.json", lambda: counted(seed, setting))
    return {"seed": of_seed, "experts": of_experts, "mixed": mixed, "trained": trained, "dense_longer": more}


# -------------------------------------------------------------------------------------------------------- telling


def rows_of(found: Found) -> list[tuple[str, dict[str, float], Found | None]]:
    """Every model that was scored, in the order of its making: what it is called, losses, and what its training was."""
    rows: list[tuple[str, dict[str, float], Found | None]] = [("seed", found["seed"]["held_out"], found["seed"])]
    rows += [(told["name"], told["held_out"], told) for told in found["experts"]]
    rows += [(f"{arm}, just mixed", found["mixed"][arm], None) for arm in (BAM, FEED_FORWARDS)]
    for told in found["trained"]:
        rows.append((f"{told['arm']}, trained, {told['seed']}", told["held_out"], told))
    return rows + [(LONGER[told["name"]], told["held_out"], told) for told in found["dense_longer"]]


def averages(found: Found) -> dict[str, dict[str, float]]:
    """Losses of each arm after training, the mean of its runs, by domain."""
    arms: dict[str, list[dict[str, float]]] = {}
    for told in found["trained"]:
        arms.setdefault(told["arm"], []).append(told["held_out"])
    return {
        arm: {domain: statistics.mean(losses[domain] for losses in runs) for domain in DOMAINS}
        for arm, runs in arms.items()
    }


def report(found: Found) -> None:
    """A table, and in sentences by how much the arms differ."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="nats a token on held-out text")
    for column in ("model", *DOMAINS, "mean", "parameters", "forward MFLOPs a token", "steps", "s", "processor s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, losses, told in rows_of(found):
        values = [f"{losses[domain]:.4f}" for domain in DOMAINS] + [f"{mean(losses):.4f}"]
        if told is not None:
            values += [f"{told['parameters']:,}", f"{told['forward_flops_per_token'] / 1e6:.3f}", str(told["steps"])]
            values += [f"{told['seconds']:.0f}", f"{told['processor_seconds']:.0f}"]
        table.add_row(name, *values)
    Console(width=150).print(table)
    for form, losses in found["mixed"]["bam_by_form"].items():
        print(f"BAM right after mixing, gates {form}: {mean(losses):.4f}")
    print(f"taken: {found['mixed']['form']}; counted models, all domains: {found['seed']['counted']}")
    arms = averages(found)
    for other in (FEED_FORWARDS, DENSE):
        away = {domain: arms[BAM][domain] - arms[other][domain] for domain in DOMAINS}
        words = ", ".join(f"{domain} {value:+.4f}" for domain, value in away.items())
        print(f"BAM to {other}, mean of {found['runs']} runs: {words}; mean {mean(away):+.4f}")


def draw(found: Found, path: Path) -> None:
    """Held-out losses by domain, and losses of the arms while they are trained on equal batches."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure = plt.figure(figsize=(10, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, len(DOMAINS), height_ratios=(1.15, 1))
    draw_losses(found, [figure.add_subplot(grid[0, at]) for at in range(len(DOMAINS))])
    axes = figure.add_subplot(grid[1, :])
    dense = [told["training_loss"] for told in found["trained"] if told["arm"] == DENSE]
    for arm, colour in ((BAM, "C3"), (FEED_FORWARDS, "C0")):
        runs = [told["training_loss"] for told in found["trained"] if told["arm"] == arm]
        for number, (losses, beside) in enumerate(zip(runs, dense, strict=True)):
            away = [loss - other for loss, other in zip(losses, beside, strict=True)]
            steps = range(1, len(away) + 1)
            axes.plot(steps, away, color=colour, alpha=0.6, label=arm if number == 0 else None)
    axes.axhline(0, color="0.6", linewidth=1)
    axes.set(title="Training loss on equal batches, less that of the dense model", xlabel="step", ylabel="nats a token")
    axes.legend()
    figure.savefig(path)


def draw_losses(found: Found, panels: list[Any]) -> None:
    """One panel a domain, one line a model."""
    arms = averages(found)
    rows = [("seed", found["seed"]["held_out"], "0.6")]
    rows += [(told["name"].replace("-", ": "), told["held_out"], "0.6") for told in found["experts"]]
    for arm, colour in ((BAM, "C3"), (FEED_FORWARDS, "C0")):
        rows += [(f"{arm}, just mixed", found["mixed"][arm], colour)]
    rows += [(f"{arm}, trained", arms[arm], colour) for arm, colour in ((BAM, "C3"), (FEED_FORWARDS, "C0"))]
    rows += [("dense, trained", arms[DENSE], "C2")]
    rows += [(LONGER[told["name"]], told["held_out"], "C2") for told in found["dense_longer"]]
    places = range(len(rows))
    for axes, domain in zip(panels, DOMAINS, strict=True):
        values = [losses[domain] for _, losses, _ in rows]
        axes.scatter(values, places, color=[colour for _, _, colour in rows])
        for place, value in enumerate(values):
            axes.annotate(f"{value:.3f}", (value, place), (5, -3), textcoords="offset points", fontsize=8)
        width = max(values) - min(values)
        axes.set_axisbelow(True)
        axes.set(title=domain, xlabel="held-out loss, nats a token", xlim=(min(values) - 0.05 * width, None))
        axes.set_xlim(right=max(values) + 0.3 * width)
        axes.set_yticks(places, [name for name, _, _ in rows] if axes is panels[0] else [""] * len(rows))
        axes.invert_yaxis()
        axes.grid(axis="y", color="0.9")


def forget_other_settings(options: argparse.Namespace) -> None:
    """Remove what was made with other settings than these; how often arms are trained is none of them."""
    numbers = {key: value for key, value in vars(options).items() if isinstance(value, int | float) and key != "seeds"}
    settings, path = json.dumps(numbers), options.work / "settings.json"
    if path.exists() and path.read_text() == settings:
        return
    for folder in ("texts", "tokenizer", "datasets", "runs"):
        shutil.rmtree(options.work / folder, ignore_errors=True)
    for file in ("mixed.json", "counted.json"):
        (options.work / file).unlink(missing_ok=True)
    path.write_text(settings)


def main() -> int:
    """Prepare, train, mix, train, report, draw, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 96), ("layers", 4), ("heads", 4), ("vocabulary", 2048), ("rows", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--seed-tokens", type=int, default=1_000_000)
    parser.add_argument("--expert-tokens", type=int, default=200_000, help="of each of the three")
    parser.add_argument("--mixture-tokens", type=int, default=200_000, help="of each arm")
    parser.add_argument("--lr", type=float, default=3e-3, help="the seed's peak; all others have half of it")
    parser.add_argument("--seeds", type=int, default=2, help="how often arms are trained, each time in another order")
    parser.add_argument("--held-out", type=int, default=60_000, help="characters of each domain")
    parser.add_argument("--quick", action="store_true", help="few steps: see that it runs; leaves nothing")
    parser.add_argument("--work", type=Path, default=Path("data/bam-domains"), help="what is fetched and made")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bam_domains.jsonl")
    parser.add_argument("--picture", type=Path, default=Path("docs/bam_domains.svg"))
    options = parser.parse_args()
    if options.quick:
        options.seed_tokens, options.expert_tokens, options.mixture_tokens = 40_000, 8_000, 8_000
        options.seeds, options.held_out = 1, 10_000
    stay_in_this_environment()
    options.work.mkdir(parents=True, exist_ok=True)
    forget_other_settings(options)
    found = measure(options) | {"runs": options.seeds}
    report(found)
    draw(found, options.work / "picture.svg" if options.quick else options.picture)
    append(options, "bam_domains", **found)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error} Nothing after it was tried.")
