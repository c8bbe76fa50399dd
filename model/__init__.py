"""Define it: single-device model code that reads top to bottom with no rank arithmetic."""
