"""Recurrent layers (gated delta nets, state spaces, short convolutions) on states that belong to the engine's cache.

The module that mixes a layer's tokens is given another `forward`, which hands its input to the pass (`RecurrentCall`).
The pass runs the module on the state of the right rows, as many times as it needs: padding, a probe and a rejected
draft must leave no trace in a state, which cannot forget a token. What the module reads and writes is `MixerCache`, by
the methods that transformers' own caches have; which modules do, is seen in a one-token pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.attention.call import (
    BELONGS_TO_ENGINE,
    AttentionCall,
    AttentionHandler,
    RecurrentCall,
    dense_attention,
)
from zsmerge_llm.errors import InputError, UnsupportedModelError
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec, RecurrentState, StateTensor

CURRENT_PASS: ContextVar[AttentionHandler | None] = ContextVar("current_pass", default=None)
"""The pass that runs: some models do not hand keywords on to their recurrent layers, or to their attention."""
CACHE_NAMES = ("cache", "cache_params", "past_key_values")
"""What transformers' releases call the cache that a mixing module is given."""

PASS_ARGUMENTS = ("attention_mask", "zsmerge")
CHECK_TOKENS = 8


class MixerCache:
    """What a mixing module takes for transformers' cache: the state of its own layer, changed in place.

    A state that nothing was read into is all zeros, which is what a module starts from by itself.
    """

    def __init__(self, state: RecurrentState) -> None:
        self._tensors = state.tensors

    @property
    def is_empty(self) -> bool:
        """Whether nothing was read into the state."""
        return not any(bool(tensor.any()) for tensor in self._tensors.values())

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the newest inputs of a convolution, [B, D, K]."""
        return self._tensors.get(f"conv.{state_idx}")

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the sum over all tokens, [B, ...]."""
        return self._tensors.get(f"recurrent.{state_idx}")

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Take new inputs [B, D, T] in; return them behind those that were held, [B, D, K + T]."""
        held = self._tensors[f"conv.{state_idx}"]
        joined = torch.cat([held, conv_states.to(held.dtype)], dim=-1)
        held.copy_(joined[..., -held.shape[-1] :])
        return joined

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Replace the sum over all tokens; return the one that is held."""
        held = self._tensors[f"recurrent.{state_idx}"]
        return held.copy_(recurrent_states)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """Return True: there always is a state."""
        return True

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """Return the sum over all tokens, [B, ...]: MiniMax's name of it."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Replace the sum over all tokens: MiniMax's name of it."""
        self.update_recurrent_state(linear_cache, layer_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: rejected drafts are the pass's business."""
        return False


class _StateTrace:
    """Records which states a mixing module keeps. It is given as an empty cache."""

    def __init__(self) -> None:
        self.tensors: dict[str, StateTensor] = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Return None: there is none yet."""

    get_recurrent_state = get_linear_cache = get_conv_state

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self._note(f"conv.{state_idx}", (*conv_states.shape[1:-1], size), conv_states)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._note(f"recurrent.{state_idx}", tuple(recurrent_states.shape[1:]), recurrent_states)
        return recurrent_states

    def update(self, *_: Any, **__: Any) -> None:
        raise UnsupportedModelError(
            "A layer asks its cache for keys and values, and does not attend through transformers' attention "
            "interface, through which the compressed cache works. Use another model."
        )

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def _note(self, name: str, shape: tuple[int, ...], tensor: Tensor) -> None:
        self.tensors[name] = StateTensor(name, shape, tensor.dtype)


class MixerForward:
    """The `forward` of a mixing module while its model belongs to an engine.

    Attributes:
        layer: its index in the model. index: of its state in a cache, and spec: of that state, as soon as known.
        resumes: whether the module goes on from a state when it gets several tokens at once. Mamba 1 in transformers
            does so with one token only.
    """

    def __init__(self, module: nn.Module, keyword: str) -> None:
        self.layer, self.index = int(module.layer_idx), 0  # type: ignore[arg-type]
        self.resumes = True
        self.spec: RecurrentSpec | None = None
        self._num_results: int | None = None  # of a module that returns a tuple
        self._module, self._keyword = module, keyword
        self._replaced = vars(module).get("forward")  # one that somebody else set: accelerate, for example
        self._original: Callable[..., Any] = module.forward
        self._names = list(inspect.signature(self._original).parameters)[1:]  # behind the input

    def __call__(self, hidden_states: Tensor, *more: Any, **given: Any) -> Any:
        """Mix the tokens [B, T, D] of a layer, by way of the pass.

        more, given: whatever else the module takes. What it returns beside its output is None.

        Raises:
            InputError: the model was called outside the engine.
        """
        handler = CURRENT_PASS.get()
        if handler is None:
            raise InputError(BELONGS_TO_ENGINE)
        given |= zip(self._names, more, strict=False)
        # The cache and the mask are the engine's business, not the model's.
        others = {name: value for name, value in given.items() if name not in (*CACHE_NAMES, *PASS_ARGUMENTS)}
        if "attention_mask" in given:
            others["attention_mask"] = None

        def mix(hidden: Tensor, cache: Any) -> Tensor:
            mixed = self._original(hidden, **{self._keyword: cache}, **others)
            if not isinstance(mixed, tuple):
                return mixed
            self._num_results = len(mixed)
            return mixed[0]

        def run(hidden: Tensor, cache: Any) -> Tensor:
            if self.resumes or hidden.shape[1] == 1 or cache is None or cache.is_empty:
                return mix(hidden, cache)
            return torch.cat([mix(token, cache) for token in hidden.split(1, dim=1)], dim=1)

        output = handler.mix(RecurrentCall(self.layer, self.index, hidden_states, run))
        return output if self._num_results is None else (output, *[None] * (self._num_results - 1))

    def uninstall(self) -> None:
        """Give the module back the forward it had."""
        if self._replaced is None:
            del self._module.forward
        else:
            self._module.forward = self._replaced


@dataclass
class _Recorder(AttentionHandler):
    """Runs every mixing module without a state, and records what it would keep, by the layer's index."""

    specs: dict[int, RecurrentSpec] = field(default_factory=dict)
    resuming: dict[int, bool] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        return dense_attention(call, call.key, call.value, None)

    def mix(self, call: RecurrentCall) -> Tensor:
        if call.layer in self.specs:
            raise UnsupportedModelError(f"Layer {call.layer} has several recurrent parts, which cannot be told apart.")
        trace = _StateTrace()
        mixed = call.run(call.hidden, trace)
        spec = RecurrentSpec(call.layer, tuple(trace.tensors.values()), call.hidden.device)
        self.specs[call.layer] = spec
        self.resuming[call.layer] = not spec.tensors or call.hidden.is_meta or _resumes(call, spec)
        return mixed


def _resumes(call: RecurrentCall, spec: RecurrentSpec) -> bool:
    """Return whether a module goes on from a state with several tokens at once; if not, it does with one.

    Random tokens are mixed at once, and again in two parts, of which the second must come out as before: to rounding,
    and about as near to it as when the tokens of the second part come one by one.

    Raises:
        UnsupportedModelError: the module does neither.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, CHECK_TOKENS, call.hidden.shape[2], generator=generator).to(call.hidden)
    half = CHECK_TOKENS // 2
    whole = call.run(hidden, None)[:, half:].float()

    def error(*sizes: int) -> float:
        cache = MixerCache(RecurrentState(spec, 1))
        parts = [call.run(part, cache) for part in hidden.split([half, *sizes], dim=1)]
        return float((torch.cat(parts[1:], dim=1).float() - whole).norm() / whole.norm().clamp(min=1e-9))

    rounding = max(1e-3, 16 * torch.finfo(call.hidden.dtype).eps)
    one_by_one, at_once = error(*[1] * (CHECK_TOKENS - half)), error(CHECK_TOKENS - half)
    if one_by_one > rounding:
        raise UnsupportedModelError(f"Layer {call.layer} does not go on from the state that it keeps in its cache.")
    return at_once <= min(rounding, 4 * one_by_one + 1e-5)


def cache_takers(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer that take a cache: those that attend, keep a state, or hold such a module."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and _takes_cache(module)]


def find_mixers(model: PreTrainedModel, attending: Collection[nn.Module]) -> list[nn.Module]:
    """Return the modules that may keep a recurrent state: they take a cache, and neither attend nor hold such a module.

    attending: those that called the attention function.
    """
    taking = cache_takers(model)
    known = {*attending, *taking}
    return [
        module
        for module in taking
        if module not in attending and not any(part in known for part in module.modules() if part is not module)
    ]


def install_mixers(mixers: Sequence[nn.Module], run: Callable[[AttentionHandler], None]) -> tuple[RecurrentSpec, ...]:
    """Give mixing modules another forward, and return what each keeps, in order of the layers.

    Args:
        mixers: the candidates; those that keep nothing are left alone.
        run: reads one token with a handler.
    """
    forwards = [_installed(module) or MixerForward(module, _cache_keyword(module) or "") for module in mixers]
    for module, forward in zip(mixers, forwards, strict=True):
        module.forward = forward
    recorder = _Recorder()
    run(recorder)
    found = sorted(layer for layer, spec in recorder.specs.items() if spec.tensors)
    for forward in forwards:
        if forward.layer in found:
            forward.index, forward.resumes = found.index(forward.layer), recorder.resuming[forward.layer]
            forward.spec = recorder.specs[forward.layer]
        else:
            forward.uninstall()
    return tuple(recorder.specs[layer] for layer in found)


def uninstall_mixers(model: PreTrainedModel) -> None:
    """Give all mixing modules their own forward back."""
    for forward in mixers_of(model):
        forward.uninstall()


def mixers_of(model: nn.Module) -> list[MixerForward]:
    """Return the forwards of recurrent layers that belong to the engine."""
    return [forward for module in model.modules() if (forward := _installed(module)) is not None]


def _installed(module: nn.Module) -> MixerForward | None:
    """Return the module's forward, if it is the engine's."""
    forward = vars(module).get("forward")
    return forward if isinstance(forward, MixerForward) else None


def _takes_cache(module: nn.Module) -> bool:
    return _installed(module) is not None or _cache_keyword(module) is not None


def _cache_keyword(module: nn.Module) -> str | None:
    """Return the name of the argument that takes a cache; None if there is none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)
