"""Documents as text: a given text, or a file's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

from zsmerge_llm.errors import ContextLimitError, InputError
from zsmerge_llm.language.long_text import MAX_TEXT
from zsmerge_llm.paths import as_path

MAX_BYTES = 4 * MAX_TEXT
"""Bytes of a longest file: no character takes more than four."""
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
    document = as_path(document, "document") if document is not None else None
    try:
        content = io.TextIOWrapper(io.BytesIO(read_file(document)), "utf-8").read() if document else str(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{document} cannot be read as text ({error}): give a UTF-8 text file or the text itself."
        ) from error
    if not content.strip():
        raise InputError("The document is empty: give some text to read.")
    return content, document.stem if document else DEFAULT_TITLE


def read_file(path: Path) -> bytes:
    """Return the content of a regular file. Others, such as a device, may never end.

    Raises:
        InputError: another kind of file. ContextLimitError: as `read_stream`. OSError: it cannot be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is no regular file: give a text file.")
    with path.open("rb") as file:
        return read_stream(file, str(path))


def read_stream(stream: BinaryIO, name: str) -> bytes:
    """Return all that a stream gives. Raises ContextLimitError: more than `MAX_BYTES`."""
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ContextLimitError(f"{name} has more than {MAX_BYTES:,} bytes, the most that are read: divide it.")
    return data


def decode_text(data: bytes) -> str | None:
    """Return the text of a file's bytes; None where they are no text in UTF-8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _existing(text: str) -> Path | None:
    """Return the file that a string names; None if it names no file, as texts do."""
    try:
        return Path(text) if len(text) < MAX_PATH_LENGTH and Path(text).is_file() else None
    except (OSError, ValueError):  # too long for a name, or with a null character
        return None
