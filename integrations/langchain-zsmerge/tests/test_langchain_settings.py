"""Settings, model profile, token counts, copies and serialization of `ChatZSMerge`."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.load import dumpd, load
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, trim_messages
from langchain_core.runnables import ConfigurableField
from langchain_zsmerge import ChatZSMerge
from pydantic import ValidationError

from zsmerge_llm import CacheConfig


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


def test_tokens_are_counted_by_the_models_tokenizer_and_template(chat: ChatZSMerge) -> None:
    assert chat.get_token_ids("one three") == [3, 5]
    assert chat.get_num_tokens("one two three") == 3
    messages = [SystemMessage("be brief"), HumanMessage("hi")]
    assert chat.get_num_tokens_from_messages(messages) == 6  # system be brief user hi assistant
    assert (
        chat.get_num_tokens_from_messages(messages, tools=[{"name": "weather", "description": "", "parameters": {}}])
        == 7
    )
    assert chat.get_num_tokens_from_messages([]) == 0


def test_tokens_of_messages_that_end_with_an_answer_are_counted(chat: ChatZSMerge) -> None:
    assert chat.get_num_tokens_from_messages([AIMessage("hello there")]) == 3  # assistant hello there


def test_trim_messages_counts_with_the_model(chat: ChatZSMerge) -> None:
    history = [HumanMessage("a b c"), AIMessage("d e f"), HumanMessage("g h")]
    kept = trim_messages(history, max_tokens=4, token_counter=chat, strategy="last", start_on="human")
    assert kept == [HumanMessage("g h")]


def test_the_profile_has_the_context_window_of_an_exact_cache_once_the_model_is_loaded(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm)
    assert chat.profile is not None
    chat.invoke("hi")
    assert "max_input_tokens" not in chat.profile  # a compressed cache reads any length
    llm.cache = CacheConfig.full()
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
