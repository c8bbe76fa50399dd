"""`[reparam]` in real runs: resume, export, import of plain models and of the released format, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.hf.loading import load
from model.shards import tensor_shapes
from tests.checkpoints import write_step
from tests.pool import Pool
from tests.trainer.conversions import KINDS, done
from tests.trainer.runs import assert_twins, begin_with, headway, stored, train, write_config, write_tokens
from trainer.metrics import read_metrics

SIGMA = {"kind": "sigma"}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "walk")


def run(pool: Pool, config: Path, *overrides: str, world_size: int = 1) -> Path:
    results = pool.run(train, world_size, config, *overrides)
    assert [code for code, _ in results] == [0] * world_size, "\n".join(said for _, said in results)
    return config.parent / "run"


def config_in(folder: Path, prefix: str, **sections: dict[str, Any]) -> Path:
    folder.mkdir()
    return write_config(folder, prefix, **sections)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def plain(pool: Pool, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without."""
    return run(pool, config_in(tmp_path_factory.mktemp("plain") / "it", prefix))


@pytest.fixture(scope="module")
def twin(pool: Pool, prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with, on two processes, that nobody stopped."""
    return run(pool, config_in(tmp_path_factory.mktemp("twin") / "it", prefix, reparam=SIGMA), world_size=2)


def test_a_resumed_run_equals_its_twin_bit_for_bit(pool: Pool, prefix: str, twin: Path, tmp_path: Path) -> None:
    config = config_in(tmp_path / "stopped", prefix, reparam=SIGMA)
    run(pool, config, "--run.stop_at_step", "5", world_size=2)
    assert_twins(run(pool, config, world_size=2), twin)
    held = stored(twin, 10)
    assert {name.rpartition(".")[2] for name in held if name.startswith("beside.layers.0.mixer.q.")} == {
        *("spectral_gain", "spectral_norm", "spectral_u", "spectral_v")
    }
    assert "optimizer.layers.1.feedforward.down.spectral_gain.exp_avg" in held


def test_the_loss_begins_as_the_plain_one_and_then_differs(twin: Path, plain: Path) -> None:
    assert losses(twin)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
    assert losses(twin)[-1] != pytest.approx(losses(plain)[-1], rel=1e-3)


def test_a_plain_run_goes_on_reparametrised_and_back(pool: Pool, prefix: str, plain: Path, tmp_path: Path) -> None:
    """The stored weights are those that are multiplied, so either reads the other's."""
    config = config_in(tmp_path / "on", prefix, reparam=SIGMA)
    on = ("--run.resume", str(plain / "checkpoints" / "step-00000004"), "--run.stop_at_step", "6")
    (refused,) = pool.run(train, 1, config, *on)
    assert refused[0] == 2
    assert "reparam.kind" in refused[1]
    went_on = run(pool, config, *on, "--run.allow_change", "reparam.kind")
    assert losses(went_on)[0] == pytest.approx(losses(plain)[4], rel=1e-6)
    back = config_in(tmp_path / "back", prefix)
    last = str(went_on / "checkpoints" / "step-00000006")
    run(pool, back, "--run.resume", last, "--run.stop_at_step", "7", "--run.allow_change", "reparam.kind")
    assert losses(back.parent / "run")[0] < losses(plain)[3]


@pytest.mark.parametrize(
    ("began", "changed"),
    [("plain", {"gain_init": "one"}), ("twin", {"vectors": 4}), ("twin", {"qkv_grouping": "fused"})],
)
def test_a_run_that_goes_on_is_not_changed_by_other_settings(
    pool: Pool, prefix: str, plain: Path, twin: Path, tmp_path: Path, began: str, changed: dict[str, Any]
) -> None:
    """Neither by gains that are for beginnings, nor by vectors of another shape, which are found anew."""
    source = {"plain": plain, "twin": twin}[began]
    config = config_in(tmp_path / "on", prefix, reparam=SIGMA | changed)
    allowed = [word for key in ("kind", *changed) for word in ("--run.allow_change", f"reparam.{key}")]
    step = str(source / "checkpoints" / "step-00000004")
    went_on = run(pool, config, "--run.resume", step, "--run.stop_at_step", "5", *allowed)
    assert losses(went_on)[0] == pytest.approx(losses(source)[4], rel=1e-5)


def test_a_plain_model_is_where_a_reparametrised_one_begins(
    pool: Pool, prefix: str, plain: Path, tmp_path: Path
) -> None:
    first = {}
    for name, reparam in (("plain", {}), ("sigma", SIGMA)):
        config = config_in(tmp_path / name, prefix, reparam=reparam)
        begin_with(config, plain)
        first[name] = losses(run(pool, config, "--run.stop_at_step", "1"))[0]
    assert first["sigma"] == first["plain"]
    config = config_in(tmp_path / "one", prefix, reparam=SIGMA | {"gain_init": "one"})
    begin_with(config, plain)
    ((code, said),) = pool.run(train, 1, config)
    assert code == 2
    assert "reparam.gain_init = 'one' would change the model of model.init_from" in said


def test_what_is_exported_is_a_plain_model(twin: Path, tmp_path: Path, in_this_process: None) -> None:
    done("convert", "to-hf", str(twin), str(tmp_path / "out"))
    config = (tmp_path / "out" / "config.json").read_text()
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "reparam" not in config
    assert not any("spectral" in name for name in tensors)
    ours, _ = load(twin)
    theirs, _ = load(tmp_path / "out")
    tokens = torch.arange(30)[None]
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=0)
    held = stored(twin, 10)
    for name in tensor_shapes(twin / "checkpoints" / "step-00000010", "beside."):
        if name.endswith("spectral_gain"):
            weight = ours.get_parameter(name.replace("spectral_gain", "weight")).double()
            gain = held[f"beside.{name}"].item()
            assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(gain, rel=1e-2), name


