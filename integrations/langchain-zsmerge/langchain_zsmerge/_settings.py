"""Settings of `ChatZSMerge` and `ZSMergeLLM`, and the shared `zsmerge_llm.LLM` that they describe."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.globals import get_llm_cache
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

from langchain_zsmerge._errors import langchain_errors
from zsmerge_llm import LLM, CacheConfig, SamplingParams, SchedulingConfig
from zsmerge_llm.errors import ConfigError, did_you_mean


class _ModelRegistry:
    """The models in use in this process: objects of equal loading settings share weights and sessions.

    LangChain makes a new object for every call of a `configurable_fields` model; each would load the weights again.
    References are weak: a model is freed with the last object that uses it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models: weakref.WeakValueDictionary[str, LLM] = weakref.WeakValueDictionary()

    def get(self, settings: dict[str, Any]) -> LLM:
        """Return the LLM of these settings; it loads at its first use."""
        key = repr(sorted(settings.items()))
        with self._lock:
            llm = self._models.get(key)
            if llm is None:
                llm = self._models[key] = LLM(**settings)
            return llm


_MODELS = _ModelRegistry()


class ZSMergeSettings(BaseModel):
    """Settings of both classes. Unknown names raise ConfigError. The model loads at its first use."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    model: str = Field(
        default_factory=from_env("ZSMERGE_MODEL", default="smollm2"),
        validation_alias=AliasChoices("model", "model_name"),
        frozen=True,
    )
    """Built-in name, Hub id, folder or `.gguf` file. Default: `ZSMERGE_MODEL`, else `smollm2`."""
    llm: Any = Field(default=None, exclude=True, repr=False, frozen=True)
    """An existing `zsmerge_llm.LLM` to share. It has its own loading settings."""

    cache_config: CacheConfig = Field(default_factory=CacheConfig, frozen=True)
    """Budget and eviction policy of the KV cache: a `CacheConfig` or a dict of its settings. `cache=CacheConfig(...)`
    sets it too; any other `cache` is LangChain's cache of answers."""
    dtype: str = Field(default="auto", frozen=True)
    device: str = Field(default_factory=from_env("ZSMERGE_DEVICE", default="auto"), frozen=True)
    device_map: str | dict[str, Any] | None = Field(default=None, frozen=True)
    quantization: Literal["nf4", "int8", "int4", "fp8"] | None = Field(default=None, frozen=True)
    compile: bool | Literal["auto"] = Field(default="auto", frozen=True)
    """Whether decode steps run through compiled layers. `"auto"` compiles once enough was decoded to pay for it."""
    chat_template: str | None = Field(default=None, frozen=True)
    """A Jinja template in place of the model's own."""
    template_args: dict[str, Any] | None = Field(default=None, frozen=True)
    """Variables for the chat template, such as `{"enable_thinking": False}`."""
    allow_control_tokens: bool = Field(default=False, frozen=True)
    """Whether control tokens that messages and tools spell, such as `<|im_end|>`, are read as tokens, not as text."""
    retrieval_tokens: int | Literal["auto"] = Field(default="auto", frozen=True)
    """Maximum tokens of dropped text that are retrieved and read again before a question; 0 for none. `"auto"`: the
    more, the more was dropped."""
    max_input_tokens: int | None = Field(default=None, frozen=True)
    """A longer prompt raises ContextLimitError; None sets no limit. Nothing is ever truncated."""
    sessions_dir: str | None = Field(
        default_factory=from_env("ZSMERGE_SESSIONS_DIR", default=None, error_message=None), frozen=True
    )
    """Folder that stores conversations between processes. Default: `ZSMERGE_SESSIONS_DIR`, else none."""
    session_memory: int | str | None = Field(default=None, frozen=True)
    """Host memory limit of idle conversations, such as `"4GiB"`; None for the default of zsmerge-llm."""
    gpu_session_memory: int | str = Field(default="auto", frozen=True)
    """The same for a GPU's memory. `"auto"`: what is free there beside the memory to work in."""

    scheduling: SchedulingConfig | None = Field(default=None, frozen=True)
    """How requests that run at the same time share the device, and how many there may be."""

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
    """Seconds that one answer may take; then decoding stops and DeadlineExceededError, a TimeoutError, is raised."""
    priority: int = 0
    """Where several requests wait for the model, the lowest number goes first."""
    retry_invalid: bool = False
    """Whether structured output asks once more, with the error, where an answer breaks its schema or class."""
    streaming: bool = False
    """Make `invoke` use the stream, for callbacks that want each token."""
    max_retries: int | None = Field(default=None, exclude=True)
    """A standard parameter of LangChain; without effect on a local model."""
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    """A standard parameter of LangChain; without effect on a local model."""

    _llm: Any = PrivateAttr(default=None)
    _other_llms: dict[str, LLM] = PrivateAttr(default_factory=dict)

    if TYPE_CHECKING:
        custom_get_token_ids: Callable[[str], list[int]] | None

    # Validators are inherited by name; the prefix keeps LangChain's own.

    @model_validator(mode="before")
    @classmethod
    def _zsmerge_normalize(cls, values: Any) -> Any:
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
            hint = did_you_mean([name], known) or f" It has {', '.join(sorted(known))}."
            raise ConfigError(f"{cls.__name__} has no setting {name}.{hint}")

    @field_validator("model", "sessions_dir", mode="before")
    @classmethod
    def _zsmerge_path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("cache_config", mode="before")
    @classmethod
    def _zsmerge_cache_from_dict(cls, value: Any) -> Any:
        return CacheConfig.from_dict(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _zsmerge_find_llm(self) -> Self:
        self._sampling_params(None, {})  # refuses bad values now
        if self.llm is None:
            self._llm = _MODELS.get(self._loading_settings())
            return self
        defaults = {
            name: type(self).model_fields[name].get_default(call_default_factory=True) for name in LOADING_SETTINGS
        }
        if changed := [name for name in LOADING_SETTINGS if getattr(self, name) != defaults[name]]:
            raise ConfigError(f"{', '.join(changed)} cannot change a model given as llm: set it in LLM(...) instead.")
        self._llm = self.llm
        return self

    def _loading_settings(self) -> dict[str, Any]:
        """Return the keywords for `LLM`."""
        settings = {name: getattr(self, name) for name in LOADING_SETTINGS if name != "cache_config"}
        given = {name: value for name, value in settings.items() if value is not None}
        return {"model": self.model, "cache": self.cache_config, **given}

    def _stop_strings(self, stop: Sequence[str] | str | None) -> list[str]:
        of_call = [stop] if isinstance(stop, str) else stop or []
        return list(dict.fromkeys([*(self.stop or []), *of_call]))

    def _sampling_params(self, stop: Sequence[str] | str | None, changes: dict[str, Any]) -> SamplingParams:
        settings = {name: getattr(self, name) for name in SAMPLING_SETTINGS}
        return SamplingParams(**{**settings, **changes}, stop=tuple(self._stop_strings(stop)))

    def _sampling_options(self, options: dict[str, Any], others: tuple[str, ...] = ()) -> dict[str, Any]:
        """Return the sampling settings among the keywords of one call. `others`: names that the caller handles.

        Raises:
            ConfigError: a keyword of another name.
        """
        known = (*SAMPLING_SETTINGS, *others, *REQUEST_SETTINGS, "model", "stream")
        if unknown := sorted(options.keys() - set(known)):
            hint = did_you_mean(unknown, known)
            raise ConfigError(
                f"A call of {type(self).__name__} has no option {', '.join(unknown)}; it has {', '.join(known)}.{hint}"
            )
        return {name: options[name] for name in SAMPLING_SETTINGS if name in options}

    def _request_options(
        self, stop: Sequence[str] | str | None, sampling: dict[str, Any], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the keywords of one request: those of sampling, timeout and priority."""
        own = {name: options.get(name, getattr(self, name)) for name in REQUEST_SETTINGS}
        return {"sampling": self._sampling_params(stop, sampling), **own}

    def _llm_for(self, model: str) -> LLM:
        """Return the LLM of a model that a call names. Another one than this object's stays loaded as long as this.

        Raises:
            ConfigError: another model, where this object was given its own as `llm`.
        """
        if model == self.model:
            return self.core
        if self.llm is not None:
            raise ConfigError(
                f"This object was given {self.model!r} as llm: create {type(self).__name__}(model={model!r}) instead."
            )
        self._other_llms[model] = _MODELS.get({**self._loading_settings(), "model": model})
        return self._other_llms[model]

    @property
    def core(self) -> LLM:
        """The underlying `zsmerge_llm.LLM`, with its sessions, documents and tokenizer. It loads at its first use."""
        llm: LLM = self._llm
        return llm

    def _uses_cache(self) -> bool:
        """Return whether LangChain looks for answers in a cache."""
        cache: Any = getattr(self, "cache", None)
        return get_llm_cache() is not None if cache is None else cache is not False

    @langchain_errors()
    def _fingerprint(self, model: str | None = None) -> str:
        """Return what answers in LangChain's cache belong to: digests of weights, tokenizer and template. Loads."""
        return str(self._llm_for(model or self.model).store.fingerprint)

    @langchain_errors()
    def warm_up(self) -> Self:
        """Load the model now, not at its first use: loading may block an event loop."""
        self.core.warm_up()
        return self

    @langchain_errors()
    def get_token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text by the model's tokenizer, without special tokens. Loads the model."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        ids: list[int] = self._llm.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        parent: Any = super()
        return parent._get_ls_params(stop=self._stop_strings(stop) or None, **kwargs)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = ("model", *LOADING_SETTINGS, *SAMPLING_SETTINGS, "stop")
        return {**{name: getattr(self, name) for name in names}, "cache_config": self.cache_config.to_dict()}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Settings can be written with `langchain_core.load.dumps`; an `llm` given as an object cannot."""
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """The settings of the cache that differ from the defaults, as plain data."""
        defaults = CacheConfig().to_dict()
        changed = {name: value for name, value in self.cache_config.to_dict().items() if value != defaults[name]}
        return {"cache_config": changed}

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {"_llm": None, "_other_llms": {}}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self._llm = self.llm if self.llm is not None else _MODELS.get(self._loading_settings())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        for llm in (self._llm, *self._other_llms.values()):
            memo[id(llm)] = llm  # settings are copied, weights never
        return super().__deepcopy__(memo)


_PARAMETERS = inspect.signature(LLM).parameters.keys() - {"model", "cache"} | {"cache_config"}
LOADING_SETTINGS = tuple(name for name in ZSMergeSettings.model_fields if name in _PARAMETERS)
"""Fields that describe the model and its cache: the keywords of `LLM`, with `cache_config` for `cache`."""
SAMPLING_SETTINGS = tuple(
    name for name in ZSMergeSettings.model_fields if name in {field.name for field in fields(SamplingParams)} - {"stop"}
)
"""Fields of `SamplingParams`; `stop` is apart, because a call adds to it."""
REQUEST_SETTINGS = ("timeout", "priority")
"""Fields of one request that a call may change."""
