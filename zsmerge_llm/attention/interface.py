"""The seam with transformers: one attention function, registered as "zsmerge", that owns the compressed cache.

The engine calls the model with `use_cache=False` and one keyword, `zsmerge=ForwardPass(...)`, which travels through the
decoder layers to the function; no model class is subclassed and no attention code replaced. (A backend may still swap
the forward of a layer or a matrix for a faster one, reversibly: see `cpu.patches`.) What a model's layers need is seen
in a one-token trace, not guessed from its config, and what the cache cannot carry is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from zsmerge_llm.attention import adapters
from zsmerge_llm.attention.call import BELONGS_TO_ENGINE, AttentionCall, AttentionHandler, dense_attention
from zsmerge_llm.attention.offloading import input_device
from zsmerge_llm.attention.recurrent import CURRENT_PASS, cache_takers, find_mixers, install_mixers
from zsmerge_llm.errors import InputError, UnsupportedModelError, ZSMergeError
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec
from zsmerge_llm.kvcache.rope import Rotation, fit_rotation
from zsmerge_llm.kvcache.slots import LayerSpec

NAME = "zsmerge"
ATTENTION_INDEX = "zsmerge_attention_index"
"""Attribute of attention modules in models whose other layers do not attend: which of those that do a module is."""
IGNORED_KEYWORDS = {
    *("dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position"),
    "logits_to_keep",
}
"""Keywords of attention layers that do not change what the cache computes."""


def zsmerge_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    zsmerge: AttentionHandler | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend for one layer of the model: what transformers calls. Returns [B, T, Hq, D] and no weights.

    Raises:
        InputError: the model was called outside the engine.
        UnsupportedModelError: the layer asks for something the cache does not carry.
    """
    kind = type(module).__name__
    zsmerge = zsmerge or CURRENT_PASS.get()  # some models drop the keyword
    if zsmerge is None:
        raise InputError(f'{BELONGS_TO_ENGINE} For a while, model.set_attn_implementation("sdpa") does it too.')
    unknown = [name for name, given in others.items() if isinstance(given, Tensor) and name not in IGNORED_KEYWORDS]
    if unknown or attention_mask is not None:
        what = ", ".join(unknown) or "a mask of its own"
        raise UnsupportedModelError(f"{kind} passes {what} to its attention, which the compressed cache cannot carry.")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise UnsupportedModelError(f"{kind} attends in both directions; the compressed cache is for causal decoders.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    index: Any = getattr(module, ATTENTION_INDEX, module.layer_idx)
    call = AttentionCall(index, query, key, value, scale, sliding_window, softcap, s_aux)
    return zsmerge.attend(call).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, zsmerge_attention)


@dataclass
class _Trace(AttentionHandler):
    """Records what each layer asks for in a forward pass without a cache.

    calls: by the layer's index in the model. entered: the module that takes a cache and was entered last. modules:
    those that attended.
    """

    calls: dict[int, AttentionCall] = field(default_factory=dict)
    entered: Any = None
    modules: list[nn.Module] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> Tensor:
        if self.entered is not None:
            self.modules.append(self.entered)
        layer = call.layer if self.entered is None else self.entered.layer_idx
        if layer in self.calls:
            which = f"Layer {layer}" if isinstance(layer, int) and layer >= 0 else "A module that several layers share"
            raise UnsupportedModelError(
                f"{which} attends several times in a pass, and a layer of the cache serves one call. Use a model whose "
                "layers attend once."
            )
        self.calls[layer] = call
        return dense_attention(call, call.key, call.value, None)

    def enter(self, module: nn.Module, _: Any) -> None:
        """Take note of a module whose forward begins."""
        self.entered = module


@dataclass
class _Keys(AttentionHandler):
    """Records each layer's keys [B, H, D], while every token attends to itself alone, whatever its position."""

    keys: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        self.keys[call.layer] = call.key[:, :, 0]
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)


def forward(
    model: PreTrainedModel, handler: AttentionHandler, logits_to_keep: int | Tensor = 0, **inputs: Any
) -> Tensor:
    """Run the model with `handler` in every attention layer: logits [B, kept, vocab].

    logits_to_keep: the places whose logits are wanted, int [kept], or how many of the last ones; 0: all.

    Raises:
        InputError: the model was given another attention since, which would ignore the cache without a word.
    """
    if model.config._attn_implementation != NAME:
        raise InputError(
            f'{type(model).__name__} was set to attend by "{model.config._attn_implementation}" since. Call '
            f'model.set_attn_implementation("{NAME}") to use it through the engine again.'
        )
    keyword = adapters.keyword(model)
    token = CURRENT_PASS.set(handler)
    try:
        logits: Tensor = model(**inputs, logits_to_keep=logits_to_keep, use_cache=False, **{keyword: handler}).logits
    finally:
        CURRENT_PASS.reset(token)
    if isinstance(logits_to_keep, int):
        return logits[:, -logits_to_keep:]
    # Some models do not know the keyword, and return the logits of all tokens.
    return logits if logits.shape[1] == len(logits_to_keep) else logits[:, logits_to_keep]


