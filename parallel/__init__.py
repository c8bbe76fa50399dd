"""Spread it: every mesh and every collective."""
