"""Fingerprints of what a saved cache belongs to: with other weights its answers would be wrong, not just worse."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.models.lora import AdapterState
from zsmerge_llm.sessions.session import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLED_VALUES = 64
"""Values hashed of each weight tensor: enough to tell models apart, in milliseconds for any size."""


def fingerprint(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, template: str | None, cache: CacheConfig
) -> Fingerprint:
    """Return digests of a model's weights (sampled), tokenizer and chat template, and the cache's configuration.

    Adapters count as weights, and so does which of them are active, merged or disabled, and how they are scaled.
    """
    weights = hashlib.sha256()
    # Not state_dict(): bitsandbytes 0.50 unpacks its 4-bit weights on a CPU for it, and they are unusable afterwards.
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in sorted(tensors.items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in _parts(tensor):
            weights.update(_sample(part))
    weights.update(AdapterState(model).text().encode())
    return Fingerprint(
        weights=weights.hexdigest(),
        tokenizer=tokenizer_digest(tokenizer),
        template=hashlib.sha256((template or "").encode()).hexdigest(),
        cache=json.dumps(cache.to_dict(), sort_keys=True),
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest that tells one tokenizer from another in a fingerprint."""
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(_tokenizer_data(tokenizer)):
        digest.update(piece.encode())  # all of it in one call of json.dumps would keep other threads waiting
    return digest.hexdigest()


def _tokenizer_data(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the tokenizer as JSON values, without the settings that mere use changes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return sorted(tokenizer.get_vocab().items())
    return {**json.loads(backend.to_str()), "truncation": None, "padding": None}


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors of a weight: those inside a tensor subclass, such as torchao's codes and scales."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in _parts(getattr(tensor, name))]


def _sample(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():  # offloaded to disk: name and shape must do
        return b""
    flat = tensor.detach().reshape(-1)
    picked = flat[:: max(1, len(flat) // SAMPLED_VALUES)][:SAMPLED_VALUES]
    return picked.cpu().contiguous().view(torch.uint8).numpy().tobytes()
