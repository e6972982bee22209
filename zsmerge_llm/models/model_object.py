"""A model object that a user hands in: what it must be, and what is taken off around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zsmerge_llm.attention.offloading import names_without_data
from zsmerge_llm.errors import ConfigError, LoadError, UnsupportedModelError
from zsmerge_llm.models.lora import without_wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRAPPERS = ("DataParallel", "DistributedDataParallel", "OptimizedModule")
"""Classes of torch around one model that computes the same without them: `torch.compile` makes the last."""
REMEDY = "give the model's name or folder instead"


def checked_model(model: Any) -> PreTrainedModel:
    """Return the transformers model inside of an object, adapters included.

    Raises:
        ConfigError: no transformers model, or one inside of a wrapper that may change it.
        UnsupportedModelError: a wrapper of peft that computes, or weights that torch.ao has quantized.
        LoadError: some weights have no data.
    """
    from transformers import PreTrainedModel

    inner = _unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        kind = type(inner).__name__
        hint = f": give the transformers model inside of the {kind}" if _holds_model(inner) else ""
        raise ConfigError(f"model must be a name, a path or a transformers model, not {kind}{hint}.")
    for name, module in inner.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise UnsupportedModelError(
                f"{name} of the {type(inner).__name__} is quantized by torch.ao: {REMEDY}, with quantization='int8'."
            )
    if missing := names_without_data(inner):
        raise LoadError(
            f"{len(missing)} weights of the {type(inner).__name__} ({missing[0]}, ...) are on the meta device and have "
            f"no data: load them, or {REMEDY}."
        )
    return inner


def _unwrapped(model: Any) -> Any:
    inner = without_wrapper(model)
    if type(inner).__name__ in WRAPPERS and type(inner).__module__.startswith("torch."):
        return _unwrapped(next(inner.children()))
    return inner


def _holds_model(model: Any) -> bool:
    from torch import nn
    from transformers import PreTrainedModel

    return isinstance(model, nn.Module) and any(isinstance(module, PreTrainedModel) for module in model.modules())
