"""Peak memory of a forward pass above weights and caches, from shapes alone.

T = chunk + probe tokens, C = slots + stage + chunk (a chunk that does not fit stands beside copies of the slots), b =
bytes of an activation. While a text is read, the largest of these lives beside what all layers hold for the vote:

- vote: L · (T · H · (Dk + Dv) · b + 2 · 4 · H · C). Only a policy that votes, while the question is known.
- MLP: 3 · T · I · b + 4 · T · h · b + mask.
- attention: the layer's slots and their copies, queries, keys, values, output and mask. Where attention is not fused,
  also the logits and weights of all heads, 3 · 4 · Hq · T · C.
- scoring behind it: 4 · (2 · Hq + 2 · H) · m · C for the m queries that a policy scores with, and the keys in float32.
- mask: T · (C + probe) · b, three times while it is made, and for each query head where slots have biases of their own.

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
UNFUSED_COPIES, MASK_COPIES = 3, 3
"""Tensors of logits and weights, float32, that unfused attention holds at once; of a mask while it is made."""
HOST_ALLOCATOR, DEVICE_ALLOCATOR = 1.25, 1.2
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
    compressed = config.slots is not None
    votes = compressed and policy_of(config).votes and config.passage_share > 0
    probe = MAX_QUESTION_TOKENS if compressed and policy_of(config).uses_probe else 0
    total, size = chunk + probe, shape.dtype.itemsize
    held = mask = layer = making = 0
    for own, spec in zip(layer_configs(config, shape.specs), shape.specs, strict=True):
        slots = _slots(shape, own, chunk)
        if votes and spec.window is None:
            held += total * _kv_nbytes(spec) + 2 * FLOAT * spec.kv_heads * slots
        # Slots of different weight, and windows, give every head a mask of its own, made in float32.
        per_head = own.residual > 0 or spec.window is not None
        own_mask = total * (slots + probe) * size
        if per_head:
            own_mask = total * (slots + probe) * (spec.query_heads * size + 2 * spec.kv_heads * FLOAT)
        attention = _attention(shape, own, spec, chunk, probe, fused)
        mask, layer = max(mask, own_mask), max(layer, own_mask + attention)
        making = max(making, MASK_COPIES * total * (slots + probe) * size + attention // 2)
    mlp = 3 * total * shape.intermediate * size + 4 * total * shape.hidden * size
    return max(held + mlp + mask, held + layer, making)


def _attention(shape: ModelShape, config: CacheConfig, spec: LayerSpec, chunk: int, probe: int, fused: bool) -> int:
    """Return the bytes of one layer's attention and of the scoring behind it, without the mask."""
    size, slots, total = shape.dtype.itemsize, _slots(shape, config, chunk), chunk + probe
    copies = slots * (_kv_nbytes(spec) + spec.kv_heads * PER_SLOT_NBYTES)
    tokens = total * (spec.query_heads * (spec.key_dim + spec.value_dim) * size + 2 * _kv_nbytes(spec))
    live = copies + tokens + 2 * total * shape.hidden * size
    with_probe = (slots + probe) * _kv_nbytes(spec) if probe else 0
    attending = with_probe + total * spec.query_heads * spec.key_dim * size
    if spec.softcap is not None or shape.sinks or not fused:
        attending += UNFUSED_COPIES * spec.query_heads * total * slots * FLOAT
    return live + max(attending, _scoring(config, spec, slots, chunk, probe))


def _scoring(config: CacheConfig, spec: LayerSpec, slots: int, new: int, probe: int) -> int:
    """Return the bytes of what a layer's policy computes behind attention: logits and weights in float32, for its probe
    and the newest queries, or for every query where it observes every pass."""
    if config.slots is None:
        return 0
    policy = policy_of(config)
    queries = max(probe, config.num_recorded_queries)
    if policy.observes_every_pass and not policy.records_queries:
        queries = new
    weights = (2 if spec.softcap is None else UNFUSED_COPIES) * spec.query_heads + 2 * spec.kv_heads
    in_float = slots * spec.kv_heads * spec.key_dim * FLOAT
    return queries * slots * weights * FLOAT + in_float


def _decoding(shape: ModelShape, config: CacheConfig) -> int:
    """Return the bytes of a decode step: logits of a speculative pass, and the compression of one layer."""
    rows = 1 + MAX_DRAFT_TOKENS
    compressed = 0
    for own, spec in zip(layer_configs(config, shape.specs), shape.specs, strict=True):
        slots = _slots(shape, own, rows)
        copies = slots * (_kv_nbytes(spec) + spec.kv_heads * PER_SLOT_NBYTES)
        compressed = max(compressed, 2 * copies, _scoring(own, spec, slots, rows, 0))
    return rows * shape.vocab * (shape.dtype.itemsize + FLOAT) + compressed


def _slots(shape: ModelShape, config: CacheConfig, new: int) -> int:
    """Return the most slots that a layer's pass attends to; of the exact cache, those of the context window."""
    if config.slots is None:
        return (shape.window or config.stage) + new
    return config.slots + config.stage + new


def _kv_nbytes(spec: LayerSpec) -> int:
    """Return the bytes of one token's keys and values in one layer."""
    return spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize
