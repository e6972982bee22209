"""Loads a model and its tokenizer from a name, a path or a model object.

A name is resolved to a local folder first (`hub`, `gguf`), which is then loaded offline.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
    ZSMergeError,
)
from zsmerge_llm.models import gguf, hub
from zsmerge_llm.models.adapter_folder import adapted_digest, base_model, check_mergeable, holds_adapter, merged
from zsmerge_llm.models.checkpoints import check_loadable, quantization_method
from zsmerge_llm.models.device import (
    packed_bits,
    pick_device,
    pick_dtype,
    placement,
    quantization_config,
    validate_settings,
)
from zsmerge_llm.models.hub import StatusCallback
from zsmerge_llm.models.integrity import read_json, weights_digest
from zsmerge_llm.models.log_filters import log_int8_cast_once, quiet_transformers
from zsmerge_llm.models.model_classes import generating_class
from zsmerge_llm.models.weight_files import check_claims, check_fits
from zsmerge_llm.paths import cache_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LAYERS = 1000
"""Layers above which a config is taken for damaged: a model of them would be made before its weights are read."""
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?(@[\w.-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer and its name.

    source: its file or folder; None for a model object, which is left as it is.
    weights_digest: of all bytes of its files, as `integrity.weights_digest`; None for a model object.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: Path | None
    weights_digest: str | None = None


@dataclass(frozen=True)
class BuiltinModel:
    """A model with a built-in name. `cached`: it loads without the network."""

    name: str
    description: str
    cached: bool


@dataclass(frozen=True)
class _Source:
    """folder: of the model's weights. path: what the user gave. adapter: a folder whose adapter is merged in."""

    name: str
    folder: Path
    path: Path
    adapter: Path | None = None


def builtin_models(cache_dir: Path | str | None = None) -> list[BuiltinModel]:
    """Return the models that `load` knows by name."""
    cache = cache_folder(cache_dir)
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
) -> LoadedModel:
    """Load a model: a built-in name, a Hub id, a folder, a .gguf file, or a transformers model object.

    A folder with a LoRA adapter is loaded as the model that it was made for, with the adapter merged into its weights.

    Args:
        tokenizer: a tokenizer, or the folder or Hub id of one, in place of the model's own.
        dtype: "auto" is bfloat16 if the device computes in it, else float16 on a GPU and float32 on a CPU.
        device: "auto" is cuda, else mps, else cpu. Not together with `device_map`.
        device_map: as in transformers: spreads the layers over several devices.
        quantization: "int4" or "int8" on a CPU uses torch's packed kernels; "nf4", and "int8" on a GPU or with a
            `device_map`, uses bitsandbytes; "int4" and "fp8" on an NVIDIA GPU use torchao. Not for a checkpoint that is
            quantized already (`checkpoints`).
        chat_template: Jinja text, or a file that holds it, in place of the model's own.
        cache_dir: folder of downloaded and converted models. Default: ZSMERGE_CACHE_DIR, else the user's cache folder.
        progress: called with a line of text at each step.

    Raises:
        ConfigError: a setting that cannot work.
        ModelNotFoundError, CorruptModelError, UnsupportedModelError: see `errors`.
        MissingDependencyError: quantization without bitsandbytes or torchao, or a checkpoint without its package.
        LoadError: the weights alone are more than the device's memory; nothing has been read then.
    """
    report_status = progress or (lambda step: None)
    validate_settings(dtype, device, device_map, quantization)
    if not isinstance(model, (str, Path)):
        changes = {"dtype": dtype, "device": device, "device_map": device_map, "quantization": quantization}
        return _from_object(model, tokenizer, chat_template, changes, report_status)
    target = pick_device(device)
    weight_dtype = pick_dtype(dtype, target)
    bits = packed_bits(quantization, target, device_map)
    quantizer = None if bits is not None else quantization_config(quantization, weight_dtype, target, device_map)
    # in its own dtype a file is mapped into memory, not copied, until each matrix is packed
    options: dict[str, Any] = {"dtype": weight_dtype if bits is None else "auto", "attn_implementation": "eager"}
    if quantizer is not None:
        options["quantization_config"] = quantizer
    if (placed := placement(target, device_map, quantizer is not None)) is not None:
        options["device_map"] = placed
    cache = cache_folder(cache_dir)
    source = _resolve(model, cache, report_status)
    log_int8_cast_once()
    with quiet_transformers():
        config = read_config(source.folder, source.name)
        with _typed_errors(source.name, "config.json"):
            check_loadable(config, source.name, quantization, placed)
            if source.adapter is not None:
                is_quantized = quantizer is not None or quantization_method(config) is not None
                check_mergeable(source.adapter, is_quantized)
            check_claims(source.folder, source.name, config)
            if device_map is None:
                check_fits(source.folder, source.name, config, target, weight_dtype, quantization)
        digest = weights_digest(source.folder, cache)
        report_status("Loading weights")
        loaded = _read_weights(source, config, options)
        if source.adapter is not None:
            report_status("Merging the LoRA adapter")
            loaded, digest = merged(loaded, source.adapter), adapted_digest(digest, source.adapter, cache)
        found_tokenizer = _find_tokenizer(tokenizer, _tokenizer_folder(source), report_status)
    if bits is not None:
        from zsmerge_llm.cpu.quantized_linear import quantize_model

        report_status(f"Packing weights in {bits} bits")
        quantize_model(loaded, bits, weight_dtype)
    loaded.eval().requires_grad_(False)
    return LoadedModel(loaded, _with_template(found_tokenizer, chat_template), source.name, source.path, digest)


