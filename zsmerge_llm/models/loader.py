"""From a name, a path or a model object to a model and its tokenizer, ready to run.

A name is resolved to a local folder first (`hub`, `gguf`); from there on everything loads in one way, offline.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import (
    ConfigError,
    CorruptModelError,
    LoadError,
    MissingDependencyError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from zsmerge_llm.models import gguf, hub
from zsmerge_llm.models.device import check_settings, packed_bits, pick_device, pick_dtype, quantization_config
from zsmerge_llm.models.log_filters import quiet, say_int8_cast_once

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

StatusCallback = Callable[[str], None]
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and its tokenizer. `source` is its file or folder, None for a model object."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: Path | None


@dataclass(frozen=True)
class BuiltinModel:
    """A built-in name. `cached`: it starts without the network."""

    name: str
    description: str
    cached: bool


@dataclass(frozen=True)
class _Source:
    name: str
    folder: Path
    path: Path


def builtin_models(cache_dir: Path | str | None = None) -> list[BuiltinModel]:
    """The names `load` knows by itself."""
    cache = hub.cache_folder(cache_dir)
    return [BuiltinModel(m.name, m.description, hub.builtin_cached(m, cache)) for m in hub.BUILTINS.values()]


def load(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    quantization: str | None = None,
    chat_template: str | None = None,
    cache_dir: Path | str | None = None,
    progress: StatusCallback | None = None,
) -> Loaded:
    """Load a model: a built-in name, a Hub id, a folder, a .gguf file, or a transformers model object.

    Args:
        tokenizer: a tokenizer, or the folder or Hub id of one, in place of the model's own.
        dtype: "auto" is bfloat16 where the hardware computes in it, else float16 on a GPU and float32 on a CPU.
        device: "auto" is cuda, else mps, else cpu. Not together with `device_map`.
        device_map: as in transformers: spreads the layers over several devices.
        quantization: "int4" or "int8" on a CPU: torch's packed kernels. "nf4", and "int8" on a GPU or with a
            `device_map`: bitsandbytes.
        chat_template: Jinja text, or a file that holds it, in place of the model's own.
        cache_dir: where fetched and converted models are kept; ZSMERGE_CACHE_DIR or the user's cache folder by default.
        progress: is told each step in words.

    Raises:
        ConfigError: a setting that cannot work.
        ModelNotFoundError, CorruptModelError, UnsupportedModelError: see `errors`.
        MissingDependencyError: quantization without bitsandbytes.
    """
    say = progress or (lambda step: None)
    check_settings(dtype, device, device_map, quantization)
    if not isinstance(model, (str, Path)):
        changes = {"dtype": dtype, "device": device, "device_map": device_map, "quantization": quantization}
        return _adopt(model, tokenizer, chat_template, changes, say)
    target = pick_device(device)
    width = pick_dtype(dtype, target)
    bits = packed_bits(quantization, target, device_map)
    # in its own dtype a file is mapped into memory, not copied, until each matrix is packed
    options: dict[str, Any] = {"dtype": width if bits is None else "auto", "attn_implementation": "eager"}
    if quantization is not None and bits is None:
        options["quantization_config"] = quantization_config(quantization, width, target)
        say_int8_cast_once()
    if device_map is not None or "quantization_config" in options or target.type != "cpu":
        options["device_map"] = device_map if device_map is not None else {"": target}
    source = _resolve(model, hub.cache_folder(cache_dir), say)
    with quiet():
        _check_causal(_read_config(source), source.name)
        say("Loading weights")
        network = _read_weights(source, options)
        words = _find_tokenizer(tokenizer, source.folder, say)
    if bits is not None:
        from zsmerge_llm.cpu.quantized_linear import quantize_model

        say(f"Packing weights in {bits} bits")
        quantize_model(network, bits, width)
    network.eval().requires_grad_(False)
    return Loaded(network, _with_template(words, chat_template), source.name, source.path)


def load_tokenizer(
    model: str | Path, *, cache_dir: Path | str | None = None, progress: StatusCallback | None = None
) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone, without its weights (a GGUF file that was never loaded is converted first).

    Raises:
        ModelNotFoundError, CorruptModelError: see `errors`.
    """
    say = progress or (lambda step: None)
    with quiet():
        return _find_tokenizer(None, _resolve(model, hub.cache_folder(cache_dir), say).folder, say)


