"""What conversion to and from Megatron refuses: models it cannot say, files that are not what they should be."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import write_step
from tests.trainer.conversions import GROUPED, KINDS, SWIGLU, decoder, done
from tests.trainer.runs import headway

UNSAYABLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "several things at once": (
        decoder({"softmax": GROUPED | {"window": 7}}, SWIGLU, residual="parallel", embedding_scale="sqrt"),
        ["window = 7", "model.residual = 'parallel'", "model.embedding_scale = 'sqrt'"],
    ),
    "another mixer": (KINDS["a hybrid, parallel"][1], ["lightning is not"]),
    "experts": (KINDS["mixtral"][1], ["feed-forwards are all swiglu, or all gelu"]),
    "a sink": (decoder({"softmax": GROUPED | {"sink": True}}, SWIGLU), ["without key_bias and sink"]),
    "a norm without weights": (decoder({"softmax": GROUPED}, SWIGLU, norm="srmsnorm"), ["model.norm = 'srmsnorm'"]),
    "norms of two kinds": (
        decoder({"softmax": GROUPED | {"qk_norm": True}}, SWIGLU, norm="layernorm"),
        ["qk_norm with model.norm = 'layernorm'"],
    ),
    "biases, but not on queries": (
        decoder({"softmax": GROUPED | {"qkv_bias": False}}, SWIGLU, bias=True),
        ["qkv_bias = false with model.bias = true"],
    ),
    "layers that differ": (KINDS["qwen2 with windows in some layers"][1], ["all layers have the same attention"]),
}


@pytest.mark.parametrize("kind", UNSAYABLE)
def test_a_model_that_megatron_cannot_say(kind: str, tmp_path: Path) -> None:
    tables, sentences = UNSAYABLE[kind]
    step = write_step(tmp_path / "step", tables)
    code, said = headway("convert", "to-megatron", str(step), str(tmp_path / "out"))
    assert code == 2 and all(sentence in said for sentence in sentences), said
    assert os.listdir(tmp_path) == ["step"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    step = write_step(folder / "step", KINDS["llama"][1])
    done("convert", "to-megatron", str(step), str(folder / "out"))
    return folder / "out"


def change_arguments(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "release" / "common.pt"
        content = torch.load(path, weights_only=False)
        vars(content["args"]).update(changes)
        torch.save(content, path)

    return change


def change_common(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "release" / "common.pt"
        content = torch.load(path, weights_only=False) | changes
        torch.save({key: value for key, value in content.items() if value is not None}, path)

    return change


class Payload:
    """What a malicious file would hold."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def plant_code(folder: Path) -> None:
    change_common(more=Payload(folder / "ran"))(folder)


def plant_code_in_metadata(folder: Path) -> None:
    import pickle

    (folder / "release" / ".metadata").write_bytes(pickle.dumps(Payload(folder / "ran")))


def cut_short(folder: Path) -> None:
    path = folder / "release" / "common.pt"
    path.write_bytes(path.read_bytes()[:300])


def cut_shards_short(folder: Path) -> None:
    first, *_ = sorted((folder / "release").glob("*.distcp"))
    first.write_bytes(first.read_bytes()[:-1000])


def lose_shards(folder: Path) -> None:
    for path in (folder / "release").glob("*.distcp"):
        path.unlink()
    (folder / "release" / "common.pt").unlink()


def another_backend(folder: Path) -> None:
    (folder / "release" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))


