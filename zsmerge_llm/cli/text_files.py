"""Text that a user gives as a file."""

from __future__ import annotations

import sys
from pathlib import Path

from zsmerge_llm.errors import InputError

DOCUMENTS = (b"%PDF-", b"%!PS", b"{\\rtf", b"PK\x03\x04", b"\x1f\x8b", b"\xd0\xcf\x11\xe0")
"""How PDF, PostScript, RTF, zipped (DOCX, ODT, EPUB), gzipped and old Office files begin."""


def read_text(file: Path) -> str:
    """Return the text of a file, or of standard input for "-". Raises InputError: no text."""
    name = "standard input" if str(file) == "-" else str(file)
    from zsmerge_llm.retrieval.documents import decode_text, read_file, read_stream

    try:
        data = read_stream(sys.stdin.buffer, name) if str(file) == "-" else read_file(file)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {name}: check the path.") from error
    except (OSError, ValueError) as error:  # a folder, no permission
        raise InputError(f"{name} cannot be read ({error}): give a text file.") from error
    text = decode_text(data)
    if text is None or data.startswith(DOCUMENTS):
        raise InputError(f"{name} is not text in UTF-8: convert it first (a PDF with pdftotext, say).")
    if not text.strip():
        raise InputError(f"{name} is empty: give a file with some text.")
    return text
