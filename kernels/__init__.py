"""Compute it: pure functions on tensors. No modules, no configuration, no process groups."""