def test_norms_and_gains_are_in_records_and_in_tensorboard(pool: Pool, prefix: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = {"diagnose_every_steps": 2, "sinks": ["jsonl", "tensorboard"]}
    run_dir = run(pool, config_in(tmp_path / "it", prefix, reparam=SIGMA, metrics=metrics, schedule={"steps": 2}))
    found = read_metrics(run_dir)[-1]["diagnostics"]
    held = stored(run_dir, 2)
    for key, name in (("gain", "spectral_gain"), ("sigma", "spectral_norm")):
        wanted = {k.removeprefix("beside.").removesuffix(f".{name}"): x.item() for k, x in held.items() if name in k}
        wanted = {k: x for k, x in wanted.items() if not k.startswith("optimizer.")}
        assert found[key] == pytest.approx(wanted, rel=1e-4)
        assert len(wanted) == 15
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    (event,) = events.Scalars("gain/layers.1.mixer.q")
    assert event.value == pytest.approx(found["gain"]["layers.1.mixer.q"])


def test_all_faults_are_listed_at_once(prefix: str, tmp_path: Path) -> None:
    config = config_in(
        tmp_path / "wrong",
        prefix,
        reparam=SIGMA | {"targets": ["*.gate.wieght", "embedding.*"], "gain_init": -1, "vectors": 0, "decay": False},
        optimizer={"kind": "muon"},
    )
    code, said = headway("train", str(config), "--reparam.qkv_groupings", "fused")
    assert code == 2
    for words in (
        "reparam.qkv_groupings is no key of [reparam]; the nearest known key is reparam.qkv_grouping",
        "'*.gate.wieght', which matches no parameter; the nearest is '*.gate.weight'",
        "'embedding.*', which matches embedding.weight",
        "reparam.gain_init = -1",
        "reparam.vectors = 0 must be at least 1",
        "set optimizer.weight_decay = 0",
    ):
        assert words in said
    assert not (tmp_path / "wrong" / "run").exists()


class ReleasedLinear(nn.Module):
    """The released layer in evaluation, by its equations."""

    def __init__(self, layer: str, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.weight, self.gain = tensors[f"{layer}.weight"], tensors.get(f"{layer}.sigma")
        self.u = tensors[f"{layer}.spectral_normed_weight.u"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gain is None:
            return x @ self.weight.T
        v = nn.functional.normalize(self.weight.mv(self.u), dim=0)
        u = nn.functional.normalize(self.weight.T.mv(v), dim=0)
        return x @ (self.weight / torch.einsum("r,rc,c->", v, self.weight, u) * self.gain).T


def released_format(folder: Path) -> dict[str, torch.Tensor]:
    """Turn an exported folder into one of the released layers, some trained, one that only watched its norm."""
    tensors = load_file(folder / "model.safetensors")
    for name, weight in list(tensors.items()):
        if "_proj" not in name:
            continue
        layer = name.removesuffix(".weight")
        _, norms, right = torch.linalg.svd(weight)
        # A vector that has not quite converged, and a tracker that holds the gain.
        u = nn.functional.normalize(right[0] + 0.05 * torch.randn(weight.shape[1]), dim=0)
        gain = norms[:1] * 1.3
        tensors |= {f"{layer}.spectral_normed_weight.u": u, f"{layer}.effective_spectral_norm": gain.clone()}
        tensors[f"{layer}.spectral_normed_weight.spectral_norm"] = gain.clone()
        if "layers.1.self_attn.o_proj" not in name:
            tensors[f"{layer}.sigma"] = gain
        if "down_proj" in name:  # safetensors keeps one of two names for one memory
            tensors[f"{layer}.spectral_normed_weight.weight"] = weight.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_the_released_format_is_read(tmp_path: Path, in_this_process: None) -> None:
    folder = tmp_path / "released"
    done("convert", "to-hf", str(write_step(tmp_path / "step", KINDS["llama"][1])), str(folder))
    tensors = released_format(folder)
    model, _ = load(folder)
    wanted, _ = load(tmp_path / "step")
    for layer, block in wanted.layers.items():
        for part, names in ((block.mixer, "qkvo"), (block.feedforward, ("gate", "up", "down"))):
            kind = "self_attn" if part is block.mixer else "mlp"
            for name in names:
                setattr(part, name, ReleasedLinear(f"model.layers.{layer}.{kind}.{name}_proj", tensors))
    tokens = torch.randint(61, (2, 20))
    torch.testing.assert_close(model(tokens), wanted(tokens), rtol=1e-5, atol=1e-5)
    done("convert", "from-hf", str(folder), str(tmp_path / "in"))
    torch.testing.assert_close(load(tmp_path / "in")[0](tokens), model(tokens), rtol=0, atol=0)


def test_a_damaged_released_folder_is_refused_with_all_that_is_wrong(tmp_path: Path, in_this_process: None) -> None:
    folder = tmp_path / "released"
    done("convert", "to-hf", str(write_step(tmp_path / "step", KINDS["llama"][1])), str(folder))
    tensors = released_format(folder)
    layer = "model.layers.0.self_attn.q_proj"
    tensors[f"{layer}.sigma"] = torch.ones(3)
    tensors[f"{layer}.spectral_normed_weight.u"] = torch.ones(5)
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code, said = headway("convert", "from-hf", str(folder), str(tmp_path / "in"))
    assert code == 2
    assert f"{layer}.sigma is [3], expected [1]" in said
    assert f"{layer}.spectral_normed_weight.u is [5], expected [32]" in said
    assert "model.layers.1.mlp.gate_proj.spectral_normed_weight.u stands beside no matrix" in said
