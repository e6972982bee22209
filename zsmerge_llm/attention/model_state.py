"""A model object belongs to its owner: what engines change of it, and how it is put back when the last one lets go."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from zsmerge_llm.attention import adapters
from zsmerge_llm.attention.backend import AttentionBackend
from zsmerge_llm.attention.interface import ATTENTION_INDEX, NAME
from zsmerge_llm.attention.recurrent import uninstall_mixers


class ModelState:
    """What a model was like: attention implementation, training mode of each module, and buffers of rotary modules."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._training = {module: module.training for module in model.modules()}
        self._attention = [(config, config._attn_implementation) for config in _configs(model)]
        self._rotary = [
            (module, {name: value for name, value in vars(module).items() if name[0] != "_"}, dict(module._buffers))
            for module in model.modules()
            if any(name.endswith("inv_freq") for name in module._buffers)
        ]

    def restore(self) -> None:
        """Put it back; an attention implementation that the owner has set since stays."""
        adapters.uninstall(self.model)
        uninstall_mixers(self.model)
        for module in self.model.modules():
            vars(module).pop(ATTENTION_INDEX, None)
        for config, attention in self._attention:
            if config._attn_implementation == NAME:
                config._attn_implementation_internal = attention
        for module in self.model.modules():
            module.training = self._training.get(module, module.training)
        for module, values, buffers in self._rotary:
            # Frequencies that a pass of an engine has changed are inference tensors, with which nobody can train.
            if any(buffer is not None and buffer.is_inference() for buffer in module._buffers.values()):
                vars(module).update(values)
                module._buffers.update(buffers)


class HeldModel:
    """A model that an engine uses, until `release`, or until nothing references `owner` any more.

    The first engine on a model records its state, and the last one puts it back.

    Args:
        owner: the engine. It is not kept alive.

    Attributes:
        backends: closed when the model is released. They must not reference the owner.
    """

    def __init__(self, owner: object, model: PreTrainedModel) -> None:
        self.backends: list[AttentionBackend] = []
        self._finalizer = weakref.finalize(owner, _release, _acquire(model), self.backends)
        self._finalizer.atexit = False

    def release(self) -> None:
        """Take away what the backends changed of the model, and let go of it. A second time, nothing happens."""
        self._finalizer()


class _Lease:
    """One model's state for as long as engines use it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.state = ModelState(model)
        self.users = 0


_LEASES: WeakKeyDictionary[PreTrainedModel, _Lease] = WeakKeyDictionary()
_LOCK = RLock()  # a finalizer may run in a thread that holds it


def _acquire(model: PreTrainedModel) -> _Lease:
    with _LOCK:
        while True:
            lease = _LEASES.get(model)
            if lease is None:
                lease = _LEASES[model] = _Lease(model)
            lease.users += 1
            if _LEASES.get(model) is lease:  # else a finalizer gave it back in between
                return lease


def _release(lease: _Lease, backends: Sequence[AttentionBackend]) -> None:
    for backend in backends:
        backend.close()
    with _LOCK:
        lease.users -= 1
        if not lease.users and _LEASES.pop(lease.state.model, None) is not None:
            with torch.inference_mode(False):
                lease.state.restore()


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    """Yield every config that has an attention implementation of its own, those of submodels included."""
    waiting: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        waiting += [getattr(config, name, None) for name in config.sub_configs]
