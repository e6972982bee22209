"""Random pydantic classes: nested, recursive, with unions, constraints, decimals, dates, sets and enums."""

from __future__ import annotations

import datetime
import enum
import random
import uuid
from decimal import Decimal
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import AnyUrl, BaseModel, ConfigDict, Field, HttpUrl, create_model


class Colour(enum.Enum):
    """Text by name."""

    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    """Numbers by name."""

    LOW = 1
    HIGH = 2


LEAVES: tuple[Any, ...] = (
    str,
    int,
    float,
    bool,
    Decimal,
    bytes,
    Colour,
    Level,
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    uuid.UUID,
    AnyUrl,
    HttpUrl,
    Literal["a", 1, None],
    Annotated[int, Field(ge=-5, lt=50)],
    Annotated[int, Field(multiple_of=3)],
    Annotated[float, Field(gt=0, le=1)],
    Annotated[str, Field(min_length=2, max_length=6)],
    Annotated[str, Field(pattern=r"^[A-Z]{2}\d{3}$")],
    Annotated[Decimal, Field(max_digits=5, decimal_places=2)],
    Annotated[Decimal, Field(ge=0, decimal_places=3)],
    set[Colour],
    set[str],
    frozenset[int],
    dict[str, int],
    dict[Colour, int],
    dict[int, bool],
    tuple[int, str],
    tuple[bool, ...],
    Any,
)


def random_class(seed: int) -> type[BaseModel]:
    """Return a random class, the same for the same seed."""
    source = random.Random(seed)
    return _make(source, f"Thing{seed}", depth=2)


def _make(source: random.Random, name: str, depth: int) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for at in range(source.randint(1, 4)):
        kind = _field(source, f"{name}x{at}", depth)
        fields[f"field_{at}"] = (kind, ...) if source.random() < 0.8 else (Optional[kind], None)  # noqa: UP045
    if source.random() < 0.3:
        children = source.choice([f"Optional['{name}']", f"list['{name}']", f"dict[str, '{name}']"])
        fields["children"] = (children, None if children.startswith("O") else ...)
    forbid = ConfigDict(extra=source.choice(["ignore", "forbid"]))
    made = create_model(name, __config__=forbid, __module__=__name__, **fields)
    made.model_rebuild(_types_namespace={name: made, "Optional": Optional})
    return made


def _field(source: random.Random, name: str, depth: int) -> Any:
    if depth == 0 or source.random() < 0.55:
        return source.choice(LEAVES)
    kind = source.choice(["class", "list", "short list", "union", "tagged", "dict"])
    if kind == "class":
        return _make(source, name, depth - 1)
    if kind == "tagged":
        return _tagged(source, name, depth)
    inner = _field(source, name, depth - 1)
    if kind == "list":
        return list[inner]  # type: ignore[valid-type]
    if kind == "short list":
        return Annotated[list[inner], Field(min_length=1, max_length=3)]  # type: ignore[valid-type]
    if kind == "dict":
        return dict[str, inner]  # type: ignore[valid-type]
    return Union[inner, _field(source, name + "u", depth - 1)]  # noqa: UP007


def _tagged(source: random.Random, name: str, depth: int) -> Any:
    kinds = [
        create_model(f"{name}{tag}", kind=(Literal[tag], ...), value=(_field(source, name + tag, depth - 1), ...))
        for tag in ("P", "Q")
    ]
    return Annotated[Union[tuple(kinds)], Field(discriminator="kind")]  # noqa: UP007
