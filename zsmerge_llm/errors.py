"""All errors that this package raises on purpose. Each message states what is wrong and how to fix it.

In brackets: the class of Python that an error is, too. `langchain_zsmerge` raises each as a class of LangChain as well.

ZSMergeError
├── ConfigError (ValueError)            invalid or contradictory settings
│   └── UntrustedFolderError            a cache folder that others may write to
├── InputError (ValueError)             invalid messages, prompts, tools or token ids
│   ├── UnsupportedContentError         message content other than text, such as an image
│   ├── UnsupportedSchemaError          a strict schema with a keyword that cannot be enforced while decoding
│   └── ContextLimitError               a prompt longer than a set limit; nothing is ever truncated
├── LoadError                           the model cannot be loaded
│   ├── ModelNotFoundError (FileNotFoundError)  no such Hub id, folder, file or built-in name
│   ├── CorruptModelError               a model file is empty, truncated or fails its checksum
│   ├── UnsupportedModelError           an architecture or feature that the compressed cache does not support
│   └── MissingTemplateError (ValueError)  chat with a model that has no chat template
├── MissingDependencyError (ImportError)  an optional package is not installed
├── PackageError                        compiled code on disk that is not used
├── DeviceMemoryError (MemoryError)     the device has no memory left for what was asked
├── ForkedProcessError (RuntimeError)   a model is used in a fork of the process that loaded it
├── InvalidOutputError (ValueError)     an answer that is not what its schema or class asks for
├── QueueFullError                      as many requests as allowed are waiting or being answered
├── DeadlineExceededError (TimeoutError)  a request's time was up before its answer was complete
└── SessionError                        a session cannot be used
    ├── SessionNotFoundError (FileNotFoundError, KeyError)  no session of that name
    ├── SessionCorruptError             a saved session is truncated or was altered
    ├── SessionMismatchError            a session of another model, tokenizer, template or cache config
    ├── SessionStorageError (OSError)   the file of a session cannot be written or deleted
    └── StoreFullError                  `session_memory` is too small for one session

ShortenedOutputWarning (UserWarning): an answer that is valid, and shorter than the model would have made it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class ZSMergeError(Exception):
    """Base class of all errors that zsmerge-llm raises on purpose."""


class ConfigError(ZSMergeError, ValueError):
    """A setting is invalid, or settings contradict each other."""


class UntrustedFolderError(ConfigError):
    """A cache folder, or a file in it, is not the user's own: others could have put into it what would be trusted."""


class InputError(ZSMergeError, ValueError):
    """Messages, prompts, tools or token ids are invalid."""


class UnsupportedContentError(InputError):
    """Message content is not text, such as an image block."""


class UnsupportedSchemaError(InputError):
    """A strict schema has a keyword that cannot be enforced while decoding, or a class has no JSON schema."""


class ContextLimitError(InputError):
    """A prompt is longer than a set limit. Nothing is ever truncated."""


class LoadError(ZSMergeError):
    """The model cannot be loaded."""


class ModelNotFoundError(LoadError, FileNotFoundError):
    """There is no such Hub id, folder, GGUF file or built-in name."""


class CorruptModelError(LoadError):
    """A model file is empty, truncated or fails its checksum."""


class UnsupportedModelError(LoadError):
    """The compressed cache does not support the model's architecture or one of its features."""


class MissingTemplateError(LoadError, ValueError):
    """The model has no chat template, so it cannot chat."""


class MissingDependencyError(ZSMergeError, ImportError):
    """An optional package is required and not installed."""


class PackageError(ZSMergeError):
    """Compiled code on disk is damaged, made for something else, or not the user's own. Decoding goes on without it."""


class DeviceMemoryError(ZSMergeError, MemoryError):
    """The device has no memory left for what was asked. Conversations are as they were before."""


class ForkedProcessError(ZSMergeError, RuntimeError):
    """A model is used in a fork of a process that had loaded one. Nothing is changed in either process."""


class InvalidOutputError(ZSMergeError, ValueError):
    """An answer is not what its schema or class asks for: it was cut, or breaks a rule that decoding cannot enforce."""

    @property
    def correction(self) -> str:
        """What to tell a model that gave this answer, so that it answers again."""
        return f"{str(self)[:600]}\nAnswer again, with all of this corrected."


class ShortenedOutputWarning(UserWarning):
    """An answer is valid under its schema and was ended early, to be complete within `max_tokens`. Parts are missing.

    `warnings.filterwarnings("error", category=ShortenedOutputWarning)` makes it an error.
    """


class QueueFullError(ZSMergeError):
    """As many requests as allowed are waiting or being answered. Nothing was read: send the request again later."""


class DeadlineExceededError(ZSMergeError, TimeoutError):
    """A request's time was up before its answer was complete. Its conversation is as it was before."""


class SessionError(ZSMergeError):
    """A session cannot be used."""


class SessionNotFoundError(SessionError, FileNotFoundError, KeyError):
    """There is no session of that name or at that path."""


class SessionCorruptError(SessionError):
    """A saved session is truncated or was altered."""


class SessionMismatchError(SessionError):
    """A session belongs to another model, tokenizer, template or cache configuration."""


class SessionStorageError(SessionError, OSError):
    """The file of a session cannot be written or deleted. The session is as it was before, and so is the file."""


class StoreFullError(SessionError):
    """`session_memory` is too small for one session."""


def shown(value: object) -> str:
    """Return a value as an error shows it: in at most 80 characters."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, or an object whose own code fails
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(names: Iterable[object], known: Iterable[str]) -> str:
    """Return a question that names the known name nearest to each of some others; "" where none is near."""
    from difflib import get_close_matches

    choices = sorted(known)
    near = [match for name in names for match in get_close_matches(str(name), choices, n=1)]
    return f" Did you mean {', '.join(near)}?" if near else ""
