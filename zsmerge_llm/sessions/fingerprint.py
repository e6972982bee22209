"""Fingerprints of what a saved cache belongs to: with other weights its answers would be wrong, not just worse."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsmerge_llm.attention.offloading import offloaded_tensor
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.models.integrity import remembered_digest
from zsmerge_llm.models.lora import AdapterState
from zsmerge_llm.paths import cache_folder
from zsmerge_llm.sessions.session import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 1 << 26
"""Bytes that are hashed at a time, so that of a GPU's weights no more are copied to host memory."""


def fingerprint(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    cache: CacheConfig,
    weights_digest: str | None = None,
) -> Fingerprint:
    """Return digests of a model's weights, tokenizer and chat template, and the cache's configuration.

    Every byte of the weights counts. Adapters count as weights, and so does which of them are active, merged or
    disabled, and how they are scaled. So does the code of a model that is not transformers' own.

    Args:
        weights_digest: of the files that the weights were loaded from; None hashes the model's own tensors.
    """
    weights = hashlib.sha256((weights_digest or "").encode())
    # Not state_dict(): bitsandbytes 0.50 unpacks its 4-bit weights on a CPU for it, and they are unusable afterwards.
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    parts = [(name, part) for name, tensor in sorted(tensors.items()) for part in _parts(tensor)]
    for name, part in parts:
        weights.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
    if weights_digest is None:
        own = {id(part): part for _, part in parts}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases Python's lock
            digests = dict(zip(own, pool.map(_digest, own.values()), strict=True))
        for name, part in parts:
            weights.update(_offloaded_digest(model, name) if part.is_meta else digests[id(part)])
    weights.update(AdapterState(model).text().encode())
    weights.update(_foreign_code(model).encode())
    return Fingerprint(
        weights=weights.hexdigest(),
        tokenizer=tokenizer_digest(tokenizer),
        template=hashlib.sha256((template or "").encode()).hexdigest(),
        cache=json.dumps(cache.to_dict(), sort_keys=True),
    )


def _foreign_code(model: nn.Module) -> str:
    """Return a model's class and the text of its file; "" for a class of transformers."""
    kind = type(model)
    if kind.__module__.partition(".")[0] == "transformers":
        return ""
    try:
        return f"{kind.__qualname__} {inspect.getsource(sys.modules[kind.__module__])}"
    except (OSError, TypeError, KeyError):  # made without a file
        return kind.__qualname__


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest that tells one tokenizer from another in a fingerprint.

    Truncation and padding, which mere use changes, are no part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _json_digest(sorted(tokenizer.get_vocab().items()))
    text = backend.to_str()
    find = partial(_json_digest_without_settings, text)
    return remembered_digest(text, find, cache_folder())  # parsing and sorting it takes up to two seconds


def _json_digest_without_settings(tokenizer_json: str) -> str:
    return _json_digest({**json.loads(tokenizer_json), "truncation": None, "padding": None})


def _json_digest(value: Any) -> str:
    digest = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(value):
        digest.update(piece.encode())  # all of it in one call of json.dumps would keep other threads waiting
    return digest.hexdigest()


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors of a weight: those inside a tensor subclass, such as torchao's codes and scales."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in _parts(getattr(tensor, name))]


def _offloaded_digest(model: nn.Module, name: str) -> bytes:
    with offloaded_tensor(model, name) as tensor:
        return _digest(tensor)


def _digest(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's bytes, in the order of its elements."""
    digest = hashlib.sha256()
    if not tensor.is_meta and tensor.numel():
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, len(content), BLOCK):
            digest.update(content[start : start + BLOCK].cpu().numpy().data)
    return digest.digest()
