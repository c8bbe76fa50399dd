"""lm-evaluation-harness on MODEL: its stock tasks, or those that the YAML files of a folder define."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from model.hf.formats.own import OWN
from model.hf.loading import load_source
from model.hf.source import Source, open_model
from trainer.convert import facts_of
from trainer.data.tokenizer import load_tokenizer
from trainer.data.train_tokenizer import write_hugging_face_files

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def evaluate_tasks(
    path: str | Path,
    tasks: list[str],
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    limit: int | None = None,
    allow_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run lm-evaluation-harness on MODEL, in fp32. Nothing is fetched, unless the variables of `OFFLINE` are set to 0.

    Args:
        tasks: names of the harness's own tasks, groups or tags, and folders: every task that YAML files in one define.
            Data files named there are relative to the folder.
        limit: only the first so many examples of each task.

    Returns:
        By task, and by group where one was asked for: `examples`, how many there were (None for a group), and
        `metrics`: by name a `value` and a `stderr`, which is None where the harness has none. A metric computed after
        another filter than none is called `metric,filter`, as in the harness.

    Raises:
        ValueError: no harness, no such task, one that cannot be loaded, or a model that has no tokenizer.
    """
    # huggingface_hub and datasets read them when they are imported.
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    check_installed()
    source = open_model(path)
    if source.tokenizer is None:
        raise ValueError(f"{source.folder} has no tokenizer with it, and tasks are made of text.")
    loaded = load_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = wrap(source, device, allow_code=allow_code), _tokenizer(source)
    with _silent("lm_eval.models.huggingface"):
        runner = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    # The tasks are there already: it need not look for any, which takes long.
    nothing = TaskManager(include_defaults=False)
    found = simple_evaluate(runner, tasks=loaded, limit=limit, task_manager=nothing, log_samples=False)
    return {task: _result(found, task) for task in found["results"]}


def check_installed() -> None:
    """Raises ValueError where the harness, or what its `hf` model needs, is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate", "peft")):
        raise ValueError("--tasks needs lm-evaluation-harness: pip install -e '.[eval]'")


def wrap(source: Source, device: torch.device | str, *, allow_code: bool = False) -> Any:
    """The model as a `PreTrainedModel`, with the configuration that an export of it would have."""
    from model.hf.modeling import HeadwayConfig, HeadwayForCausalLM

    architecture = source.architecture(allow_code=allow_code)
    facts = facts_of(source, None if source.tokenizer is None else load_tokenizer(source.tokenizer))
    longest = architecture.model.max_positions or facts.max_positions
    settings = OWN.write(architecture) | facts.tokens | {"max_position_embeddings": longest}
    model = load_source(source, device=device, allow_code=allow_code)
    return HeadwayForCausalLM(HeadwayConfig(**settings), model).eval()


def _tokenizer(source: Source) -> Any:
    """The tokenizer as an export of the model would have it."""
    from transformers import AutoTokenizer

    assert source.tokenizer is not None
    if any((source.tokenizer / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return AutoTokenizer.from_pretrained(str(source.tokenizer), trust_remote_code=False)
    with TemporaryDirectory() as temporary:
        write_hugging_face_files(load_tokenizer(source.tokenizer), Path(temporary))
        return AutoTokenizer.from_pretrained(temporary)


def load_tasks(names: list[str]) -> list[Any]:
    """The tasks and groups of the harness that go by these names or stand in these folders, their data read.

    Raises:
        ValueError: a name or folder without a task, a task that cannot be loaded, or two of one name.
    """
    if missing := [name for name in names if os.sep in name and not Path(name).is_dir()]:
        raise ValueError(f"--tasks {missing[0]}: there is no such folder.")
    loaded = [task for name in names for task in (_from_folder(name) if Path(name).is_dir() else _stock(name))]
    counted = Counter(leaf.task_name for task in loaded for leaf in _leaves(task))
    if twice := [name for name, count in counted.items() if count > 1]:
        raise ValueError(f"--tasks: {', '.join(twice)} would be run more than once: two tasks need two names.")
    return loaded


def _leaves(task: Any) -> list[Any]:
    """The tasks of a group, or the task itself."""
    return task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]


def _from_folder(name: str) -> list[Any]:
    from lm_eval.tasks import TaskManager

    folder = Path(name).resolve()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    faults = _overlooked(folder, {entry.yaml_path for entry in manager.task_index.values()})
    if faults:
        raise ValueError(" ".join(faults))
    if not manager.all_subtasks:
        raise ValueError(f"--tasks {name}: no YAML file in this folder defines a task (`task: NAME`).")
    with chdir(folder):
        return [item for task in manager.all_subtasks for item in _load(manager, task)]


def _overlooked(folder: Path, taken: set[Path | None]) -> list[str]:
    """A sentence for each file that the harness passes over though it was to be a task: it says nothing itself."""
    from lm_eval.tasks._yaml_loader import load_yaml

    faults = []
    for file in sorted(set(folder.rglob("*.yaml")) - taken):
        if ".ipynb_checkpoints" in file.parts:
            continue
        try:
            table = load_yaml(file, resolve_func=False)
        except Exception as error:
            faults.append(f"{file} cannot be read: {_in_one_line(error)}.")
            continue
        if "task" in table:
            faults.append(f"{file}: another file defines {table.get('group', table['task'])!r} already.")
    return faults


def _stock(name: str) -> list[Any]:
    manager = _stock_tasks()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"--tasks {name!r} is neither a folder nor a task of lm-evaluation-harness; the nearest is {near!r}."
        )
    return _load(manager, name)


@cache
def _stock_tasks() -> Any:
    """Its index is made of thousands of files, which takes some ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: Any, name: str) -> list[Any]:
    """A group as one, the tasks of a tag one by one."""
    try:
        found = manager.load(name)
    # Data in any format, templates and code of the task's own: all of it may fail, in its own way.
    except Exception as error:
        offline = any(os.environ[variable] != "0" for variable in OFFLINE)
        hint = f" Nothing is fetched unless {' and '.join(f'{variable}=0' for variable in OFFLINE)}." if offline else ""
        raise ValueError(f"--tasks: {name} cannot be loaded: {_in_one_line(error)}.{hint}") from error
    return [found["groups"][name]] if name in found["groups"] else list(found["tasks"].values())


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _result(found: dict[str, Any], task: str) -> dict[str, Any]:
    """What the harness says of one task: `metric,filter` and `metric_stderr,filter` beside its names and counts."""
    said = found["results"][task]
    metrics = {}
    for key, value in said.items():
        metric, separator, kept = key.partition(",")
        if not separator or metric.endswith("_stderr"):
            continue
        stderr = said.get(f"{metric}_stderr,{kept}")
        metrics[metric if kept == "none" else key] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) else None,
        }
    counted = found["n-samples"].get(task)
    return {"examples": None if counted is None else counted["effective"], "metrics": metrics}


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """Without warnings that some arguments have no effect on a model which is an object: they are not given."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
