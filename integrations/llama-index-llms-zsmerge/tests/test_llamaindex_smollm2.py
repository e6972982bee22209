"""The integration on the real SmolLM2-135M."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.zsmerge import ZSMergeLLM

pytestmark = pytest.mark.slow
QUESTION = [ChatMessage(role="user", content="What is the capital of France? Answer with one word.")]


@pytest.fixture(scope="module")
def llm() -> ZSMergeLLM:
    return ZSMergeLLM(model="smollm2", max_tokens=24)


async def test_all_chat_and_completion_methods_give_the_same_greedy_text(llm):
    *_, streamed = llm.stream_chat(QUESTION)
    *_, astreamed = [item async for item in await llm.astream_chat(QUESTION)]
    answers = [llm.chat(QUESTION), await llm.achat(QUESTION), streamed, astreamed]
    assert {response.message.content for response in answers} == {answers[0].message.content}
    assert "Paris" in answers[0].message.content
    prompt = QUESTION[0].content
    *_, completed = llm.stream_complete(prompt)
    assert completed.text == llm.complete(prompt).text == (await llm.acomplete(prompt)).text
    assert completed.text == answers[0].message.content


def test_usage_counts_the_models_own_tokens(llm):
    response = llm.chat(QUESTION)
    usage = response.raw["usage"]
    assert usage["completion_tokens"] >= len(llm.tokenize(response.message.content))
    assert usage["prompt_tokens"] > len(llm.tokenize(QUESTION[0].content))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_formatted_prompt_is_continued_as_text(llm):
    assert llm.complete("The capital of France is", formatted=True, max_tokens=8).text.strip()


def test_a_stop_string_ends_the_answer(llm):
    whole = llm.complete("Count from 1 to 9.", max_tokens=24).text
    word = whole.split()[2]
    assert llm.complete("Count from 1 to 9.", max_tokens=24, stop=[word]).text == whole[: whole.index(word)]


async def test_closing_a_stream_stops_decoding(llm):
    stream = await llm.astream_chat([ChatMessage(role="user", content="Tell me a very long story.")], max_tokens=2000)
    async for _ in stream:
        break
    await stream.aclose()
    response = await asyncio.wait_for(llm.achat(QUESTION), timeout=60)  # 2000 tokens would take longer
    assert "Paris" in response.message.content


async def test_concurrent_calls_answer_each_its_own_question(llm):
    prompts = [f"What is the capital of {country}? Answer with one word." for country in ("France", "Italy")]
    paris, rome = await asyncio.gather(*(llm.acomplete(prompt) for prompt in prompts))
    assert "Paris" in paris.text
    assert "Rome" in rome.text


def test_a_query_engine_reads_a_document_beyond_the_budget_in_one_call(llm):
    filler = [f"On day {day} the weather at the harbour was calm and the boats stayed in." for day in range(120)]
    text = "\n".join([*filler, "The password of the lighthouse is MARIGOLD.", *filler[:3]])
    engine = SummaryIndex.from_documents([Document(text=text)]).as_query_engine(llm=llm)
    assert "marigold" in str(engine.query("What is the password of the lighthouse?")).lower()


def test_a_chat_engine_lets_the_model_read_the_conversation_so_far(llm):
    handler = TokenCountingHandler()
    talker = ZSMergeLLM(llm=llm.llm, max_tokens=16, callback_manager=CallbackManager([handler]))
    chat = SimpleChatEngine.from_defaults(llm=talker)
    chat.chat("My name is Ann.")
    chat.chat("What is my name?")
    first, second = handler.llm_token_counts
    assert second.prompt_token_count > first.prompt_token_count + len(llm.tokenize("My name is Ann. What is my name?"))


def test_a_prompt_template_is_answered(llm):
    assert "Paris" in llm.predict(PromptTemplate("What is the capital of {country}?"), country="France")
