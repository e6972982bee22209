"""Messages are checked with errors that help; templates render stably; a conversation's tokens are read once."""

from __future__ import annotations

import copy
from datetime import date
from typing import Any

import pytest

from tests.support.templates import (
    SPECIAL_TOKENS,
    STABLE_TEMPLATES,
    TOOLS,
    byte_level,
    generated_text,
    long_chat,
    template,
    tool_call,
)
from zsmerge_llm.errors import ConfigError, InputError, MissingTemplateError, UnsupportedContentError
from zsmerge_llm.language.chat_template import ChatTemplate, normalize_messages

USER = {"role": "user", "content": "Hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [tool_call("Bern", 1)]}
RESULT = {"role": "tool", "content": "12 degrees", "tool_call_id": "abcdefg01"}
CHATTING = [name for name in SPECIAL_TOKENS if name != "gemma2"]  # Gemma 2's takes no system message


def play(name: str, chat: list[list[dict[str, Any]]], tools: list[Any] | None, thought: str = "") -> list[str]:
    """Run a session over `chat` as the engine would; its text at each prompt, decoded from the ids it has read.

    The first prompt is read whole, later ones as the delta behind what was generated, less the end token if that was
    read already. Checks on the way that stable templates would have rendered the very same text.
    """
    form = template(name)
    end = form.encode(SPECIAL_TOKENS[name][0])
    messages: list[dict[str, Any]] = []
    ids: list[int] = []
    texts: list[str] = []
    for step in chat:
        n = len(messages) + 1
        messages = normalize_messages([*messages, *step])
        if not ids:
            ids = form.encode(form.render(messages, tools))
        else:
            new = form.encode(form.delta(messages, n, tools))
            assert new[:1] == end
            ids += form.encode(thought + generated_text(name, messages[n - 1])) + new  # the model wrote new[0] itself
        texts.append(form.tokenizer.decode(ids))
        if name in STABLE_TEMPLATES:
            assert texts[-1] == form.render(messages, tools)
    return texts


@pytest.mark.parametrize("name", CHATTING)
def test_twelve_turns_with_system_tool_calls_and_results_read_everything_once(name: str) -> None:
    chat = long_chat()
    text = play(name, chat, TOOLS)[-1]

    assert len(chat) == 16
    said = [f"{kind}-{turn:02d}" for turn in range(12) for kind in ("question", "answer")][:-1]
    said += [f"{kind}-{turn:02d}" for turn in (1, 4, 7, 10) for kind in ("place", "result")]
    assert {words: text.count(words) for words in said} == dict.fromkeys(said, 1)
    assert text.count("<bos>") == (name.startswith(("llama", "mistral", "gemma")))
    # Mistral's template repeats system message and tools with each user message, as the model was trained to see them
    assert text.count("You are terse.") == (12 if name.startswith("mistral") else 1)
    assert text.count("The weather of a place.") == (12 if name.startswith("mistral") else 1)


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS])
def test_a_plain_chat_reads_exactly_what_a_fresh_render_holds_with_every_template(name: str) -> None:
    chat = [[USER]]
    for turn in range(12):
        chat.append([{"role": "assistant", "content": f"Answer {turn}"}, {"role": "user", "content": f"And {turn}?"}])
    form = template(name)
    messages = [message for step in chat for message in step]

    assert play(name, chat, None)[-1] == form.render(normalize_messages(messages))


def test_qwen3_without_thinking_reads_what_a_fresh_render_holds_with_tools_too() -> None:
    messages: list[dict[str, Any]] = []
    for step, text in zip(long_chat(), play("qwen3", long_chat(), TOOLS), strict=True):
        messages += step
        assert text == template("qwen3").render(normalize_messages(messages), TOOLS)


def test_thinking_stays_in_the_session_and_is_dropped_from_a_fresh_render() -> None:
    text = play("qwen3", long_chat(), TOOLS, thought="<think>\nhm\n</think>\n\n")[-1]
    fresh = template("qwen3").render(normalize_messages([message for step in long_chat() for message in step]), TOOLS)

    assert text.count("<think>") == 15
    assert "<think>" not in fresh
    assert text.replace("<think>\nhm\n</think>\n\n", "") == fresh


