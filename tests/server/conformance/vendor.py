"""Fields, kinds and events as the installed packages `openai` and `anthropic` define them."""

from __future__ import annotations

import types
import typing
from importlib.metadata import version
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from typing_extensions import NotRequired, Required

WRAPPERS = (Annotated, Required, NotRequired)


def versions() -> str:
    """Return which packages the fields are from."""
    return ", ".join(f"{name} {version(name)}" for name in ("openai", "anthropic"))


def fields(*classes: Any) -> list[str]:
    """Return the names of the fields of TypedDicts."""
    return sorted({name for each in classes for name in typing.get_type_hints(each)})


def kinds(union: Any, key: str = "type") -> list[str]:
    """Return the values by which the members of a union are told apart, and the texts among its members."""
    found: set[str] = set()
    for member in members(union):
        if isinstance(member, str):
            found.add(member)
        elif hint := hints(member).get(key):
            found |= {each for each in members(hint) if isinstance(each, str)}
    return sorted(found)


def hints(member: Any) -> dict[str, Any]:
    """Return the annotations of a class; {} for what is none."""
    if isinstance(member, type) and issubclass(member, BaseModel):
        return {name: each.annotation for name, each in member.model_fields.items()}
    return typing.get_type_hints(member) if isinstance(member, type) and hasattr(member, "__annotations__") else {}


def members(hint: Any) -> list[Any]:
    """Return the types and texts that a union, a list of one, or a Literal consists of."""
    origin = get_origin(hint)
    if origin is Literal:
        return list(get_args(hint))
    if origin in WRAPPERS:
        return members(get_args(hint)[0])
    if origin in (Union, types.UnionType) or (origin is not None and origin is not dict):
        return [each for part in get_args(hint) for each in members(part)]
    return [hint]
