"""What a run reads its data with, under one name."""

from trainer.data.batch import Batch
from trainer.data.check import check_sources
from trainer.data.config import DataConfig, DataSource
from trainer.data.evaluation import EvaluationData, validation_sets
from trainer.data.fingerprint import fingerprint, fingerprint_differences
from trainer.data.split import split_ranges, training_documents
from trainer.data.training import TrainingData

__all__ = [
    "Batch",
    "DataConfig",
    "DataSource",
    "EvaluationData",
    "TrainingData",
    "check_sources",
    "fingerprint",
    "fingerprint_differences",
    "split_ranges",
    "training_documents",
    "validation_sets",
]
