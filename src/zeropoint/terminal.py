"""What results look like in a terminal, whichever they are: tables, plain text, sizes, times."""

from __future__ import annotations

import io
import math
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table


def table(title: str, **more: Any) -> Table:
    """An empty table under a title, which is no markup. ``more`` goes to ``rich.table.Table``."""
    return Table(
        title=escape(title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        header_style="bold",
        pad_edge=False,
        **more,
    )


def plain_text(view: RenderableType, width: int = 120) -> str:
    """What rich shows, without colour, for ``print`` and for files.

    >>> plain_text("a [b]b[/b]")
    'a b'
    """
    file = io.StringIO()
    console = Console(
        file=file, width=width, color_system=None, force_terminal=False, legacy_windows=False
    )
    console.print(view)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))


def three(value: float) -> str:
    """Three significant digits, no exponent.

    >>> three(0.012345), three(1234.5)
    ('0.0123', '1234')
    """
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")  # 0.9996 is 1.00, not 1.000
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{value:.{digits}f}"


def size(count: float) -> str:
    """Bytes with decimal prefixes.

    >>> size(999), size(22_700_000)
    ('999 bytes', '22.7 MB')
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} bytes" if unit == "bytes" else f"{three(count)} {unit}"


def unit_of(value: float) -> tuple[str, float]:
    """The unit of a time in seconds, and what to multiply it by."""
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        if value * factor < 999.5:
            return unit, factor
    return "s", 1.0


def seconds(value: float | None) -> str:
    """A time with its unit; a dash where nothing was timed.

    >>> seconds(0.00123), seconds(None)
    ('1.23 ms', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    unit, factor = unit_of(value)
    return f"{three(value * factor)} {unit}"
