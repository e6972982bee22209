"""`ChatZSMerge`: settings, answers, streams, sessions, tools, counting, serialization."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import tool
from langchain_zsmerge import ChatZSMerge
from pydantic import ValidationError

from zsmerge_llm import CacheConfig, Grammar
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.testing import scripted_answer


@pytest.fixture
def chat(llm: Any) -> ChatZSMerge:
    return ChatZSMerge(llm=llm)


# settings


def test_importing_and_constructing_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from langchain_zsmerge import ChatZSMerge, ZSMergeLLM\n"
        "ChatZSMerge(model='smollm2'); ZSMergeLLM(model='smollm2')\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_setting_is_refused_with_the_likely_name() -> None:
    with pytest.raises(ValidationError, match="Did you mean temperature"):
        ChatZSMerge(temprature=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("temperature", -1, "between 0 and 100"),
        ("temperature", float("nan"), "finite"),
        ("top_p", 0.0, "above 0"),
        ("max_tokens", 0, "at least 1"),
        ("quantization", "int3", "nf4"),
        ("cache_config", {"slots": 3}, "too small"),
        ("cache_config", {"slotz": 3}, "no setting slotz"),
        ("timeout", 0, "greater than 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(llm: Any, setting: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ChatZSMerge(llm=llm, **{setting: value})


def test_loading_settings_beside_a_given_model_are_refused(llm: Any) -> None:
    with pytest.raises(ValidationError, match="dtype cannot change a model given as llm"):
        ChatZSMerge(llm=llm, dtype="float32")


def test_the_cache_argument_takes_the_kv_cache_or_langchains_cache() -> None:
    assert ChatZSMerge(cache=CacheConfig(slots=512)).cache_config.slots == 512  # type: ignore[arg-type]
    assert ChatZSMerge(cache_config={"slots": 256}).cache_config == CacheConfig(slots=256)  # type: ignore[arg-type]
    answers = InMemoryCache()
    assert ChatZSMerge(cache=answers).cache is answers


def test_the_model_may_be_called_model_name() -> None:
    assert ChatZSMerge(model_name="gemma3").model == "gemma3"  # type: ignore[call-arg]


def test_settings_come_from_the_environment(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSMERGE_MODEL", "other")
    monkeypatch.setenv("ZSMERGE_SESSIONS_DIR", "kept")
    chat = ChatZSMerge(llm=llm, model_name="mine")  # type: ignore[call-arg]
    assert (chat.model, chat.sessions_dir) == ("mine", "kept")
    monkeypatch.delenv("ZSMERGE_SESSIONS_DIR")
    assert ChatZSMerge().model == "other"


def test_objects_of_equal_loading_settings_share_one_model() -> None:
    first, second = ChatZSMerge(temperature=0), ChatZSMerge(temperature=1)
    assert first._llm is second._llm
    assert ChatZSMerge(cache_config=CacheConfig(slots=512))._llm is not first._llm


# answers


def test_an_answer_has_text_usage_and_metadata(chat: ChatZSMerge) -> None:
    answer = chat.invoke("Why?")
    assert answer.text == "The sky is blue."
    assert answer.usage_metadata == {
        "input_tokens": 7,
        "output_tokens": 4,
        "total_tokens": 11,
        "input_token_details": {"cache_read": 5},
    }
    assert answer.response_metadata["model_name"] == "fake"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["token_usage"]["cache_bytes"] == 1024


def test_settings_of_the_object_and_of_the_call_reach_the_model(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm, temperature=0.7, top_k=5, seed=3, stop=["END"])
    chat.bind(top_k=9).invoke("hi", stop=["\n", "END"], max_tokens=8)
    sampling = llm.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0.7, 9, 3, 8)
    assert sampling.stop == ("END", "\n")


def test_an_unknown_option_of_a_call_is_refused(chat: ChatZSMerge) -> None:
    with pytest.raises(ConfigError, match="no option logit_bias"):
        chat.invoke("hi", logit_bias={})
    with pytest.raises(ConfigError, match="temperature must lie"):
        chat.invoke("hi", temperature=-2)


def test_a_call_may_name_another_model_unless_the_model_was_given(chat: ChatZSMerge, llm: Any) -> None:
    assert chat.invoke("hi", model="fake").text
    with pytest.raises(ConfigError, match=r"ChatZSMerge\(model='gpt'\)"):
        chat.invoke("hi", model="gpt")
    own = ChatZSMerge(model="smollm2", temperature=0)
    other = own._request(None, {"model": "other"})
    assert (other.model, other.llm.model) == ("other", "other")
    assert other.llm is ChatZSMerge(model="other").core
    assert own._request(None, {}).llm is own.core


def test_a_chain_of_prompt_model_and_parser_streams(chat: ChatZSMerge, llm: Any) -> None:
    chain = ChatPromptTemplate.from_messages([("system", "be {how}"), ("human", "{q}")]) | chat | StrOutputParser()
    assert [piece for piece in chain.stream({"how": "brief", "q": "why?"}) if piece] == ["The ", "sky ", "is ", "blue."]
    assert llm.requests[0].prompt == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
    ]


def test_streamed_chunks_add_up_to_the_answer(chat: ChatZSMerge) -> None:
    chunks = list(chat.stream("Why?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.text == "The sky is blue."
    assert whole.response_metadata == chat.invoke("Why?").response_metadata
    assert whole.usage_metadata == chat.invoke("Why?").usage_metadata
    assert [chunk.chunk_position for chunk in chunks].count("last") == 1


def test_breaking_out_of_a_stream_stops_decoding(slow_llm: Any) -> None:
    for _ in ChatZSMerge(llm=slow_llm).stream("hi"):
        break
    assert slow_llm.decoded_words == 1
    assert slow_llm.closed_streams == 1


def test_a_time_limit_stops_the_answer(slow_llm: Any) -> None:
    chat = ChatZSMerge(llm=slow_llm, timeout=0.1)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="raise timeout"):
        chat.invoke("hi")
    with pytest.raises(TimeoutError):
        list(chat.stream("hi"))
    assert time.monotonic() - started < 1.0
    assert ChatZSMerge(llm=slow_llm, timeout=30).invoke("hi", max_tokens=1).text == "word "


def test_a_token_callback_sees_each_token(llm: Any) -> None:
    tokens: list[str] = []

    class Listener(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            tokens.append(token)

    ChatZSMerge(llm=llm, streaming=True).invoke("hi", config={"callbacks": [Listener()]})
    assert "".join(tokens) == "The sky is blue."


def test_langchains_cache_serves_the_same_question_in_any_session(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm, cache=InMemoryCache())
    chat.invoke("hi", session_id="a")
    chat.invoke("hi", session_id="b")
    assert len(llm.requests) == 1
    chat.invoke("hi", temperature=0.5)
    assert len(llm.requests) == 2


def test_content_version_v1_round_trips(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm, output_version="v1")
    answer = chat.invoke("hi")
    assert answer.content == [{"type": "text", "text": "The sky is blue."}]
    chat.invoke([HumanMessage("hi"), answer, HumanMessage("and?")])
    assert llm.requests[1].prompt[1]["content"] == [{"type": "text", "text": "The sky is blue."}]


# sessions


def test_a_conversation_is_read_again_where_a_call_says_so(chat: ChatZSMerge, llm: Any) -> None:
    chat.invoke("hi")
    chat.bind(reread=True).invoke("hi")
    assert [request.reread for request in llm.requests] == [False, True]


@pytest.mark.parametrize("config", [{"session_id": "ann"}, {"thread_id": "ann"}])
def test_a_config_names_the_session_in_every_way_of_calling(chat: ChatZSMerge, llm: Any, config: Any) -> None:
    run = {"configurable": config}
    chat.invoke("hi", config=run)
    list(chat.stream("hi", config=run))
    chat.batch(["hi", "ho"], config=run)
    (chat | StrOutputParser()).invoke("hi", config=run)
    list((chat | StrOutputParser()).stream("hi", config=run))
    assert [request.session for request in llm.requests] == ["ann"] * 6


async def test_a_config_names_the_session_in_every_async_way(chat: ChatZSMerge, llm: Any) -> None:
    run: Any = {"configurable": {"thread_id": 7}}
    await chat.ainvoke("hi", config=run)
    _ = [chunk async for chunk in chat.astream("hi", config=run)]
    await chat.abatch(["hi", "ho"], config=run)
    _ = [event async for event in chat.astream_events("hi", config=run, version="v2")]
    assert [request.session for request in llm.requests] == ["7"] * 5


def test_a_model_called_inside_a_runnable_finds_the_session_of_the_run(chat: ChatZSMerge, llm: Any) -> None:
    step = RunnableLambda(lambda question: chat.invoke(question).text)
    step.invoke("hi", config={"configurable": {"thread_id": "ann"}})
    assert llm.requests[0].session == "ann"


def test_a_session_of_the_call_or_binding_goes_before_the_config(chat: ChatZSMerge, llm: Any) -> None:
    run: Any = {"configurable": {"session_id": "config"}}
    chat.invoke("hi", config=run, session_id="call")
    chat.bind(session_id="bound").invoke("hi", config=run)
    chat.invoke("hi")
    assert [request.session for request in llm.requests] == ["call", "bound", None]


def test_a_message_history_keeps_the_session(chat: ChatZSMerge, llm: Any) -> None:
    histories: dict[str, InMemoryChatMessageHistory] = {}
    talk = RunnableWithMessageHistory(chat, lambda name: histories.setdefault(name, InMemoryChatMessageHistory()))
    for question in ("one", "two"):
        talk.invoke([HumanMessage(question)], config={"configurable": {"session_id": "ann"}})
    assert llm.requests[1].session == "ann"
    assert [message["role"] for message in llm.requests[1].prompt] == ["user", "assistant", "user"]


def test_warming_up_loads_before_the_first_call(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm)
    assert chat.warm_up() is chat
    assert llm.is_warm


# tools


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return "sunny"


def test_bound_tools_reach_the_model_and_its_calls_come_back(llm: Any) -> None:
    llm.answers = [scripted_answer("", {"name": "weather", "arguments": '{"city": "X"}'})]
    chat = ChatZSMerge(llm=llm).bind_tools([weather])
    answer = chat.invoke("weather in X?")
    assert llm.requests[0].tools[0]["function"]["name"] == "weather"
    assert answer.tool_calls == [{"name": "weather", "args": {"city": "X"}, "id": "id_0", "type": "tool_call"}]
    streamed = list(chat.stream("weather in X?"))
    assert [call["args"] for chunk in streamed for call in chunk.tool_calls] == [{"city": "X"}]


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, None),
        (False, None),
        ("auto", "auto"),
        ("none", "none"),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ("weather", {"type": "function", "function": {"name": "weather"}}),
        ({"type": "function", "function": {"name": "weather"}}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
        ({"type": "any"}, "required"),
    ],
)
def test_every_way_to_choose_a_tool_is_understood(llm: Any, choice: Any, wanted: Any) -> None:
    ChatZSMerge(llm=llm).bind_tools([weather], tool_choice=choice).invoke("hi")
    assert llm.requests[0].tool_choice == wanted
    ChatZSMerge(llm=llm).invoke("hi", tools=[weather], tool_choice=choice)
    assert llm.requests[1].tool_choice == wanted


def test_an_unknown_choice_is_refused(chat: ChatZSMerge) -> None:
    with pytest.raises(ConfigError, match="none of the tools"):
        chat.bind_tools([weather], tool_choice="wether")


def test_options_of_calls_reach_the_model(llm: Any) -> None:
    tools = ChatZSMerge(llm=llm).bind_tools([weather], parallel_tool_calls=False, strict=True, temperature=0.5)
    tools.invoke("hi")
    assert llm.requests[0].parallel_tool_calls is False
    assert llm.requests[0].tools[0]["function"]["strict"] is True
    assert llm.requests[0].sampling.temperature == 0.5
    yes = Grammar.choice("yes", "no")
    ChatZSMerge(llm=llm).invoke("hi", grammar=yes)
    assert llm.requests[1].grammar is yes


def test_malformed_calls_are_kept_apart_in_answers_and_streams(llm: Any) -> None:
    function = {"name": None, "arguments": '{"name": "weather", "argu'}
    invalid = {"id": "c1", "type": "function", "function": function, "error": "cut"}
    llm.answers = [scripted_answer("", invalid_tool_calls=[invalid])]
    chat = ChatZSMerge(llm=llm).bind_tools([weather])
    chunks = list(chat.stream("hi"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert isinstance(whole, AIMessageChunk)
    for answer in (chat.invoke("hi"), whole):
        assert answer.tool_calls == []
        assert [call["id"] for call in answer.invalid_tool_calls] == ["c1"]


# counting, profile


def test_tokens_are_counted_by_the_models_tokenizer_and_template(chat: ChatZSMerge) -> None:
    assert chat.get_token_ids("one three") == [3, 5]
    assert chat.get_num_tokens("one two three") == 3
    messages = [SystemMessage("be brief"), HumanMessage("hi")]
    assert chat.get_num_tokens_from_messages(messages) == 6  # system be brief user hi assistant
    assert chat.get_num_tokens_from_messages(messages, tools=[weather]) == 7
    assert chat.get_num_tokens_from_messages([]) == 0


def test_a_part_that_ends_with_an_answer_is_counted(chat: ChatZSMerge) -> None:
    assert chat.get_num_tokens_from_messages([AIMessage("hello there")]) == 3  # assistant hello there


def test_trim_messages_counts_with_the_model(chat: ChatZSMerge) -> None:
    history = [HumanMessage("a b c"), AIMessage("d e f"), HumanMessage("g h")]
    kept = trim_messages(history, max_tokens=4, token_counter=chat, strategy="last", start_on="human")
    assert kept == [HumanMessage("g h")]


def test_the_profile_knows_the_window_once_the_model_is_used(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm)
    assert chat.profile is not None
    assert "max_input_tokens" not in chat.profile
    chat.invoke("hi")
    assert chat.profile["max_input_tokens"] == 2048
    assert {"tool_calling", "tool_choice", "structured_output"} <= {key for key, can in chat.profile.items() if can}
    assert ChatZSMerge(llm=llm, profile={"max_input_tokens": 9}).profile == {"max_input_tokens": 9}
    limited = ChatZSMerge(max_input_tokens=100).profile
    assert limited is not None
    assert limited["max_input_tokens"] == 100


def test_tracing_parameters_name_provider_model_and_stops(llm: Any) -> None:
    params = ChatZSMerge(llm=llm, stop=["A"], temperature=0.5)._get_ls_params(stop=["B"])
    assert params["ls_provider"] == "zsmerge"
    assert params["ls_model_name"] == "fake"
    assert params["ls_stop"] == ["A", "B"]
    assert params["ls_temperature"] == 0.5


# copies and serialization


def test_settings_survive_serialization_and_pickling() -> None:
    chat = ChatZSMerge(model="smollm2", cache_config=CacheConfig(slots=512), temperature=0.3, api_key="secret")
    written = dumpd(chat)
    assert "secret" not in str(written)
    read = load(written, valid_namespaces=["langchain_zsmerge"], allowed_objects=[ChatZSMerge])
    assert read.asdict() == chat.asdict()
    pickled = pickle.loads(pickle.dumps(chat))
    assert pickled.asdict() == chat.asdict()
    assert pickled._llm is chat._llm


def test_a_configurable_field_changes_the_call_and_keeps_the_model(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm).configurable_fields(temperature=ConfigurableField(id="heat"))
    chat.with_config(configurable={"heat": 0.9}).invoke("hi")
    assert llm.requests[0].sampling.temperature == 0.9


def test_copies_share_the_model(chat: ChatZSMerge, llm: Any) -> None:
    for other in (copy.copy(chat), copy.deepcopy(chat), chat.model_copy(update={"temperature": 1.0})):
        assert other._llm is llm


def test_loading_settings_cannot_be_changed_afterwards(chat: ChatZSMerge) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        chat.model = "other"
    chat.temperature = 0.5


def test_a_shared_model_serves_many_threads(llm: Any) -> None:
    answers = ChatZSMerge(llm=llm).batch(["hi"] * 8)
    assert [answer.text for answer in answers] == ["The sky is blue."] * 8
    assert threading.active_count() < 20
