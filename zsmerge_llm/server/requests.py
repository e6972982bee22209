"""What all dialects share: a request as `LLM.stream` takes it, its session, its sampling, and what it cost."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import shown
from zsmerge_llm.server.errors import ErrorReply, RequestError, invalid, not_found
from zsmerge_llm.server.settings import NAME, ServerSettings
from zsmerge_llm.types import Message, Usage

if TYPE_CHECKING:
    from zsmerge_llm.llm import LLM


class Body(BaseModel):
    """A request's body. Fields that it does not have are refused."""

    model_config = ConfigDict(extra="forbid", strict=False, protected_namespaces=())


@dataclass(frozen=True)
class ChatRequest:
    """One request: messages in the OpenAI format, and the keyword arguments of `LLM.stream`.

    Attributes:
        model: the name that the client used, which the answer repeats.
    """

    model: str
    messages: list[Message]
    options: dict[str, Any]

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return self.options["sampling"].logprobs is not None


@dataclass(frozen=True)
class Context:
    """Who asks, and whom."""

    llm: LLM
    settings: ServerSettings
    owner: str | None

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may give the model."""
        return (served_name(self.llm.name), *self.settings.aliases)

    def check_model(self, name: str) -> None:
        """Refuse a model that is not served. Raises RequestError."""
        if name not in self.model_names and name != self.llm.name:
            message = f"There is no model {shown(name)} here; there is {', '.join(map(repr, self.model_names))}."
            raise RequestError(ErrorReply(404, "not_found_error", message, "model_not_found", "model"))

    def check_messages(self, number: int) -> None:
        """Refuse a conversation of too many messages. Raises RequestError."""
        if number > self.settings.max_messages:
            raise invalid(f"The conversation has {number} messages; {self.settings.max_messages} are allowed.")

    def options(self, sampling: SamplingParams, session: str | None, **options: Any) -> dict[str, Any]:
        """Return keyword arguments of `LLM.stream`, without those that are None."""
        given = {key: value for key, value in options.items() if value is not None}
        given |= {"session": session} if session else {}
        return {**given, "sampling": sampling, "namespace": self.owner, "timeout": self.settings.timeout}

    def sampling(self, *limits: int | None, stop: Any = None, **settings: Any) -> SamplingParams:
        """Return sampling parameters; what is None has its default.

        limits: those of the answer's tokens; the first one given holds.
        """
        max_tokens = next((limit for limit in limits if limit is not None), self.settings.max_tokens)
        given = {key: value for key, value in settings.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, stop=stop or (), **given)

    def session(self, document: str | None, *candidates: str | None) -> str | None:
        """Return the session of a document or, without one, the first name that is given.

        Raises:
            RequestError: there is no such document, or it is no name.
        """
        name = session_name(document, *candidates)
        if document is None or name is None:
            return name
        self.llm.store.refresh(self.qualified(name))
        info = self.llm.store.info(self.qualified(name))
        if info is None or not info.has_document:
            raise not_found(f"There is no document {name!r}: send it to /v1/documents first.")
        return name

    def qualified(self, name: str) -> str:
        """Return the name of a session of this user in the store."""
        return name if self.owner is None else f"{self.owner}/{name}"


def served_name(model: str) -> str:
    """Return the name of a model for clients: of a file or folder its own name, and not where it is."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.name if path.is_absolute() or path.exists() else model


def session_name(*candidates: str | None) -> str | None:
    """Return the first name that is given. Raises RequestError: it is no name."""
    name = next((each for each in candidates if each is not None), None)
    if name is not None and not NAME.fullmatch(name):
        raise invalid("The id of a session is 1 to 200 characters, without slashes and control characters.")
    return name


def refuse(**fields: Any) -> None:
    """Refuse fields that have a value: what they ask for is not there. Raises RequestError."""
    for name, value in fields.items():
        if value:
            raise invalid(f"{name} is not supported: leave it out.", name)


def new_id(prefix: str) -> str:
    """Return an id as the dialects write them."""
    return f"{prefix}{uuid.uuid4().hex}"


def now() -> int:
    """Return the seconds since 1970."""
    return int(time.time())


def own_counts(usage: Usage) -> dict[str, Any]:
    """Return what only this server reports of a request."""
    return {
        "reuse": usage.reuse,
        "dropped_tokens": usage.dropped_tokens,
        "merged_tokens": usage.merged_tokens,
        "retrieved_tokens": usage.retrieved_tokens,
        "cache_bytes": usage.cache_bytes,
        "prefill_seconds": round(usage.prefill_seconds, 4),
        "decode_seconds": round(usage.decode_seconds, 4),
    }


def text_of(content: Any) -> str:
    """Return the text of a system prompt or instruction: a string, or blocks of text. Raises RequestError."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(block, Mapping) and "text" in block for block in content):
        return "\n".join(str(block["text"]) for block in content)
    raise invalid("A system prompt must be text or a list of text blocks.", "system")
