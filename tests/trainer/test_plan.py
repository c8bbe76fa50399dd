"""`headway plan`: verdicts, and figures that are those of the real program."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trainer.planning.program as program
from model.stack import Model
from parallel.data import local
from parallel.mesh import build_mesh, costliest_ranks, resolve_layout
from parallel.spread import spread
from parallel.trace import CATEGORIES
from tests.pool import Pool
from tests.trainer.runs import headway, write_config
from trainer.config import Config, load_config
from trainer.objective import add_auxiliary_losses
from trainer.optimizer import build_optimizer
from trainer.planning.devices import GIB, assume
from trainer.planning.forecast import bubble, forecast, precision_of, rank_time, seconds_of
from trainer.planning.program import RankTrace, Sent, trace_pipeline, trace_step

ROWS, N, D = 24, 32, 32
MODEL = {"d_model": D, "num_layers": 4, "vocab_size": 61, "pattern": ["softmax"]}
SIZES = {"seq_len": N, "global_batch_size": ROWS}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Of a run whose data does not exist."""
    return write_config(tmp_path, str(tmp_path / "nothing"), model=MODEL, data=SIZES)


@pytest.fixture
def hybrid(tmp_path: Path) -> Path:
    """Likewise, of layers of two kinds."""
    pattern = {"pattern": ["lightning", "softmax"]}
    return write_config(tmp_path, str(tmp_path / "nothing"), model=MODEL | pattern, data=SIZES)


def configured(path: Path, world_size: int, **parallel: Any) -> Config:
    overrides = [word for key, value in parallel.items() for word in (f"--parallel.{key}", str(value))]
    return load_config(path, overrides, world_size=world_size)


def traced(path: Path, world_size: int, precision: str = "fp32", **parallel: Any) -> list[RankTrace]:
    config = configured(path, world_size, **parallel)
    return trace_pipeline(config, world_size, precision=precision, gloo=True)


