"""Configuration: typed, strict, and refused with every fault at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import trainer.optimizer
from parallel.mesh import build_mesh, resolve_layout
from parallel.processes import process_group, this_process
from parallel.reparam import PlainWeights
from parallel.spread import Spread, spread
from tests.trainer.runs import write_config
from trainer.config import Config, OptimizerConfig, Refused, ScheduleConfig, config_from_tables, load_config
from trainer.optimizer import build_optimizer, frozen_names, learning_rate, set_learning_rate
from trainer.resume import config_changes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_config(tmp_path, "data/none")


def refusal(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(Refused) as caught:
        load_config(path, overrides)
    return caught.value.faults


def test_a_resolved_configuration_reads_back_as_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "again.toml"
    again.write_text(config.to_toml())
    assert load_config(again).tables() == config.tables()
    assert config.tables()["data"]["samples"] == 80
    assert config.tables()["mixers"]["lightning"]["kind"] == "lightning"


def test_a_key_that_a_checkpoint_does_not_know_stood_at_its_default(path: Path) -> None:
    older = load_config(path).tables()
    del older["optimizer"]["momentum"]
    assert config_changes(older, load_config(path).tables()) == {}
    changed = load_config(path, ["--optimizer.momentum", "0.9", "--optimizer.lr", "1.0"]).tables()
    lr = older["optimizer"]["lr"]
    assert config_changes(older, changed) == {"optimizer.momentum": (0.95, 0.9), "optimizer.lr": (lr, 1.0)}


def test_overrides_are_typed(path: Path) -> None:
    config = load_config(
        path,
        [
            *("--schedule.steps", "20", "--optimizer.lr=3e-3", "--run.compile", "true", "--run.dir", "some/where"),
            *("--model.pattern", '["softmax"]', "--mixers.softmax.num-heads", "4", "--run.freeze", "embedding.*"),
            *("--run.allow_change", "optimizer.lr", "--run.allow_change", "data.seq_len"),
            *("--optimizer.betas", "[0.8, 0.9]", "--mixers.second.kind", "softmax", "--mixers.second.num_heads", "2"),
        ],
    )
    assert (config.schedule.steps, config.optimizer.lr, config.run.compile) == (20, 3e-3, True)
    assert config.run.dir == "some/where"
    assert config.model.pattern == ["softmax"]
    assert config.architecture.mixers["softmax"][1].num_heads == 4
    assert config.run.freeze == ["embedding.*"]
    assert config.run.allow_change == ["optimizer.lr", "data.seq_len"]
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.architecture.mixers["second"][1].num_heads == 2


def test_unknown_keys_name_the_nearest(path: Path) -> None:
    faults = refusal(path, "--optimizer.learning_rate", "1", "--shedule.steps", "3", "--mixers.softmax.num_head", "2")
    assert "optimizer.learning_rate is no key of [optimizer]; the nearest known key is optimizer." in faults[1]
    assert "[shedule] is no section; the nearest known section is [schedule]." in faults
    assert any("the nearest known key is mixers.softmax.num_heads" in fault for fault in faults)


@pytest.mark.parametrize("seconds", ["3", "-1", "inf", "nan"])
def test_a_node_is_given_some_seconds(path: Path, seconds: str) -> None:
    (fault,) = refusal(path, "--parallel.node_timeout", seconds)
    assert fault.startswith(f"parallel.node_timeout = {seconds} must be at least 5 (seconds)")
    assert load_config(path, ["--parallel.node_timeout", "0"]).parallel.node_timeout == 0


def test_all_faults_come_at_once(path: Path) -> None:
    faults = refusal(
        path,
        *("--run.precision", "fp8", "--run.stop_at_step", "0", "--model.d_model", "wide", "--data.split", "[0.9, 0.2]"),
        *("--optimizer.betas", "[0.9, 1.0]", "--optimizer.momentum", "1", "--optimizer.ns_steps", "0"),
        *("--schedule.steps", "-1", "--checkpoint.keep_last", "0"),
        *("--mixers.softmax.num_heads", "many", "--feedforwards.swiglu.kind", "swigloo", "--metrics.sinks", "[]"),
    )
    for key in (
        "run.precision",
        "run.stop_at_step",
        "model.d_model",
        "data.split",
        "optimizer.betas",
        "optimizer.momentum",
        "optimizer.ns_steps",
        "schedule.steps",
        "checkpoint.keep_last",
        "mixers.softmax.num_heads",
        "feedforwards.swiglu",
        "metrics.sinks",
    ):
        assert any(key in fault for fault in faults), key
    assert all(fault.endswith((".", ")")) for fault in faults), faults


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--model.pattern", '["lightning*3", "softmax"]'], ["covers 4 layers", "num_layers = 2", "num_layers = 4"]),
        (["--model.pattern", '["lightnin"]'], ["'lightnin'", "defined: lightning, softmax"]),
        (["--mixers.softmax.num_kv_heads", "3"], ["num_kv_heads = 3", "nearest that does is 2"]),
        (["--mixers.lightning.num_heads", "3"], ["num_heads = 3", "d_model = 16", "num_heads = 2"]),
        (["--model.positions", "learned"], ["needs model.max_positions"]),
        (["--model.positions", "learned", "--model.max_positions", "8"], ["seq_len = 32", "max_positions = 8"]),
        (["--feedforwards.other.kind", "sglu", "--feedforwards.other.d_ff", "8"], ["feedforward_pattern is missing"]),
        (["--mixers.softmax.kind", "no.such.module:Thing"], ["cannot be imported"]),
        (["--mixers.softmax.kind", "collections:OrderedDict"], ["no subclass of model.layer.Mixer"]),
        (["--objective.entropy_weight", "-1"], ["objective.entropy_weight = -1", "0 is none"]),
        (["--objective.entropy_margin", "1"], ["objective.entropy_margin = 1", "[0, 1)"]),
        (["--objective.entropy_threshold", "2"], ["objective.entropy_threshold = 2", "[0, 1]"]),
        (["--objective.entropy_threshold_lr", "-1"], ["objective.entropy_threshold_lr = -1", "0 keeps"]),
        (["--objective.entropy_reduction", "sum"], ["objective.entropy_reduction", "per_query_sum"]),
        (
            ["--objective.entropy_weight", "0.1", "--model.pattern", '["lightning"]'],
            [
                "objective.entropy_weight = 0.1",
                "no layer has attention weights",
                "(the mixers are Lightning)",
                "softmax",
            ],
        ),
        (["--objective.entropy_weight", "0.1", "--run.compile", "true"], ["with run.compile", "run.compile = false"]),
        (
            ["--objective.entropy_weight", "1", "--objective.entropy_threshold_lr", "1", "--optimizer.lr", "0"],
            ["objective.entropy_threshold_lr = 1", "optimizer.lr, which is 0"],
        ),
        (["schedule.steps", "3"], ["is no override", "--section.key VALUE"]),
        (["--schedule.steps"], ["has no value"]),
        (["--data", "3"], ["is no override"]),
    ],
)
def test_faults_say_what_would_work(path: Path, overrides: list[str], words: list[str]) -> None:
    said = " ".join(refusal(path, *overrides))
    for word in words:
        assert word in said


def test_files_that_are_none(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    assert "is not TOML" in refusal(broken)[0]
    assert "Did you mean configs/quickstart.toml?" in refusal(tmp_path / "quickstrt.toml")[0]


def test_code_in_a_checkpoints_configuration_needs_permission(path: Path) -> None:
    import tomllib

    tables = tomllib.loads(path.read_text())
    tables["mixers"]["softmax"]["kind"] = "model.mixers.softmax:Softmax"
    with pytest.raises(Refused, match="--allow-code"):
        config_from_tables(tables, allow_code=False)
    assert config_from_tables(tables, allow_code=True)


def test_a_warm_up_longer_than_the_run_is_clipped_with_a_warning(path: Path) -> None:
    config = load_config(path, ["--schedule.warmup_steps", "50"])
    assert config.schedule.warmup_steps == 10
    assert "clipped to 10" in config.warnings[0]


def test_learning_rates() -> None:
    cosine = ScheduleConfig(steps=100, warmup_steps=10, kind="cosine", final_lr_fraction=0.1)
    assert [learning_rate(step, 1.0, cosine) for step in (1, 5, 10, 55, 100)] == pytest.approx([0.1, 0.5, 1, 0.55, 0.1])
    linear = ScheduleConfig(steps=100, warmup_steps=0, kind="linear", final_lr_fraction=0.0)
    assert [learning_rate(step, 2.0, linear) for step in (50, 100)] == pytest.approx([1.0, 0.0])
    wsd = ScheduleConfig(steps=100, warmup_steps=10, kind="wsd", final_lr_fraction=0.0, decay_fraction=0.2)
    assert [learning_rate(step, 1.0, wsd) for step in (10, 50, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.5, 0])


@contextmanager
def alone(config: Config) -> Iterator[Spread]:
    """The model of a configuration on one process."""
    with process_group(this_process()):
        mesh = build_mesh(resolve_layout(config.parallel, 1), "cpu")
        cpu = torch.device("cpu")
        yield spread(config.architecture, mesh, cpu, precision="fp32", seq_len=config.data.seq_len)


def test_decay_is_for_matrices_only(path: Path) -> None:
    config: Config = load_config(path, ["--model.bias", "true"])
    with alone(config) as model:
        optimizer = build_optimizer(model, config.optimizer, frozen=["layers.1.*"])
    names = {parameter: name for name, parameter in model.parameters.items()}
    groups = {group["weight_decay"]: {names[p] for p in group["params"]} for group in optimizer.param_groups}
    assert "layers.0.mixer.lrpe.theta" in groups[0.0]
    assert "layers.0.feedforward.up.bias" in groups[0.0]
    assert "final_norm.weight" in groups[0.0]
    assert {"embedding.weight", "layers.0.mixer.q.weight", "head.weight"} <= groups[0.1]
    assert not [name for group in groups.values() for name in group if name.startswith("layers.1.")]
    assert not model.parameters["layers.1.mixer.q.weight"].requires_grad


def test_muon_is_for_matrices_of_layers_only(path: Path) -> None:
    changes = ["--model.bias", "true", "--optimizer.kind", "muon", "--optimizer.momentum", "0.9"]
    config: Config = load_config(path, changes)
    with alone(config) as model:
        optimizer = build_optimizer(model, config.optimizer, frozen=["layers.1.mixer.*"])
    names = {parameter: name for name, parameter in model.parameters.items()}
    matrices, *others = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert matrices == {
        *(f"layers.0.mixer.{name}.weight" for name in "qkvuo"),
        *(f"layers.{index}.feedforward.{name}.weight" for index in (0, 1) for name in ("gate", "up", "down")),
    }
    beside = set().union(*others)
    assert {"embedding.weight", "head.weight", "layers.0.mixer.lrpe.theta", "layers.0.feedforward.up.bias"} <= beside
    assert not beside & matrices
    assert not [name for name in beside if name.startswith("layers.1.mixer.")]
    for parameter, name in names.items():
        keys = (
            {"momentum_buffer"} if name in matrices else {"step", "exp_avg", "exp_avg_sq"} if name in beside else None
        )
        assert (set(optimizer.state[parameter]) if parameter in optimizer.state else None) == keys, name
    set_learning_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}


def test_patterns_that_freeze_nothing_or_everything_are_refused(path: Path) -> None:
    names = ["layers.0.mixer.q.weight", "layers.1.mixer.q.weight"]
    assert frozen_names(names, ["layers.0.*"]) == {names[0]}
    with pytest.raises(ValueError, match="matches no parameter"):
        frozen_names(names, ["layer.0.*"])
    with pytest.raises(ValueError, match="leaves no parameter"):
        frozen_names(names, ["*"])


def test_the_optimizer_is_adamw_by_its_formula() -> None:
    from trainer.config import OptimizerConfig

    class One:
        weight = torch.nn.Parameter(torch.full((1, 1), 2.0, dtype=torch.float64))
        parameters = learned = {"weight": weight}
        beside: dict[str, torch.nn.Parameter] = {}
        apart: set[str] = set()
        reparam = PlainWeights()
        uncut = torch.nn.ParameterDict(parameters)
        stages: list[torch.nn.Module] = []

        def freeze(self, names: set[str]) -> None:
            assert not names

    model = One()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5), [])  # type: ignore[arg-type]
    value, first, second = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.3, -0.2), start=1):
        model.weight.grad = torch.full((1, 1), gradient, dtype=torch.float64)
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        value -= 0.1 * 0.5 * value
        value -= 0.1 * (first / (1 - 0.8**step)) / (math.sqrt(second / (1 - 0.9**step)) + 1e-3)
    assert model.weight.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("plain", [True, False])
def test_apex_is_taken_for_plain_tensors_alone(monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    class Stand(torch.optim.AdamW):
        pass

    monkeypatch.setattr("trainer.optimizer.fused_adam", lambda: Stand)
    monkeypatch.setattr("trainer.optimizer._is_plain", lambda parameter: plain)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    for by_torch in (False, True):
        found = trainer.optimizer._adamw(OptimizerConfig(), {(0.1, 1.0): [parameter]}, by_torch=by_torch)
        assert type(found) is (Stand if plain and not by_torch else torch.optim.AdamW)
