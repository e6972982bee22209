"""Variables of a chat template that hold for one request.

Those that change nothing but the header of the answer, as many switches of reasoning do, make no other conversation:
they count in the digest of the prompt alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.language.template_probe import sample_histories
from zsmerge_llm.types import Message


def with_request_args(template: ChatTemplate, args: Mapping[str, Any]) -> ChatTemplate:
    """Return the same template with further variables."""
    added = {name: value for name, value in args.items() if name not in template.args or template.args[name] != value}
    if not added:
        return template
    changed = _with_args(template, {**template.args, **added})
    if _histories(template) == _histories(changed):
        changed.header_args = added
    else:
        changed.history_args = changed.args
    return changed


def without_request_args(template: ChatTemplate) -> ChatTemplate:
    """Return the same template without them: documents were read so."""
    return template if template.args is template.model_args else _with_args(template, template.model_args)


def mark_prompt(template: ChatTemplate, messages: Sequence[Message]) -> list[Message]:
    """Return the messages, the last of them with the variables that change the header of its answer."""
    if not template.header_args:
        return list(messages)
    return [*messages[:-1], {**messages[-1], "header_args": template.header_args}]


def _with_args(template: ChatTemplate, args: dict[str, Any]) -> ChatTemplate:
    changed = copy.copy(template)
    changed.args = args
    return changed


def _histories(template: ChatTemplate) -> tuple[str, ...]:
    return sample_histories(partial(template.render, add_generation_prompt=False))
