"""Check the types of a request's arguments before anything is read, so that a wrong one fails alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import InputError
from zsmerge_llm.language.grammar import Grammar
from zsmerge_llm.language.reasoning_tags import EFFORTS

if TYPE_CHECKING:
    from zsmerge_llm.sessions.session import Session


def check_types(options: Any) -> None:
    """Refuse options of a request that are of a wrong type.

    Raises:
        InputError: names the option, and what it must be.
    """
    check_arguments(**{name: getattr(options, name) for name in _EXPECTED})


def check_arguments(**given: Any) -> None:
    """Refuse arguments of a wrong type, by the names that options have. Raises InputError."""
    for name, value in given.items():
        is_valid, expected = _OF_DOCUMENTS.get(name) or _EXPECTED[name]
        if not is_valid(value):
            raise InputError(f"{name} must be {expected}, not a {type(value).__name__}.")


def check_session(session: Any) -> Session:
    """Return a session. Raises InputError: it is none."""
    if not _is_session(session):
        raise InputError(f"This must be a Session, not a {type(session).__name__}: Session.fork makes one.")
    check_arguments(name=session.name)
    return cast("Session", session)


def check_batch(entries: Any, name: str) -> Sequence[Any]:
    """Return the entries of a batch. Raises InputError: they are no list or tuple."""
    if not isinstance(entries, (list, tuple)):
        raise InputError(f"{name} must be a list, one entry for each answer, not a {type(entries).__name__}.")
    return entries


def check_prompt(prompt: Any) -> str:
    """Return a plain prompt. Raises InputError: it is no text, or empty."""
    if not isinstance(prompt, str) or not prompt:
        raise InputError("The prompt is empty: give some text to continue.")
    return prompt


def _is_session(session: Any) -> bool:
    from zsmerge_llm.sessions.session import Session  # needs torch

    return isinstance(session, Session)


def _is_seconds(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    except OverflowError:
        return False


def _or_none(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


_TEXT = _or_none(lambda value: isinstance(value, str)), "text"
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sampling": (lambda value: isinstance(value, SamplingParams), "a SamplingParams"),
    "session": (
        _or_none(lambda value: isinstance(value, str) or _is_session(value)),
        "a name (text) or a Session",
    ),
    "namespace": (
        _or_none(lambda value: isinstance(value, str) and value != "" and "/" not in value),
        "a text without a slash",
    ),
    "probe": _TEXT,
    "template_args": (
        _or_none(lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value)),
        "a dict of the template's variables by their names",
    ),
    "reasoning_effort": (_or_none(lambda value: value in EFFORTS), f"one of {', '.join(EFFORTS)}"),
    "grammar": (_or_none(lambda value: isinstance(value, Grammar)), "a Grammar, such as Grammar.regex(...)"),
    "cancel": (_or_none(lambda value: callable(getattr(value, "is_set", None))), "a threading.Event"),
    "progress": (_or_none(callable), "a function of two numbers"),
    "timeout": (_or_none(_is_seconds), "a finite number of seconds above 0, or None"),
    "priority": (
        lambda value: isinstance(value, int) and not isinstance(value, bool),
        "a whole number, the lowest goes first",
    ),
}
"""By the name of an option: whether a value is one, and what it must be."""
_OF_DOCUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": _TEXT,
    "notes": (
        lambda value: isinstance(value, bool) or (isinstance(value, str) and value.strip() != ""),
        "what notes are to be about (a text that is not empty), True or False",
    ),
}
"""The same for what no request takes."""
