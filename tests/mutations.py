"""Plant faults, one at a time, and see the tests fail: `make mutations`.

Each fault breaks a copy of the code in a way the field breaks. A fault that no test notices is printed as SURVIVED and
the exit code is 1. Not part of CI: it takes a few minutes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "model", "parallel", "trainer", "launch", "tests", "configs")
CONFORMANCE = "tests/conformance/test_mixers.py"
LAYOUTS = "tests/conformance/test_data_parallel.py"
RESUME = "tests/trainer/test_resume.py"


@dataclass(frozen=True)
class Fault:
    """What goes wrong, the replacements in one file that make it so, and the tests that must notice."""

    name: str
    file: str
    replacements: list[tuple[str, str]]
    tests: list[str] = field(default_factory=list)


FAULTS = [
    Fault(
        "causal mask off by one (softmax)",
        "model/mixers/softmax.py",
        [("seen = (keys <= queries)", "seen = (keys <= queries + 1)")],
        [CONFORMANCE],
    ),
    Fault(
        "a lightning query does not see its own token",
        "kernels/lightning/states.py",
        [(".tril()", ".tril(-1)")],
        ["tests/kernels/test_lightning.py"],
    ),
    Fault(
        "decay of the wrong layer",
        "model/mixers/lightning.py",
        [("heads, site.layer, site.num_layers)", "heads, max(0, site.layer - 1), site.num_layers)")],
        ["tests/model/test_lightning.py"],
    ),
    Fault(
        "decay from the number of layers of the same kind",
        "model/mixers/lightning.py",
        [("heads, site.layer, site.num_layers)", "heads, site.layer, site.num_layers + 1)")],
        ["tests/model/test_lightning.py"],
    ),
    Fault(
        "state not reset at a document",
        "kernels/lightning/chunked.py",
        [("enter = enter * (document_BTC == edge_BP[:, :-1, None])[:, None, :, :, None]", "pass")],
        [CONFORMANCE],
    ),
    Fault(
        "cached state not reset at a document",
        "model/layer.py",
        [("return state_BHde * continues_B[:, None, None, None]", "return state_BHde")],
        [CONFORMANCE],
    ),
    Fault(
        "slopes rounded by a cast to bf16",
        "model/mixers/lightning.py",
        [("        super()._apply(fn, recurse)\n", "        return super()._apply(fn, recurse)\n")],
        [CONFORMANCE],
    ),
    Fault(
        "samples repeated after resume",
        "trainer/loop.py",
        [
            (
                "    counters, config = run.counters, run.config\n",
                "    counters, config = run.counters, run.config\n    first = run.counters.step\n",
            ),
            ("run.data.batch(counters.step, run.rows)", "run.data.batch(counters.step - first, run.rows)"),
        ],
        [RESUME],
    ),
    Fault(
        "gradient divided by the local token count",
        "trainer/step.py",
        [("/ max(counted, 1.0)\n        total =", "/ max(batch.counted.sum().item(), 1.0)\n        total =")],
        [LAYOUTS],
    ),
    Fault(
        "gradient not divided by the token count",
        "trainer/step.py",
        [("gradient_divisor(self.model, self.layout.data_parallel) / max(counted, 1.0)", "1.0")],
        [LAYOUTS, RESUME],
    ),
    Fault(
        "gradient scaled by the data-parallel size",
        "parallel/data.py",
        [("return data_parallel if isinstance(model, FSDPModule) else 1", "return 1")],
        [LAYOUTS],
    ),
    Fault(
        "gradient norm of the local shard",
        "parallel/gradients.py",
        [("        for group in groups:\n            dist.all_reduce(squares, group=group)\n", "")],
        ["tests/parallel/test_gradients.py", LAYOUTS],
    ),
    Fault(
        "replicated gradients counted once per replica",
        "parallel/gradients.py",
        [("if isinstance(placement, Shard) and mesh.size(dim) > 1", "if mesh.size(dim) > 1")],
        ["tests/parallel/test_gradients.py", LAYOUTS],
    ),
    Fault(
        "optimizer state not resumed",
        "trainer/checkpoint.py",
        [('"optimizer": moments, ', "")],
        [RESUME],
    ),
    Fault(
        "learning-rate schedule restarts on resume",
        "trainer/loop.py",
        [
            (
                "    counters, config = run.counters, run.config\n",
                "    counters, config = run.counters, run.config\n    first = run.counters.step\n",
            ),
            ("learning_rate(step, config", "learning_rate(step - first, config"),
        ],
        [RESUME],
    ),
    Fault(
        "a rank's share of the batch is its neighbour's",
        "trainer/run.py",
        [("rows = range(process.rank * share, (process.rank + 1) * share)", "rows = range(share)")],
        [RESUME],
    ),
    Fault(
        "one rank skips a non-finite update alone",
        "trainer/step.py",
        [("loss = total_nats / max(counted, 1.0)", "loss = nats / max(counted, 1.0)")],
        [RESUME],
    ),
    Fault(
        "the older checkpoint is deleted before the newer one is complete",
        "trainer/checkpoint.py",
        [
            (
                "        self.wait()\n        self.saved_step",
                "        self.wait(); [shutil.rmtree(f) for f in step_folders(self.run_dir)]\n        self.saved_step",
            )
        ],
        ["tests/trainer/test_kill.py"],
    ),
    Fault(
        "recomputation that keeps compilation from happening",
        "parallel/recompute.py",
        [
            (
                "block.forward = _recomputed(block.forward, options)",
                "block.forward = partial(checkpoint, block.forward, **options)",
            )
        ],
        [CONFORMANCE],
    ),
    Fault(
        "recomputation keeps products that are then changed in place",
        "parallel/recompute.py",
        [("_KEPT = {", "_KEPT = {\n    torch.ops.aten.bmm.default,")],
        [CONFORMANCE],
    ),
    Fault(
        "initial values depend on who draws them",
        "model/initialisation.py",
        [("generator=_generator(seed, name, block)", "generator=_generator(seed, name, rows.start)")],
        ["tests/model/test_stack.py"],
    ),
    Fault(
        "rotary angles in bf16",
        "model/positions.py",
        [
            (
                "angles = positions_BN[..., None, None].double() * self.theta.double()",
                "angles = positions_BN[..., None, None].bfloat16() * self.theta.bfloat16()",
            )
        ],
        ["tests/model/test_lightning.py"],
    ),
    Fault(
        "shards are not looked at when a checkpoint is chosen",
        "model/folders.py",
        [("elif hashes and file_sha256(path) != expected", "elif False and file_sha256(path) != expected")],
        [RESUME],
    ),
    Fault(
        "angles rounded on their way out",
        "model/hf/export.py",
        [("stored[names[0]], known[names[0]])", "dtype, known[names[0]])")],
        ["tests/trainer/test_convert.py::test_a_bf16_run_goes_out_in_bf16_and_its_angles_do_not"],
    ),
    Fault(
        "a head of its own taken for a tied one",
        "model/hf/source.py",
        [('self.tables["model"]["tie_embeddings"] = same', 'self.tables["model"]["tie_embeddings"] = True')],
        ["tests/trainer/test_convert.py::test_a_published_transnormer_says_by_its_head_whether_it_is_tied"],
    ),
    Fault(
        "matrices packed by head taken for matrices packed by kind",
        "model/hf/names.py",
        [("heads=settings.num_heads if name.per_head else 1", "heads=1")],
        ["tests/model/test_hf_names.py", "tests/model/test_minimax.py"],
    ),
    Fault(
        "padding seen by an export",
        "model/hf/modeling.py",
        [("    return begins.cumsum(1)[:, -n:], positions[:, -n:]", "    return None, positions[:, -n:]")],
        ["tests/trainer/test_convert.py::test_without_headway"],
    ),
    Fault(
        "a comparison of logits that always holds",
        "model/hf/check.py",
        [("return self.error <= self.tolerance", "return True")],
        ["tests/trainer/test_convert.py::test_a_wrong_export_is_caught"],
    ),
    Fault(
        "every rank takes the first rows of imported weights",
        "parallel/data.py",
        [("read(name)[rows.start : rows.stop]", "read(name)[: len(rows)]")],
        ["tests/trainer/test_hugging_face_model.py::test_training_begins_with_weights_from_a_hugging_face_folder"],
    ),
    Fault(
        "an interrupted export under its final name",
        "model/files.py",
        [('    partial = final.with_name(final.name + ".partial")\n    shutil', "    partial = final\n    shutil")],
        ["tests/trainer/test_convert_refusals.py::test_an_interrupted_export_leaves_nothing"],
    ),
    Fault(
        "beams that keep their own caches",
        "model/hf/modeling.py",
        [("self.reorder(beam_idx)", "pass")],
        ["tests/trainer/test_convert.py::test_without_headway"],
    ),
    Fault(
        "the residual that is not normalised",
        "model/stack.py",
        [("normed = self.feedforward_norm(kept * normed", "normed = self.feedforward_norm(kept * x")],
        ["tests/model/test_minimax.py"],
    ),
]


def plant(fault: Fault, folder: Path) -> bool:
    """Break a copy of the code; whether the tests notice."""
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, folder / floor, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / fault.file
    text = path.read_text()
    for old, new in fault.replacements:
        assert text.count(old) >= 1, f"{fault.name}: {fault.file} has no {old!r} any more"
        text = text.replace(old, new)
    path.write_text(text)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *fault.tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    # 1 is "tests failed"; anything else means that pytest itself did not get that far.
    assert done.returncode in (0, 1), f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}"
    return done.returncode == 1


def main(wanted: list[str]) -> int:
    """Plant all faults, or those whose name holds one of the words given."""
    chosen = [fault for fault in FAULTS if not wanted or any(word in fault.name for word in wanted)]
    survived = 0
    for fault in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="headway-fault-") as folder:
            caught = plant(fault, Path(folder))
        survived += not caught
        print(f"{'caught' if caught else 'SURVIVED':<9} {fault.name} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} faults caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
