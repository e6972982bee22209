"""Where a document's text comes from."""

from __future__ import annotations

from pathlib import Path

from zsmerge_llm.errors import InputError

LONGEST_PATH = 1024


def read_text(document: str | Path) -> tuple[str, str]:
    """A document's text and a name for it.

    Args:
        document: a path to a text file (a `Path`, or a string that names an existing file), or the text itself.

    Raises:
        InputError: no text, or a file that is no UTF-8 text.
    """
    path = document if isinstance(document, Path) else _existing(document)
    try:
        text, title = (str(document), "document") if path is None else (path.read_text(encoding="utf-8"), path.stem)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{document} cannot be read as text ({error}): give a UTF-8 text file or the text itself."
        ) from error
    if not text.strip():
        raise InputError("The document is empty: give some text to read.")
    return text, title


def _existing(text: str) -> Path | None:
    """The file that a string names; None if it is no name of a file, as texts are."""
    try:
        return Path(text) if len(text) < LONGEST_PATH and Path(text).is_file() else None
    except (OSError, ValueError):  # too long for a name, or with a null character
        return None
