"""The objective: its section of the configuration, and what a model is told to train on beside the cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from model.layer import Mixer
    from model.objective import Objective
    from parallel.spread import Spread
    from trainer.config import Config


@dataclass
class ObjectiveConfig:
    """`[objective]`"""

    kind: Literal["next_token"] = "next_token"
    """What is minimised: next-token cross-entropy."""
    entropy_weight: float = 0.0
    """What the penalty on attention entropies weighs beside the cross-entropy; 0: there is none."""
    entropy_margin: float = 0.2
    """So far from its threshold, as a part of the largest entropy, a head is left alone."""
    entropy_threshold: float = 0.5
    """Where the threshold of every head begins, as a part of the largest entropy. It is learned."""
    entropy_threshold_lr: float | None = None
    """Peak learning rate of the thresholds, which follow the schedule and never decay. Default: optimizer.lr."""
    entropy_reduction: Literal["mean", "per_query_sum"] = "mean"
    """Penalise a head's mean entropy in each sequence, and take the mean over sequences; or penalise the entropy of
    each query, and sum over queries and sequences, as the code does that was released with the paper."""
    entropy_normaliser: Literal["length", "seen"] = "length"
    """The largest entropy is the log of the sequence's length; or each query's entropy is divided by the log of the
    number of keys it sees, without those that see one, and the largest is 1."""

    def faults(self, mixers: Sequence[type[Mixer]] | None, *, compiled: bool, lr: float | None) -> list[str]:
        """Why this cannot be minimised, in sentences.

        Args:
            mixers: of the layers, None where they are not known. compiled: `run.compile`. lr: `optimizer.lr`.
        """
        faults = list(self._range_faults())
        if not self.entropy_weight > 0:
            return faults
        if mixers is not None and not any(mixer.has_attention_map for mixer in mixers):
            names = ", ".join(sorted({mixer.__name__ for mixer in mixers}))
            faults.append(
                f"objective.entropy_weight = {self.entropy_weight:g}, but no layer has attention weights (the mixers "
                f"are {names}): those of {', '.join(_with_attention_map())} have; or set it to 0."
            )
        if compiled:
            faults.append(
                f"objective.entropy_weight = {self.entropy_weight:g} with run.compile: this version does not compile "
                "blocks whose attention is looked into; set run.compile = false, or the weight to 0."
            )
        if self.entropy_threshold_lr and lr == 0:
            faults.append(
                f"objective.entropy_threshold_lr = {self.entropy_threshold_lr:g} follows the schedule of "
                "optimizer.lr, which is 0: give that a value; run.freeze keeps parameters as they are."
            )
        return faults

    def _range_faults(self) -> Iterator[str]:
        if not 0 <= self.entropy_weight < math.inf:
            yield f"objective.entropy_weight = {self.entropy_weight:g} must be a number, and not negative; 0 is none."
        if not 0 <= self.entropy_margin < 1:
            yield f"objective.entropy_margin = {self.entropy_margin:g} must lie in [0, 1), for example 0.2."
        if not 0 <= self.entropy_threshold <= 1:
            yield f"objective.entropy_threshold = {self.entropy_threshold:g} must lie in [0, 1], for example 0.5."
        if self.entropy_threshold_lr is not None and not 0 <= self.entropy_threshold_lr < math.inf:
            yield (
                f"objective.entropy_threshold_lr = {self.entropy_threshold_lr:g} must be a number, and not negative; "
                "0 keeps the thresholds where they begin."
            )


def _with_attention_map() -> list[str]:
    """The mixers that have attention weights, by their names in the registry."""
    from model.mixers import MIXERS
    from model.registry import find_layer

    return [name for name in MIXERS if find_layer("mixers", name, name, allow_code=False).has_attention_map]


def make_objective(model: Spread, config: Config) -> Objective:
    """What a model is trained on, in the form that its layout allows."""
    from model.objective import OBJECTIVES

    takes_head = config.run.fused_loss and model.has_whole_head
    return OBJECTIVES[config.objective.kind](model.cross_entropy, takes_head=takes_head)


def add_auxiliary_losses(model: Spread, config: Config) -> dict[str, float]:
    """Tell a model what it is trained on beside the objective's own loss.

    Returns:
        Name -> what multiplies the learning rate, for what is then trained beside the model.
    """
    from model.entropy import EntropyPenalty

    objective, lr = config.objective, config.optimizer.lr
    if objective.entropy_weight == 0:
        return {}
    penalty = EntropyPenalty(
        objective.entropy_weight,
        objective.entropy_margin,
        objective.entropy_threshold,
        objective.entropy_reduction,
        objective.entropy_normaliser,
    )
    own_lr = lr if objective.entropy_threshold_lr is None else objective.entropy_threshold_lr
    return dict.fromkeys(model.penalise_entropy(penalty), own_lr / lr if lr > 0 else 1.0)
