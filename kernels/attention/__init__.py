"""What attention in any of its forms has in common: which keys a query sees."""

from kernels.attention.visible import Visible

__all__ = ["Visible"]
