"""What a saved cache belongs to, as digests: a cache of other weights would give answers that are wrong, not worse."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.sessions.session import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 64
"""Values looked at in each weight tensor: enough to tell models apart, in milliseconds for any size."""


def fingerprint(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: str | None, cache: CacheConfig
) -> Fingerprint:
    """Digests of a model's weights (a sample of each tensor), tokenizer and chat template, and the cache's settings."""
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(_sample(tensor))
    return Fingerprint(
        weights=weights.hexdigest(),
        tokenizer=tokenizer_digest(tokenizer),
        template=hashlib.sha256((template or "").encode()).hexdigest(),
        cache=json.dumps(asdict(cache), sort_keys=True),
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tells one tokenizer from another in a fingerprint."""
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(_words(tokenizer)):
        digest.update(piece.encode())  # all of it in one call of json.dumps would keep other threads waiting
    return digest.hexdigest()


def _words(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer as data, without the settings that mere use changes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def _sample(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():  # offloaded to disk: name and shape must do
        return b""
    flat = tensor.detach().reshape(-1)
    picked = flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE]
    return picked.cpu().contiguous().view(torch.uint8).numpy().tobytes()
