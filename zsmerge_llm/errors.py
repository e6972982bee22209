"""Every error this package raises on purpose. Each message says what is wrong and what to do about it.

ZSMergeError
├── ConfigError (ValueError)            a setting that cannot work
├── InputError (ValueError)             messages, prompts or token ids that cannot be used
│   ├── UnsupportedContentError         content the model cannot take (an image block, say)
│   └── ContextLimitError               more tokens than a stated limit; nothing is ever truncated
├── LoadError                           a model that cannot be loaded
│   ├── ModelNotFoundError              no such Hub id, folder, file or built-in name
│   ├── CorruptModelError               a file that is empty, truncated or fails its checksum
│   ├── UnsupportedModelError           an architecture or feature the compressed cache cannot carry
│   └── MissingTemplateError            chat asked of a model without a chat template
├── MissingDependencyError (ImportError)  an optional package is not installed
└── SessionError                        a conversation that cannot be used
    ├── SessionNotFoundError            no session of that name
    ├── SessionCorruptError             a saved session that is truncated or was altered
    ├── SessionMismatchError            a saved session of another model, tokenizer, template or cache config
    └── StoreFullError                  the memory ceiling is too small for one session
"""


class ZSMergeError(Exception):
    """Base of all errors raised on purpose by zsmerge-llm."""


class ConfigError(ZSMergeError, ValueError):
    """A setting that cannot work."""


class InputError(ZSMergeError, ValueError):
    """Messages, prompts or token ids that cannot be used."""


class UnsupportedContentError(InputError):
    """Message content that a text model cannot take."""


class ContextLimitError(InputError):
    """More tokens than a stated limit allows. Nothing is ever truncated."""


class LoadError(ZSMergeError):
    """A model that cannot be loaded."""


class ModelNotFoundError(LoadError):
    """No such Hub id, folder, GGUF file or built-in name."""


class CorruptModelError(LoadError):
    """A model file that is empty, truncated or fails its checksum."""


class UnsupportedModelError(LoadError):
    """An architecture or a feature that the compressed cache cannot carry."""


class MissingTemplateError(LoadError):
    """Chat was asked of a model that has no chat template."""


class MissingDependencyError(ZSMergeError, ImportError):
    """An optional package is needed and not installed."""


class SessionError(ZSMergeError):
    """A conversation that cannot be used."""


class SessionNotFoundError(SessionError):
    """No session of that name or at that path."""


class SessionCorruptError(SessionError):
    """A saved session that is truncated or was altered."""


class SessionMismatchError(SessionError):
    """A saved session that belongs to another model, tokenizer, template or cache configuration."""


class StoreFullError(SessionError):
    """The memory ceiling is too small for even one session."""
