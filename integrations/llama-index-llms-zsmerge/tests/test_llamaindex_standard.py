"""What every method of the LLM must do, on a tiny random model and (slow) on Qwen2.5-Coder-0.5B-Instruct.

LlamaIndex has no such suite of its own; this one follows LangChain's. Nothing here depends on what the model says.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import json
import pickle
import time
from typing import Any, Literal

import pytest
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.zsmerge import ZSMergeLLM
from pydantic import BaseModel, Field, TypeAdapter

from zsmerge_llm import LLM
from zsmerge_llm.errors import ConfigError, InputError, UnsupportedContentError
from zsmerge_llm.language.grammar import Grammar

CHAT = ("chat", "stream_chat", "achat", "astream_chat")
COMPLETE = ("complete", "stream_complete", "acomplete", "astream_complete")
WITH_TOOLS = ("chat_with_tools", "stream_chat_with_tools", "achat_with_tools", "astream_chat_with_tools")
PREDICT = (
    "structured_predict",
    "stream_structured_predict",
    "astructured_predict",
    "astream_structured_predict",
)
PROMPT = PromptTemplate("Describe {what}.")


class Ship(BaseModel):
    name: str | None = Field(default=None, max_length=8)


class Harbour(BaseModel):
    """A harbour."""

    name: str = Field(max_length=8)
    kind: Literal["river", "sea"]
    depth: int = Field(description="in metres", ge=0)
    ships: list[Ship] = Field(max_length=1)


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def weather(place: str, unit: str = "celsius") -> str:
    """The weather of a place."""
    return f"Fine in {place}, 20 {unit}."


def now() -> str:
    """The time."""
    return "12:00"


TOOLS = [FunctionTool.from_defaults(function) for function in (add, weather, now)]
ARGUMENTS = {
    "add": TypeAdapter(dict[Literal["a", "b"], int]),
    "weather": TypeAdapter(dict[Literal["place", "unit"], str]),
    "now": TypeAdapter(dict[str, int]),
}


async def every(answer: Any) -> list[Any]:
    """All responses of any of the methods, as a list."""
    answer = await answer if inspect.isawaitable(answer) else answer
    if inspect.isasyncgen(answer):
        return [response async for response in answer]
    return list(answer) if inspect.isgenerator(answer) else [answer]


async def ask(llm: Any, method: str, text: str = "Name a ship.", **options: Any) -> list[Any]:
    return await every(getattr(llm, method)([user(text)] if "chat" in method else text, **options))


def user(text: str) -> ChatMessage:
    return ChatMessage(role=MessageRole.USER, content=text)


def text_of(response: Any) -> str:
    return (response.message.content or "") if hasattr(response, "message") else response.text


class Standard:
    """The suite. A subclass says which model it runs on."""

    @pytest.fixture
    def llm(self, engine: LLM) -> ZSMergeLLM:
        return ZSMergeLLM(llm=engine, max_tokens=16)

    # -- chat and completion --

    @pytest.mark.parametrize("method", CHAT + COMPLETE)
    async def test_each_method_answers_and_reports_its_usage(self, llm: ZSMergeLLM, method: str) -> None:
        last = (await ask(llm, method))[-1]
        usage = last.raw["usage"]
        assert text_of(last)
        assert last.raw["finish_reason"] in ("stop", "length")
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 < usage["completion_tokens"] <= 16
        assert last.additional_kwargs["prompt_tokens"] == usage["prompt_tokens"] > 0

    @pytest.mark.parametrize("methods", [CHAT, COMPLETE])
    async def test_the_four_chat_or_completion_methods_give_the_same_text(
        self, llm: ZSMergeLLM, methods: tuple[str, ...]
    ) -> None:
        assert len({text_of((await ask(llm, method))[-1]) for method in methods}) == 1

    @pytest.mark.parametrize("method", [name for name in CHAT + COMPLETE if "stream" in name])
    async def test_a_stream_has_deltas_and_the_text_so_far(self, llm: ZSMergeLLM, method: str) -> None:
        seen = await ask(llm, method)
        assert len(seen) > 2
        for count, response in enumerate(seen, 1):
            assert text_of(response) == "".join(earlier.delta for earlier in seen[:count])
        assert all(response.raw["usage"] is None for response in seen[:-1])
        assert seen[-1].raw["finish_reason"]

    def test_all_roles_can_be_in_one_conversation(self, llm: ZSMergeLLM) -> None:
        said = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hello."), ("user", "A ship?")]
        assert text_of(llm.chat([ChatMessage(role=role, content=text) for role, text in said]))

    def test_several_user_messages_in_a_row_are_accepted(self, llm: ZSMergeLLM) -> None:
        assert text_of(llm.chat([user("Hello."), user("Name a ship.")]))

    def test_blocks_of_text_are_one_message(self, llm: ZSMergeLLM) -> None:
        blocks = ChatMessage(role="user", blocks=[TextBlock(text="Name"), TextBlock(text="a ship.")])
        assert text_of(llm.chat([blocks])) == text_of(llm.chat([user("Name\na ship.")]))

    def test_the_next_turn_reads_only_what_is_new(self, llm: ZSMergeLLM) -> None:
        messages = [user("Name a ship. " * 20)]
        first = llm.chat(messages)
        second = llm.chat([*messages, first.message, user("Another.")]).raw["usage"]
        assert second["reuse"] == "continued"
        assert second["cached_tokens"] >= first.raw["usage"]["prompt_tokens"]

    @pytest.mark.parametrize("method", ["chat", "complete"])
    async def test_max_tokens_is_exact(self, llm: ZSMergeLLM, method: str) -> None:
        (response,) = await ask(llm, method, "Count from one to a hundred.", max_tokens=3)
        assert (response.raw["finish_reason"], response.raw["usage"]["completion_tokens"]) == ("length", 3)

    @pytest.mark.parametrize("method", CHAT + COMPLETE)
    async def test_a_stop_string_ends_the_answer(self, llm: ZSMergeLLM, method: str) -> None:
        whole = text_of((await ask(llm, method))[-1])
        stop = whole[len(whole) // 2 :][:2]
        assert text_of((await ask(llm, method, stop=[stop]))[-1]) == whole[: whole.index(stop)]

    def test_a_seed_makes_sampling_repeatable(self, llm: ZSMergeLLM) -> None:
        def drawn(seed: int) -> str:
            return text_of(llm.chat([user("Name a ship.")], temperature=1.0, seed=seed))

        assert drawn(1) == drawn(1)
        assert len({drawn(seed) for seed in range(1, 5)}) > 1

    @pytest.mark.parametrize("method", CHAT + COMPLETE)
    async def test_a_grammar_constrains_the_answer(self, llm: ZSMergeLLM, method: str) -> None:
        last = (await ask(llm, method, grammar=Grammar.choice("barque", "schooner")))[-1]
        assert text_of(last) in ("barque", "schooner")

    @pytest.mark.parametrize("method", CHAT + COMPLETE)
    async def test_bad_options_are_refused(self, llm: ZSMergeLLM, method: str) -> None:
        with pytest.raises(ConfigError, match="no setting colour"):
            await ask(llm, method, colour="blue")
        with pytest.raises(ConfigError, match="temperature"):
            await ask(llm, method, temperature=-1.0)
        with pytest.raises(InputError, match="response_format"):
            await ask(llm, method, response_format={"type": "xml"})

    def test_an_unsupported_content_block_is_refused_by_name(self, llm: ZSMergeLLM) -> None:
        with pytest.raises(UnsupportedContentError, match="image"):
            llm.chat([ChatMessage(role="user", blocks=[ImageBlock(url="http://example.org/a.png")])])
        with pytest.raises(InputError, match="no messages"):
            llm.chat([])

    # -- tools --

    @pytest.mark.parametrize("method", WITH_TOOLS)
    async def test_a_required_call_is_made(self, llm: ZSMergeLLM, method: str) -> None:
        responses = await every(getattr(llm, method)(TOOLS, user_msg="Hi!", tool_required=True, max_tokens=96))
        (call,) = llm.get_tool_calls_from_response(responses[-1])
        ARGUMENTS[call.tool_name].validate_python(call.tool_kwargs)
        assert responses[-1].raw["finish_reason"] == "tool_calls"
        assert [block.block_type for block in responses[-1].message.blocks][-1] == "tool_call"
        assert not responses[-1].message.content

    @pytest.mark.parametrize("name", ["add", "weather", "now"])
    @pytest.mark.parametrize("as_dict", [False, True])
    def test_a_named_tool_is_called(self, llm: ZSMergeLLM, name: str, as_dict: bool) -> None:
        choice: Any = {"type": "function", "function": {"name": name}} if as_dict else name
        response = llm.chat_with_tools(TOOLS, user_msg="Hi!", tool_choice=choice, max_tokens=96)
        (call,) = llm.get_tool_calls_from_response(response)
        assert call.tool_name == name
        ARGUMENTS[name].validate_python(call.tool_kwargs)

    def test_tool_choice_none_prevents_calls(self, llm: ZSMergeLLM) -> None:
        response = llm.chat_with_tools(TOOLS, user_msg="What is 1 + 2?", tool_choice="none")
        assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
        with pytest.raises(ValueError, match="called no tool"):
            llm.get_tool_calls_from_response(response)

    def test_choosing_an_unknown_tool_is_refused(self, llm: ZSMergeLLM) -> None:
        with pytest.raises(InputError, match="multiply"):
            llm.chat_with_tools(TOOLS, user_msg="Hi!", tool_choice="multiply")

    def test_every_call_has_a_unique_id(self, llm: ZSMergeLLM) -> None:
        ids = set()
        for _ in range(3):
            response = llm.chat_with_tools(TOOLS, user_msg="Hi!", tool_choice="now", max_tokens=96)
            ids |= {call.tool_id for call in llm.get_tool_calls_from_response(response)}
            ids |= {block.tool_call_id for block in response.message.blocks if isinstance(block, ToolCallBlock)}
        assert len(ids) == 3

    @pytest.mark.parametrize("allowed", [False, True])
    def test_parallel_calls_are_made_only_where_allowed(self, llm: ZSMergeLLM, allowed: bool) -> None:
        response = llm.chat_with_tools(
            TOOLS[2:], user_msg="Hi!", allow_parallel_tool_calls=allowed, tool_required=True, max_tokens=160
        )
        calls = llm.get_tool_calls_from_response(response)
        assert calls
        assert allowed or len(calls) == 1

    def test_calls_and_results_go_back_to_the_model(self, llm: ZSMergeLLM) -> None:
        asked = [user("What is the weather in Zürich?")]
        first = llm.chat_with_tools(TOOLS, chat_history=asked, tool_choice="weather", max_tokens=96)
        (call,) = llm.get_tool_calls_from_response(first)
        result = ChatMessage(role="tool", content="Föhn", additional_kwargs={"tool_call_id": call.tool_id})
        second = llm.chat_with_tools(TOOLS, chat_history=[*asked, first.message, result])
        assert second.raw["usage"]["reuse"] == "continued"
        assert second.raw["usage"]["cached_tokens"] >= first.raw["usage"]["prompt_tokens"]

    async def test_predict_and_call_runs_a_tool(self, llm: ZSMergeLLM) -> None:
        options = {"user_msg": "Hi!", "max_tokens": 96}
        assert llm.predict_and_call(TOOLS[2:], **options).response == "12:00"
        assert (await llm.apredict_and_call(TOOLS[2:], **options)).sources[0].raw_output == "12:00"

    # -- structured output --

    @pytest.mark.parametrize("method", PREDICT)
    async def test_an_object_is_predicted(self, llm: ZSMergeLLM, method: str) -> None:
        options = {"what": "a harbour", "llm_kwargs": {"max_tokens": 96}}
        seen = await every(getattr(llm, method)(Harbour, PROMPT, **options))
        assert type(seen[-1]) is Harbour
        assert ("stream" in method) == (len(seen) > 1)

    @pytest.mark.parametrize("method", CHAT + COMPLETE)
    async def test_a_structured_llm_answers_in_objects(self, llm: ZSMergeLLM, method: str) -> None:
        structured = llm.as_structured_llm(Harbour)
        seen = await ask(structured, method, max_tokens=96)
        assert type(seen[-1].raw) is Harbour
        assert Harbour.model_validate_json(text_of(seen[-1])) == seen[-1].raw
        assert seen[-1].additional_kwargs["completion_tokens"] > 0
        if "stream" in method:
            assert "".join(response.delta for response in seen) == text_of(seen[-1])
            assert len(seen) > 2

    def test_an_answer_cut_by_max_tokens_is_a_whole_object_all_the_same(self, llm: ZSMergeLLM) -> None:
        for tokens in (48, 64, 96):
            found = llm.structured_predict(Harbour, PROMPT, llm_kwargs={"max_tokens": tokens}, what="a harbour")
            assert type(found) is Harbour

    def test_an_object_that_breaks_a_validator_is_an_error_with_a_remedy(self, llm: ZSMergeLLM) -> None:
        with pytest.raises(ValueError, match="max_tokens"):
            llm.structured_predict(Harbour, PROMPT, llm_kwargs={"max_tokens": 2}, what="a harbour")

    # -- the object itself --

    def test_a_copy_shares_the_model_and_not_the_settings(self, llm: ZSMergeLLM) -> None:
        other = copy.deepcopy(llm)
        assert other.llm is copy.copy(llm).llm is llm.llm
        other.stop.append("x")
        other.max_tokens = 1
        assert (llm.max_tokens, llm.stop) == (16, [])

    def test_settings_survive_while_the_model_is_loaded(self, llm: ZSMergeLLM) -> None:
        llm.complete("Hi!")
        data = json.loads(json.dumps(llm.to_dict()))
        assert ZSMergeLLM.from_dict(data).to_dict() == llm.to_dict()
        assert pickle.loads(pickle.dumps(llm)).to_dict() == llm.to_dict()

    async def test_the_token_counter_agrees_with_the_usage(self, engine: LLM) -> None:
        handler = TokenCountingHandler()
        llm = ZSMergeLLM(llm=engine, max_tokens=8, callback_manager=CallbackManager([handler]))
        usages = [(await ask(llm, method))[-1].raw["usage"] for method in CHAT + COMPLETE]
        assert handler.prompt_llm_token_count == sum(usage["prompt_tokens"] for usage in usages)
        assert handler.completion_llm_token_count == sum(usage["completion_tokens"] for usage in usages)

    # -- side by side --

    async def test_twenty_calls_at_once_leave_the_loop_free(
        self, llm: ZSMergeLLM, record_property: Any, capsys: Any
    ) -> None:
        llm.complete("Hi!")  # loads
        gaps: list[tuple[float, float]] = []

        async def ticker() -> None:
            last = time.perf_counter(), time.thread_time()
            while True:
                await asyncio.sleep(0.002)
                this = time.perf_counter(), time.thread_time()
                gaps.append((this[0] - last[0], this[1] - last[1]))
                last = this

        gc.collect()
        gc.freeze()  # else the collector's walk over all that other tests imported may fall between two ticks
        task = asyncio.create_task(ticker())
        try:
            calls = (llm.achat([user(f"Ship {number}?")], max_tokens=4) for number in range(20))
            answers = await asyncio.gather(*calls)
        finally:
            task.cancel()
            gc.unfreeze()
        assert all(answer.raw["finish_reason"] for answer in answers)
        worst, usual = max(gaps)[0], sorted(gaps)[int(len(gaps) * 0.9)][0]
        record_property("worst_gap_ms", round(1000 * worst))
        with capsys.disabled():
            print(f"\n20 calls: worst gap {1000 * worst:.0f} ms, 90% below {1000 * usual:.0f} ms, {len(gaps)} ticks")
        assert max(work for _, work in gaps) < 0.05  # what the loop's own thread did between two ticks
        assert usual < 0.05  # other programs may take the processor for longer now and then

    @pytest.mark.parametrize("method", ["stream_chat", "stream_complete"])
    def test_a_closed_stream_stops_within_one_token(self, llm: ZSMergeLLM, method: str) -> None:
        passes = Passes(llm)
        stream = getattr(llm, method)([user("Count.")] if "chat" in method else "Count.", max_tokens=400)
        next(stream)
        before = passes.count
        stream.close()
        time.sleep(0.1)
        assert passes.count == before

    @pytest.mark.parametrize("method", ["astream_chat", "astream_complete"])
    async def test_a_closed_async_stream_stops_within_one_token(self, llm: ZSMergeLLM, method: str) -> None:
        passes = Passes(llm)
        stream = await getattr(llm, method)([user("Count.")] if "chat" in method else "Count.", max_tokens=400)
        await anext(stream)
        await stream.aclose()
        before = passes.count
        await asyncio.sleep(0.3)
        assert passes.count <= before + 1


class Passes:
    """Counts the passes through a model's weights."""

    def __init__(self, llm: ZSMergeLLM) -> None:
        self.count = 0
        llm.llm.engine.model.register_forward_hook(self._passed)

    def _passed(self, *_: Any) -> None:
        self.count += 1


class TestTiny(Standard):
    @pytest.fixture
    def engine(self, tiny: LLM) -> LLM:
        return tiny


@pytest.mark.slow
class TestQwenCoder(Standard):
    @pytest.fixture
    def engine(self, qwen_coder: LLM) -> LLM:
        return qwen_coder
