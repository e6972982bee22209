"""Renders a memory map as one self-contained HTML page: no network, no fonts, no scripts from elsewhere.

The text is part of the page, escaped. The heat map's data is a few run-length coded numbers per layer, whose size
depends on the cache's budget, not on the length of the text.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zsmerge_llm.errors import InputError
from zsmerge_llm.inspection.memory_map import LayerMap, MemoryMap
from zsmerge_llm.inspection.spans import (
    LEVELS,
    MARKER,
    PENDING,
    TokenTexts,
    decode_tokens,
    least_held,
    most_held,
    shade_levels,
    split_blocks,
    split_passages,
    token_styles,
)
from zsmerge_llm.paths import as_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LISTED_PASSAGES = 8
"""Passages in each list."""


def write_html(memory: MemoryMap, tokenizer: PreTrainedTokenizerBase, path: str | Path, title: str = "Session") -> Path:
    """Write the page to `path` in UTF-8, and return the path. Only the owner may read it.

    Raises:
        InputError: no path, or one that cannot be written to.
    """
    target = as_path(path, "The path of a page")
    page = render(memory, tokenizer, title)
    try:
        with open(target, "w", encoding="utf-8", newline="\n", opener=_private) as file:
            file.write(page)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}): give another path.") from error
    return target


def _private(path: str, flags: int) -> int:
    """Open a file for its owner alone, also where it was there before; what is no file keeps its mode."""
    handle = os.open(path, flags, 0o600)
    if hasattr(os, "fchmod") and stat.S_ISREG(os.fstat(handle).st_mode):
        with suppress(OSError):  # some file systems have no modes
            os.fchmod(handle, 0o600)
    return handle


def render(memory: MemoryMap, tokenizer: PreTrainedTokenizerBase, title: str = "Session") -> str:
    """Return the page as HTML.

    Args:
        tokenizer: that of the model which read the session.
        title: heading of the page.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    tokens = decode_tokens(tokenizer, memory.tokens)
    styles, passages = token_styles(memory, tokens), split_passages(memory, tokens)
    css, script = _asset("memory.css"), _asset("memory.js")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["integer"] = lambda number: f"{round(number):,}"
    page.filters["percent"] = _percent
    page.filters["megabytes"] = _megabytes
    return page.from_string(_asset("memory.html")).render(
        title=title,
        memory=memory,
        blocks=split_blocks(tokens, styles),
        legend=_legend(memory),
        least_held=[] if memory.is_complete else least_held(passages, LISTED_PASSAGES),
        most_held=[] if memory.is_complete else most_held(passages, LISTED_PASSAGES, memory),
        style=Markup(css),
        script=Markup(script),
        style_hash=_csp_hash(css),
        script_hash=_csp_hash(script),
        data=_script_data(memory, tokens, styles),
    )


def _script_data(memory: MemoryMap, tokens: TokenTexts, styles: Sequence[str]) -> dict[str, Any]:
    """Return the data of the page's script. The texts are in the page only."""
    kinds = [{MARKER: 1, PENDING: 2}.get(style, 0) for style in styles]
    return {
        "tokens": len(memory.tokens),
        "seen": memory.seen,
        "levels": LEVELS,
        "lengths": _varints(len(text.encode("utf-16-le")) // 2 for text in tokens.texts),
        "kinds": _run_lengths(np.array(kinds)),
        "layers": [_layer_data(layer, layer in memory.measured_layers) for layer in memory.layers],
    }


def _layer_data(layer: LayerMap, is_measured: bool) -> dict[str, Any]:
    return {
        "index": layer.index,
        "heads": layer.num_heads,
        "window": layer.sliding_window,
        "measured": is_measured,
        "held": _run_lengths(layer.verbatim_heads.numpy()),
        "merged": [[slot.position, slot.tokens] for slot in layer.merged_slots],
    }


def _legend(memory: MemoryMap) -> list[tuple[int, str, int]]:
    """Return (shade, meaning, number of tokens) for each shade."""
    counts = np.bincount(shade_levels(memory.verbatim_share.numpy()), minlength=LEVELS + 1)
    edges = [round(100 * level / (LEVELS - 1)) for level in range(1, LEVELS - 1)]
    between = [f"{low} to {high}%" for low, high in pairwise(edges)]
    names = ["no head", f"under {edges[0]}%", *between, f"over {edges[-1]}%", "every head"]
    return [(level, name, int(counts[level])) for level, name in enumerate(names)]


def _run_lengths(values: np.ndarray) -> str:
    """Encode runs of equal values as alternating lengths and values, in `_varints`."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1])
    lengths = np.diff(np.append(starts, len(values)))
    return _varints(np.stack([lengths, values[starts]], axis=1).flatten().tolist())


def _varints(values: Iterable[int]) -> str:
    """Encode non-negative integers in base64: seven bits per byte, lowest first; the eighth bit: more follow."""
    coded = bytearray()
    for value in values:
        while value > 127:
            coded.append(value & 127 | 128)
            value >>= 7
        coded.append(value)
    return base64.b64encode(coded).decode()


def _asset(name: str) -> str:
    return files("zsmerge_llm.inspection").joinpath("assets").joinpath(name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    """Return the hash by which a content security policy allows a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _percent(share: float) -> str:
    """0.374 → "37%". Only 0 is "0%" and only 1 is "100%"."""
    if 0 < share < 0.01:
        return "< 1%"
    return "> 99%" if 0.99 < share < 1 else f"{100 * share:.0f}%"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
