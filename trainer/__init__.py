"""Run it: command line, configuration, the loop, data, checkpoints, metrics, report."""
