"""Folders with a LoRA adapter of peft: the model that it was made for, and that model with the adapter merged in."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import (
    ConfigError,
    CorruptModelError,
    MissingDependencyError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from zsmerge_llm.models.integrity import file_digests, read_json
from zsmerge_llm.models.lora import without_wrapper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model.

    Raises:
        UnsupportedModelError: it holds both.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    if (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"The folder {folder} holds a model and a LoRA adapter: move {ADAPTER_CONFIG} and the adapter's weights "
            "into a folder of their own, and give that one."
        )
    return True


def base_model(folder: Path) -> str:
    """Return the folder or the Hub id of the model that an adapter was made for.

    Raises:
        CorruptModelError: the adapter's config cannot be read. ModelNotFoundError: it names no model.
        UnsupportedModelError: it names another adapter.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(name, str) or not name:
        raise ModelNotFoundError(
            f"The {ADAPTER_CONFIG} of {folder} names no model: set base_model_name_or_path in it to a folder or Hub id."
        )
    if (Path(name) / ADAPTER_CONFIG).is_file():
        raise UnsupportedModelError(f"The adapter in {folder} is made for the adapter in {name}: merge that one first.")
    return name


def check_mergeable(folder: Path, quantized: bool) -> None:
    """Refuse an adapter that cannot be merged, before anything is loaded.

    Args:
        quantized: whether the model's weights will be quantized when they are read.

    Raises:
        MissingDependencyError: no peft. ConfigError: quantized weights. UnsupportedModelError: no LoRA adapter.
        ModelNotFoundError: the adapter's weights are missing.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"{folder} holds a LoRA adapter, which needs peft: pip install peft") from error
    if quantized:
        raise ConfigError(
            f"The LoRA adapter in {folder} cannot be merged into quantized weights: leave quantization= out, use "
            "'int4' or 'int8' on a CPU, or apply it with peft and give the model object."
        )
    kind = read_json(folder / ADAPTER_CONFIG).get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{folder} holds an adapter of type {kind}; only LORA adapters can be merged.")
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ModelNotFoundError(f"The folder {folder} has no {WEIGHTS[0]}: download the adapter again.")


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return a model with an adapter's changes in its own weights; the model object is changed.

    Raises:
        CorruptModelError: the adapter does not fit the model. UnsupportedModelError: it does more than change weights.
    """
    from peft import PeftConfig, PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped: Any = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
            found = wrapped.load_adapter(folder, "default", is_trainable=False)
    except Exception as error:  # whatever weights of another model make of peft
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CorruptModelError(f"The LoRA adapter in {folder} does not fit its model ({reason}).") from error
    wrong = [name for name in (*found.unexpected_keys, *found.missing_keys) if "lora_" in name]
    if wrong:
        raise CorruptModelError(
            f"The LoRA adapter in {folder} does not fit its model ({wrong[0]}): give it the model that it was made for."
        )
    without_wrapper(wrapped)
    result: PreTrainedModel = wrapped.merge_and_unload()
    return result


def adapted_digest(base: str, folder: Path, cache: Path) -> str:
    """Return the digest of a model's weights with an adapter in them. base: that of the model's own."""
    names = [ADAPTER_CONFIG, *(name for name in WEIGHTS if (folder / name).is_file())]
    digests = sorted(file_digests(folder, names, cache).items())
    return hashlib.sha256(f"{base} {digests}".encode()).hexdigest()