def load_tokenizer(
    model: str | Path, *, cache_dir: Path | str | None = None, progress: StatusCallback | None = None
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer without its weights. A GGUF file is converted first, unless it was.

    Raises:
        ModelNotFoundError, CorruptModelError: see `errors`.
    """
    report_status = progress or (lambda step: None)
    with quiet_transformers():
        source = _resolve(model, cache_folder(cache_dir), report_status)
        return _find_tokenizer(None, _tokenizer_folder(source), report_status)


def _resolve(model: str | Path, cache: Path, report_status: StatusCallback) -> _Source:
    if isinstance(model, str) and model in hub.BUILTINS:
        folder = hub.builtin_folder(hub.BUILTINS[model], cache, report_status)
        return _Source(model, folder, folder)
    path = local_path(model)
    if path is None:
        folder = hub.hub_folder(str(model), report_status, cache)
        holds_adapter(folder)
        return _Source(str(model), folder, folder)
    if path.is_dir() and holds_adapter(path):
        base = _resolve(base_model(path), cache, report_status)
        return _Source(path.resolve().name, base.folder, path, adapter=path)
    if path.is_dir():
        return _Source(path.resolve().name, path, path)
    folder = hub.converted_folder(path, gguf.folder_for(path, cache), cache, report_status)
    return _Source(path.stem, folder, path)


def local_path(model: str | Path) -> Path | None:
    """Return the folder with weights, or the file, that `model` names; None for a Hub id.

    Raises:
        ModelNotFoundError: no such file or folder, a folder without a model, or a name of no kind.
    """
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a null byte, ~ of nobody
        raise ModelNotFoundError(f"{str(model)[:80]!r} is no path ({error}): check it.") from error
    if is_folder:
        _check_folder(path)
        return path
    if is_file or path.suffix.lower() == ".gguf":
        if not is_file:
            raise ModelNotFoundError(f"There is no file {path}: check the path.")
        return path
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        choices = f"a built-in name ({', '.join(hub.BUILTINS)}), a Hub id (owner/name), a folder or a .gguf file"
        raise ModelNotFoundError(f"There is no file or folder {str(model)!r}: check the path, or give {choices}.")
    return None


def _tokenizer_folder(source: _Source) -> Path:
    """Return where a model's tokenizer is: an adapter may bring its own."""
    own = source.adapter
    return own if own is not None and (own / "tokenizer_config.json").is_file() else source.folder


def _check_folder(folder: Path) -> None:
    if holds_adapter(folder):
        return
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        remedy = f"give the path of {files[0]} in it" if files else "give the folder that holds config.json and weights"
        raise ModelNotFoundError(f"The folder {folder} has no config.json: {remedy}.")
    if not hub.has_weights(folder):
        raise ModelNotFoundError(f"The folder {folder} lacks its weights, or some of them: download it again.")


def read_config(folder: Path, name: str) -> Any:
    """Return the transformers config of a causal language model's folder.

    Raises:
        CorruptModelError: a config that cannot be read. UnsupportedModelError: another kind of model.
    """
    from transformers import AutoConfig

    settings = read_json(folder / "config.json")
    with _typed_errors(name, "config.json"):
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (ValueError, KeyError) as error:  # an unknown model_type, or one that needs its own code
            if "auto_map" in settings:
                raise UnsupportedModelError(
                    f"{name} brings code of its own, which is not run: if you trust it, load the model with "
                    "transformers (trust_remote_code=True), and give that model object."
                ) from error
            raise UnsupportedModelError(
                f"{name} is not a model that this version of transformers knows ({_first_line(error)})."
            ) from error
        _check_causal(config, name)
        if not 0 < config.get_text_config().num_hidden_layers <= MAX_LAYERS:
            raise CorruptModelError(f"The config.json of {name} describes a model of more than {MAX_LAYERS:,} layers.")
    return config


@contextmanager
def _typed_errors(name: str, file: str) -> Iterator[None]:
    """Turn whatever transformers raises about the settings in a file into an error that names the file.

    Raises:
        CorruptModelError
    """
    try:
        yield
    except ZSMergeError:
        raise
    except Exception as error:  # whatever settings that cannot be make of transformers
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise CorruptModelError(f"The {file} of {name} cannot be used ({reason}): download it again.") from error


def _check_causal(config: Any, name: str) -> None:
    """Refuse models other than decoder-only language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    architectures = config.architectures or []
    label = architectures[0] if architectures else type(config).__name__.removesuffix("Config")
    advice = "use a decoder-only model such as Llama, Qwen or Gemma"
    # An encoder-decoder may have two configs of text.
    if getattr(config, "is_encoder_decoder", False) or getattr(config.get_text_config(), "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model ({label}): {advice}.")
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    has_lm_head = not architectures or any(
        name.endswith(("CausalLM", "LMHeadModel", "ConditionalGeneration")) for name in architectures
    )
    if is_encoder or not has_lm_head or generating_class(config) is None:
        raise UnsupportedModelError(f"{name} is not a causal language model ({label}): {advice}.")


def _read_weights(source: _Source, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    import torch
    from safetensors import SafetensorError

    try:
        loaded: Any = generating_class(config).from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (SafetensorError, OSError) as error:
        remedy = "download it again"
        raise CorruptModelError(
            f"The weights of {source.name} cannot be read ({_first_line(error)}): {remedy}."
        ) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        remedy = "use quantization='nf4', device_map='auto' or a smaller model"
        raise LoadError(f"There is not enough memory for {source.name}: {remedy}.") from error
    except ImportError as error:
        raise MissingDependencyError(
            f"{source.name} needs a package that is not installed: {_first_line(error)}"
        ) from error
    except Exception as error:  # whatever a config or a damaged file makes of transformers
        raise LoadError(f"{source.name} cannot be loaded with these settings: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CorruptModelError(
            f"The weights of {source.name} lack {len(missing)} tensors ({missing[0]}, ...): download it again."
        )
    return model


def _from_object(
    model: Any, tokenizer: Any, chat_template: str | None, changes: dict[str, Any], report_status: StatusCallback
) -> LoadedModel:
    from zsmerge_llm.models.model_object import checked_model  # needs torch

    model = checked_model(model)
    if given := [name for name, value in changes.items() if value not in (None, "auto")]:
        raise ConfigError(
            f"{', '.join(given)} cannot be applied to a model that is loaded already: give its name or folder instead."
        )
    origin = model.config.name_or_path or ""
    name = origin or type(model).__name__
    _check_causal(model.config, name)
    if tokenizer is None and not origin:
        raise ConfigError("A model object without config.name_or_path needs its tokenizer: pass tokenizer=.")
    log_int8_cast_once()
    with quiet_transformers():
        found_tokenizer = _find_tokenizer(tokenizer, origin, report_status)
    return LoadedModel(model, _with_template(found_tokenizer, chat_template), name, None)


def _find_tokenizer(given: Any, origin: str | Path, report_status: StatusCallback) -> PreTrainedTokenizerBase:
    """Return the given tokenizer, or load that of a folder or Hub id: the given one, else `origin`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is not None and not isinstance(given, (str, Path)):
        raise ConfigError(f"tokenizer must be a tokenizer, a folder or a Hub id, not {type(given).__name__}.")
    where = str(origin if given is None else given)
    folder = Path(where).expanduser()
    if not folder.is_dir():
        folder = hub.hub_folder(where, report_status)
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Texts beyond the trained window are read, so that the warning about indexing errors would be untrue.
        found.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        return found
    except Exception as error:  # tokenizers raises this type itself
        remedy = "pass tokenizer= (a tokenizer, a folder or a Hub id)"
        raise ModelNotFoundError(f"{where} holds no usable tokenizer ({_first_line(error)}): {remedy}.") from error


def _with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    if chat_template is None:
        return tokenizer
    text = chat_template
    if "{" not in text:
        path = Path(text).expanduser()
        if not path.is_file():
            raise ConfigError(f"chat_template is neither Jinja text nor a file: {text!r}.")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"The chat template {path} cannot be read ({error}): give a text file.") from error
    changed = copy.copy(tokenizer)  # the caller's tokenizer keeps its template
    changed.chat_template = text
    return changed


def _first_line(error: BaseException) -> str:
    """Return the first line of a message; those of transformers have many."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
