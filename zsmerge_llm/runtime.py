"""What is behind an `LLM` once its model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, cast

from zsmerge_llm.config import CacheConfig, check_integer, parse_bytes
from zsmerge_llm.engine.scheduling import SchedulingConfig
from zsmerge_llm.errors import ConfigError, InputError, shown
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.language.grammar import GrammarCompiler
from zsmerge_llm.language.output_format import OutputFormats
from zsmerge_llm.models.owner_process import check_process, is_forked
from zsmerge_llm.types import NamedSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.engine.layer_budgets import LayerBudgets
    from zsmerge_llm.generation.document_reading import DocumentReader
    from zsmerge_llm.planning.explanation import Explanation
    from zsmerge_llm.retrieval.selection import RetrievalTokens
    from zsmerge_llm.retrieval.token_vectors import TokenVectors
    from zsmerge_llm.sessions.conversations import Conversations
    from zsmerge_llm.sessions.tiers import DeviceTier


@dataclass(frozen=True)
class Runtime:
    """A loaded model with everything that works on it."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    template: ChatTemplate
    output_formats: OutputFormats
    conversations: Conversations
    layer_budgets: LayerBudgets

    def with_template_args(self, args: Mapping[str, Any]) -> Runtime:
        """Return the same for one request with further variables of the chat template."""
        if not args:
            return self
        conversations = self.conversations.with_args(args)
        template = conversations.template
        formats = self.output_formats.using(template)
        return replace(self, template=template, output_formats=formats, conversations=conversations)

    def document_reader(self, max_input_tokens: int | None) -> DocumentReader:
        """Return what reads documents into their sessions. max_input_tokens: as for `LLM`."""
        from zsmerge_llm.generation.document_reading import DocumentReader  # needs torch

        return DocumentReader(
            self.engine, self.conversations.documents, self.template, self.output_formats, max_input_tokens
        )


class LazyRuntime:
    """The runtime of an `LLM`: assembled at its first use, by one thread, and never again once it is closed."""

    def __init__(self, assemble: Callable[[], Runtime]) -> None:
        self.current: Runtime | None = None
        self._assemble = assemble
        self._closed = False
        self._lock = RLock()

    def load(self) -> Runtime:
        """Return the runtime, assembled if it is not.

        Raises:
            InputError: it was closed. LoadError: the model cannot be loaded.
            ForkedProcessError: this is a fork of a process that had loaded a model.
        """
        check_process()
        with self._lock:
            if self._closed:
                raise InputError("This LLM is closed: make another one.")
            if self.current is None:
                self.current = self._assemble()
            return self.current

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy or pickle how it is assembled: the copy assembles its own."""
        return LazyRuntime, (self._assemble,)

    def close(self) -> None:
        """Give a model object back as it was, and release the memory of any other model. In a fork, nothing happens."""
        if is_forked():
            return
        with self._lock:
            self._closed = True
            runtime, self.current = self.current, None
        if runtime is not None:
            runtime.engine.close()
            runtime.conversations.store.close()


class CopiedBySettings(NamedSettings):
    """What is deep-copied and pickled by its settings: the copy loads its model anew, when it is first used.

    Attributes:
        model: as for `LLM`.
    """

    model: str | Path | PreTrainedModel

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings. Raises ConfigError: a model object was handed in, which is its owner's."""
        if not isinstance(self.model, (str, Path)):
            raise ConfigError(
                "An LLM of a model object cannot be copied or pickled: give the model's name or folder instead, or "
                "make an LLM of the copy's own model."
            )
        return vars(self).copy()

    def __copy__(self) -> Self:
        """Return another object with the same loaded model."""
        shallow = object.__new__(type(self))
        vars(shallow).update(vars(self))
        return shallow


def validate_runtime_settings(
    cache: Any, compile: Any, retrieval_tokens: Any, gpu_session_memory: Any, scheduling: Any
) -> None:
    """Refuse settings of `LLM` that cannot work, before anything is loaded.

    Raises:
        ConfigError: a cache that is no CacheConfig, an unknown value of `compile`, or a bad number of tokens or bytes.
    """
    if scheduling is not None and not isinstance(scheduling, SchedulingConfig):
        raise ConfigError(f"scheduling must be a SchedulingConfig, not a {type(scheduling).__name__}.")
    if gpu_session_memory != "auto":
        parse_bytes(gpu_session_memory)
    if cache is not None and not isinstance(cache, CacheConfig):
        raise ConfigError(f"cache must be a CacheConfig, not a {type(cache).__name__}.")
    if compile not in (True, False, "auto"):
        raise ConfigError(f"compile must be True, False or 'auto', not {shown(compile)}.")
    if retrieval_tokens != "auto" and (
        isinstance(retrieval_tokens, bool) or not isinstance(retrieval_tokens, int) or retrieval_tokens < 0
    ):
        raise ConfigError(
            f"retrieval_tokens must be a number of tokens, 0 for none, or 'auto', not {shown(retrieval_tokens)}."
        )


def check_limit(name: str, limit: Any) -> int | None:
    """Return a limit that a user may set; None is none. Raises ConfigError."""
    if limit is not None:
        check_integer(name, limit, 1)
    return cast("int | None", limit)


