"""Diagnoses while training: recorded when they are due, and without any effect on it. `headway diagnose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.diagnostics import Diagnosis
from model.hf import load
from tests.checkpoints import write_step
from tests.pool import Pool
from tests.trainer.conversions import SWIGLU, decoder
from tests.trainer.runs import VOCAB, curve, headway, stored, train, write_config, write_tokens
from trainer.config import Refused, load_config
from trainer.diagnostics import BY_HEAD, BY_LAYER, LOAD, layer_means, record_of
from trainer.metrics import LONGEST_END, MetricsConfig, MetricsLog, last_record, read_metrics

SCALARS = {"attention_entropy_min", "attention_entropy_norm_min", "sink_rate", "attention_logit_max", "residual_max"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokens(tmp_path_factory.mktemp("data") / "tokens", documents=60)


def small_config(folder: Path, data: str, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    sections = {
        "data": {"seq_len": 96, "validate_every_steps": 4},
        "schedule": {"steps": 6},
        "checkpoint": {"every_steps": 0},
    } | sections
    return write_config(folder, data, **sections)


CASES = {
    "one process": (1, {}, {}),
    "recompute": (1, {}, {"recompute": "full"}),
    "fsdp2": (2, {}, {}),
    "fsdp2, selective recomputation": (2, {}, {"recompute": "selective", "microbatches": 2}),
    "pp2": (2, {}, {"pp": 2}),
    "compiled": (1, {"compile": True}, {}),
    "fsdp2, compiled, recompute": (2, {"compile": True}, {"recompute": "full"}),
}
QUICK = ("one process", "recompute", "fsdp2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.matrix) for n in CASES])
def test_diagnoses_leave_no_trace_in_training(name: str, pool: Pool, data: str, tmp_path: Path) -> None:
    """Losses, gradient norms and parameters are equal bit for bit with them and without."""
    world_size, run, parallel = CASES[name]
    dirs = []
    for every in (0, 2):
        folder = tmp_path / f"every-{every}"
        settings = {"dir": str(folder / "run"), "precision": "fp32"} | run
        config = small_config(folder, data, run=settings, parallel=parallel)
        results = pool.run(train, world_size, config, "--metrics.diagnose_every_steps", str(every))
        assert [code for code, _ in results] == [0] * world_size, results
        dirs.append(folder / "run")
    assert curve(dirs[0]) == curve(dirs[1]) and len(curve(dirs[0])) == 6
    without, with_them = (stored(folder, 6) for folder in dirs)
    assert without.keys() == with_them.keys()
    for key, tensor in without.items():
        assert torch.equal(tensor, with_them[key]), key
    assert not any("diagnostics" in record for record in read_metrics(dirs[0]))
    assert [record["step"] for record in read_metrics(dirs[1]) if "diagnostics" in record] == [2, 4, 6]


def test_a_record_has_scalars_and_tables(pool: Pool, data: str, tmp_path: Path) -> None:
    config = small_config(tmp_path, data, metrics={"sinks": ["jsonl", "tensorboard"], "diagnose_every_steps": 3})
    ((code, said),) = pool.run(train, 1, config)
    assert code == 0, said
    records = read_metrics(tmp_path / "run")
    assert [record.keys() >= SCALARS for record in records] == [False, False, True, False, False, True]
    record = records[-1]
    told = record["diagnostics"]
    assert told["layers"] == [0, 1] and {*BY_HEAD, *BY_LAYER, "layers"} == told.keys()
    for key in BY_HEAD:
        linear, softmax = told[key]  # lightning has no weights to look at
        assert linear is None and len(softmax) == 2, key
    assert told["mass"][1] == [1, 1]
    assert record["attention_entropy_min"] == pytest.approx(sum(told["entropy"][1]) / 2, rel=1e-4)
    assert record["residual_max"] == pytest.approx(max(told["residual_max"]), rel=1e-4)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    drawn = [(event.step, event.value) for event in events.Scalars("attention_entropy/layer_01")]
    assert [step for step, _ in drawn] == [3, 6]
    assert drawn[-1][1] == pytest.approx(record["attention_entropy_min"], rel=1e-4)
    tags = set(events.Tags()["scalars"])
    assert {"sink_rate", "residual_max/layer_00", "attention_logit_max/layer_01"} - tags <= {"sink_rate"}
    assert "attention_entropy/layer_00" not in tags


def test_a_model_without_attention_weights_has_its_residual_stream(pool: Pool, data: str, tmp_path: Path) -> None:
    model = {"d_model": 16, "num_layers": 2, "vocab_size": VOCAB, "pattern": ["lightning"]}
    config = small_config(tmp_path, data, model=model, metrics={"sinks": ["jsonl"], "diagnose_every_steps": 6})
    text = config.read_text().replace("[mixers.softmax]\nnum_heads = 2\n", "")
    config.write_text(text)
    ((code, said),) = pool.run(train, 1, config)
    assert code == 0, said
    record = read_metrics(tmp_path / "run")[-1]
    assert SCALARS & record.keys() == {"residual_max"}
    assert record["diagnostics"]["entropy"] == [None, None] and len(record["diagnostics"]["residual_max"]) == 2


def test_how_often_is_checked(data: str, tmp_path: Path) -> None:
    assert MetricsConfig(diagnose_every_steps=0).faults() == [] and MetricsConfig().diagnose_every_steps == 50
    (fault,) = MetricsConfig(diagnose_every_steps=-1).faults()
    assert "diagnose_every_steps is -1" in fault and "0 (never)" in fault
    with pytest.raises(Refused, match="diagnose_every_steps is -1"):
        load_config(small_config(tmp_path, data), ["--metrics.diagnose_every_steps", "-1"])


def a_diagnosis(layers: int = 2, heads: int = 2) -> Diagnosis:
    values = torch.rand(layers, heads, dtype=torch.float64)
    residual = torch.rand(layers, dtype=torch.float64)
    return Diagnosis(
        [heads] * layers, dict.fromkeys((*BY_HEAD, LOAD), values), [[]] * layers, 0.5, residual, residual, residual
    )


def test_what_is_no_number_is_null_and_no_mean_is_made_of_it() -> None:
    found = a_diagnosis()
    found.by_head["entropy"] = torch.tensor([[torch.nan, 1.0], [torch.inf, 123456.789]], dtype=torch.float64)
    told = record_of(found)["diagnostics"]
    assert told["entropy"] == [[None, 1], [None, 123460]]
    means = dict(layer_means(told))
    assert means["attention_entropy/layer_00"] == 1 and means["attention_entropy/layer_01"] == 123460
    assert not any("sink_argmax" in name for name in means)


def test_the_last_record_is_found_however_long_it_is(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, ["jsonl"], resumed_step=0) as log:
        log.write({"step": 1})
        log.write({"step": 2} | record_of(a_diagnosis(layers=100, heads=128)))
    assert (tmp_path / "metrics.jsonl").stat().st_size > LONGEST_END
    record = last_record(tmp_path)
    assert record is not None and record["step"] == 2


LLAMA = decoder({"softmax": {"num_heads": 4, "num_kv_heads": 2}}, SWIGLU, d_model=32, num_layers=3, vocab_size=VOCAB)


def test_the_command_tells_what_a_model_does(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a step folder; and the same model's own weights, looked at by hand, say the same."""
    step, out = write_step(tmp_path / "step", LLAMA), tmp_path / "found" / "diagnosis.json"
    flags = ("--data", data, "--rows", "2", "--seq-len", "100", "--out", str(out))
    assert headway("diagnose", str(step), *flags) == (0, "")
    printed = capsys.readouterr().out
    assert "entropy" in printed and "sink_rate" in printed and "tokens  200" in printed
    told = json.loads(out.read_text())
    assert told.keys() > SCALARS and told["diagnostics"]["layers"] == [0, 1, 2]
    assert all(len(row) == 4 for row in told["diagnostics"]["sink"])

    model, _ = load(step)
    seen: list[torch.Tensor] = []
    model.layers["0"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    from trainer.data.evaluation import EvaluationData

    source = EvaluationData(data, seq_len=100)
    for row in range(2):
        batch = source.batch(row, range(1), 1)
        model(batch.tokens, documents=batch.documents, positions=batch.positions)
    assert told["diagnostics"]["residual_max"][0] == pytest.approx(torch.cat(seen).abs().max().item(), rel=1e-4)


def test_the_command_takes_a_hugging_face_folder(data: str, tmp_path: Path) -> None:
    """Entropies and first weights are those of transformers' own attention maps."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCAB, initializer_range=0.5)
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "llama")
    out = tmp_path / "diagnosis.json"
    # One document a row: documents of this data are longer than 24 tokens.
    flags = ("--data", data, "--rows", "1", "--seq-len", "24", "--out", str(out))
    assert headway("diagnose", str(tmp_path / "llama"), *flags) == (0, "")
    from trainer.data.evaluation import EvaluationData

    tokens = EvaluationData(data, seq_len=24).batch(0, range(1), 1).tokens
    with torch.no_grad():
        maps = theirs(tokens, output_attentions=True).attentions
    told = json.loads(out.read_text())["diagnostics"]
    for layer, map_BHNN in enumerate(maps):
        entropy = -(map_BHNN * map_BHNN.clamp(min=1e-30).log()).sum(-1).mean((0, 2))
        assert told["entropy"][layer] == pytest.approx(entropy.tolist(), abs=1e-4)
        assert told["first_weight"][layer] == pytest.approx(map_BHNN[..., 0].mean((0, 2)).tolist(), abs=1e-4)
    assert json.loads(out.read_text())["sink_rate"] is None


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--rows", "0"), "--rows 0 must be at least 1."),
        (("--seq-len", "-3", "--queries", "0"), "--seq-len -3 must be at least 1. --queries 0 must be at least 1."),
        (("--seq-len", "1000000"), "too few for one row of 1000000"),
        ((), "has no validation data of its own: give --data PREFIX."),
    ],
)
def test_what_cannot_be_looked_at_is_refused(flags: tuple[str, ...], told: str, data: str, tmp_path: Path) -> None:
    step = write_step(tmp_path / "step", LLAMA)
    flags = (*flags, "--data", data) if flags else flags
    code, said = headway("diagnose", str(step), *flags)
    assert code == 2 and told in said, said


def test_a_model_that_is_not_there_is_refused(data: str, tmp_path: Path) -> None:
    code, said = headway("diagnose", str(tmp_path / "nowhere"), "--data", data)
    assert code == 2 and "nowhere does not exist" in said
    code, said = headway("diagnose", str(write_step(tmp_path / "step", LLAMA)), "--data", str(tmp_path / "none"))
    assert code == 2 and "none" in said


def test_code_that_a_checkpoint_names_is_imported_only_if_allowed(
    data: str, tmp_path: Path, own_package: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a mixer of one's own that is made of ours is looked at like ours."""
    tables = decoder({"own": {"kind": "mixing.mixers:Halved", "num_heads": 4}}, SWIGLU, num_layers=1, vocab_size=VOCAB)
    step = write_step(tmp_path / "step", tables, allow_code=True)
    flags = ("--data", data, "--rows", "1", "--seq-len", "30")
    code, said = headway("diagnose", str(step), *flags)
    assert code == 2 and "--allow-code" in said
    assert headway("diagnose", str(step), *flags, "--allow-code") == (0, "")
    assert "attention_entropy_min" in capsys.readouterr().out
