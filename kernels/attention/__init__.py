"""What attention in any of its forms has in common: which keys a query sees, and what its weights are like."""

from kernels.attention.statistics import RowStatistics, row_statistics, sink_scores, sink_weights
from kernels.attention.visible import Visible

__all__ = ["RowStatistics", "Visible", "row_statistics", "sink_scores", "sink_weights"]
