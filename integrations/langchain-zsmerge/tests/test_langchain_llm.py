"""`ZSMergeLLM`: plain completion."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, load
from langchain_core.prompts import PromptTemplate
from langchain_zsmerge import ChatZSMerge, ZSMergeLLM

from zsmerge_llm import CacheConfig
from zsmerge_llm.errors import ConfigError


@pytest.fixture
def model(llm: Any) -> ZSMergeLLM:
    return ZSMergeLLM(llm=llm, stop=["END"])


def test_a_prompt_is_continued_and_stops_are_merged(model: ZSMergeLLM, llm: Any) -> None:
    assert (PromptTemplate.from_template("The {x}") | model).invoke({"x": "sky"}) == "The sky is blue."
    assert llm.requests[0].prompt == "The sky"
    model.invoke("a", stop=["\n"], temperature=0.5)
    assert llm.requests[1].sampling.stop == ("END", "\n")
    assert llm.requests[1].sampling.temperature == 0.5


def test_several_prompts_are_one_batch(model: ZSMergeLLM, llm: Any) -> None:
    assert model.batch(["a", "b", "c"]) == ["The sky is blue."] * 3
    assert [request.prompt for request in llm.requests] == [["a", "b", "c"]]


async def test_several_prompts_are_one_batch_in_async_too(model: ZSMergeLLM, llm: Any) -> None:
    assert await model.abatch(["a", "b"]) == ["The sky is blue."] * 2
    assert [request.prompt for request in llm.requests] == [["a", "b"]]


def test_a_result_carries_usage_for_each_prompt_and_in_total(model: ZSMergeLLM) -> None:
    result = model.generate(["a", "b"])
    info = result.generations[1][0].generation_info
    assert info is not None
    assert info["finish_reason"] == "stop"
    assert info["token_usage"]["cached_tokens"] == 5
    assert result.llm_output == {
        "model_name": "fake",
        "token_usage": {"prompt_tokens": 14, "completion_tokens": 8, "total_tokens": 22},
    }


def test_a_stream_yields_each_chunk_and_calls_the_callbacks(model: ZSMergeLLM, llm: Any) -> None:
    tokens: list[str] = []

    class Listener(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            tokens.append(token)

    assert "".join(model.stream("a", config={"callbacks": [Listener()]})) == "The sky is blue."
    assert "".join(tokens) == "The sky is blue."


def test_breaking_out_of_a_stream_stops_decoding(slow_llm: Any) -> None:
    for _ in ZSMergeLLM(llm=slow_llm).stream("a"):
        break
    assert slow_llm.decoded_words == 1


def test_a_completion_takes_no_session(model: ZSMergeLLM) -> None:
    with pytest.raises(ConfigError, match="no option session_id"):
        model.invoke("a", session_id="x")


def test_langchains_cache_serves_the_same_prompt(llm: Any) -> None:
    model = ZSMergeLLM(llm=llm, cache=InMemoryCache())
    model.invoke("a")
    model.batch(["a", "b"])
    assert [request.prompt for request in llm.requests] == ["a", "b"]


def test_tokens_are_counted_by_the_models_tokenizer(model: ZSMergeLLM) -> None:
    assert model.get_num_tokens("one two three") == 3


def test_settings_survive_serialization() -> None:
    model = ZSMergeLLM(model="smollm2", cache_config=CacheConfig.streaming(512), max_tokens=9)
    read = load(dumpd(model), valid_namespaces=["langchain_zsmerge"], allowed_objects=[ZSMergeLLM])
    assert read.asdict() == model.asdict()


def test_a_chat_model_of_the_same_settings_shares_the_weights() -> None:
    assert ZSMergeLLM(model="smollm2")._llm is ChatZSMerge(model="smollm2")._llm


def test_tracing_parameters_name_provider_and_model(model: ZSMergeLLM) -> None:
    params = model._get_ls_params()
    assert params["ls_provider"] == "zsmerge"
    assert params["ls_model_name"] == "fake"
    assert params["ls_stop"] == ["END"]