def _check_template(chat_template: Any, args: Any) -> None:
    if not isinstance(chat_template, (str, NoneType)):
        raise ConfigError(f"chat_template must be Jinja text, not a {type(chat_template).__name__}.")
    if not isinstance(args, (dict, NoneType)) or not all(isinstance(name, str) for name in args or ()):
        raise ConfigError("template_args must be a dict of the template's variables by their names.")


def assemble(
    model: str | Path | PreTrainedModel,
    cache: CacheConfig,
    chunk: int | Literal["auto"],
    compile: bool | Literal["auto"],
    loading: dict[str, Any],
    template_args: dict[str, Any] | None,
    retrieval_tokens: RetrievalTokens,
    sessions_dir: str | Path | None,
    session_memory: int,
    gpu_session_memory: int | str,
    scheduling: SchedulingConfig | None,
    allow_control_tokens: bool = False,
) -> Runtime:
    """Load the model and build what works on it. `loading` goes to `loader.load`; the rest is as for `LLM`.

    Raises:
        LoadError: the model cannot be loaded. StoreFullError: `session_memory` is too small for one conversation.
    """
    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.engine.layer_budgets import LayerBudgets, budgets_path
    from zsmerge_llm.models.loader import load
    from zsmerge_llm.retrieval.attention_search import AttentionSearch
    from zsmerge_llm.retrieval.calibration import calibration
    from zsmerge_llm.retrieval.passage_search import PassageSearch
    from zsmerge_llm.sessions.conversations import Conversations
    from zsmerge_llm.sessions.documents import Documents
    from zsmerge_llm.sessions.fingerprint import fingerprint
    from zsmerge_llm.sessions.prompt_builder import PromptBuilder
    from zsmerge_llm.sessions.store import Store
    from zsmerge_llm.sessions.validation import ExpectedCache

    _check_template(loading["chat_template"], template_args)
    loaded = load(model, **loading)
    tokenizer = loaded.tokenizer
    template = ChatTemplate(tokenizer, args=template_args, allow_control_tokens=allow_control_tokens)
    engine = Engine(loaded.model, cache, chunk, compile, scheduling=scheduling)
    with ExitStack() as undo:  # a model object is its owner's: where anything fails, it is given back
        undo.callback(engine.close)
        source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else str(tokenizer.chat_template)
        mark = fingerprint(loaded.model, tokenizer, source, cache, loaded.weights_digest)
        expected = ExpectedCache(engine.config, *engine.layers, engine.vocab_size)
        size, device = engine.new_cache().nbytes, device_tier(engine, loading["quantization"], gpu_session_memory)
        store = Store(mark, session_memory, size, sessions_dir, expected, device)
        output_formats = OutputFormats(template, GrammarCompiler(tokenizer, engine.vocab_size, engine.stop_ids))
        report_status = loading.get("progress")
        layer_budgets = LayerBudgets(engine, lambda: calibration(template), budgets_path(mark.weights), report_status)
        configs = (layer_budgets.prompt_config, layer_budgets.document_config)
        documents = Documents(store, template, engine.new_cache, *configs, engine.read)
        searches = (
            PassageSearch(template, retrieval_tokens, token_vectors(engine, tokenizer)),
            AttentionSearch(engine.query_attention, template),
        )
        prompts = PromptBuilder(template, layer_budgets.prompt_config, *searches)
        conversations = Conversations(store, template, engine.new_cache, prompts, documents)
        undo.pop_all()
        return Runtime(loaded.name, tokenizer, engine, template, output_formats, conversations, layer_budgets)


def token_vectors(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> TokenVectors | None:
    """Return the vectors of a model's tokens; None where its embeddings are too narrow for any."""
    from zsmerge_llm.retrieval.token_vectors import MIN_WIDTH, TokenVectors

    if engine.model.config.get_text_config().hidden_size < MIN_WIDTH:
        return None

    def encode(texts: list[str]) -> list[list[int]]:
        return cast("list[list[int]]", tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    return TokenVectors(engine.token_embeddings, encode, engine.vocab_size)


def device_tier(engine: Engine, quantization: str | None, limit: int | str) -> DeviceTier | None:
    """Return where idle conversations stay beside a model; None for one that computes in host memory.

    limit: bytes; "auto" takes what its devices have free beside the memory to work in, and 0 where they do not tell.
    """
    from zsmerge_llm.gpu.staged_copies import DeviceCopies
    from zsmerge_llm.models.device import is_host
    from zsmerge_llm.planning.explanation import free_for_idle
    from zsmerge_llm.sessions.tiers import DeviceTier
    from zsmerge_llm.sessions.transfer import Transfer

    devices = engine.layers.devices
    if all(map(is_host, devices)):
        return None
    free = free_for_idle(engine, quantization) if limit == "auto" else parse_bytes(limit)
    return DeviceTier(Transfer(devices, DeviceCopies(devices)), free)


def explain(
    model: str | Path | PreTrainedModel,
    cache: CacheConfig,
    chunk: int | Literal["auto"],
    compile: bool | Literal["auto"],
    loading: dict[str, Any],
    runtime: Runtime | None,
) -> Explanation:
    """Explain what an `LLM` of these settings takes of memory: planned, or with its runtime as it is.

    Raises:
        LoadError: no such model, or none that the cache can carry.
    """
    from zsmerge_llm.planning.explanation import explain_loaded, explain_planned

    if runtime is None:
        return explain_planned(model, loading, cache, chunk, compile)
    store = runtime.conversations.store
    return explain_loaded(runtime.name, runtime.engine, store, loading["quantization"], compile)
