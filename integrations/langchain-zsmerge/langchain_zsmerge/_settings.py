"""What `ChatZSMerge` and `ZSMergeLLM` have in common: their settings and the model behind them."""

from __future__ import annotations

import difflib
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from langchain_core.utils import from_env
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.errors import ConfigError

if TYPE_CHECKING:
    from zsmerge_llm import LLM

_LOADING = (
    "cache_config",
    "dtype",
    "device",
    "device_map",
    "quantization",
    "compile",
    "chat_template",
    "template_args",
    "retrieval_tokens",
    "max_input_tokens",
    "sessions_dir",
    "session_memory",
)
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


class Request(NamedTuple):
    """One call: what answers it, under which name, and the keywords for it."""

    core: LLM
    model: str
    settings: dict[str, Any]


class _Shared:
    """The models in use in this process: objects of equal settings share one set of weights and sessions.

    LangChain makes a new object for every call of a `configurable_fields` model; each would load the weights anew.
    Held weakly: a model goes when the last object using it goes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: weakref.WeakValueDictionary[str, LLM] = weakref.WeakValueDictionary()

    def get(self, settings: dict[str, Any]) -> LLM:
        from zsmerge_llm import LLM

        key = repr(sorted(settings.items()))
        with self._lock:
            llm = self._models.get(key)
            if llm is None:
                llm = self._models[key] = LLM(**settings)
            return llm


_SHARED = _Shared()


class ZSMergeSettings(BaseModel):
    """Settings of both classes. Unknown names are refused. Nothing is loaded before the first use."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str = Field(
        default_factory=from_env("ZSMERGE_MODEL", default="smollm2"),
        validation_alias=AliasChoices("model", "model_name"),
        frozen=True,
    )
    """Built-in name, Hub id, folder or `.gguf` file. Default: `ZSMERGE_MODEL`, else `smollm2`."""
    llm: Any = Field(default=None, exclude=True, repr=False, frozen=True)
    """An existing `zsmerge_llm.LLM` to share; the settings of loading are its own then."""

    cache_config: CacheConfig = Field(default_factory=CacheConfig, frozen=True)
    """The KV cache's budget and rule (a `CacheConfig` or a dict of its settings). `cache=CacheConfig(...)` sets it too;
    any other `cache` is LangChain's cache of answers."""
    dtype: str = Field(default="auto", frozen=True)
    device: str = Field(default_factory=from_env("ZSMERGE_DEVICE", default="auto"), frozen=True)
    device_map: str | dict[str, Any] | None = Field(default=None, frozen=True)
    quantization: Literal["nf4", "int8", "int4"] | None = Field(default=None, frozen=True)
    compile: bool | Literal["auto"] = Field(default="auto", frozen=True)
    """Whether decode steps run through compiled layers; `"auto"` begins once enough was decoded for it to pay."""
    chat_template: str | None = Field(default=None, frozen=True)
    """A Jinja template in place of the model's own."""
    template_args: dict[str, Any] | None = Field(default=None, frozen=True)
    """Variables for the chat template, such as `{"enable_thinking": False}`."""
    retrieval_tokens: int = Field(default=256, frozen=True)
    """Tokens of earlier text that are read again before a question, where the cache has lost some; 0: none."""
    max_input_tokens: int | None = Field(default=None, frozen=True)
    """A longer prompt raises ContextLimitError; None sets no limit. Nothing is ever truncated."""
    sessions_dir: str | None = Field(
        default_factory=from_env("ZSMERGE_SESSIONS_DIR", default=None, error_message=None), frozen=True
    )
    """Where conversations are kept between processes. Default: `ZSMERGE_SESSIONS_DIR`, else nowhere."""
    session_memory: int | str | None = Field(default=None, frozen=True)
    """What all conversations may hold in memory, such as `"4GiB"`; None leaves it to zsmerge-llm."""

    max_tokens: int | None = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = Field(default=None, validation_alias=AliasChoices("stop", "stop_sequences"))
    """Strings that end the answer, in addition to those of a call."""

    timeout: float | None = Field(default=None, gt=0, validation_alias=AliasChoices("timeout", "request_timeout"))
    """Seconds one answer may take; then decoding stops and TimeoutError is raised."""
    streaming: bool = False
    """Make `invoke` go through the stream, for callbacks that want each token."""
    max_retries: int | None = Field(default=None, exclude=True)
    """One of LangChain's standard parameters; a local model has nothing to try again."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """One of LangChain's standard parameters; a local model needs no key."""

    _llm: Any = PrivateAttr(default=None)
    _others: dict[str, LLM] = PrivateAttr(default_factory=dict)

    if TYPE_CHECKING:
        custom_get_token_ids: Callable[[str], list[int]] | None

    @model_validator(mode="before")
    @classmethod
    def _zsmerge_sort(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if isinstance(values.get("cache"), (CacheConfig, dict)):
            if "cache_config" in values:
                raise ConfigError("cache and cache_config both set the KV cache: give one of them.")
            values["cache_config"] = values.pop("cache")
        llm = values.get("llm")
        if llm is not None and not {"model", "model_name"} & values.keys():
            values["model"] = llm.model if isinstance(llm.model, (str, Path)) else llm.name
        cls._refuse_unknown(values)
        return values

    @classmethod
    def _refuse_unknown(cls, values: dict[str, Any]) -> None:
        known = set(cls.model_fields) | {"model_name", "stop_sequences", "request_timeout"}
        for name in values.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" It has {', '.join(sorted(known))}."
            raise ConfigError(f"{cls.__name__} has no setting {name}.{hint}")

    @field_validator("model", "sessions_dir", mode="before")
    @classmethod
    def _zsmerge_path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("cache_config", mode="before")
    @classmethod
    def _zsmerge_cache(cls, value: Any) -> Any:
        return CacheConfig.from_dict(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _zsmerge_connect(self) -> Self:
        self._sampling(None, {})
        if self.llm is None:
            self._llm = _SHARED.get(self._loading())
            return self
        defaults = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in _LOADING}
        if clash := [name for name in _LOADING if getattr(self, name) != defaults[name]]:
            raise ConfigError(f"{', '.join(clash)} cannot change a model given as llm: set it in LLM(...) instead.")
        self._llm = self.llm
        return self

    def _loading(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in _LOADING if name != "cache_config"}
        given = {name: value for name, value in settings.items() if value is not None}
        return {"model": self.model, "cache": self.cache_config, **given}

    def _stops(self, stop: Sequence[str] | str | None) -> list[str]:
        asked = [stop] if isinstance(stop, str) else stop or []
        return list(dict.fromkeys([*(self.stop or []), *asked]))

    def _sampling(self, stop: Sequence[str] | str | None, changes: dict[str, Any]) -> SamplingParams:
        settings = {name: getattr(self, name) for name in _SAMPLING}
        return SamplingParams(**{**settings, **changes}, stop=tuple(self._stops(stop)))

    def _options(self, options: dict[str, Any], extra: tuple[str, ...] = ()) -> dict[str, Any]:
        """The sampling settings among the keywords of one call; `extra` names those the caller looks after.

        Raises:
            ConfigError: a keyword of another name.
        """
        known = (*_SAMPLING, *extra, "model", "stream")
        if unknown := sorted(options.keys() - set(known)):
            raise ConfigError(
                f"A call of {type(self).__name__} has no option {', '.join(unknown)}; it has {', '.join(known)}."
            )
        return {name: options[name] for name in _SAMPLING if name in options}

    def _core(self, model: str) -> LLM:
        """What runs `model`, this object's or another one that a call names; that stays loaded as long as this object.

        Raises:
            ConfigError: another model, where this object was given its own as `llm`.
        """
        if model == self.model:
            return self.core
        if self.llm is not None:
            raise ConfigError(
                f"This object was given {self.model!r} as llm: create {type(self).__name__}(model={model!r}) instead."
            )
        self._others[model] = _SHARED.get({**self._loading(), "model": model})
        return self._others[model]

    @property
    def core(self) -> LLM:
        """The `zsmerge_llm.LLM` behind it: its sessions, its documents, its tokenizer. Not loaded before it is used."""
        llm: LLM = self._llm
        return llm

    def warm_up(self) -> Self:
        """Load the model now rather than at the first use, before an event loop has others to serve."""
        self.core.warm_up()
        return self

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text by the model's own tokenizer, without special tokens around it. Loads the model."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        ids: list[int] = self._llm.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @property
    def _identifying_params(self) -> dict[str, Any]:
        loading = {**{name: getattr(self, name) for name in _LOADING}, "cache_config": asdict(self.cache_config)}
        return {"model": self.model, **loading, **{name: getattr(self, name) for name in _SAMPLING}, "stop": self.stop}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Settings can be written with `langchain_core.load.dumps`; an `llm` given as an object cannot."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The cache's settings as plain data, without those that are the default ones."""
        usual = asdict(CacheConfig())
        changed = {name: value for name, value in asdict(self.cache_config).items() if value != usual[name]}
        return {"cache_config": changed}

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {"_llm": None, "_others": {}}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._llm = self.llm if self.llm is not None else _SHARED.get(self._loading())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        for llm in (self._llm, *self._others.values()):
            memo[id(llm)] = llm  # settings are copied, weights never
        return super().__deepcopy__(memo)
