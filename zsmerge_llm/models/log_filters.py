"""Filters for log output of transformers and bitsandbytes that would bury this package's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars, warnings and notes inside the block. Its errors are logged and raised."""
    from transformers.utils import logging as transformers_logging

    had_bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


class _FirstCastWarning(logging.Filter):
    """Passes only the first of bitsandbytes' warnings about casting inputs: it logs one per layer and token."""

    def __init__(self) -> None:
        super().__init__()
        self._has_passed = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("MatMul8bitLt: inputs will be cast"):
            return True
        passes, self._has_passed = not self._has_passed, True
        return passes


def log_int8_cast_once() -> None:
    """Reduce the warning that bitsandbytes' int8 layers log at every call to one. Other records are not affected."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(existing, _FirstCastWarning) for existing in logger.filters):
        logger.addFilter(_FirstCastWarning())