def test_the_delta_starts_with_the_end_token_and_ends_with_the_next_header() -> None:
    messages = normalize_messages([USER, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye"}])

    assert template("qwen2.5").delta(messages, 2) == (
        "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template("gemma3").delta(messages[:2], 2, add_generation_prompt=False) == "<end_of_turn>\n"


@pytest.mark.parametrize("name", CHATTING)
def test_the_delta_behind_an_earlier_answer_holds_everything_since(name: str) -> None:
    messages = normalize_messages([message for step in long_chat(6) for message in step])
    form = template(name)
    text = form.delta(messages, 3, TOOLS)

    assert messages[2]["role"] == "assistant"
    assert form.render(messages, TOOLS).endswith(text)
    assert text.startswith(SPECIAL_TOKENS[name][0])
    assert text.count("answer-00") == 0
    assert [text.count(f"question-{turn:02d}") for turn in range(6)] == [0, 1, 1, 1, 1, 1]


def test_the_delta_is_found_where_a_template_insists_that_results_follow_calls() -> None:
    strict = """{%- for m in messages -%}
        {%- if m.role == "tool" and not (loop.previtem.tool_calls or loop.previtem.role == "tool") -%}
            {{- raise_exception("a result without a call") -}}
        {%- endif -%}
        <|im_start|>{{ m.role }} {{ m.content }}
        {%- for c in m.tool_calls or [] %} CALL {{ c.function | tojson }}{% endfor -%}
        <|im_end|>
    {%- endfor -%}{{ "<|im_start|>" if add_generation_prompt }}"""
    form = ChatTemplate(byte_level("<|im_end|>", ("<|im_start|>",)), strict)

    assert (
        form.delta(normalize_messages([USER, CALL, RESULT]), 2)
        == "<|im_end|><|im_start|>tool 12 degrees<|im_end|><|im_start|>"
    )


def test_a_template_that_hides_the_answer_has_no_delta_and_says_so() -> None:
    form = ChatTemplate(byte_level(), "{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}")

    with pytest.raises(InputError, match=r"does not show where messages\[1\] ends"):
        form.delta(normalize_messages([USER, CALL, RESULT]), 2)


def test_a_delta_behind_a_message_that_is_not_the_assistants_is_refused() -> None:
    for n in (0, 1, 3, 4):
        with pytest.raises(InputError, match="not an answer of the assistant"):
            template("qwen3").delta(normalize_messages([USER, CALL, RESULT]), n, TOOLS)


def test_a_string_is_one_user_message_and_blocks_are_joined() -> None:
    blocks = [{"type": "text", "text": "one"}, "two", {"type": "text", "text": "three"}]

    assert normalize_messages("Hello") == [USER]
    assert normalize_messages([{"role": "user", "content": blocks, "id": "x"}]) == [
        {"role": "user", "content": "one\ntwo\nthree"}
    ]


def test_tool_arguments_are_parsed_and_what_is_no_json_object_stays_text() -> None:
    given = ['{"a": 1}', {"a": 1}, "", None, "{broken", "[1]"]
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in given]
    messages = normalize_messages(
        [USER, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "", "name": "f"}]
    )

    assert [one["function"]["arguments"] for one in messages[1]["tool_calls"]] == [
        {"a": 1},
        {"a": 1},
        {},
        {},
        "{broken",
        "[1]",
    ]
    assert calls[0]["function"]["arguments"] == '{"a": 1}'  # the caller's own messages are not touched


def test_results_find_their_calls_by_id_or_by_name() -> None:
    calls = [
        {"function": {"name": "f", "arguments": {}}},
        {"id": "mine", "function": {"name": "g", "arguments": {}}},
        {"function": {"name": "f", "arguments": {}}},
    ]
    results = [{"tool_call_id": "mine"}, {"name": "f"}, {"name": "f"}]
    messages = normalize_messages(
        [USER, {"role": "assistant", "tool_calls": calls}]
        + [{"role": "tool", "content": "r", **result} for result in results]
    )

    assert [one["id"] for one in messages[1]["tool_calls"]] == ["call00000", "mine", "call00002"]
    assert [(one["tool_call_id"], one["name"]) for one in messages[2:]] == [
        ("mine", "g"),
        ("call00000", "f"),
        ("call00002", "f"),
    ]


@pytest.mark.parametrize(
    ("messages", "kind", "says"),
    [
        ([], InputError, "at least one"),
        ("", InputError, "at least one"),
        ({"role": "user", "content": "x"}, InputError, "list of dicts"),
        (None, InputError, "list of dicts"),
        ([{}], InputError, "must be one of system, user, assistant, tool"),
        (["Hello"], InputError, "must be a dict"),
        ([{"role": "robot", "content": "x"}], InputError, "'robot'"),
        ([{"role": ["user"], "content": "x"}], InputError, "must be one of"),
        ([{"role": "user"}], InputError, "not nothing"),
        ([{"role": "user", "content": 7}], InputError, "text or a list of text blocks, not a int"),
        ([{"role": "user", "content": b"x"}], InputError, "text or a list"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], InputError, "text or a list"),
        ([{"role": "user", "content": [7]}], InputError, "'type': 'text'"),
        ([{"role": "user", "content": [{"type": "text"}]}], InputError, "text must be a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], UnsupportedContentError, "send it as text"),
        ([USER, {"role": "assistant", "content": "x"}], InputError, "LLM.complete"),
        ([{"role": "user", "content": "x", "tool_calls": [tool_call("a", 1)]}], InputError, "in an assistant message"),
        ([{"role": "assistant", "tool_calls": "f()"}, USER], InputError, "must be a list"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}, USER], InputError, "must have the form"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}, USER], InputError, "must have the form"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}, USER],
            InputError,
            "a dict of JSON values or its JSON text, not a int",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": {1}}}}]}, USER],
            InputError,
            "a dict of JSON values",
        ),
        ([USER, {"role": "tool", "content": "x"}], InputError, "tool_call_id"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": 4}], InputError, "must be a string"),
    ],
)
def test_messages_that_cannot_be_used_are_refused_with_a_remedy(
    messages: Any, kind: type[InputError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        normalize_messages(messages)
    assert type(caught.value) is kind


def test_a_model_without_a_template_still_takes_completions_and_names_the_remedy_for_chat() -> None:
    form = ChatTemplate(byte_level())

    assert form.tokenizer.decode(form.encode_prompt("Once")) == "Once"
    with pytest.raises(MissingTemplateError, match=r"LLM\.complete.*chat_template="):
        form.render([USER])


def test_what_a_template_refuses_is_an_input_error_with_its_own_words() -> None:
    with pytest.raises(InputError, match="refuses these messages"):
        ChatTemplate(byte_level(), "{{ messages[0].content + 1 }}").render([USER])
    with pytest.raises(ConfigError, match="not valid Jinja"):
        ChatTemplate(byte_level(), "{% if %}").render([USER])


def test_tools_of_a_wrong_form_are_refused_and_an_empty_list_is_no_tools() -> None:
    form = template("llama3")

    assert form.render([USER], []) == form.render([USER])
    with pytest.raises(InputError, match=r"tools\[0\] must have the form"):
        form.render([USER], [{"name": "weather"}])


def test_tools_reach_a_model_whose_template_knows_none() -> None:
    messages = normalize_messages(
        [{"role": "system", "content": "Be brief."}, USER, CALL, RESULT, {"role": "user", "content": "So?"}]
    )
    text = template("gemma3").render(messages, TOOLS)

    assert text.startswith("<bos><start_of_turn>user\nBe brief.\n\n# Tools\n")
    assert '"name": "weather"' in text
    assert text.endswith(
        '<start_of_turn>model\n<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n</tool_call>'
        "<end_of_turn>\n"
        "<start_of_turn>user\n<tool_response>\n12 degrees\n</tool_response>\nSo?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_mistral_gets_ids_of_nine_characters_and_keeps_those_it_has() -> None:
    long = copy.deepcopy([USER, CALL, RESULT])
    long[1]["tool_calls"][0]["id"] = long[2]["tool_call_id"] = "call_0123456789abcdef"  # type: ignore[index]

    kept, replaced = (
        template("mistral-nemo").render(normalize_messages(chat), TOOLS) for chat in ([USER, CALL, RESULT], long)
    )
    assert kept.count("abcdefg01") == 2
    assert replaced == kept.replace("abcdefg01", "call00000")


def test_the_date_is_frozen_and_can_be_given() -> None:
    form = template("llama3", today=date(2024, 2, 29))

    assert "Today Date: 29 Feb 2024\n" in form.render([USER])
    odd = ChatTemplate(byte_level(), "{{ strftime_now( '%Y-%m-%d \"%j\"' ) }}", today=date(2024, 2, 29))
    assert odd.render([USER]) == '2024-02-29 "060"'
    assert template("llama3").today == date.today()


def test_template_arguments_reach_the_template() -> None:
    assert template("qwen3", args={"enable_thinking": False}).render([USER]).endswith("<think>\n\n</think>\n\n")


def test_one_bos_is_read_whether_the_template_or_the_tokenizer_writes_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(byte_level("<end_of_turn>", ("<start_of_turn>",)))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    form = ChatTemplate(tokenizer, template("gemma3").chat_template)

    assert form.encode(form.render([USER])).count(0) == 1
    assert form.encode_prompt("Once").count(0) == 1


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InputError, match="not valid Unicode"):
        template("qwen3").encode("half a pair: \ud83d")


def test_digests_ignore_what_does_not_change_the_conversation() -> None:
    form = template("qwen3")
    later = {"role": "user", "content": "Thanks"}
    one = [USER, CALL, RESULT, {"role": "assistant", "content": "It is warm."}, later]
    other = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}], "id": "1", "name": "alice"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "z", "function": {"name": "weather", "arguments": '{ "place":"Bern" }'}}],
        },
        {"role": "tool", "content": "12 degrees", "tool_call_id": "z"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is warm.\n", "reasoning_content": "hm"},
        later,
    ]
    shuffled = [{"function": dict(reversed(TOOLS[0]["function"].items())), "type": "function"}]  # type: ignore[attr-defined]

    assert form.digests(normalize_messages(one), TOOLS) == form.digests(normalize_messages(other), shuffled)
    assert len(set(form.digests(normalize_messages(one), TOOLS))) == 6