def plan(*argv: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code, said = headway("plan", *argv)
    return code, printed.getvalue(), said


# Verdicts.


def test_a_legal_layout_is_planned_without_its_data(config_file: Path) -> None:
    code, printed, said = plan(str(config_file), "--world", "4", "--device", "h100", "--parallel.tp", "2")
    assert (code, said) == (0, "")
    for words in ("the layout is legal", "It fits", "activations", "reduce-scatter", "tokens/s", "--attained"):
        assert words in printed


def test_an_illegal_layout_is_refused_with_all_that_train_would_say(config_file: Path, pool: Pool) -> None:
    wrong = ["--parallel.tp", "3", "--parallel.pp", "5", "--schedule.steps", "0"]
    code, printed, said = plan(str(config_file), "--world", "2", *wrong)
    assert (code, printed) == (2, "")
    assert "schedule.steps = 0" in said
    assert "parallel.tp = 3 does not divide" in said
    trained = pool.run(headway, 2, "train", str(config_file), *wrong)[0][1]
    # Training also says that there is no data.
    assert set(said.splitlines()[1:]) == {line for line in trained.splitlines()[1:] if "data.train" not in line}


@pytest.mark.parametrize(
    ("option", "value"), [("--world", "0"), ("--attained", "0"), ("--overlap", "1.5"), ("--reserve", "-1")]
)
def test_options_that_cannot_be_are_refused(config_file: Path, option: str, value: str) -> None:
    code, _, said = plan(str(config_file), *(["--world", "2"] if option != "--world" else []), option, value)
    assert code == 2
    assert f"{option} {value}" in said


def test_help_names_every_option() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        headway("plan", "--help")
    assert ended.value.code == 0
    for option in ("--world", "--device", "--node-size", "--peak", "--attained", "--link", "--network", "--json"):
        assert option in printed.getvalue()
    assert "--section.key VALUE" in " ".join(printed.getvalue().split())


def test_json_has_the_figures_of_the_tables(config_file: Path) -> None:
    code, printed, _ = plan(str(config_file), "--world=4", "--device", "a100", "--json", "--parallel.pp=2")
    found = json.loads(printed)
    assert code == 0
    assert (found["legal"], found["fits"], found["world_size"], found["layout"]["pp"]) == (True, True, 4, 2)
    assert [rank["pp_rank"] for rank in found["ranks"]] == [0, 1]
    for rank in found["ranks"]:
        assert set(rank["memory"]) == set(CATEGORIES)
        assert sum(rank["memory"].values()) == rank["peak"]
    assert found["tokens_per_second"] == pytest.approx(ROWS * N / found["step_time"])
    assert found["step_time"] == pytest.approx(max(sum(rank["seconds"].values()) for rank in found["ranks"]))


def test_what_does_not_fit_comes_with_remedies(config_file: Path) -> None:
    argv = (str(config_file), "--world", "2", "--device", "v100", "--json", "--reserve")
    peak = json.loads(plan(*argv, "0")[1])["ranks"][0]["peak"]
    just = str((31.7 * GIB - peak + 1) / GIB)
    found = json.loads(plan(*argv, just)[1])
    assert found["fits"] is False
    assert len(found["remedies"]) == 3
    assert all(remedy["peak"] < peak for remedy in found["remedies"])
    assert found["remedies"][0]["changes"] == {"microbatches": 2}
    assert json.loads(plan(*argv, just, "--parallel.microbatches", "2")[1])["fits"] is True


def test_no_speed_is_said_where_the_peak_is_not_known(config_file: Path) -> None:
    _, printed, _ = plan(str(config_file), "--world", "2", "--device", "cpu")
    assert "peak of this device is not known" in printed
    assert "tokens/s" not in printed


# Figures.

LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "alone, selective": (1, "fp32", {"recompute": "selective", "microbatches": 2}),
    "fsdp2": (2, "fp32", {"microbatches": 2}),
    "fsdp2 bf16, full": (2, "bf16", {"recompute": "full"}),
    "tp2 x pp2": (4, "fp32", {"tp": 2, "pp": 2}),
    "hsdp2 x tp2, no sequence parallelism": (4, "fp32", {"tp": 2, "dp_replicate": 2, "sequence_parallel": "false"}),
    "fsdp2 x pp2 zbv": (4, "fp32", {"pp": 2, "pp_schedule": "zbv"}),
    "cp2 x fsdp2": (4, "fp32", {"cp": 2}),
    "cp4, selective": (4, "fp32", {"cp": 4, "recompute": "selective"}),
}


def really_traced(path: Path, precision: str, parallel: dict[str, Any]) -> tuple[RankTrace, dict[str, int]]:
    """The same trace of a real step, and what this process holds of the model by adding up its tensors. Collective."""
    world_size = dist.get_world_size()
    config = configured(path, world_size, **parallel)
    layout = resolve_layout(config.parallel, world_size)
    mesh, cpu = build_mesh(layout, "cpu"), torch.device("cpu")
    model = spread(config.architecture, mesh, cpu, precision=precision, seq_len=N, reparam=config.reparam)
    model.initialise(0)
    optimizer = build_optimizer(model, config.optimizer, [], add_auxiliary_losses(model, config))
    states = [x for state in optimizer.state.values() for x in state.values()]
    parameters = [parameter for stage in model.stages for parameter in stage.parameters()]
    parameters += model.beside.values()
    held = {
        name: sum(local(x).numel() * local(x).itemsize for x in tensors)
        for name, tensors in (("parameters", parameters), ("optimizer", states))
    }
    return trace_step(config, layout, precision=precision, fake=False, gloo=True), held


