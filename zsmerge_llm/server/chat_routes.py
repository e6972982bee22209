"""The routes that answer: OpenAI's three and Anthropic's."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event
from typing import Annotated

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from zsmerge_llm.server import anthropic_messages, openai_chat, openai_completions, openai_responses
from zsmerge_llm.server.answers import Answering, Asking
from zsmerge_llm.server.delivery import EventForm, json_reply, run
from zsmerge_llm.server.errors import anthropic_error, openai_error
from zsmerge_llm.server.requests import ChatRequest, Context
from zsmerge_llm.types import Chunk, Result

OPENAI = EventForm(named=False, end="[DONE]", error=openai_error)
RESPONSES = EventForm(named=True, end=None, error=openai_error)
ANTHROPIC = EventForm(named=True, end=None, error=anthropic_error)
SessionHeader = Annotated[str | None, Header(alias="X-Session-Id")]

router = APIRouter(prefix="/v1")


class Chat:
    """A conversation to be answered, whole or piece by piece."""

    def __init__(self, context: Context, wanted: ChatRequest) -> None:
        self._llm = context.llm
        self._wanted = wanted

    def answer(self, cancel: Event) -> Result:
        """Return the answer."""
        return self._llm.chat(self._wanted.messages, **self._wanted.options, cancel=cancel)

    def chunks(self, cancel: Event) -> Iterator[Chunk]:
        """Return the answer, piece by piece."""
        return self._llm.stream(self._wanted.messages, **self._wanted.options, cancel=cancel)


@router.post("/chat/completions")
async def chat_completions(
    body: openai_chat.ChatCompletionBody, asking: Asking, answering: Answering, session: SessionHeader = None
) -> Response:
    """Answer a conversation, as OpenAI."""
    wanted = openai_chat.parse(body, asking, session)
    chat = Chat(asking, wanted)
    if body.stream:
        events = openai_chat.ChatEvents(wanted, body.includes_usage)
        return await answering.events(chat.chunks, events, OPENAI)
    return json_reply(openai_chat.response(wanted, await answering.whole(chat.answer)))


@router.post("/completions")
async def completions(body: openai_completions.CompletionBody, asking: Asking, answering: Answering) -> Response:
    """Continue a text, as OpenAI."""
    prompt, options = openai_completions.parse(body, asking)
    if body.stream:
        events = openai_completions.CompletionEvents(body.model, body.includes_usage)
        return await answering.events(
            lambda cancel: asking.llm.stream_complete(prompt, **options, cancel=cancel), events, OPENAI
        )
    result = await answering.whole(lambda cancel: asking.llm.complete(prompt, **options, cancel=cancel))
    return json_reply(openai_completions.response(body.model, result))


@router.post("/responses")
async def responses(
    body: openai_responses.ResponseBody,
    request: Request,
    asking: Asking,
    answering: Answering,
    session: SessionHeader = None,
) -> Response:
    """Answer a conversation, as OpenAI's newer dialect."""
    stored: openai_responses.StoredResponses = request.app.state.responses
    wanted = openai_responses.parse(body, asking, session, stored)
    chat = Chat(asking, wanted)
    events = openai_responses.ResponseEvents(wanted, body, stored.keeper(body, wanted, asking.owner))
    if body.stream:
        return await answering.events(chat.chunks, events, RESPONSES)
    return json_reply(events.response(await answering.whole(chat.answer)))


@router.post("/messages")
async def messages(
    body: anthropic_messages.MessagesBody, asking: Asking, answering: Answering, session: SessionHeader = None
) -> Response:
    """Answer a conversation, as Anthropic."""
    wanted = anthropic_messages.parse(body, asking, session)
    chat = Chat(asking, wanted)
    if body.stream:
        return await answering.events(chat.chunks, anthropic_messages.MessageEvents(wanted), ANTHROPIC)
    return json_reply(anthropic_messages.response(wanted, await answering.whole(chat.answer)))


@router.post("/messages/count_tokens")
async def count_tokens(body: anthropic_messages.CountBody, request: Request, asking: Asking) -> Response:
    """Count the tokens of a conversation, as Anthropic."""
    asking.check_model(body.model)
    given, tools = anthropic_messages.messages_of(body), anthropic_messages.tools_of(body.tools)
    number = await run(request, lambda cancel: asking.llm.count_prompt_tokens(given, tools))
    return json_reply({"input_tokens": number})


@router.get("/models")
async def models(asking: Asking) -> Response:
    """List the names of the model."""
    data = [_model(name) for name in asking.model_names]
    return json_reply({"object": "list", "data": data, "has_more": False})


@router.get("/models/{name:path}")
async def model(name: str, asking: Asking) -> Response:
    """Describe the model."""
    asking.check_model(name)
    return json_reply(_model(name))


def _model(name: str) -> dict[str, object]:
    """Return what both dialects say of a model."""
    openai = {"id": name, "object": "model", "created": 0, "owned_by": "zsmerge-llm"}
    return {**openai, "type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}
