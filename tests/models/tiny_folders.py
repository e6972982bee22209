"""Helpers to load a tiny model and to compute its logits."""

from __future__ import annotations

from typing import Any

import torch

from zsmerge_llm.models.loader import LoadedModel, load

IDS = torch.arange(3, 43)[None]


def logits(model: Any) -> torch.Tensor:
    """Return the logits of 40 fixed tokens."""
    with torch.no_grad():
        return model(IDS).logits


def load_tiny(source: Any, **settings: Any) -> LoadedModel:
    """Load a model, by default in float32 on the CPU."""
    return load(source, **{"dtype": "float32", "device": "cpu", **settings})


def unreachable(*_: Any, **__: Any) -> None:
    """Raise ConnectionError; replaces calls to the network."""
    raise ConnectionError("no route")