def test_digests_of_prefixes_are_prefixes_of_digests() -> None:
    form = template("llama3")
    messages = normalize_messages([message for step in long_chat() for message in step])
    whole = form.digests(messages, TOOLS)

    assert len(whole) == len(messages) + 1
    for length in range(len(messages)):
        assert form.digests(messages[:length], TOOLS) == whole[: length + 1]


def test_digests_differ_with_every_change_that_matters() -> None:
    form = template("qwen3")
    parallel = {"role": "assistant", "tool_calls": [tool_call("Bern", 1), tool_call("Rome", 2)]}

    def last(*messages: dict[str, Any], tools: Any = TOOLS, extra: Any = None, form: ChatTemplate = form) -> str:
        return form.digests(normalize_messages(list(messages)), tools, extra)[-1]

    chats = [
        last(USER),
        last(USER, tools=None),
        last(USER, extra={"schema": 1}),
        last(USER, form=template("qwen3", args={"enable_thinking": False})),
        last({"role": "system", "content": "Hello"}),
        last({"role": "user", "content": "Hello "}),
        last(USER, CALL, RESULT),
        last(USER, CALL, {**RESULT, "content": "13 degrees"}),
        last(USER, {**CALL, "content": "Let me see."}, RESULT),
        last(USER, {**CALL, "tool_calls": [tool_call("Rome", 1)]}, RESULT),
        last(USER, parallel, RESULT),
        last(USER, parallel, {**RESULT, "tool_call_id": "abcdefg02"}),
        last(USER, {"role": "assistant", "content": "<think>"}, USER),
        last(USER, {"role": "assistant", "content": ""}, USER),
    ]
    assert len(set(chats)) == len(chats)
