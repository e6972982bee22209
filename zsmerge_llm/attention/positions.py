"""How many positions a model was trained on, whether it can read beyond them, and models that count them alone."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import Tensor, nn

from zsmerge_llm.errors import UnsupportedModelError

POSITION_TABLE = re.compile(r"(^|\.)(wpe|(embed_)?positions?(_embed(ding)?s?)?|pos_(embed|encoding|emb))(\.weights?)?$")
"""Names of tables with one row a position."""
SPARE_ROWS = 8
"""Rows that such a table may have beyond the window: OPT's and BART's have two."""
LENGTH_DEPENDENT = {"longrope": "longrope positions", "dynamic": "dynamic NTK positions"}
"""Rotary types that rotate by other frequencies beyond the window, those that a key was cached with included."""


def context_window(config: Any) -> int | None:
    """Return the positions that a model was trained on, where its config says so.

    With longrope, those of its short factors. Beyond them every key of a text would have to be rotated by other
    frequencies than those that it was cached with.
    """
    text = config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    limits += [each.get("original_max_position_embeddings") for each in _rotary_settings(text) if _is_longrope(each)]
    return min((limit for limit in limits if limit), default=None)


def ends_at_window(model: nn.Module) -> str | None:
    """Name what keeps a model from reading beyond its window even with an exact cache; None: nothing does."""
    config: Any = model.config
    kinds = {str(each.get("rope_type")) for each in _rotary_settings(config.get_text_config())}
    if found := [name for kind, name in LENGTH_DEPENDENT.items() if kind in kinds]:
        return found[0]
    return "a table of positions" if _has_table(model) else None


def uses_alibi(config: Any) -> bool:
    """Return whether a text config asks for biases that grow with the distance, in place of positions."""
    parts = (config, getattr(config, "attn_config", None))
    asked = any(getattr(part, "alibi", False) for part in parts)
    return asked or config.model_type == "bloom" or getattr(config, "position_embedding_type", None) == "alibi"


def check_positions(model: nn.Module) -> None:
    """Refuse models that count positions themselves: they would take each pass for the beginning of a text.

    Raises:
        UnsupportedModelError
    """
    given = "position_ids" in inspect.signature(type(model).forward).parameters
    counts = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    if counts or (not given and _has_table(model)):
        raise UnsupportedModelError(
            f"{type(model).__name__} counts positions itself, from the tokens of a pass: it cannot read a text in "
            "parts. Use a model with rotary positions."
        )


def _has_table(model: nn.Module) -> bool:
    """Return whether the language model has a table with one row a position; those of images have other lengths."""
    config: Any = model.config
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    tables = [tensor for name, tensor in _tensors(model) if tensor.dim() == 2 and POSITION_TABLE.search(name)]
    return window is not None and any(window <= len(table) <= window + SPARE_ROWS for table in tables)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _rotary_settings(config: Any) -> list[dict[str, Any]]:
    """Return the rotary settings of a text config: one for all layers, or one a kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    return [each for each in settings.values() if isinstance(each, dict)] or [settings]


def _is_longrope(settings: dict[str, Any]) -> bool:
    return settings.get("rope_type") == "longrope"
