"""Faults of weights per modality: how rows are sorted, what is untied, layouts, losses, and data of text and images."""

from __future__ import annotations

from tests.mutations.fault import Fault

GROUPED, STACK, TOWERS, UNTIED, UNTIE = (
    "kernels/grouped.py",
    "model/stack.py",
    "model/towers.py",
    "model/untied.py",
    "model/untie.py",
)
TENSOR, REGION, BALANCE, SPREAD, PIPELINE = (
    "parallel/tensor.py",
    "parallel/region.py",
    "parallel/balance.py",
    "parallel/spread.py",
    "parallel/pipeline.py",
)
MODALITIES, COLUMN, PARTS = "trainer/modalities.py", "trainer/data/modalities.py", "trainer/data/parts.py"
ROWS = "parallel/rows.py"
RUN, UNIT = "tests/conformance/test_towers.py", "tests/model/test_towers.py"
MOT, DATA = "tests/trainer/test_mot.py", "tests/trainer/test_data_parts.py"
EQUATIONS, BY_HAND = f"{UNIT}::test_the_equations", f"{RUN}::test_training_is_on_the_equations"
BEHIND_NORM = f"{RUN}::test_biases_behind_a_norm_over_all_heads"
FROZEN_IDS = f"{RUN}::test_rows_of_frozen_ids"
UNTIED_OR_NOT = f"{UNIT}::test_what_is_untied_and_what_is_not"
CURVES = f"{MOT}::test_losses_of_modalities_in_metrics_and_report"
BATCHES = f"{DATA}::test_training_batches_know_modalities"


def spread(*names: str) -> list[str]:
    """Towers in these layouts."""
    return [f"{RUN}::test_towers_of_two_mixers[{name}]" for name in names]


