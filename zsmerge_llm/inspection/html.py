"""A memory map as one HTML page that needs nothing else: no network, no fonts, no scripts from elsewhere.

The text stands in the page, escaped; what hovering and the heat map need goes along as a few numbers per layer, whose
size follows the cache's budget rather than the length of the text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zsmerge_llm.inspection.memory_map import LayerMap, MemoryMap
from zsmerge_llm.inspection.spans import (
    LEVELS,
    MARKER,
    PENDING,
    Words,
    best,
    blocks,
    levels,
    passages,
    styles,
    words,
    worst,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LISTED = 8
"""Passages in each list."""


def write_html(found: MemoryMap, tokenizer: PreTrainedTokenizerBase, path: str | Path, title: str = "Session") -> Path:
    """Write the page to `path`, in UTF-8. Raises OSError."""
    target = Path(path)
    target.write_text(render(found, tokenizer, title), encoding="utf-8", newline="\n")
    return target


def render(found: MemoryMap, tokenizer: PreTrainedTokenizerBase, title: str = "Session") -> str:
    """The page as text.

    Args:
        tokenizer: the model's, which the session was read with.
        title: what the page is headed with.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    text = words(tokenizer, found.tokens)
    looks, every = styles(found, text), passages(found, text)
    style, script = _asset("memory.css"), _asset("memory.js")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["whole"] = lambda number: f"{round(number):,}"
    page.filters["percent"] = _percent
    page.filters["bytes"] = _bytes
    return page.from_string(_asset("memory.html")).render(
        title=title,
        found=found,
        blocks=blocks(text, looks),
        legend=_legend(found),
        lost=[] if found.whole else worst(every, LISTED),
        kept=[] if found.whole else best(every, LISTED, found),
        style=Markup(style),
        script=Markup(script),
        style_hash=_sha256(style),
        script_hash=_sha256(script),
        data=_data(found, text, looks),
    )


def _data(found: MemoryMap, text: Words, looks: Sequence[str]) -> dict[str, Any]:
    """What the page's script knows. Texts are only in the page itself."""
    kinds = [{MARKER: 1, PENDING: 2}.get(look, 0) for look in looks]
    return {
        "tokens": len(found.tokens),
        "seen": found.seen,
        "levels": LEVELS,
        "lengths": _numbers(len(piece.encode("utf-16-le")) // 2 for piece in text.pieces),
        "kinds": _pairs(np.array(kinds)),
        "layers": [_layer(layer, layer in found.judged) for layer in found.layers],
    }


def _layer(layer: LayerMap, judged: bool) -> dict[str, Any]:
    return {
        "index": layer.index,
        "heads": layer.heads,
        "window": layer.window,
        "judged": judged,
        "held": _pairs(layer.held.numpy()),
        "merged": [[slot.position, slot.tokens] for slot in layer.merged],
    }


def _legend(found: MemoryMap) -> list[tuple[int, str, int]]:
    """(level, what it means, tokens of it)."""
    counts = np.bincount(levels(found.share.numpy()), minlength=LEVELS + 1)
    edges = [round(100 * level / (LEVELS - 1)) for level in range(1, LEVELS - 1)]
    between = [f"{low} to {high}%" for low, high in pairwise(edges)]
    names = ["no head", f"under {edges[0]}%", *between, f"over {edges[-1]}%", "every head"]
    return [(level, name, int(counts[level])) for level, name in enumerate(names)]


def _pairs(values: np.ndarray) -> str:
    """Run-length coding: (how many, of which value) in turn, for `_numbers`."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1])
    lengths = np.diff(np.append(starts, len(values)))
    return _numbers(np.stack([lengths, values[starts]], axis=1).flatten().tolist())


def _numbers(values: Iterable[int]) -> str:
    """Whole numbers as base64 text: seven bits a byte, the lowest first, the eighth bit for "there is more"."""
    coded = bytearray()
    for value in values:
        while value > 127:
            coded.append(value & 127 | 128)
            value >>= 7
        coded.append(value)
    return base64.b64encode(coded).decode()


def _asset(name: str) -> str:
    return files("zsmerge_llm.inspection").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    """As a content security policy names what may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _percent(share: float) -> str:
    """0.374 → "37%". Nothing and all are told apart from nearly so."""
    if 0 < share < 0.01:
        return "< 1%"
    return "> 99%" if 0.99 < share < 1 else f"{100 * share:.0f}%"


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
