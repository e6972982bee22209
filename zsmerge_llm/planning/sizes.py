"""Bytes as text, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(size: int) -> str:
    """Return a size as text in binary units, such as "513.1 MiB" or "-1.3 GiB"."""
    value, unit = float(size), 0
    while abs(value) >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:,.1f} {UNITS[unit]}"


def format_table(rows: Sequence[tuple[str, str, str]]) -> str:
    """Return lines of a label, a value aligned right, and a note."""
    labels, values = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{label:<{labels}}  {value:>{values}}  {note}".rstrip() for label, value, note in rows)