FIRST = ("alone, selective", "fsdp2 bf16, full", "tp2 x pp2", "cp2 x fsdp2")


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.matrix) for n in LAYOUTS])
def test_a_plan_is_what_a_real_step_does(name: str, hybrid: Path, pool: Pool) -> None:
    world_size, precision, parallel = LAYOUTS[name]
    layout = resolve_layout(configured(hybrid, world_size, **parallel).parallel, world_size)
    planned = traced(hybrid, world_size, precision, **parallel)
    real = pool.run(really_traced, world_size, hybrid, precision, parallel)
    for rank in planned:
        found, held = real[costliest_ranks(layout)[rank.pp_rank]]
        # FSDP fills the last shard up, where it is shorter than the others.
        assert {name: rank.memory[name] for name in held} == pytest.approx(held, rel=0.03 if layout.cp > 1 else 0)
        if len(planned) > 1:
            # What a pipeline sends is held until it has arrived, so there may be a residual stream more, or two.
            assert 0 <= found.peak - rank.peak <= 2 * ROWS * N * D * 4 // 4
        else:
            # Decay slopes have values, and fake tensors are made of them where they are used: some bytes.
            assert found.memory == pytest.approx(rank.memory, abs=64)
        assert rank == replace(found, memory=rank.memory)


def what_is_added(name: str, path: Path, pool: Pool, section: str) -> tuple[int, int]:
    """By a section of the configuration, which is planned as it is trained: bytes of parameters, and reductions."""
    world_size, _, parallel = LAYOUTS[name]
    (without,) = traced(path, world_size, **parallel)
    path.write_text(f"{path.read_text()}\n{section}\n")
    test_a_plan_is_what_a_real_step_does(name, path, pool)
    (rank,) = traced(path, world_size, **parallel)
    before, after = (sum(s.count for s in found.sent if s.kind == "all-reduce") for found in (without, rank))
    return rank.memory["parameters"] - without.memory["parameters"], after - before


@pytest.mark.parametrize("name", ["alone, selective", pytest.param("cp2 x fsdp2", marks=pytest.mark.matrix)])
def test_reparametrised_matrices_are_planned(name: str, hybrid: Path, pool: Pool) -> None:
    """Gains, vectors, and three reductions over all processes."""
    _, reductions = what_is_added(name, hybrid, pool, '[reparam]\nkind = "sigma"')
    assert reductions == (3 if LAYOUTS[name][0] > 1 else 0)


@pytest.mark.parametrize("parallel", [{"ep": 2}, pytest.param({"ep": 2, "pp": 2}, marks=pytest.mark.matrix)])
def test_experts_are_planned(parallel: dict[str, int], tmp_path: Path, pool: Pool) -> None:
    """A plan takes all experts to get equally many tokens: as they do where each token goes to all of them."""
    moe = {"num_experts": 4, "top_k": 4, "expert": "swiglu", "bias_rate": 0.01}
    parts = {"feedforwards": {"moe": moe, "swiglu": {"d_ff": 64}}}
    path = write_config(tmp_path, str(tmp_path / "nothing"), model=MODEL, data=SIZES, **parts)
    for rank in assert_planned(path, parallel, pool):
        assert any(sent.kind == "all-to-all" and sent.dimension == "ep" for sent in rank.sent)


def assert_planned(path: Path, parallel: dict[str, int], pool: Pool) -> list[RankTrace]:
    """On four processes a real step is what is planned; the plan."""
    planned = traced(path, 4, **parallel)
    layout = resolve_layout(configured(path, 4, **parallel).parallel, 4)
    real = pool.run(really_traced, 4, path, "fp32", parallel)
    for rank in planned:
        found, held = real[costliest_ranks(layout)[rank.pp_rank]]
        assert {name: rank.memory[name] for name in held} == pytest.approx(held, rel=0.03)
        assert rank == replace(found, memory=rank.memory)
    return planned


@pytest.mark.parametrize(
    "parallel", [{"tp": 2}, *(pytest.param(x, marks=pytest.mark.matrix) for x in ({"cp": 2, "pp": 2}, {"ep": 2}))]
)
def test_weights_of_modalities_are_planned(parallel: dict[str, int], tmp_path: Path, pool: Pool) -> None:
    """A plan takes all modalities to have equally many tokens, and all experts."""
    moe = {"num_experts": 4, "top_k": 4, "expert": "swiglu"}
    model = MODEL | {"feedforward_pattern": ["swiglu"]}
    untie = {"modalities": 2, "ranges": [[0, 32], [32, 61]], "feedforwards": {"1": "moe"}}
    parts = {"feedforwards": {"moe": moe, "swiglu": {"d_ff": 64}}, "untie": untie}
    path = write_config(tmp_path, str(tmp_path / "nothing"), model=model, data=SIZES, **parts)
    assert_planned(path, parallel, pool)


