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
    path = Path(document) if isinstance(document, Path) or len(document) < LONGEST_PATH else None
    try:
        if path is None or not (isinstance(document, Path) or path.is_file()):
            text, title = str(document), "document"
        else:
            text, title = path.read_text(encoding="utf-8"), path.stem
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{document} cannot be read as text ({error}): give a UTF-8 text file or the text itself."
        ) from error
    if not text.strip():
        raise InputError("The document is empty: give some text to read.")
    return text, title
