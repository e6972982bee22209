"""Responses that are kept: after a restart too, so many and no more, and each its user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.conftest import KEYS, serving
from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.scripted_model import scripted_answers
from zsmerge_llm import LLM
from zsmerge_llm.server.settings import ServerSettings


def client(address: str, key: str = KEYS[0]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def settings(folder: Path | None, **limits: Any) -> ServerSettings:
    return ServerSettings(api_keys=KEYS, max_tokens=6, responses_dir=folder, **limits)


def respond(oai: openai.OpenAI, text: str = "Name a tree.", **options: Any) -> Any:
    return oai.responses.create(model="tiny", input=text, **options)


def test_a_response_is_there_after_a_restart_and_for_its_user_alone(llm: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    with serving(llm, settings(folder)) as address:
        first = respond(client(address), instructions="Be brief.")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
    with serving(llm, settings(folder)) as address:
        ann, bob = (client(address, key) for key in KEYS)
        found = ann.responses.retrieve(first.id)
        assert (found.output_text, found.instructions, found.status) == (first.output_text, "Be brief.", first.status)
        second = respond(ann, "Another.", previous_response_id=first.id, instructions="Be brief.")
        assert second.usage.zsmerge["reuse"] == "continued"
        for refused in (bob.responses.retrieve, bob.responses.delete):
            with pytest.raises(openai.NotFoundError):
                refused(first.id)
        with pytest.raises(openai.NotFoundError):
            respond(bob, previous_response_id=first.id)
        ann.responses.delete(first.id)
        for lost in (ann.responses.retrieve, ann.responses.delete):
            with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
                lost(first.id)
        assert ann.responses.retrieve(second.id).previous_response_id == first.id


@pytest.mark.parametrize("kept_in_files", [False, True])
@pytest.mark.parametrize("limit", [{"max_responses": 2}, {"max_response_bytes": 9_000}])
def test_the_newest_responses_are_kept_and_no_more(
    llm: LLM, tmp_path: Path, kept_in_files: bool, limit: dict[str, int]
) -> None:
    with serving(llm, settings(tmp_path if kept_in_files else None, **limit)) as address:
        oai = client(address)
        names = [respond(oai, f"Name {number} trees. {'Why? ' * 400}").id for number in range(4)]
        kept = []
        for name in names:
            try:
                kept.append(oai.responses.retrieve(name).id)
            except openai.NotFoundError:
                continue
        assert kept == names[-len(kept) :]
        assert 0 < len(kept) <= 3
        with pytest.raises(openai.BadRequestError, match="stream"):
            oai.responses.retrieve(names[-1], stream=True)


def test_a_response_that_was_damaged_or_cannot_be_kept_costs_no_answer(llm: LLM, tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    with serving(llm, settings(folder)) as address:
        oai = client(address)
        for damage in (b"", b"{", b"[]", b'{"owner": null, "messages": 5, "response": {}}', b'{"other": 1}'):
            first = respond(oai)
            (folder / f"{first.id}.json").write_bytes(damage)
            with pytest.raises(openai.NotFoundError):
                oai.responses.retrieve(first.id)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        folder.write_text("no folder")
        assert respond(oai).output_text


def test_reasoning_is_streamed_as_an_item_of_its_own() -> None:
    with make_llm("qwen3", cache=LARGE_CACHE, retrieval_tokens=0) as llm:
        llm.model = "tiny"
        with serving(llm, settings(None)) as address, scripted_answers(llm, "<think>\nOak?\n</think>\n\nAn oak."):
            oai = client(address)
            whole = respond(oai, max_output_tokens=400)
            events = list(respond(oai, max_output_tokens=400, stream=True))
    last: Any = events[-1]
    for answer in (whole, last.response):
        thought, said = answer.output
        assert (thought.type, thought.content[0].text, said.content[0].text) == ("reasoning", "Oak?", "An oak.")
    added = [(event.output_index, event.item.type) for event in events if event.type == "response.output_item.added"]
    assert added == [(0, "reasoning"), (1, "message")]
    thoughts = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert thoughts == "Oak?"