BAD: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "several things at once": (
        change_arguments(num_experts=8, rotary_percent=0.5, position_embedding_type="mrope"),
        ["num_experts = 8", "rotary_percent = 0.5", "position_embedding_type = 'mrope'"],
    ),
    "no arguments": (change_common(args=None), ["holds no arguments"]),
    "a missing argument": (change_arguments(ffn_hidden_size=None), ["do not say ffn_hidden_size"]),
    "another width": (change_arguments(ffn_hidden_size=40), ["linear_fc1.weight in the checkpoint is [96, 32]"]),
    "fewer layers": (change_arguments(num_layers=2), ["left over", "decoder.layers.2.mlp.linear_fc2.weight"]),
    "biases that are not there": (change_arguments(add_bias_linear=True), ["missing", "linear_proj.bias"]),
    "an old order of queries": (change_common(checkpoint_version=1.0), ["checkpoint_version 1.0", "expected 3.0"]),
    "code": (plant_code, ["asks for posix.system", "nothing in it was run"]),
    "code in the metadata": (plant_code_in_metadata, ["asks for posix.system"]),
    "a truncated file": (cut_short, ["common.pt is damaged or cut short (300 bytes)"]),
    "truncated weights": (cut_shards_short, [".distcp is cut short"]),
    "missing files": (lose_shards, [".distcp is missing", "common.pt is missing"]),
    "no metadata": (lambda folder: (folder / "release" / ".metadata").unlink(), [".metadata cannot be read"]),
    "damaged metadata": (
        lambda folder: (folder / "release" / ".metadata").write_bytes(b"not a pickle") and None,
        [".metadata cannot be read"],
    ),
    "another backend": (another_backend, ["sharded_backend = 'zarr'", "torch_dist"]),
    "a tied head that is another": (
        change_arguments(untie_embeddings_and_output_weights=False),
        ["output_layer.weight differs from embedding.word_embeddings.weight"],
    ),
    "an iteration that is not there": (
        lambda folder: (folder / "latest_checkpointed_iteration.txt").write_text("7") and None,
        ["iter_0000007 is not there"],
    ),
    "no folder of Megatron's": (
        lambda folder: (folder / "latest_checkpointed_iteration.txt").unlink(),
        ["is no checkpoint of Megatron"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_checkpoint_that_is_not_read(kind: str, exported: Path, tmp_path: Path) -> None:
    spoil, sentences = BAD[kind]
    folder = tmp_path / "bad"
    shutil.copytree(exported, folder)
    spoil(folder)
    code, said = headway("convert", "from-megatron", str(folder), str(tmp_path / "back"))
    assert code == 2 and all(sentence in said for sentence in sentences), said
    assert os.listdir(tmp_path) == ["bad"] and not (folder / "ran").exists()


def write_ranks(folder: Path, *ranks: str) -> Path:
    """Files of ranks with little in them."""
    for name in ranks:
        (folder / name).mkdir(parents=True)
        torch.save({"model": {"output_layer.weight": torch.zeros(4, 4)}}, folder / name / "model_optim_rng.pt")
    return folder


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        (["mp_rank_00_000", "mp_rank_01_001"], "nothing of mp_rank_00_001, mp_rank_01_000"),
        (["mp_rank_00_000", "mp_rank_00_000_001"], "expert-parallel rank"),
        (["mp_rank_01"], "of rank 0"),
        (["mp_rank_00"], "holds no arguments"),
    ],
)
def test_files_of_ranks_that_are_not_read(ranks: list[str], sentence: str, tmp_path: Path) -> None:
    folder = write_ranks(tmp_path / "iter_0000100", *ranks)
    code, said = headway("convert", "from-megatron", str(folder), str(tmp_path / "back"))
    assert code == 2 and sentence in said, said


def test_faults_of_arguments_are_told_together(tmp_path: Path) -> None:
    step = write_step(tmp_path / "step", KINDS["llama"][1])
    out = tmp_path / "out"
    out.mkdir()
    argv = ["--dtype", "float8", "--make-vocab-size-divisible-by", "0", "--overwrite"]
    code, said = headway("convert", "to-megatron", str(step), str(out), *argv)
    assert code == 2 and "float8" in said and "divisible-by 0" in said and "is no Megatron folder" in said, said
    (out / "latest_checkpointed_iteration.txt").write_text("release")
    code, said = headway("convert", "to-megatron", str(step), str(out))
    assert code == 2 and "--overwrite" in said