class ModelLayers(NamedTuple):
    """What the layers of a model need of a cache: those that attend, and those that keep a state, in order."""

    attention: tuple[LayerSpec, ...]
    recurrent: tuple[RecurrentSpec, ...]

    @property
    def devices(self) -> list[torch.device]:
        """Where they compute: those that attend and, behind them, those that keep a state."""
        return [*(spec.device for spec in self.attention), *(spec.device for spec in self.recurrent)]


@torch.inference_mode()
def prepare_model(model: PreTrainedModel) -> ModelLayers:
    """Make `model` use the compressed cache, and return what each of its layers needs.

    Raises:
        UnsupportedModelError: an architecture or feature the cache cannot carry, by name.
    """
    adapters.check(model)
    adapters.install(model, zsmerge_attention, NAME)
    trace = _Trace()
    _run_one_token(model, trace, trace.enter)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    attending = sorted(trace.calls)
    recurrent: tuple[RecurrentSpec, ...] = ()
    others = sorted(set(range(config.num_hidden_layers)) - set(attending))
    if others or not set(kinds) <= {None, *adapters.ATTENTION_LAYERS}:
        mixers = find_mixers(model, trace.modules)
        recurrent = install_mixers(mixers, partial(_run_one_token, model))
    _check_layers(model, kinds, others, recurrent)
    if others:
        for module in trace.modules:
            setattr(module, ATTENTION_INDEX, attending.index(int(module.layer_idx)))  # type: ignore[arg-type]
    return ModelLayers(tuple(_spec(trace.calls[index], kinds[index], config) for index in attending), recurrent)


def _run_one_token(
    model: PreTrainedModel, handler: AttentionHandler, enter: Callable[[nn.Module, Any], None] | None = None
) -> None:
    """Read a single token without a cache.

    enter: called with each module that takes a cache, and its input, before its forward begins.

    Raises:
        UnsupportedModelError: the model cannot, for whatever reason.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    hooks = [] if enter is None else [module.register_forward_pre_hook(enter) for module in cache_takers(model)]
    try:
        forward(model, handler, input_ids=token, position_ids=token, logits_to_keep=1)
    except (ZSMergeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # weights of several devices or dtypes, hooks of others
        raise UnsupportedModelError(
            f"This {type(model).__name__} cannot read a single token ({str(error).strip().partition(chr(10))[0]}): "
            "make it work by itself first, or give its name or folder instead."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _check_layers(
    model: PreTrainedModel, kinds: Sequence[str | None], others: Sequence[int], recurrent: Sequence[RecurrentSpec]
) -> None:
    """Refuse layers that neither attend nor keep a state, though they seem to mix tokens."""
    if len(others) == len(kinds):
        raise UnsupportedModelError(
            f"No layer of {type(model).__name__} attends through transformers' attention interface: there is nothing "
            "that a compressed cache could hold. Use transformers itself."
        )
    known = {spec.layer for spec in recurrent}
    missing = [layer for layer in others if layer not in known and kinds[layer] not in adapters.TOKENWISE_LAYERS]
    if missing:
        raise UnsupportedModelError(
            f"Layers {missing} of {type(model).__name__} do not attend through transformers' attention interface, and "
            "keep no state in its cache: the compressed cache cannot carry them."
        )
    hidden = [layer for layer, kind in enumerate(kinds) if kind in adapters.RECURRENT_LAYERS and layer not in known]
    if hidden:
        raise UnsupportedModelError(
            f"Layers {hidden} of {type(model).__name__} keep a recurrent state within their attention, which the "
            "compressed cache cannot carry. Use another model."
        )


@torch.inference_mode()
def measure_rotations(model: PreTrainedModel, positions: Sequence[int]) -> list[Rotation | None]:
    """Find how each layer rotates its keys, from its keys at position 0 and at `positions`; None if unknown."""
    embedding: Any = model.get_input_embeddings()
    vocab, device = embedding.weight.shape[0], input_device(model)
    tokens = torch.linspace(0, vocab - 1, 8, device=device).long()[:, None]

    def keys(position: int) -> dict[int, Tensor]:
        seen = _Keys()
        at = torch.full_like(tokens, position)
        forward(model, seen, input_ids=tokens, position_ids=at, logits_to_keep=1)
        return seen.keys

    origin = keys(0)
    # Read out now: some models change their frequencies with the position.
    frequencies = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    frequencies = [each for index, each in enumerate(frequencies) if not _among(each, frequencies[:index])]
    moved = {position: keys(position) for position in positions}
    return [
        fit_rotation(origin[layer], {position: keys[layer] for position, keys in moved.items()}, frequencies)
        for layer in sorted(origin)
    ]


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(torch.equal(tensor.cpu(), other.cpu()) for other in others)


def _spec(call: AttentionCall, kind: str | None, config: Any) -> LayerSpec:
    window = call.window
    if kind == "sliding_attention" and window is None:
        window = config.sliding_window
    if kind == "full_attention":
        window = None
    return LayerSpec(
        query_heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        key_dim=call.key.shape[3],
        value_dim=call.value.shape[3],
        window=window,
        dtype=call.key.dtype,
        device=call.key.device,
        scaling=call.scaling,
        softcap=call.softcap,
    )
