"""How far each kind of positions reads: tiny models with a window of few tokens, read beyond its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.families.checks import TOLERANCE, tiny_model
from tests.families.tiny_configs import tiny_config
from tests.support.tiny_models import tokens
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ContextLimitError, UnsupportedModelError

WINDOW = 128
COMPRESSED = CacheConfig(slots=32, recent=8, stage=4)
THETA = {"rope_theta": 10_000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": WINDOW}


@dataclass(frozen=True)
class PositionKind:
    """Positions of a kind: a family that has them, and settings that ask for them."""

    name: str
    family: str
    settings: dict[str, Any]


def _rotary(name: str, kind: str, family: str = "llama", **settings: Any) -> PositionKind:
    return PositionKind(name, family, {"rope_parameters": {"rope_type": kind, **THETA, **settings}})


KINDS = [
    _rotary("rotary", "default"),
    _rotary("linear scaling", "linear", factor=4.0),
    _rotary("llama3 scaling", "llama3", **LLAMA3),
    _rotary("YaRN", "yarn", **YARN),
    _rotary("dynamic NTK", "dynamic", factor=4.0),
    _rotary("longrope", "longrope", "phi3", **LONGROPE),
    PositionKind("partial rotary", "glm", {}),
    PositionKind("rotary of several axes", "qwen2_vl", {}),
    PositionKind("rotary, two kinds of layers", "gemma3_text", {}),
    PositionKind("none in some layers", "smollm3", {"no_rope_layers": [1, 0]}),
    PositionKind("learned table", "gpt2", {}),
    PositionKind("learned table with an offset", "opt", {}),
    PositionKind("table of sines", "ctrl", {}),
    PositionKind("ALiBi", "falcon", {"alibi": True}),
    PositionKind("ALiBi, own attention", "bloom", {}),
    PositionKind("counted by the model", "bart", {}),
]


@dataclass(frozen=True)
class PositionRow:
    """What reading with one kind of positions gives.

    within: an exact cache up to the window. exact: an exact cache beyond it. compressed: a compressed one.
    """

    kind: PositionKind
    within: str
    exact: str
    compressed: str


def check_positions(kind: PositionKind) -> PositionRow:
    """Read to the window and beyond it, and say what came of it."""
    window = dict.fromkeys(("max_position_embeddings", "n_positions"), WINDOW)
    own = tiny_config(kind.family)
    settings = {name: size for name, size in window.items() if hasattr(own, name)}
    nested = {"text_config": settings} if own.get_text_config() is not own else settings
    model = tiny_model(tiny_config(kind.family, **{**nested, **kind.settings}))
    try:
        Engine(model, compile=False).close()
    except UnsupportedModelError as error:
        return PositionRow(kind, f"refused: {error}", "", "")
    return PositionRow(kind, _exact(model, WINDOW), _exact(model, WINDOW + 40), _compressed(model))


def _exact(model: PreTrainedModel, length: int) -> str:
    """Compare an exact cache with transformers' forward pass over the whole text."""
    engine = Engine(model, CacheConfig.full(), chunk=32, compile=False)
    cache = engine.new_cache()
    try:
        found = engine.read(cache, tokens(length))
    except ContextLimitError:
        return "ends with an error"
    finally:
        engine.close()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens(length)]), use_cache=False).logits[0, -1].float()
    off = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
    return "as transformers" if off <= TOLERANCE else f"off by {off:.2g}"


def _compressed(model: PreTrainedModel) -> str:
    engine = Engine(model, COMPRESSED, chunk=32, compile=False)
    cache = engine.new_cache()
    try:
        logits = engine.read(cache, tokens(4 * WINDOW))
    except ContextLimitError:
        return "ends with an error"
    finally:
        engine.close()
    assert torch.isfinite(logits).all()
    return "goes on, re-mapped" if cache.position_maps[0].offset else "goes on"
