"""What stands behind an `LLM` once its model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.language.chat_template import Template
from zsmerge_llm.language.grammar import Grammars
from zsmerge_llm.language.output_format import Forms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.engine.layer_budgets import Profile
    from zsmerge_llm.sessions.conversations import Conversations


@dataclass(frozen=True)
class Parts:
    """One model with everything that works on it."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    template: Template
    forms: Forms
    conversations: Conversations
    profile: Profile


def check_settings(
    cache: CacheConfig | None,
    device: str,
    device_map: Any,
    quantization: str | None,
    compile: bool | str,
    recall: int,
) -> None:
    """Refuse at once what cannot be loaded later. Raises ConfigError."""
    if cache is not None and not isinstance(cache, CacheConfig):
        raise ConfigError(f"cache must be a CacheConfig, not a {type(cache).__name__}.")
    if quantization not in (None, "nf4", "int8", "int4"):
        raise ConfigError(f"quantization must be None, 'nf4', 'int8' or 'int4', not {quantization!r}.")
    if compile not in (True, False, "auto"):
        raise ConfigError(f"compile must be True, False or 'auto', not {compile!r}.")
    if device_map is not None and device != "auto":
        raise ConfigError("Give either device or device_map, not both.")
    if isinstance(recall, bool) or not isinstance(recall, int) or recall < 0:
        raise ConfigError(f"recall must be a number of tokens, 0 for none, not {recall!r}.")


def assemble(
    model: str | Path | PreTrainedModel,
    cache: CacheConfig,
    chunk: int,
    compile: bool | Literal["auto"],
    loading: dict[str, Any],
    template_args: dict[str, Any] | None,
    recall: int,
    sessions_dir: str | Path | None,
    session_memory: int,
) -> Parts:
    """Load the model and build what belongs to it. `loading` goes to `loader.load`; the rest is as for `LLM`.

    Raises:
        LoadError: the model cannot be loaded. StoreFullError: `session_memory` is too small for one conversation.
    """
    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.engine.layer_budgets import Profile, profile_path
    from zsmerge_llm.models.loader import load
    from zsmerge_llm.retrieval.attention_search import Glance
    from zsmerge_llm.retrieval.passage_search import Recall
    from zsmerge_llm.sessions.conversations import Conversations
    from zsmerge_llm.sessions.fingerprint import fingerprint
    from zsmerge_llm.sessions.store import Store

    loaded = load(model, **loading)
    tokenizer = loaded.tokenizer
    template = Template(tokenizer, args=template_args)
    engine = Engine(loaded.model, cache, chunk, compile)
    source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else str(tokenizer.chat_template)
    mark = fingerprint(loaded.model, tokenizer, source, cache)
    devices = [str(spec.device) for spec in engine.specs]
    store = Store(mark, session_memory, engine.new_cache().nbytes, sessions_dir, devices)
    forms = Forms(template, Grammars(tokenizer, engine.vocab_size, engine.stop_ids))
    profile = Profile(engine, template, profile_path(mark.weights), loading.get("progress"))
    budgets = (engine.new_cache, profile.config, profile.document_config)
    searches = (Recall(template, recall), Glance(engine.look, template))
    conversations = Conversations(store, template, *budgets, *searches)
    return Parts(loaded.name, tokenizer, engine, template, forms, conversations, profile)
