"""The eight chat and completion methods, whole and streamed, sync and async, on a fake model."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.llms import ChatMessage
from llama_index.llms.zsmerge import ZSMergeLLM

from zsmerge_llm import CacheConfig
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.language.grammar import Grammar
from zsmerge_llm.testing import FakeLLM
from zsmerge_llm.types import Result, Usage

CHAT = ("chat", "stream_chat", "achat", "astream_chat")
COMPLETE = ("complete", "stream_complete", "acomplete", "astream_complete")
ANSWER = "The sky is blue."


async def ask(llm: ZSMergeLLM, method: str, prompt: str = "What is the capital?", **options: Any) -> list[Any]:
    """Every response of one of the eight methods, as a list."""
    question = [ChatMessage(role="user", content=prompt)] if method in CHAT else prompt
    answer = getattr(llm, method)(question, **options)
    if inspect.isawaitable(answer):
        answer = await answer
    if inspect.isasyncgen(answer):
        return [response async for response in answer]
    return list(answer) if inspect.isgenerator(answer) else [answer]


def text_of(response: Any) -> str:
    return response.message.content if hasattr(response, "message") else response.text


def test_it_is_a_llama_index_llm():
    assert issubclass(ZSMergeLLM, BaseLLM)
    assert ZSMergeLLM.class_name() == "ZSMergeLLM"


def test_warming_up_loads_before_the_first_call():
    llm = ZSMergeLLM(llm=FakeLLM())
    assert llm.warm_up() is llm
    assert llm.llm.is_warm


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_each_method_answers(method):
    llm = ZSMergeLLM(llm=FakeLLM())
    assert text_of((await ask(llm, method))[-1]) == ANSWER


@pytest.mark.parametrize("method", [name for name in CHAT + COMPLETE if "stream" in name])
async def test_a_stream_has_deltas_and_the_text_so_far(method):
    seen = await ask(ZSMergeLLM(llm=FakeLLM()), method)
    assert [response.delta for response in seen] == ["The ", "sky ", "is ", "blue.", ""]
    assert [text_of(response) for response in seen] == ["The ", "The sky ", "The sky is ", ANSWER, ANSWER]


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_each_method_reports_its_usage(method):
    last = (await ask(ZSMergeLLM(llm=FakeLLM()), method))[-1]
    usage = last.raw["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (usage["completion_tokens"], usage["cached_tokens"], usage["cache_bytes"]) == (4, 5, 1024)
    assert usage["reuse"] == "new"
    assert last.raw["finish_reason"] == "stop"
    assert last.additional_kwargs == {
        name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens")
    }


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_the_token_counting_handler_sees_our_counts_once(method):
    handler = TokenCountingHandler(tokenizer=lambda text: [0] * 1000)
    llm = ZSMergeLLM(llm=FakeLLM(), callback_manager=CallbackManager([handler]))
    usage = (await ask(llm, method))[-1].raw["usage"]
    assert handler.prompt_llm_token_count == usage["prompt_tokens"]
    assert handler.completion_llm_token_count == usage["completion_tokens"] == 4


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_each_method_dispatches_its_events(method, events):
    await ask(ZSMergeLLM(llm=FakeLLM()), method)
    kind = "LLMChat" if method in CHAT else "LLMCompletion"
    assert events.names[0] == f"{kind}StartEvent"
    assert events.names[-1] == f"{kind}EndEvent"
    assert events.names.count(f"{kind}StartEvent") == 1
    assert len([name for name in events.names if "InProgress" in name]) == (5 if "stream" in method else 0)


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_each_method_takes_sampling_settings_from_the_object_and_the_call(method):
    engine = FakeLLM()
    llm = ZSMergeLLM(llm=engine, temperature=0.5, top_k=7, stop=["END"])
    await ask(llm, method, max_tokens=5, temperature=0.25, stop=None)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens, sampling.stop) == (0.25, 7, 5, ())
    await ask(llm, method)
    assert engine.requests[1].sampling.stop == ("END",)


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_each_method_refuses_an_unknown_option(method):
    with pytest.raises(ConfigError, match="no setting colour"):
        await ask(ZSMergeLLM(llm=FakeLLM()), method, colour="blue")


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_each_method_raises_the_errors_of_zsmerge_llm(method):
    engine = FakeLLM()
    engine.error = InputError("No messages. Give at least one.")
    with pytest.raises(InputError, match="at least one"):
        await ask(ZSMergeLLM(llm=engine), method)


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_only_the_async_methods_leave_the_callers_thread(method):
    engine = FakeLLM()
    await ask(ZSMergeLLM(llm=engine), method)
    assert (threading.get_ident() in engine.threads) == (not method.startswith("a"))


@pytest.mark.parametrize("method", COMPLETE)
async def test_a_completion_is_one_user_message_for_a_chat_model(method):
    engine = FakeLLM()
    await ask(ZSMergeLLM(llm=engine, session="a conversation"), method, prompt="Hello")
    assert engine.requests[0].prompt == [{"role": "user", "content": "Hello"}]
    assert engine.requests[0].session is None


@pytest.mark.parametrize("method", COMPLETE)
async def test_a_formatted_prompt_is_continued_as_it_is(method):
    engine = FakeLLM()
    await ask(ZSMergeLLM(llm=engine), method, prompt="Once upon", formatted=True)
    assert (engine.requests[0].method, engine.requests[0].prompt) == ("complete", "Once upon")


@pytest.mark.parametrize("method", COMPLETE)
async def test_a_custom_completion_to_prompt_formats_the_prompt(method):
    engine = FakeLLM()
    llm = ZSMergeLLM(llm=engine, completion_to_prompt=lambda prompt: f"<user>{prompt}</user>")
    await ask(llm, method, prompt="Hello")
    assert (engine.requests[0].method, engine.requests[0].prompt) == ("complete", "<user>Hello</user>")


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_a_base_model_continues_plain_text(method):
    engine = FakeLLM()
    await ask(ZSMergeLLM(llm=engine, is_chat_model=False), method, prompt="Once upon")
    assert engine.requests[0].method == "complete"
    assert "Once upon" in engine.requests[0].prompt


@pytest.mark.parametrize("option", ["tools", "session", "session_id", "probe", "reread"])
async def test_plain_text_refuses_what_needs_a_chat(option):
    with pytest.raises(ConfigError, match=f"{option} needs a chat"):
        await ask(ZSMergeLLM(llm=FakeLLM()), "complete", formatted=True, **{option: "x"})


@pytest.mark.parametrize("method", CHAT)
@pytest.mark.parametrize(
    ("own", "options", "expected"),
    [
        (None, {}, None),
        ("mine", {}, "mine"),
        ("mine", {"session_id": "call"}, "call"),
        ("mine", {"session": "call"}, "call"),
        ("mine", {"session": None}, None),
    ],
)
async def test_the_session_of_the_call_overrides_that_of_the_object(method, own, options, expected):
    engine = FakeLLM()
    await ask(ZSMergeLLM(llm=engine, session=own), method, **options)
    assert engine.requests[0].session == expected


def test_metadata_announces_the_logical_window_without_a_model():
    metadata = ZSMergeLLM(model="no such model").metadata
    assert metadata.context_window == 1_000_000
    assert (metadata.model_name, metadata.is_chat_model, metadata.num_output) == ("no such model", True, 512)
    assert metadata.is_function_calling_model
    assert not ZSMergeLLM(is_chat_model=False).metadata.is_function_calling_model
    assert not ZSMergeLLM(is_function_calling_model=False).metadata.is_function_calling_model
    assert ZSMergeLLM(max_tokens=None).metadata.num_output > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": float("nan")},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"cache": {"slots": 3}},
        {"cache": {"size": 3}},
    ],
)
def test_a_bad_setting_is_refused_when_the_object_is_made(settings):
    with pytest.raises(ConfigError):
        ZSMergeLLM(**settings)


@pytest.mark.parametrize(
    ("given", "nearest"), [("temperatur", "temperature"), ("max_token", "max_tokens"), ("sessionid", "session_id")]
)
def test_a_wrong_name_shows_the_nearest_one(given, nearest):
    with pytest.raises(ConfigError, match=rf"no setting {given};.* Did you mean {nearest}\?"):
        ZSMergeLLM(llm=FakeLLM()).complete("x", **{given: 1})
    with pytest.raises(ConfigError, match=rf"no setting {given}\. Did you mean {nearest.removesuffix('_id')}\?"):
        ZSMergeLLM(llm=FakeLLM(), **{given: 1})


def test_an_unknown_setting_is_refused():
    with pytest.raises(ValueError, match="colour"):
        ZSMergeLLM(colour="blue")


def test_settings_survive_json_and_pickle(tmp_path):
    llm = ZSMergeLLM(
        tmp_path / "model.gguf",
        cache=CacheConfig.paper(slots=256),
        temperature=0.5,
        stop=["END"],
        template_args={"enable_thinking": False},
        session_memory="1GiB",
    )
    for copy in (ZSMergeLLM.from_json(llm.to_json()), pickle.loads(pickle.dumps(llm))):
        assert copy.to_dict() == llm.to_dict()
        assert copy.cache == CacheConfig.paper(slots=256)
        assert copy.model == str(tmp_path / "model.gguf")


def test_a_shared_llm_gives_its_model_and_cache():
    engine = FakeLLM()
    engine.cache = CacheConfig(slots=300)
    llm = ZSMergeLLM(llm=engine, temperature=0.5)
    assert (llm.llm, llm.model, llm.cache.slots) == (engine, "fake", 300)


@pytest.mark.parametrize("settings", [{"model": "smollm2"}, {"cache": CacheConfig()}, {"dtype": "float32"}])
def test_a_shared_llm_takes_no_settings_for_loading(settings):
    with pytest.raises(ConfigError, match=f"its own {next(iter(settings))}"):
        ZSMergeLLM(llm=FakeLLM(), **settings)


@pytest.mark.parametrize("method", CHAT + COMPLETE)
async def test_a_response_format_and_a_grammar_reach_the_model(method):
    engine, form, grammar = FakeLLM(), {"type": "json_object"}, Grammar.choice("a", "b")
    llm = ZSMergeLLM(llm=engine)
    await ask(llm, method, response_format=form)
    await ask(llm, method, grammar=grammar)
    assert [(call.response_format, call.grammar) for call in engine.requests] == [(form, None), (None, grammar)]


@pytest.mark.parametrize("method", CHAT)
async def test_reasoning_is_a_thinking_block(method):
    engine = FakeLLM(Result("Paris.", "stop", Usage(1, 0, 1, 0, 0.0, 0.0, 0), reasoning="France, so Paris."))
    llm = ZSMergeLLM(llm=engine)
    seen = await ask(llm, method)
    last = seen[-1].message
    assert [block.block_type for block in last.blocks] == ["thinking", "text"]
    assert (last.blocks[0].content, last.content) == ("France, so Paris.", "Paris.")
    if "stream" in method:
        assert [response.additional_kwargs.get("thinking_delta") for response in seen] == [
            "France, so Paris.",
            None,
            None,
        ]
    llm.chat([ChatMessage(content="Hello"), last, ChatMessage(content="And Italy?")])
    said = engine.requests[-1].prompt[1]
    assert (said["content"], said["reasoning_content"]) == ("Paris.", "France, so Paris.")


def test_a_probe_reaches_the_model():
    engine = FakeLLM()
    ZSMergeLLM(llm=engine).chat([ChatMessage(content="Hello")], probe="names")
    assert engine.requests[0].probe == "names"


def test_reread_is_an_option_of_a_call():
    engine = FakeLLM()
    for options in ({}, {"reread": True}):
        ZSMergeLLM(llm=engine).chat([ChatMessage(content="Hello")], **options)
    assert [call.reread for call in engine.requests] == [False, True]


def test_tokenize_is_the_models_own_tokenizer():
    assert ZSMergeLLM(llm=FakeLLM()).tokenize("three words here") == [5, 5, 4]


def test_importing_and_constructing_loads_no_torch():
    code = """if True:
        import sys
        from llama_index.llms.zsmerge import ZSMergeLLM
        ZSMergeLLM(model="smollm2").metadata
        print([name for name in ("torch", "transformers") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
