"""Faults in kernels, model, trainer and data parallelism: each breaks the code in a way the field breaks."""

from __future__ import annotations

from tests.mutations.fault import Fault

CONFORMANCE = "tests/conformance/test_mixers.py"
LAYOUTS = "tests/conformance/test_layouts.py::test_a_layout_equals_one_process"
RESUME = "tests/trainer/test_resume.py"

FAULTS = [
    Fault(
        "causal mask off by one (softmax)",
        "kernels/attention/visible.py",
        [("seen = (keys_M <= places) if", "seen = (keys_M <= places + 1) if")],
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
        "model/layer.py",
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
        [("1.0 / max(counted, 1.0))", "1.0 / max(batch.counted.sum().item(), 1.0))")],
        [LAYOUTS],
    ),
    Fault(
        "gradient not divided by the token count",
        "trainer/step.py",
        [("1.0 / max(counted, 1.0))", "1.0)")],
        ["tests/conformance/test_layouts.py::test_one_process_trains_on_the_mean_over_counted_tokens"],
    ),
    Fault(
        "gradient scaled by the data-parallel size",
        "parallel/spread.py",
        [("return self.mesh.data.size() if isinstance(self.stages[0], FSDPModule) else 1", "return 1")],
        [LAYOUTS],
    ),
    Fault(
        "gradient norm of the local shard",
        "parallel/gradients.py",
        [("    dist.all_reduce(squares)\n", "")],
        ["tests/parallel/test_gradients.py", LAYOUTS],
    ),
    Fault(
        "replicated gradients counted once per replica",
        "parallel/gradients.py",
        [("return all(tensor.device_mesh.get_local_rank(dim) == 0 for dim in alike)", "return True")],
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
        [("rows = range(mesh.data_rank * share, (mesh.data_rank + 1) * share)", "rows = range(share)")],
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