@pytest.mark.parametrize("name", ["alone, selective", pytest.param("cp2 x fsdp2", marks=pytest.mark.matrix)])
def test_a_penalty_on_entropies_is_planned(name: str, hybrid: Path, pool: Pool) -> None:
    """Its blocks of the map, its thresholds, and what is summed for it."""
    parameters, reductions = what_is_added(name, hybrid, pool, "[objective]\nentropy_weight = 0.1")
    # Two layers of softmax, of two heads.
    assert parameters == 2 * 2 * 4
    # One for values and thresholds of all processes; and one for each of these layers, where rows are cut.
    assert reductions == (1 + 2 if LAYOUTS[name][0] > 1 else 0)


def test_states_are_sent_to_all_that_they_reach(hybrid: Path) -> None:
    """Four ranks, so a state passes none, one or two pieces of 8 tokens; two heads of 16 x 16, with LRPE 32 x 16."""
    (rank,) = traced(hybrid, 4, cp=4)
    (exchange,) = (sent for sent in rank.sent if sent.kind == "exchange")
    # Layers 0 and 2 are Lightning, with slopes of at most 1/16: none has vanished after 16 tokens.
    rows, per_head = ROWS, 16 * 16 * 4
    assert (exchange.dimension, exchange.count) == ("cp", 4)
    assert exchange.bytes_sent == 2 * rows * 2 * 3 * (2 * per_head + per_head)


def test_the_last_piece_of_a_sequence_sees_most_keys(config_file: Path) -> None:
    (rank,) = traced(config_file, 4, cp=4)
    layers = Model(configured(config_file, 4, cp=4).architecture).layers.values()
    attention = sum(block.mixer.flops(N) - block.mixer.linear_flops() for block in layers)
    # The last quarter sees 7/8 of the row on the mean, all together one half.
    assert rank.uneven_flops == pytest.approx(attention * (7 / 8 / (1 / 2) - 1))
    _, printed, _ = plan(str(config_file), "--world", "4", "--device", "h100", "--parallel.cp", "4")
    assert "The last piece of a sequence sees most keys: it computes 1." in " ".join(printed.split())


