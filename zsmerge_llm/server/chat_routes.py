"""The routes that answer: OpenAI's three and Anthropic's."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from starlette.responses import Response

from zsmerge_llm.server import anthropic_messages, openai_chat, openai_completions, openai_responses
from zsmerge_llm.server.answers import Answering, Asking
from zsmerge_llm.server.delivery import EventForm, json_reply, run
from zsmerge_llm.server.errors import anthropic_error, openai_error
from zsmerge_llm.server.requests import ChatRequest, Context, refuse
from zsmerge_llm.server.response_events import ResponseEvents
from zsmerge_llm.server.stored_responses import StoredResponses
from zsmerge_llm.types import Chunk, Result

OPENAI = EventForm(named=False, end="[DONE]", error=openai_error)
RESPONSES = EventForm(named=True, end=None, error=openai_error)
ANTHROPIC = EventForm(named=True, end=None, error=anthropic_error)


def _stored(request: Request) -> StoredResponses:
    found: StoredResponses = request.app.state.responses
    return found


Stored = Annotated[StoredResponses, Depends(_stored)]
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
        events = openai_completions.CompletionEvents(body.model, body.includes_usage, body.logprobs is not None)
        return await answering.events(
            lambda cancel: asking.llm.stream_complete(prompt, **options, cancel=cancel), events, OPENAI
        )
    result = await answering.whole(lambda cancel: asking.llm.complete(prompt, **options, cancel=cancel))
    return json_reply(openai_completions.response(body.model, result, body.logprobs is not None))


@router.post("/responses")
async def responses(
    body: openai_responses.ResponseBody,
    asking: Asking,
    answering: Answering,
    stored: Stored,
    session: SessionHeader = None,
) -> Response:
    """Answer a conversation, as OpenAI's newer dialect."""
    wanted = openai_responses.parse(body, asking, session, stored)
    chat = Chat(asking, wanted)
    said = wanted.messages[1:] if body.instructions else wanted.messages
    events = ResponseEvents(wanted, body, stored.keeper(said, asking.owner, body.store is not False))
    if body.stream:
        return await answering.events(chat.chunks, events, RESPONSES)
    return json_reply(events.response(await answering.whole(chat.answer)))


@router.get("/responses/{name}")
def find_response(name: str, asking: Asking, stored: Stored, stream: bool = False) -> Response:
    """Return a response that was kept, as it was sent."""
    refuse(stream=stream)
    return json_reply(stored.get(name, asking.owner).response)


@router.delete("/responses/{name}")
def delete_response(name: str, asking: Asking, stored: Stored) -> Response:
    """Forget a response."""
    stored.remove(name, asking.owner)
    return json_reply({"id": name, "object": "response", "deleted": True})


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
    names = asking.model_names
    page = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    return json_reply({"object": "list", "data": [_model(name) for name in names], **page})


@router.get("/models/{name:path}")
async def model(name: str, asking: Asking) -> Response:
    """Describe the model."""
    asking.check_model(name)
    return json_reply(_model(name))


def _model(name: str) -> dict[str, object]:
    """Return what both dialects say of a model."""
    openai = {"id": name, "object": "model", "created": 0, "owned_by": "zsmerge-llm"}
    anthropic = {"type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z", "lifecycle": "active"}
    return {**openai, **anthropic}