def _resolve(model: str | Path, cache: Path, say: StatusCallback) -> _Source:
    if isinstance(model, str) and model in hub.BUILTINS:
        folder = hub.builtin_folder(hub.BUILTINS[model], cache, say)
        return _Source(model, folder, folder)
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path)
        return _Source(path.resolve().name, path, path)
    if path.is_file() or path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"There is no file {path}: check the path.")
        return _Source(path.stem, gguf.convert_once(path, gguf.folder_for(path, cache), say), path)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        known = f"a built-in name ({', '.join(hub.BUILTINS)}), a Hub id (owner/name), a folder or a .gguf file"
        raise ModelNotFoundError(f"There is no file or folder {str(model)!r}: check the path, or give {known}.")
    folder = hub.hub_folder(model, say)
    return _Source(model, folder, folder)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        remedy = f"give the path of {files[0]} in it" if files else "give the folder that holds config.json and weights"
        raise ModelNotFoundError(f"The folder {folder} has no config.json: {remedy}.")
    if not hub.has_weights(folder):
        raise ModelNotFoundError(f"The folder {folder} lacks its weights, or some of them: download it again.")


def _read_config(source: _Source) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise CorruptModelError(f"The config.json of {source.name} cannot be read ({error}).") from error
    except (ValueError, KeyError) as error:  # an unknown model_type, or code of its own
        raise UnsupportedModelError(
            f"{source.name} is not a model this transformers knows ({_first(error)})."
        ) from error


def _check_causal(config: Any, name: str) -> None:
    """Only models that continue a text, and do so from left to right."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    built = config.architectures or []
    label = built[0] if built else type(config).__name__.removesuffix("Config")
    advice = "use a decoder-only model such as Llama, Qwen or Gemma"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model ({label}): {advice}.")
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    writes = not built or any(b.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for b in built)
    if encoder or not writes or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"{name} is not a causal language model ({label}): {advice}.")


def _read_weights(source: _Source, options: dict[str, Any]) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (SafetensorError, OSError) as error:
        remedy = "download it again"
        raise CorruptModelError(f"The weights of {source.name} cannot be read ({_first(error)}): {remedy}.") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        remedy = "use quantization='nf4', device_map='auto' or a smaller model"
        raise LoadError(f"There is not enough memory for {source.name}: {remedy}.") from error
    except ImportError as error:
        raise MissingDependencyError(f"{source.name} needs a package that is not installed: {_first(error)}") from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise LoadError(f"{source.name} cannot be loaded with these settings: {_first(error)}") from error
    network, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CorruptModelError(
            f"The weights of {source.name} lack {len(missing)} tensors ({missing[0]}, ...): download it again."
        )
    return network


def _adopt(
    model: Any, tokenizer: Any, chat_template: str | None, changes: dict[str, Any], say: StatusCallback
) -> Loaded:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model must be a name, a path or a transformers model, not {type(model).__name__}.")
    if given := [name for name, value in changes.items() if value not in (None, "auto")]:
        raise ConfigError(
            f"{', '.join(given)} cannot be applied to a model that is loaded already: give its name or folder instead."
        )
    home = model.config.name_or_path or ""
    name = home or type(model).__name__
    _check_causal(model.config, name)
    if tokenizer is None and not home:
        raise ConfigError("A model object that does not know its name needs its tokenizer: pass tokenizer=.")
    with quiet():
        words = _find_tokenizer(tokenizer, home, say)
    return Loaded(model.eval(), _with_template(words, chat_template), name, None)


def _find_tokenizer(given: Any, home: str | Path, say: StatusCallback) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one in a folder or of a Hub id."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is not None and not isinstance(given, (str, Path)):
        raise ConfigError(f"tokenizer must be a tokenizer, a folder or a Hub id, not {type(given).__name__}.")
    where = str(home if given is None else given)
    folder = Path(where).expanduser()
    if not folder.is_dir():
        folder = hub.hub_folder(where, say)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        remedy = "pass tokenizer= (a tokenizer, a folder or a Hub id)"
        raise ModelNotFoundError(f"{where} holds no usable tokenizer ({_first(error)}): {remedy}.") from error


def _with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    if chat_template is None:
        return tokenizer
    text = chat_template
    if "{" not in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise ConfigError(f"chat_template is neither Jinja text nor a file: {text!r}.")
        text = path.read_text(encoding="utf-8")
    changed = copy.copy(tokenizer)  # the caller's own tokenizer keeps its template
    changed.chat_template = text
    return changed


def _first(error: BaseException) -> str:
    """The first line of a message: transformers' own run over many."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
