"""Documents as text: a given text, or a file's."""

from __future__ import annotations

from pathlib import Path

from zsmerge_llm.errors import InputError

MAX_PATH_LENGTH = 1024
DEFAULT_TITLE = "document"
"""The name of a text without one."""


def read_text(document: str | Path | None, text: str | None = None) -> tuple[str, str]:
    """Return a document's text and a name for it.

    Args:
        document: a path to a text file (a `Path`, or a string that names an existing file), or the text itself.
        text: the text itself, in place of `document`.

    Raises:
        InputError: no text, a file that is no UTF-8 text, or both arguments.
    """
    if (document is None) == (text is None):
        raise InputError("Give one of both: document (a text or a path), or text= for what is certainly a text.")
    if not isinstance(text if document is None else document, (str, Path) if text is None else str):
        kind = type(text if document is None else document).__name__
        raise InputError(f"A document is a text or the path of a text file, not a {kind}.")
    if isinstance(document, str):
        text, document = (document, None) if (path := _existing(document)) is None else (None, path)
    try:
        content = document.read_text(encoding="utf-8") if document else str(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{document} cannot be read as text ({error}): give a UTF-8 text file or the text itself."
        ) from error
    if not content.strip():
        raise InputError("The document is empty: give some text to read.")
    return content, document.stem if document else DEFAULT_TITLE


def _existing(text: str) -> Path | None:
    """Return the file that a string names; None if it names no file, as texts do."""
    try:
        return Path(text) if len(text) < MAX_PATH_LENGTH and Path(text).is_file() else None
    except (OSError, ValueError):  # too long for a name, or with a null character
        return None
