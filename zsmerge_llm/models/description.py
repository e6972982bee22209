"""What is known of a model before it is loaded: its config, and what its files hold. Nothing large is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_llm.models import gguf, hub
from zsmerge_llm.models.adapter_folder import base_model, holds_adapter
from zsmerge_llm.models.hub import StatusCallback
from zsmerge_llm.models.loader import local_path, read_config
from zsmerge_llm.models.log_filters import quiet_transformers
from zsmerge_llm.models.weight_files import StoredWeights, stored_weights
from zsmerge_llm.paths import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelDescription:
    """A model that need not be loaded.

    config: of transformers. stored: what its safetensors files hold; None where they are not on this machine.
    tokenizer_nbytes: of its tokenizer.json; None where that is not here.
    """

    name: str
    config: Any
    stored: StoredWeights | None = None
    tokenizer_nbytes: int | None = None


def describe(
    model: str | Path | PreTrainedModel, cache_dir: Path | str | None = None, progress: StatusCallback | None = None
) -> ModelDescription:
    """Describe a model as `loader.load` would find it. Of a Hub model that is not cached only the config is fetched.

    Raises:
        LoadError: no such model, or no causal language model.
    """
    if not isinstance(model, (str, Path)):
        return ModelDescription(model.config.name_or_path or type(model).__name__, model.config)
    cache, report_status = cache_folder(cache_dir), progress or (lambda step: None)
    name = str(model)
    if name in hub.BUILTINS:
        builtin = hub.BUILTINS[name]
        path = hub.builtin_local(builtin, cache) or hub.config_folder(builtin.hub_id, report_status, cache)
    elif (found := local_path(model)) is not None and found.is_dir() and holds_adapter(found):
        return replace(describe(base_model(found), cache_dir, progress), name=found.resolve().name)
    elif found is not None:
        path, name = found, found.resolve().name if found.is_dir() else found.stem
    else:
        path = hub.config_folder(name, report_status, cache)
    if path.is_file():
        converted = gguf.folder_for(path, cache)
        if not converted.is_dir():
            return ModelDescription(name, gguf.read_config(path))
        path = converted
    with quiet_transformers():
        config = read_config(path, name)
    tokenizer = path / "tokenizer.json"
    size = tokenizer.stat().st_size if tokenizer.is_file() else None
    return ModelDescription(name, config, stored_weights(path), size)
