"""`headway eval --tasks`: lm-evaluation-harness says the same of a model and of its export, which needs no Headway."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import model.hf.probe
import trainer.convert
import trainer.tasks
from tests.checkpoints import ask_in_this_process, write_step
from tests.trainer.runs import headway
from trainer.data.train_tokenizer import train_tokenizer

installed = all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate", "peft"))
needs_harness = pytest.mark.skipif(not installed, reason="lm-evaluation-harness is not installed: extra eval")

VOCAB = 400
SEQ_LEN = 32
WORDS = [
    "a",
    "the",
    "old",
    "river",
    "stone",
    "house",
    "young",
    "walks",
    "over",
    "bright",
    "green",
    "wind",
    "sings",
    "of",
    "and",
]
CHOICE = """
task: which_word
dataset_path: json
dataset_kwargs: {data_files: {test: data/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: data/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
OTHER_PROCESS = """
import json, runpy, sys
probe, out, folder = sys.argv[1:]
without = runpy.run_path(probe)["_Without"]
blocked = ["kernels", "model", "parallel", "trainer", "launch", "tests"]
sys.meta_path = [without(finder, blocked) for finder in sys.meta_path]
try:
    import model
    raise SystemExit("Headway can be imported: this proves nothing")
except ModuleNotFoundError:
    pass
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
found = simple_evaluate(
    model="hf", model_args=f"pretrained={out},trust_remote_code=True,dtype=float32", device="cpu", batch_size=4,
    tasks=["which_word", "texts"], task_manager=TaskManager(include_path=folder, include_defaults=False),
)
print(json.dumps(found["results"]))
"""


def write_tasks(folder: Path) -> None:
    """Two tasks of twelve examples. Texts are longer than the model has been trained on, so they are cut."""
    chance = random.Random(0)

    def sentence(count: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(count))

    choices = [
        {"begin": sentence(5), "choices": [" " + sentence(n) for n in (1, 2, 3)], "answer": chance.randrange(3)}
        for _ in range(12)
    ]
    texts = [{"text": sentence(chance.randrange(4, 80))} for _ in range(12)]
    (folder / "data").mkdir(parents=True)
    for name, rows in (("choice", choices), ("texts", texts)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE)
    (folder / "texts.yaml").write_text(ROLLING)


def tables() -> dict[str, Any]:
    return {
        "model": {"d_model": 32, "num_layers": 3, "vocab_size": VOCAB, "pattern": ["lightning*2", "softmax"]},
        "mixers": {"lightning": {"num_heads": 4}, "softmax": {"num_heads": 4, "num_kv_heads": 2}},
        "feedforwards": {"swiglu": {"d_ff": 48}},
        "data": {"train": ["nothing"], "seq_len": SEQ_LEN},
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`step`, a model with a tokenizer, and `tasks`."""
    folder = tmp_path_factory.mktemp("tasks")
    chance = random.Random(1)
    lines = [" ".join(chance.choice(WORDS) for _ in range(9)) + ".\n" for _ in range(300)]
    (folder / "text.txt").write_text("".join(lines))
    train_tokenizer([str(folder / "text.txt")], str(folder / "words"), VOCAB - 60)
    write_step(folder / "step", tables(), tokenizer=folder / "words")
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offline, and what the libraries keep stays here."""
    for name in trainer.tasks.OFFLINE:
        monkeypatch.setenv(name, "1")
    if installed:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    yield


def evaluated(*argv: str | Path, out: Path) -> Any:
    code, said = headway("eval", *map(str, argv), "--out", str(out))
    assert code == 0, said
    return json.loads(out.read_text())


def refused(*argv: str | Path) -> str:
    code, said = headway("eval", *map(str, argv))
    assert code == 2, said
    return said


@needs_harness
def test_native_and_export_agree(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    step, export, folder = made / "step", tmp_path / "export", made / "tasks"
    native = evaluated(step, "--tasks", folder, "--batch-size", "4", out=tmp_path / "native.json")["tasks"]
    assert native.keys() == {"which_word", "texts"}
    assert all(task["examples"] == 12 for task in native.values())
    assert native["which_word"]["metrics"]["acc"]["stderr"] > 0

    monkeypatch.setattr(trainer.convert, "ask_transformers", ask_in_this_process)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    code, said = headway("convert", "to-hf", str(step), str(export))
    assert code == 0, said
    elsewhere = without_headway(export, folder, tmp_path)
    compared = 0
    for name, task in native.items():
        for metric, found in task["metrics"].items():
            exact = metric.startswith("acc")
            expected = elsewhere[name][f"{metric},none"]
            assert found["value"] == (expected if exact else pytest.approx(expected, rel=1e-5)), metric
            compared += 1
    assert compared == 5

    # The export read by Headway again: the same windows, though nothing there tells of the data it was trained on.
    again = evaluated(export, "--tasks", folder, "--batch-size", "4", out=tmp_path / "again.json")["tasks"]
    assert again["which_word"] == native["which_word"]
    assert again["texts"]["metrics"]["bits_per_byte"]["value"] == pytest.approx(
        native["texts"]["metrics"]["bits_per_byte"]["value"], rel=1e-6
    )


def without_headway(export: Path, folder: Path, tmp_path: Path) -> dict[str, Any]:
    """What the harness says of a Hugging Face folder in a process where Headway cannot be imported."""
    (tmp_path / "script.py").write_text(OTHER_PROCESS)
    finished = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "script.py"), model.hf.probe.__file__, str(export), str(folder)],
        cwd=folder,
        env={
            "HF_HOME": str(tmp_path / "home"),
            "PATH": os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
            **dict.fromkeys(trainer.tasks.OFFLINE, "1"),
        },
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@needs_harness
def test_fewer_examples_beside_data(made: Path, tmp_path: Path) -> None:
    from tests.trainer.runs import write_tokens

    prefix = write_tokens(tmp_path / "data")
    asked = (made / "step", "--tasks", made / "tasks", "--limit", "3", "--data", prefix)
    found = evaluated(*asked, out=tmp_path / "both.json")
    assert [row["name"] for row in found["data"]] == ["data"]
    assert [task["examples"] for task in found["tasks"].values()] == [3, 3]


@needs_harness
def test_tasks_that_cannot_be_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks
    from lm_eval.tasks import TaskManager

    # A few of the stock tasks: to look through all of them takes long.
    some = TaskManager(include_path=str(Path(tasks.__file__).with_name("hellaswag")), include_defaults=False)
    monkeypatch.setattr(trainer.tasks, "_stock_tasks", lambda: some)
    step = made / "step"
    assert "the nearest is 'hellaswag'" in refused(step, "--tasks", "helaswag")
    assert "Nothing is fetched unless HF_HUB_OFFLINE=0" in refused(step, "--tasks", "hellaswag")
    assert "there is no such folder" in refused(step, "--tasks", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "defines a task" in refused(step, "--tasks", tmp_path / "empty")
    assert "would be run more than once" in refused(step, "--tasks", made / "tasks", made / "tasks")

    broken = tmp_path / "broken"
    write_tasks(broken)
    (broken / "typing.yaml").write_text("task: [")
    (broken / "twin.yaml").write_text(CHOICE)
    said = refused(step, "--tasks", broken)
    assert "typing.yaml cannot be read" in said
    assert "another file defines 'which_word' already" in said
    for name in ("typing.yaml", "twin.yaml", "data/texts.jsonl"):
        (broken / name).unlink()
    assert "texts cannot be loaded" in refused(step, "--tasks", broken)

    assert "has no tokenizer" in refused(write_step(tmp_path / "mute", tables()), "--tasks", made / "tasks")


def test_flags_that_do_not_fit(made: Path) -> None:
    assert "--limit counts examples of tasks" in refused(made / "step", "--limit", "3")
    assert "must be at least 1" in refused(made / "step", "--tasks", "x", "--limit", "0")
    assert "--baselines: with --tasks" in refused(made / "step", "--tasks", "x", "--baselines")


def test_not_installed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused(made / "step", "--tasks", made / "tasks")
    assert said.strip() == "--tasks needs lm-evaluation-harness: pip install -e '.[eval]'"
