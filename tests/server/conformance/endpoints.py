"""The endpoints, each as its vendor's own client calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anthropic
import openai

from tests.server.conformance import messages_cells, openai_cells, responses_cells
from tests.server.conformance.cells import Group


@dataclass(frozen=True)
class Clients:
    """Both vendors' clients of one server."""

    oai: openai.OpenAI
    claude: anthropic.Anthropic


@dataclass(frozen=True)
class Endpoint:
    """One endpoint.

    Attributes:
        groups: tables of what requests may hold. base: what every request has.
        create: the vendor's method. text: what an answer says.
        samples: requests of which answers are looked at, besides `base`.
    """

    path: str
    vendor: str
    groups: list[Group]
    base: dict[str, Any]
    create: Callable[[Clients], Callable[..., Any]]
    text: Callable[[Any], str]
    samples: tuple[dict[str, Any], ...] = ()
    streams: bool = True


def _blocks(answer: Any) -> str:
    return "".join(getattr(block, "text", "") for block in answer.content)


ENDPOINTS = (
    Endpoint(
        "/v1/chat/completions",
        "OpenAI",
        openai_cells.CHAT_GROUPS,
        {"model": "tiny", "messages": [openai_cells.USER]},
        lambda clients: clients.oai.chat.completions.create,
        lambda answer: answer.choices[0].message.content,
        (openai_cells.CALLED, {"logprobs": True, "top_logprobs": 2}, {"stop": list("aeiou \n.0123456789")}),
    ),
    Endpoint(
        "/v1/completions",
        "OpenAI",
        openai_cells.COMPLETION_GROUPS,
        {"model": "tiny", "prompt": "Once upon"},
        lambda clients: clients.oai.completions.create,
        lambda answer: answer.choices[0].text,
        ({"logprobs": 2},),
    ),
    Endpoint(
        "/v1/responses",
        "OpenAI",
        responses_cells.GROUPS,
        {"model": "tiny", "input": "Name a tree."},
        lambda clients: clients.oai.responses.create,
        lambda answer: answer.output_text,
        (responses_cells.CALLED, {"top_logprobs": 2}, {"text": responses_cells.JSON_SCHEMA, "max_output_tokens": 400}),
    ),
    Endpoint(
        "/v1/messages",
        "Anthropic",
        messages_cells.GROUPS,
        {"model": "tiny", "messages": [messages_cells.USER], "max_tokens": 12},
        lambda clients: clients.claude.messages.create,
        _blocks,
        (messages_cells.CALLED, {"stop_sequences": list("aeiou .0123456789")}),
    ),
    Endpoint(
        "/v1/messages/count_tokens",
        "Anthropic",
        messages_cells.COUNT_GROUPS,
        {"model": "tiny", "messages": [messages_cells.USER]},
        lambda clients: clients.claude.messages.count_tokens,
        lambda answer: str(answer.input_tokens),
        streams=False,
    ),
)
