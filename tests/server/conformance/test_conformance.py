"""The server against every field of the vendors' own clients."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.server.conformance.cells import Cell, Group
from tests.server.conformance.endpoints import ENDPOINTS, Clients, Endpoint
from tests.server.conformance.page import PAGE, render
from tests.server.conformance.replies import Seen, look_at, missing
from tests.server.conformance.vendor import versions
from tests.server.conftest import serving
from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.scripted_model import scripted_answers
from zsmerge_llm.server.settings import ServerSettings

GROUPS = [(endpoint, group) for endpoint in ENDPOINTS for group in endpoint.groups]
CELLS = [(endpoint, name, cell) for endpoint, group in GROUPS for name, cell in group.cells.items()]
REFUSED = (openai.BadRequestError, anthropic.BadRequestError)
OTHERS_WORDS = ("messages", "input")
"""Fields that change what is asked, so that the answer is another one."""


@pytest.fixture(scope="module")
def clients(address: str) -> Clients:
    return _clients(address)


def _clients(address: str) -> Clients:
    options: Any = {"api_key": "none", "max_retries": 0}
    return Clients(openai.OpenAI(base_url=f"{address}/v1", **options), anthropic.Anthropic(base_url=address, **options))


def ask(clients: Clients, endpoint: Endpoint, **fields: Any) -> Any:
    """Return an answer, or its events where it is a stream."""
    answer = endpoint.create(clients)(**{**endpoint.base, **fields})
    return list(answer) if fields.get("stream") else answer


@pytest.mark.parametrize(("endpoint", "group"), GROUPS, ids=lambda each: getattr(each, "path", None) or each.title)
def test_a_table_has_all_names_that_the_vendor_has_and_no_others(endpoint: Endpoint, group: Group) -> None:
    assert group.vendor
    assert sorted(group.cells) == sorted(group.vendor), "add a cell to tests/server/conformance"


@pytest.mark.parametrize(
    ("endpoint", "name", "cell"), CELLS, ids=[f"{each[0].path}-{each[1]}-{index}" for index, each in enumerate(CELLS)]
)
def test_a_cell_is_as_the_table_says(clients: Clients, endpoint: Endpoint, name: str, cell: Cell) -> None:
    fields = dict(cell.request or {})
    if cell.status == "refused":
        with pytest.raises(REFUSED) as caught:
            ask(clients, endpoint, **fields)
        assert (cell.named or name) in str(caught.value.body)
        return
    answer = ask(clients, endpoint, **fields)
    assert cell.check(answer)
    if cell.status == "no effect" and not fields.get("stream") and not set(fields) & set(OTHERS_WORDS):
        assert endpoint.text(answer) == endpoint.text(ask(clients, endpoint))


@pytest.fixture(scope="module")
def thinking() -> Iterator[Callable[..., Any]]:
    """Ask a model that reasons before it answers."""
    with make_llm("qwen3", cache=LARGE_CACHE, retrieval_tokens=0) as llm:
        llm.model = "tiny"
        with serving(llm, ServerSettings()) as address:
            clients = _clients(address)

            def ask_it(endpoint: Endpoint, **how: Any) -> Any:
                with scripted_answers(llm, "<think>\nOak?\n</think>\n\nAn oak."):
                    return ask(clients, endpoint, **how)

            yield ask_it


def samples(clients: Clients, thinking: Callable[..., Any], endpoint: Endpoint, **how: Any) -> Iterator[Any]:
    """Yield answers of all kinds."""
    for fields in ({}, *endpoint.samples):
        yield ask(clients, endpoint, **fields, **how)
    yield thinking(endpoint, **how)


@pytest.fixture(scope="module")
def replies(clients: Clients, thinking: Callable[..., Any]) -> dict[str, Seen]:
    """What answers hold."""
    return {each.path: look_at(samples(clients, thinking, each)) for each in ENDPOINTS}


@pytest.fixture(scope="module")
def streams(clients: Clients, thinking: Callable[..., Any]) -> dict[str, Seen]:
    """What events hold."""
    options: dict[str, Any] = {
        path: {"stream_options": {"include_usage": True}} for path in ("/v1/chat/completions", "/v1/completions")
    }
    return {
        each.path: look_at(
            event
            for events in samples(clients, thinking, each, stream=True, **options.get(each.path, {}))
            for event in events
        )
        for each in ENDPOINTS
        if each.streams
    }


@pytest.fixture(scope="module")
def models(clients: Clients) -> Seen:
    """What lists of models hold."""
    return look_at([*clients.oai.models.list(), *clients.claude.models.list()])


def test_nothing_is_missing_that_the_vendors_always_send(
    replies: dict[str, Seen], streams: dict[str, Seen], models: Seen
) -> None:
    for seen in (*replies.values(), *streams.values(), models):
        assert not missing(seen)


def test_the_page_is_what_was_seen(replies: dict[str, Seen], streams: dict[str, Seen], models: Seen) -> None:
    text = render(replies, streams, models)
    if os.environ.get("WRITE_CONFORMANCE"):
        PAGE.write_text(text, encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    if versions() not in page:
        pytest.skip(f"docs/conformance.md is not about {versions()}")
    assert text == page, "renew it: WRITE_CONFORMANCE=1 python -m pytest -n 0 tests/server/conformance"