FAULTS = [
    # Rows, and whose they are.
    Fault(
        "towers: rows put back by the order and not its inverse",
        GROUPED,
        [("permuted(rows, self._inverse, self.order)", "permuted(rows, self.order, self._inverse)")],
        [EQUATIONS],
    ),
    Fault(
        "towers: tokens of a modality in any order",
        GROUPED,
        [
            (
                "numbers_T.argsort(stable=True)",
                "(numbers_T * len(numbers_T) - torch.arange(len(numbers_T))).argsort()",
            )
        ],
        [f"{UNIT}::test_what_is_sorted_once_is_not_sorted_again"],
    ),
    Fault(
        "towers: a memo of rows of the same shape",
        GROUPED,
        [("self._last[0] is x", "self._last[0].shape == x.shape")],
        [f"{UNIT}::test_what_is_sorted_once_is_not_sorted_again"],
    ),
    Fault(
        "towers: a norm without rows is not run",
        TOWERS,
        [("zip(self.towers, parts, strict=True)])", "zip(self.towers, parts, strict=True) if len(part)])")],
        [EQUATIONS],
    ),
    Fault(
        "towers: a linear map without rows is not run",
        GROUPED,
        [
            (
                "zip(maps, x_TD.split(groups.sizes), strict=True)])",
                "zip(maps, x_TD.split(groups.sizes), strict=True) if len(rows)])",
            )
        ],
        [EQUATIONS],
    ),
    Fault(
        "towers: a feed-forward without rows is not run",
        "model/feedforward/experts.py",
        [("zip(experts, parts, contexts, strict=True)])", "zip(experts, parts, contexts, strict=True) if len(part)])")],
        [EQUATIONS],
    ),
    Fault(
        "towers: one product for all, with counts for where its groups end",
        GROUPED,
        [("self.ends = counts_G.cumsum(0).int()", "self.ends = counts_G.int()")],
        [f"{UNIT}::test_one_grouped_product_is_the_loop"],
    ),
    Fault(
        "towers: ranges that have the id beyond the last",
        UNTIE,
        [("(tokens < end)", "(tokens <= end)")],
        [BATCHES],
    ),
    Fault(
        "towers: a token that is decoded is of modality 0",
        "model/decoding.py",
        [
            (
                "model(chosen[:, None], cache=cache)",
                "model(chosen[:, None], cache=cache, modalities=torch.zeros_like(chosen)[:, None])",
            )
        ],
        [f"{MOT}::test_transformers_decodes_across_modalities"],
    ),
    # What is untied, and where it stands.
    Fault(
        "towers: one weight for all",
        TOWERS,
        [("copy.deepcopy(one) for _ in", "one for _ in")],
        [f"{UNIT}::test_towers_draw_their_own_values"],
    ),
    Fault(
        "towers: norms of queries and keys stay one",
        UNTIED,
        [('name.rpartition(".")[2] in mixer.token_norms', "not mixer.token_norms")],
        [UNTIED_OR_NOT],
    ),
    Fault("towers: routers of heads untied", UNTIED, [(" and not isinstance(module, Router)", "")], [UNTIED_OR_NOT]),
    Fault(
        "towers: norms before what they are to come after",
        STACK,
        [
            (
                "self.mixer_norm(self.mixer_out_norm(self.mixer(x, ctx, cache, head_gate)))",
                "self.mixer_out_norm(self.mixer(self.mixer_norm(x), ctx, cache, head_gate))",
            ),
            (
                "            return x + self.feedforward_norm(self.feedforward(x, ctx))\n",
                "            return x + self.feedforward(self.feedforward_norm(x), ctx)\n",
            ),
        ],
        [EQUATIONS],
    ),
    Fault(
        "towers: outputs normed that are not what is added",
        STACK,
        [
            (
                "x = x + self.mixer_norm(self.mixer_out_norm(self.mixer(x, ctx, cache, head_gate)))",
                "x = self.mixer_norm(x + self.mixer_out_norm(self.mixer(x, ctx, cache, head_gate)))",
            )
        ],
        [EQUATIONS],
    ),
    Fault(
        "towers: queries' and keys' weights of all modalities reparametrised as one matrix",
        "model/reparam.py",
        [('f"{mixer}.{letters}{tower}"', 'f"{mixer}.{letters}"')],
        [f"{RUN}::test_each_tower_is_a_matrix[settings1-tp2 x fsdp2]"],
    ),
    # Layouts.
    Fault(
        "towers: norms of a piece go by the modalities of the first one",
        REGION,
        [
            (
                "return self.region.piece(x_BN)",
                "return x_BN.chunk(self.region.size, dim=1)[0] if self.region.cuts_sequence else x_BN",
            )
        ],
        spread("tp2"),
    ),
    Fault(
        "towers: outputs of the first modality alone summed over ranks",
        UNTIED,
        [("for m in range(len(module.towers))]", "for m in range(1)]")],
        spread("tp2"),
    ),
    Fault(
        "towers: biases of outputs on every tensor-parallel rank",
        TENSOR,
        [("float(region.rank == 0) if biased", "1.0 if biased")],
        spread("tp2"),
    ),
    Fault(
        "towers: after a norm, the bias of the first modality",
        TENSOR,
        [("F.one_hot(region.piece(args[1].modalities), ", "F.one_hot(region.piece(args[1].modalities) * 0, ")],
        [f"{BEHIND_NORM}[tp2]"],
    ),
    Fault(
        "towers: after a norm, gradients of biases from one piece of the sequence",
        TENSOR,
        [("region.cuts_sequence or (together and norm is None)", "together and norm is None")],
        [f"{BEHIND_NORM}[tp2]"],
    ),
    Fault(
        "towers: after a norm, gradients of biases summed though all ranks have all of them",
        TENSOR,
        [("(together and norm is None)", "together")],
        [f"{BEHIND_NORM}[tp2, sequence whole]"],
    ),
    Fault(
        "towers: gradients of biases on one rank only, where the sequence is whole",
        TENSOR,
        [("region.cuts_sequence or (together and norm is None)", "region.cuts_sequence")],
        ["tests/parallel/test_tensor.py::test_what_is_not_cut_stays_alike_on_all_ranks"],
    ),
    Fault(
        "towers: a piece of the sequence has the modalities of the first",
        "model/batch.py",
        [
            (
                "{name: piece(tensor) for",
                '{name: piece(tensor) if name != "modalities" else tensor[:, : piece(tensor).shape[1]] for',
            )
        ],
        spread("cp2 x fsdp2"),
    ),
    Fault(
        "towers: later stages take all tokens for the first modality's",
        PIPELINE,
        [
            (
                "documents, positions, modalities=modalities)",
                "documents, positions, modalities=modalities if self.is_first else torch.zeros_like(positions))",
            )
        ],
        spread("pp2 zbv"),
    ),
    Fault(
        "towers: later stages take all tokens for the first modality's in evaluation",
        PIPELINE,
        [
            (
                "documents=part.documents, modalities=part.modalities)",
                "documents=part.documents,\n"
                "                modalities=part.modalities if stage.is_first else part.positions * 0)",
            )
        ],
        spread("pp2 zbv"),
    ),
    Fault(
        "towers: norms are told of the tokens when a micro-batch begins, not when a block runs",
        STACK,
        [
            ("        self.current.begin(ctx.stream_groups)\n", ""),
            (
                "Groups(here, count)\n",
                "Groups(here, count)\n"
                "        for block in self.layers.values():\n"
                "            block.current.begin(ctx.stream_groups)\n",
            ),
        ],
        spread("pp2, recompute"),
    ),
    Fault(
        "towers: expert parallelism takes towers for experts",
        "parallel/experts.py",
        [
            (
                "from model.feedforward.experts import Experts",
                "from model.feedforward.experts import Several as Experts",
            ),
        ],
        [f"{RUN}::test_towers_with_experts[ep2]"],
    ),
    # Mixtures of experts in towers.
    Fault(
        "towers: balance over all tokens of a sequence",
        BALANCE,
        [("            tokens_B11 = routing.routed_BN.sum(1)[:, None, None].double()\n", "            pass\n")],
        [BY_HAND],
    ),
    Fault(
        "towers: balance over the tokens of a piece of a sequence",
        BALANCE,
        [("                tokens_B11 = sum_over(tokens_B11, group)\n", "                pass\n")],
        [f"{RUN}::test_towers_with_experts[ep2 x cp2 x fsdp2]"],
    ),
    Fault(
        "towers: balance a mean over the sequences that have tokens",
        BALANCE,
        [("tokens_B11 * self._facts.sequences", "tokens_B11 * (tokens_B11 > 0).sum()")],
        [BY_HAND],
    ),
    Fault(
        "towers: balance over all tokens of the global batch",
        BALANCE,
        [("tokens = found.routed_BN.sum()", "pass")],
        [f"{BY_HAND}[global batch]"],
    ),
    Fault(
        "towers: balance also of tokens that another routes",
        BALANCE,
        [("self.routed(routing.probabilities(), routing)", "routing.probabilities()")],
        [BY_HAND],
    ),
    Fault(
        "towers: z-loss also of tokens that another routes",
        BALANCE,
        [
            (
                "self.routed(routing.scores_BNU.logsumexp(-1).square(), routing)",
                "routing.scores_BNU.logsumexp(-1).square()",
            )
        ],
        [BY_HAND],
    ),
    Fault(
        "towers: routers of a layer taken for that of the first modality",
        BALANCE,
        [("place = (layer, found.tower)", "place = (layer, 0)")],
        [BY_HAND],
    ),
    Fault(
        "towers: numbers that choose move by the loads of all modalities",
        BALANCE,
        [("(found.part, (layer, found.tower))", "(found.part, (layer, 0))")],
        [BY_HAND],
    ),
    Fault(
        "towers: scores among those of other tokens",
        GROUPED,
        [("        return self.order[rows]\n", "        return torch.arange(rows.start, rows.stop)\n")],
        [BY_HAND],
    ),
    Fault(
        "towers: loads of the last modality's experts alone",
        "model/diagnostics.py",
        [("self.experts[layer, found.tower] =", "self.experts[layer, 0] =")],
        ["tests/model/test_diagnostics.py::test_experts_of_each_modality_are_looked_at_one_after_the_other"],
    ),
    Fault(
        "towers: diagnoses that do not know what the data says",
        "model/diagnostics.py",
        [("batch.positions, modalities=batch.modalities)", "batch.positions)")],
        ["tests/model/test_diagnostics.py::test_experts_of_each_modality_are_looked_at_one_after_the_other"],
    ),
    # Losses of modalities.
    Fault(
        "towers: losses over the counts of one rank",
        "trainer/step.py",
        [("losses_of_each(untie, nats_of_each, of_each)", "losses_of_each(untie, nats_of_each, here[1:])")],
        spread("fsdp2"),
    ),
    Fault(
        "towers: losses over all tokens",
        MODALITIES,
        [("total / tokens if tokens", "total / sum(counted) if tokens")],
        [BY_HAND],
    ),
    Fault(
        "towers: losses by the modality of the token",
        SPREAD,
        [("untie.of_tokens(batch.tokens), untie.of_tokens(batch.targets)", "(untie.of_tokens(batch.tokens),) * 2")],
        [f"{BY_HAND}[by ids]"],
    ),
    Fault(
        "towers: nats by the modality of the token, counts by the target's",
        SPREAD,
        [("sums(nats_BN, part.target_modalities,", "sums(nats_BN, part.modalities,")],
        [BY_HAND],
    ),
    Fault(
        "towers: predictions that do not count are counted",
        MODALITIES,
        [("batch.counted & (batch.target_modalities == modality)", "(batch.target_modalities == modality)")],
        [BY_HAND],
    ),
    Fault(
        "towers: counts on every rank of a share",
        "trainer/step.py",
        [
            (
                "[count if mesh.is_first_of_share else 0.0 for count in here]",
                "[count if mesh.is_first_of_share or place else 0.0 for place, count in enumerate(here)]",
            )
        ],
        spread("tp2"),
    ),
    Fault(
        "towers: nats of every rank that has the same",
        SPREAD,
        [
            (
                "        first, *self.modality_nats = nats.tolist() if self._speaks else [0.0] * len(nats)\n"
                "        return first\n",
                "        first, *self.modality_nats = nats.tolist()\n        return first * self._speaks\n",
            )
        ],
        spread("tp2"),
    ),
    Fault(
        "towers: counts on every rank of a share in validation",
        "trainer/validation.py",
        [("counted = [0.0] * len(counted)", "counted[0] = 0.0")],
        [CURVES],
    ),
    Fault(
        "towers: validation by modality of the last batch alone",
        "trainer/validation.py",
        [
            (
                "            found = [_added(parts) for parts",
                "            found = [[part[0], *[0.0] * model.modalities] for part in found]\n"
                "            found = [_added(parts) for parts",
            )
        ],
        [CURVES],
    ),
    # Freezing, and a dense model with towers.
    Fault(
        "towers: a frozen one has gradients of zero, and decay",
        SPREAD,
        [
            (
                "parameter.requires_grad_(name not in names | self._untrained)",
                "parameter.requires_grad_(name not in self._untrained)\n"
                "            if name in names:\n"
                "                parameter.register_hook(torch.zeros_like)",
            )
        ],
        [f"{MOT}::test_a_frozen_text_tower_says_the_same_to_the_bit"],
    ),
    Fault(
        "towers: rows of frozen ids that decay",
        ROWS,
        [("local(self._parameters[name]).index_copy_(0, self._rows[name], values)", "pass")],
        [f"{FROZEN_IDS}[tp2 x pp2-True]"],
    ),
    Fault(
        "towers: rows of frozen ids counted in the norm",
        ROWS,
        [("local(parameter.grad).index_fill_(0, self._rows[name], 0.0)", "pass")],
        [f"{FROZEN_IDS}[tp2 x pp2-True]"],
    ),
    Fault(
        "towers: rows of frozen ids by their numbers on a rank",
        ROWS,
        [("torch.arange(rows.start, rows.stop)", "torch.arange(len(rows))")],
        [f"{FROZEN_IDS}[tp2 x pp2-True]"],
    ),
    Fault(
        "towers: rows of frozen ids kept before those of the head have come",
        SPREAD,
        [
            (
                "        self._from_copy()\n        self.kept_rows.drop_gradients()\n",
                "        self.kept_rows.drop_gradients()\n        self._from_copy()\n",
            )
        ],
        [f"{FROZEN_IDS}[tp2 x pp2-True]"],
    ),
    Fault(
        "towers: rows of frozen ids kept in the embedding alone",
        ROWS,
        [('VOCABULARY = ("embedding.weight", "head.weight")', 'VOCABULARY = ("embedding.weight",)')],
        [f"{FROZEN_IDS}[tp2 x pp2-False]"],
    ),
    Fault(
        "towers: upcycled, each after the first is drawn",
        "trainer/towers.py",
        [
            (
                "        return torch.cat((tensor, self._new_rows",
                '        if ".towers.1." in name:\n'
                "            tensor = draw(name, Normal(0.02), tensor.shape, seed=0).to(tensor.dtype)\n"
                "        return torch.cat((tensor, self._new_rows",
            )
        ],
        [f"{MOT}::test_upcycled_it_computes_what_it_did"],
    ),
    Fault(
        "towers: upcycled, new ids are zeros",
        "trainer/towers.py",
        [("(wide.mean(0) + wide.std(0) * drawn)", "torch.zeros_like(drawn)")],
        [f"{MOT}::test_upcycled_it_computes_what_it_did"],
    ),
    Fault(
        "towers: upcycled, new ids are alike",
        "trainer/towers.py",
        [("wide.std(0) * drawn", "wide.std(0) * drawn[:1] + 0 * drawn")],
        [f"{MOT}::test_upcycled_it_computes_what_it_did"],
    ),
    Fault(
        "towers: upcycled, compared by the first modality's weights alone",
        "trainer/towers.py",
        [("% model.architecture.untie.modalities", "* 0")],
        [f"{MOT}::test_a_wrong_result_gets_no_name"],
    ),
    # Data.
    Fault(
        "towers: the column read from where a document begins, not a piece of it",
        COLUMN,
        [("int(self._data.offsets[piece.document]) + piece.offset", "int(self._data.offsets[piece.document])")],
        [f"{DATA}::test_the_column_and_not_the_id_says_the_modality"],
    ),
    Fault(
        "towers: targets of the tokens' modalities",
        "trainer/data/training.py",
        [("(modalities[:, :-1], modalities[:, 1:])", "(modalities[:, :-1],) * 2")],
        [BATCHES],
    ),
    Fault(
        "towers: targets of the tokens' modalities in evaluation",
        "trainer/data/evaluation.py",
        [("of_read[:-1], of_read[1:]", "of_read[:-1], of_read[:-1]")],
        [f"{DATA}::test_what_fills_up_evaluation_is_of_modality_0"],
    ),
    Fault(
        "towers: modalities seen where nothing is trained on",
        COLUMN,
        [("training_range(data.documents, split)", "range(data.documents)")],
        [f"{DATA}::test_the_tokens_are_looked_at_where_sidecars_do_not_count_them"],
    ),
    Fault(
        "towers: a sidecar's counts taken though other ids are a modality's",
        COLUMN,
        [(' or (untie.by_ids and untie.ranges != described["ranges"])', "")],
        [f"{DATA}::test_a_sidecar_does_not_count_for_other_ranges"],
    ),
    Fault(
        "towers: a set readable before it has its column",
        "trainer/data/prepare.py",
        [('FILES = (COLUMN, ".json", ".bin", ".idx")', 'FILES = (".json", ".bin", ".idx", COLUMN)')],
        [f"{DATA}::test_a_death_between_renames_is_not_taken_for_a_complete_set"],
    ),
    Fault(
        "towers: an old column beside a new set",
        "trainer/data/prepare.py",
        [("        os.remove(out + COLUMN)\n", "        pass\n")],
        [f"{DATA}::test_a_set_of_text_that_replaces_one_of_parts_has_no_column"],
    ),
    Fault(
        "towers: codes of images among the ids of text",
        PARTS,
        [("self.text + code for code", "code for code")],
        [f"{DATA}::test_parts_in_order_with_marks_around_images_and_the_end_token"],
    ),
    Fault(
        "towers: marks of an image taken for a part of it",
        PARTS,
        [("((tokens >= self.text) & (tokens < self.opens))", "(tokens >= self.text)")],
        [f"{DATA}::test_parts_in_order_with_marks_around_images_and_the_end_token"],
    ),
    Fault(
        "towers: a column that is replaced without a word",
        "trainer/data/fingerprint.py",
        [("if untie is not None and not untie.by_ids and", "if untie is not None and untie.by_ids and")],
        [f"{DATA}::test_the_fingerprint_follows_the_column_where_it_counts"],
    ),
]
