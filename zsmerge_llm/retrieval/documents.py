"""Where a document's text comes from."""

from __future__ import annotations

from pathlib import Path

from zsmerge_llm.errors import InputError

LONGEST_PATH = 1024
TITLE = "document"
"""The name of a text that has none."""


def read_text(document: str | Path | None, text: str | None = None) -> tuple[str, str]:
    """A document's text and a name for it.

    Args:
        document: a path to a text file (a `Path`, or a string that names an existing file), or the text itself.
        text: the text itself, in place of `document`.

    Raises:
        InputError: no text, a file that is no UTF-8 text, or both arguments.
    """
    if (document is None) == (text is None):
        raise InputError("Give one of both: document (a text or a path), or text= for what is certainly a text.")
    if isinstance(document, str):
        text, document = (document, None) if (path := _existing(document)) is None else (None, path)
    try:
        found, title = (document.read_text(encoding="utf-8"), document.stem) if document else (str(text), TITLE)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{document} cannot be read as text ({error}): give a UTF-8 text file or the text itself."
        ) from error
    if not found.strip():
        raise InputError("The document is empty: give some text to read.")
    return found, title


def _existing(text: str) -> Path | None:
    """The file that a string names; None if it is no name of a file, as texts are."""
    try:
        return Path(text) if len(text) < LONGEST_PATH and Path(text).is_file() else None
    except (OSError, ValueError):  # too long for a name, or with a null character
        return None
