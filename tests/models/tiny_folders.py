"""Loading a tiny model, and looking at it."""

from __future__ import annotations

from typing import Any

import torch

from zsmerge_llm.models.loader import LoadedModel, load

IDS = torch.arange(3, 43)[None]


def logits(model: Any) -> torch.Tensor:
    """Of some tokens."""
    with torch.no_grad():
        return model(IDS).logits


def load_tiny(source: Any, **settings: Any) -> LoadedModel:
    """In float32 on the CPU, unless said otherwise."""
    return load(source, **{"dtype": "float32", "device": "cpu", **settings})


def unreachable(*_: Any, **__: Any) -> None:
    """In the place of what must not be asked."""
    raise ConnectionError("no route")
