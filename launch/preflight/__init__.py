"""Before a run over several nodes: each node finds out, within half a minute, why it could not work."""
