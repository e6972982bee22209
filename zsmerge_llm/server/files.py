"""The text of an uploaded file."""

from __future__ import annotations

from io import BytesIO

from zsmerge_llm.errors import InputError, MissingDependencyError
from zsmerge_llm.retrieval.documents import decode_text

MAX_PAGES = 5_000


def text_of_file(data: bytes, name: str) -> str:
    """Return the text of a file: UTF-8, or a PDF's.

    Raises:
        InputError: neither, or damaged. MissingDependencyError: a PDF, without pypdf.
    """
    if data.startswith(b"%PDF-"):
        return _pdf_text(data, name)
    text = decode_text(data)
    if text is None:
        raise InputError(f"{name} is neither text in UTF-8 nor a PDF: convert it first.")
    return text


def _pdf_text(data: bytes, name: str) -> str:
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise MissingDependencyError("PDFs need pypdf: pip install 'zsmerge-llm[server]'.") from error
    try:
        reader = PdfReader(BytesIO(data))
        if len(reader.pages) > MAX_PAGES:
            raise InputError(f"{name} has {len(reader.pages)} pages; {MAX_PAGES} are allowed.")
        text = "\n\n".join(page.extract_text() for page in reader.pages)
    except InputError:
        raise
    except Exception as error:  # pypdf raises many types for a damaged file
        raise InputError(f"{name} cannot be read as a PDF ({type(error).__name__}): convert it to text.") from error
    if not text.strip():
        raise InputError(f"{name} has no text, only pictures perhaps: recognize its text (OCR) first.")
    return text
