"""Peak memory of a forward pass above weights and caches, from shapes alone.

T = chunk + probe tokens, C = slots + stage + chunk (a chunk that does not fit stands beside copies of the slots), b =
bytes of an activation. While a text is read, the largest of these lives beside what all layers hold for the vote:

- vote: L · (T · H · (Dk + Dv) · b + 2 · 4 · H · C). Only a policy that votes, while the question is known.
- MLP: 3 · T · I · b + 4 · T · h · b + mask.
- attention: the layer's copies of slots, queries, keys, values, output, and mask. Where attention is not fused, also
  the logits and weights of all heads.
- mask: T · (C + probe) · b, and once for each query head where slots have biases of their own.

A decode step takes the logits of a speculative pass, in the model's dtype and in float32, and the copies of one layer
that is compressed. All of it grows with chunk and budget, none of it with the length of a text.
"""

from __future__ import annotations

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.kvcache.layer_cache import layer_configs
from zsmerge_llm.kvcache.policies import policy_of
from zsmerge_llm.kvcache.slots import LayerSpec
from zsmerge_llm.planning.shape import ModelShape
from zsmerge_llm.retrieval.query_probe import MAX_QUESTION_TOKENS

FLOAT = 4
"""Bytes of scores, positions and multiplicities."""
PER_SLOT_NBYTES = 4 * FLOAT
"""Bytes of a slot beside its key and value."""
UNFUSED_COPIES = 3
"""Tensors of logits and weights, float32, that unfused attention holds at once."""
HOST_ALLOCATOR, DEVICE_ALLOCATOR = 1.5, 1.2
"""Memory that an allocator takes from the system for a byte in use at the peak. The host's was measured with glibc."""


def workspace_nbytes(shape: ModelShape, config: CacheConfig, chunk: int, *, on_host: bool, dequantized: int = 0) -> int:
    """Return the peak of a pass above weights and caches, in bytes.

    Args:
        chunk: tokens read in one pass.
        on_host: whether the model computes on the CPU, where attention is fused for every model without softcap and
            sinks, and does not copy keys for the heads of a group.
        dequantized: weights of a quantized matrix that are dequantized at once.
    """
    tokens = live_nbytes(shape, config, chunk, fused=on_host)
    return int((tokens + dequantized * shape.dtype.itemsize) * (HOST_ALLOCATOR if on_host else DEVICE_ALLOCATOR))


def live_nbytes(shape: ModelShape, config: CacheConfig, chunk: int, *, fused: bool) -> int:
    """Return the bytes of all tensors that live at the peak of a pass."""
    return max(_reading(shape, config, chunk, fused), _decoding(shape, config))


def _reading(shape: ModelShape, config: CacheConfig, chunk: int, fused: bool) -> int:
    votes = config.slots is not None and policy_of(config).votes and config.passage_share > 0
    probe = MAX_QUESTION_TOKENS if config.slots is not None and policy_of(config).uses_probe else 0
    total, size = chunk + probe, shape.dtype.itemsize
    held, layer, mask = 0, 0, 0
    for own, spec in zip(layer_configs(config, shape.specs), shape.specs, strict=True):
        slots = _slots(shape, own, chunk)
        if votes and spec.window is None:
            held += total * _kv_nbytes(spec) + 2 * FLOAT * spec.kv_heads * slots
        # Slots of different weight, and windows, give every head a mask of its own, made in float32.
        own_mask = total * (slots + probe) * size
        if own.residual or spec.window is not None:
            own_mask = total * (slots + probe) * (spec.query_heads * size + 2 * spec.kv_heads * FLOAT)
        mask = max(mask, own_mask)
        layer = max(layer, own_mask + _attention(shape, own, spec, total, slots, fused))
    mlp = 3 * total * shape.intermediate * size + 4 * total * shape.hidden * size
    return held + max(mlp + mask, layer)


def _attention(shape: ModelShape, config: CacheConfig, spec: LayerSpec, total: int, slots: int, fused: bool) -> int:
    """Return the bytes of one layer's attention: copies of slots, queries, keys, values, output, the stream."""
    size = shape.dtype.itemsize
    copies = slots * (_kv_nbytes(spec) + spec.kv_heads * PER_SLOT_NBYTES)
    queries = total * spec.query_heads * (2 * spec.key_dim + spec.value_dim) * size
    stream = 3 * total * shape.hidden * size
    work = copies + queries + 2 * total * _kv_nbytes(spec) + stream
    if spec.softcap is not None or shape.sinks or not fused:
        return work + UNFUSED_COPIES * spec.query_heads * total * slots * FLOAT
    scoring = UNFUSED_COPIES * spec.query_heads * max(config.num_recorded_queries, 0) * slots * FLOAT
    return max(work, copies + scoring + stream)


def _decoding(shape: ModelShape, config: CacheConfig) -> int:
    """Return the bytes of a decode step: logits of a speculative pass, and the compression of one layer."""
    rows = 1 + MAX_DRAFT_TOKENS
    compressed = 0
    for own, spec in zip(layer_configs(config, shape.specs), shape.specs, strict=True):
        slots = _slots(shape, own, rows)
        scoring = UNFUSED_COPIES * spec.query_heads * max(own.num_recorded_queries, rows) * slots * FLOAT
        compressed = max(compressed, slots * (_kv_nbytes(spec) + spec.kv_heads * PER_SLOT_NBYTES), scoring)
    return rows * shape.vocab * (shape.dtype.itemsize + FLOAT) + compressed


def _slots(shape: ModelShape, config: CacheConfig, new: int) -> int:
    """Return the most slots that a layer's pass attends to; of the exact cache, those of the context window."""
    if config.slots is None:
        return (shape.window or config.stage) + new
    return config.slots + config.stage + new


def _kv_nbytes(spec: LayerSpec) -> int:
    """Return the bytes of one token's keys and values in one layer."""
    return spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize
