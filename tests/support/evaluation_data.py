"""Evaluation data that suites of benchmarks/quality are generated from."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.sources import BOOK, Sources


def calm_sea(folder: Path) -> Sources:
    """Return the data of a folder with a book of a thousand short sentences; a word has two tokens."""
    folder.joinpath(BOOK).write_text(" ".join(f"On day {day} the sea was calm." for day in range(1000)))
    return Sources(folder, lambda text: len(text.split()) * 2)
