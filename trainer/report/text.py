"""Numbers as people read them, and text made safe for HTML."""

from __future__ import annotations

import math
from html import escape as _escape
from itertools import pairwise


def escape(value: object) -> str:
    """The value as text that HTML cannot mistake for markup, in elements and in quoted attributes."""
    return _escape(str(value), quote=True)


def number(value: float, digits: int = 4) -> str:
    """A number with that many significant digits and no more: 12,345 / 3.142 / 0.0003 / 2.5e-7."""
    if not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-4 <= abs(value) < 1e12:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_trim(mantissa)}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return _trim(f"{value:,.{decimals}f}")


def compact(value: float, digits: int = 3) -> str:
    """A large number with a letter: 4.1k, 12M, 1.3B; a smaller one as `number` gives it."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # What would round up to 1000k is written 1M.
        if abs(value) >= unit * (1 - 0.5 * 10.0**-digits):
            return number(value / unit, digits) + letter
    return number(value, digits)


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    """A span of time in its two largest units."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    for (name, size), (next_name, next_size) in pairwise(units):
        if left >= size:
            rest = left % size // next_size
            return f"{left // size} {name}" + (f" {rest} {next_name}" if rest else "")
    return f"{left} s"


def size(count: int) -> str:
    """A number of bytes in binary units."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{number(value, 3)} {unit}"
        value /= 1024
    return f"{number(value, 3)} TiB"
