"""Checkpoints whose weights are quantized already (GPTQ, AWQ, compressed-tensors, FP8): transformers loads them.

What it cannot load here is refused by name before any weights are read.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

from zsmerge_llm.errors import ConfigError, MissingDependencyError, UnsupportedModelError

PACKAGES = {
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "torchao": {"torchao": "torchao"},
    "auto-round": {"auto_round": "auto-round"},
    "hqq": {"hqq": "hqq"},
    "aqlm": {"aqlm": "aqlm"},
    "vptq": {"vptq": "vptq"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
}
"""What pip installs for each module that transformers needs for a method. Others need nothing, or say it themselves."""


def quantization_method(config: Any) -> str | None:
    """Return the method by which a model's checkpoint is quantized, such as "gptq"; None for one that is not."""
    settings = _settings(config)
    if settings is None:
        return None
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    method = settings.get("quant_method")
    return "an unknown method" if method is None else str(getattr(method, "value", method))


def check_loadable(config: Any, name: str, quantization: str | None, device_map: Any) -> None:
    """Refuse a quantized checkpoint that cannot be loaded here, from its config alone.

    Raises:
        ConfigError: `quantization` on top of it.
        MissingDependencyError: a package that transformers needs for its method is not installed.
        UnsupportedModelError: transformers does not know the method, or cannot serve it on this machine.
    """
    settings, method = _settings(config), quantization_method(config)
    if settings is None or method is None:
        return
    if quantization is not None:
        raise ConfigError(
            f"{name} is quantized already ({method}), so that quantization={quantization!r} cannot be applied: leave "
            "it out, or give the folder of the unquantized model."
        )
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

    if not any(known.split("_4bit")[0] == method for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise UnsupportedModelError(
            f"{name} is quantized by {method}, which this version of transformers does not know: use an unquantized, "
            "GPTQ, AWQ, compressed-tensors or FP8 checkpoint of the model."
        )
    missing = [package for module, package in PACKAGES.get(method, {}).items() if not _is_installed(module)]
    if missing:
        raise MissingDependencyError(
            f"{name} is a {method} checkpoint, which needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
        quantizer.validate_environment(device_map=device_map, weights_only=True)
    except Exception as error:  # each method checks for its packages and devices in its own way
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedModelError(
            f"{name} is a {method} checkpoint, which cannot be loaded here ({reason}): use a machine or the packages "
            "that it needs, or the unquantized model, which quantization= makes small."
        ) from error


def _settings(config: Any) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    found = getattr(config.get_text_config(), "quantization_config", None) if found is None else found
    return found if found is None or isinstance(found, dict) else found.to_dict()


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package
        return False
