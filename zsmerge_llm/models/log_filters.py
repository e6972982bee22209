"""Other libraries' chatter, kept down where it would bury ours, and only there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and below errors, for the time of a load. What matters is raised."""
    from transformers.utils import logging as theirs

    bars, level = theirs.is_progress_bar_enabled(), theirs.get_verbosity()
    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


class _Once(logging.Filter):
    """Lets the first of bitsandbytes' warnings about casting inputs pass, which it repeats per layer and token."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("MatMul8bitLt: inputs will be cast"):
            return True
        first, self.said = not self.said, True
        return first


def say_int8_cast_once() -> None:
    """Reduce the warning bitsandbytes' int8 layers log at every call to one line. Other records pass untouched."""
    log = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(f, _Once) for f in log.filters):
        log.addFilter(_Once())
