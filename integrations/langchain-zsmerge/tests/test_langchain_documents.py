"""`ZSMergeDocuments`: documents are read once, and questions can be asked with every method."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_zsmerge import ChatZSMerge, ZSMergeDocuments
from pydantic import BaseModel, ValidationError

from zsmerge_llm.errors import ConfigError, InputError


class Colour(BaseModel):
    """A colour."""

    name: str


def report(llm: Any, *documents: Any, **settings: Any) -> ZSMergeDocuments:
    return ZSMergeDocuments(model=ChatZSMerge(llm=llm), documents=list(documents or ["The sky is blue."]), **settings)


def test_questions_of_every_kind_go_to_the_session_of_the_documents(llm: Any) -> None:
    asked = report(llm, session_id="sky", probe="colours")
    assert asked.invoke("Which colour?").text == "The sky is blue."
    assert [chunk.text for chunk in asked.stream("Which?") if chunk.text] == ["The ", "sky ", "is ", "blue."]
    assert len(asked.batch(["a", "b"])) == 2
    asyncio.run(asked.ainvoke("Which?"))
    assert {request.session for request in llm.requests} == {"sky"}
    assert llm.documents == {"sky": "The sky is blue."}
    assert llm.documents_read == 1


def test_notes_are_asked_of_the_model(llm: Any) -> None:
    report(llm).invoke("Which colour?")
    assert llm.document_notes is False
    report(llm, "Snow is white.", notes="colours").invoke("Which colours are there?")
    assert llm.document_notes == "colours"


async def test_an_async_stream_reads_in_a_thread(slow_llm: Any) -> None:
    pieces = [chunk.text async for chunk in report(slow_llm).astream("Which?", max_tokens=2)]
    assert "".join(pieces) == "word word "
    assert slow_llm.documents_read == 1


def test_many_threads_read_once(slow_llm: Any) -> None:
    report(slow_llm).batch(["a"] * 8, max_tokens=1)
    assert slow_llm.documents_read == 1


def test_documents_are_a_step_of_a_chain(llm: Any) -> None:
    chain = ChatPromptTemplate.from_template("In one word: {q}") | report(llm) | StrOutputParser()
    assert chain.invoke({"q": "which?"}) == "The sky is blue."
    assert [piece for piece in chain.stream({"q": "which?"}) if piece] == ["The ", "sky ", "is ", "blue."]
    assert llm.requests[0].prompt == [{"role": "user", "content": "In one word: which?"}]


def test_documents_are_texts_paths_and_documents_under_their_titles(llm: Any, tmp_path: Path) -> None:
    path = tmp_path / "grass.txt"
    path.write_text("Grass is green.", encoding="utf-8")
    titled = Document("Snow is white.", metadata={"title": "Winter"})
    report(llm, "The sky is blue.", path, titled).read()
    assert list(llm.documents.values())[-1] == (
        "The sky is blue.\n\ngrass\n\nGrass is green.\n\nWinter\n\nSnow is white."
    )
    report(llm, path).read()
    assert list(llm.documents.values())[-1] == "Grass is green."


def test_unreadable_files_and_empty_lists_are_refused(llm: Any, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="at least one"):
        ZSMergeDocuments(model=ChatZSMerge(llm=llm), documents=[])
    with pytest.raises(InputError, match="cannot be read as text"):
        report(llm, tmp_path / "none.txt").invoke("Which?")


def test_structured_output_follows_a_schema(llm: Any) -> None:
    llm.answers = ['{"name": "blue"}']
    asked = report(llm)
    assert asked.with_structured_output(Colour).invoke("Which?") == Colour(name="blue")
    assert llm.requests[0].response_format["json_schema"]["name"] == "Colour"
    assert asked.with_structured_output(Colour, include_raw=True).invoke("Which?")["parsed"] == Colour(name="blue")
    with pytest.raises(ConfigError, match="on documents"):
        asked.with_structured_output(Colour, method="function_calling")  # type: ignore[arg-type]


def test_messages_are_a_conversation_about_the_documents(llm: Any) -> None:
    asked, history = report(llm), [HumanMessage("Which?")]
    asked.invoke([*history, asked.invoke(history), HumanMessage("Really?")])
    assert [message["role"] for message in llm.requests[1].prompt] == ["user", "assistant", "user"]


def test_documents_can_be_pickled() -> None:
    asked = ZSMergeDocuments(model=ChatZSMerge(model="smollm2"), documents=["The sky is blue."], session_id="sky")
    again = pickle.loads(pickle.dumps(asked))
    assert (again.documents, again.session_id, again.model.core) == (asked.documents, "sky", asked.model.core)
    assert again._lock is not asked._lock
