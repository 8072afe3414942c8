"""Numbers, durations, sizes and text as a reader wants to see them in HTML."""

from __future__ import annotations

import html
import math
import re
from typing import Any


def escape(value: Any) -> str:
    """Text that HTML shows as it is, in an element and in a quoted attribute."""
    return html.escape(str(value), quote=True)


def prose(text: str) -> str:
    """Escaped text in which `...` is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def number(value: Any) -> str:
    """Four significant digits, thousands apart, powers of ten for the very large and small."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """'42 s', '12 min 03 s', '3 h 07 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(count: int) -> str:
    """Bytes in binary units: '3.42 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}" if unit != "GiB" else f"{count:.2f} GiB"
        count /= 1024
    raise AssertionError("unreachable")