@pytest.mark.matrix
@pytest.mark.parametrize("parallel", [{}, {"pp": 2}, {"pp": 2, "pp_schedule": "interleaved1f1b"}])
def test_few_microbatches_show_what_many_do(
    parallel: dict[str, Any], config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel = parallel | {"microbatches": 12 if parallel else 4}
    few = traced(config_file, 2, **parallel)
    monkeypatch.setattr(program, "_few_microbatches", lambda layout: layout)
    many = traced(config_file, 2, **parallel)
    for one, other in zip(few, many, strict=True):
        assert one.sent == other.sent
        assert one.peak == pytest.approx(other.peak, rel=0.01)


def test_each_means_of_saving_saves(config_file: Path) -> None:
    kept = [traced(config_file, 2, recompute=kind)[0].memory["activations"] for kind in ("none", "selective", "full")]
    assert kept[2] < kept[1] < kept[0]
    assert traced(config_file, 2, microbatches=2)[0].memory["activations"] < 0.6 * kept[0]
    alone, tp = traced(config_file, 1)[0], traced(config_file, 2, tp=2)[0]
    for category in ("parameters", "optimizer"):
        assert tp.memory[category] == pytest.approx(alone.memory[category] / 2, rel=0.05)


def test_messages_of_tensor_parallelism_are_those_counted_by_hand(tmp_path: Path) -> None:
    model = {"d_model": D, "num_layers": 3, "vocab_size": 61, "pattern": ["softmax"]}
    path = write_config(tmp_path, "nothing", model=model, data=SIZES)
    (rank,) = traced(path, 2, tp=2, sequence_parallel="false")
    (sums,) = rank.sent
    # Forward: a sum after each mixer, feed-forward, and the embedding; backward: before each, and before the head.
    streams = 2 * (2 * 3 + 1)
    # The largest logit; the sum of exponentials and the target's logit; and three reductions of 1, 2 and 1 doubles.
    assert (sums.dimension, sums.kind, sums.count) == ("tp", "all-reduce", streams + 2 + 3)
    # Of two ranks, each sends half of the message twice.
    assert sums.bytes_sent == streams * ROWS * N * D * 4 + ROWS * N * (1 + 2) * 4 + 4 * 8


def test_a_users_own_mixer_is_planned(config_file: Path) -> None:
    own = ["--mixers.own.kind", "tests.trainer.test_train:OwnMixer", "--mixers.own.num_heads", "2"]
    config = load_config(config_file, [*own, "--model.pattern", "own"], world_size=2)
    other = load_config(config_file, ["--model.pattern", "softmax"], world_size=2)
    kinds: dict[str, Any] = {"precision": "fp32", "gloo": True}
    assert trace_pipeline(config, 2, **kinds) == trace_pipeline(other, 2, **kinds)


def test_precision_is_chosen_as_training_chooses_it(config_file: Path) -> None:
    config = configured(config_file, 2)
    for device in ("h100", "cpu"):
        assert precision_of(config, assume(device, 2)) == "fp32"
    config.run.precision = None
    assert precision_of(config, assume("h100", 2)) == "bf16"
    assert precision_of(config, assume("cpu", 2)) == "fp32"


# Speed.


def test_messages_take_their_bytes_over_the_link_they_go_through() -> None:
    assumed = assume("h100", 16, node_size=8, link=400e9, network=50e9, links_attained=0.5)
    assert seconds_of(Sent("tp", "all-reduce", 1, 10**9, list(range(8))), assumed) == pytest.approx(1 / 200)
    # Two nodes, and in each of them one, or four, of the ranks, each with an adapter of its own.
    assert seconds_of(Sent("dp_shard", "all-gather", 1, 10**9, [0, 8]), assumed) == pytest.approx(1 / 25)
    together = [0, 1, 2, 3, 8, 9, 10, 11]
    assert seconds_of(Sent("dp_shard", "all-gather", 1, 10**9, together), assumed) == pytest.approx(1 / 100)
    assert seconds_of(Sent("pp", "send", 1, 10**9, together), assumed) == pytest.approx(1 / 25)


def test_a_step_takes_computing_waiting_the_bubble_and_what_does_not_hide(config_file: Path) -> None:
    config = configured(config_file, 4, pp=2, microbatches=4)
    layout = resolve_layout(config.parallel, 4)
    assert bubble(layout) == 1 / 4
    assumed = assume("h100", 4, peak=1e12, attained=0.5, link=1e9, links_attained=1.0, overlap=0.75)
    sent = [Sent("dp_shard", "all-gather", 1, 4 * 10**9, [0, 1]), Sent("pp", "send", 1, 10**9, [0, 2])]
    flops = 1e9  # a token: 3 times, for half of the rows, at 0.5e12 a second
    time = rank_time(config, layout, RankTrace(0, [0], {}, sent, flops, 0.0, 0.0), assumed)
    assert time.computing == pytest.approx(3e9 * (ROWS // 2) * N / 0.5e12)
    assert (time.waiting, time.idle) == (1.0, pytest.approx((time.computing + 1.0) / 4))
    # 4 s of messages, of which 3 would hide, had one of the four micro-batches that much to compute.
    assert time.exposed == pytest.approx(4 - time.computing / 4)
    config.parallel.recompute = "full"
    again = rank_time(config, layout, RankTrace(0, [0], {}, sent, flops, 0.0, 0.0), assumed)
    assert again.computing == pytest.approx(4 / 3 * time.computing)


def test_mfu_is_of_all_devices(config_file: Path) -> None:
    found = forecast(configured(config_file, 2), 2, assume("h100", 2, attained=0.25, overlap=1.0, link=1e18))
    # Every multiplication is the model's, and messages take no time.
    assert found.mfu == pytest.approx(0.25, rel=1e-3)
