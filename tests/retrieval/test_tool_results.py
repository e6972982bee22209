"""Behind the result of a tool, what its request asks for is looked up, and the request is said again."""

from __future__ import annotations

from typing import Any

import pytest

from tests.retrieval.test_passage_search import FACT, NOTES, chatter
from tests.support.chat import SHORT, make_llm, record_passes
from tests.support.templates import template
from zsmerge_llm import LLM
from zsmerge_llm.retrieval.passage_search import INTRODUCTION, PassageSearch
from zsmerge_llm.retrieval.query_probe import conversation_probe, message_probe
from zsmerge_llm.retrieval.questions import asked_at

QUESTION = "What is the password of the harbour vault?"
BUDGET = 192
Loop = list[dict[str, Any]]


@pytest.fixture(scope="module")
def search() -> PassageSearch:
    return PassageSearch(template("smollm2"), BUDGET)


def loop(*results: str, request: str = QUESTION) -> Loop:
    """Return a request, and the results of tools that were called for it."""
    steps = [(f"I open page {page}.", text) for page, text in enumerate(results)]
    return [
        {"role": "user", "content": request},
        *(
            message
            for page, (said, text) in enumerate(steps)
            for message in (
                {"role": "assistant", "content": said},
                {"role": "tool", "content": text, "tool_call_id": str(page)},
            )
        ),
    ]


def react(messages: Loop) -> Loop:
    """Return a loop as ReAct agents write it: calls and results are text."""
    forms = {"assistant": "Thought: I need a page.\nAction: open", "tool": "Observation: {}", "user": "{}"}
    roles = {"assistant": "assistant", "tool": "user", "user": "user"}
    return [{"role": roles[each["role"]], "content": forms[each["role"]].format(each["content"])} for each in messages]


def added(search: PassageSearch, messages: Loop, slots: int = 1000, recent: str = "", **settings: Any) -> str:
    """Return what is sent behind the last result; everything else stays as it is."""
    augmented = search.augment(messages, slots, recent_ids=search.template.encode(recent), **settings)
    if augmented == messages:
        return ""
    if messages[-1]["role"] == "tool":
        assert augmented[:-1] == messages
        assert augmented[-1].keys() == {"role", "content"}
        assert augmented[-1]["role"] == "user"
        return str(augmented[-1]["content"])
    assert augmented[:-1] == messages[:-1]
    assert augmented[-1]["content"].startswith(f"{messages[-1]['content']}\n\n")
    return str(augmented[-1]["content"].removeprefix(f"{messages[-1]['content']}\n\n"))


@pytest.mark.parametrize("form", [list, react])
def test_what_was_lost_of_earlier_results_and_the_request_stand_behind_the_last(
    search: PassageSearch, form: Any
) -> None:
    text = added(search, form(loop(*chatter(9))))
    assert text.startswith(f"{INTRODUCTION}\n\n")
    assert FACT in text
    assert text.endswith(f"\n\n{QUESTION}")
    passages = search.template.encode_text(text.removeprefix(INTRODUCTION).removesuffix(QUESTION))
    assert len(passages) <= BUDGET + 4


def test_nothing_is_repeated_as_long_as_the_request_is_near(search: PassageSearch) -> None:
    messages = loop(*chatter(9))
    assert added(search, messages, recent=f"... {QUESTION} It rained.") == ""
    assert FACT in added(search, messages, recent=f"... {FACT} {QUESTION} {' '.join(chatter(20)[1:])}")
    assert added(search, loop("A page."), recent="A page.") == QUESTION
    assert added(PassageSearch(search.template, 0), messages) == ""


def test_a_result_that_is_longer_than_the_cache_is_searched_too(search: PassageSearch) -> None:
    page = "\n\n".join(chatter(30, fact_at=11))
    assert FACT not in added(search, loop(page), slots=3000)
    assert FACT in added(search, loop(page), slots=400)


def test_what_stands_before_the_question_of_a_request_is_searched_too(search: PassageSearch) -> None:
    request = "\n\n".join([*chatter(9), QUESTION])
    text = added(search, loop("The page is empty.", request=request))
    assert FACT in text
    assert text.endswith(f"\n\n{QUESTION}")
    assert text.count("Rain fell") <= 1  # all of the request would be too long


def test_a_follow_up_is_searched_behind_the_question_that_it_refers_to(search: PassageSearch) -> None:
    before = [
        {"role": "user", "content": "Who wrote the novel about the Arctic convoys?"},
        {"role": "assistant", "content": "Alina Markova."},
    ]
    born = "Markova of the Arctic convoys was born in the city of Riga."
    follow_up = loop(born, *chatter(9)[1:], request="Where was she born?")
    assert born in added(search, [*before, *follow_up])


def test_a_message_that_only_begins_like_an_observation_asks_for_itself() -> None:
    asked = [*loop("A page."), {"role": "assistant", "content": "Falcon."}]
    observed = [*asked, {"role": "user", "content": "Observation: that is wrong. Why?"}]
    assert asked_at(observed) == len(observed) - 1
    assert asked_at(observed[-1:]) == 0
    assert asked_at([{"role": "tool", "content": "A page.", "tool_call_id": "1"}]) == 0


def test_a_result_is_kept_by_what_its_request_asks(search: PassageSearch) -> None:
    made = search.template
    assert conversation_probe(made, loop(*chatter(3))) == message_probe(made, QUESTION)
    assert conversation_probe(made, loop(*chatter(3))[:1]) == message_probe(made, QUESTION)


def test_an_agent_reads_again_what_its_cache_lost_and_its_session_goes_on() -> None:
    llm: LLM = make_llm(cache=NOTES, retrieval_tokens=BUDGET)
    messages, usages = loop(*chatter(1)), []
    for page in range(1, 12):
        answer = llm.chat(messages, session="agent", sampling=SHORT)
        usages.append(answer.usage)
        result = {"role": "tool", "content": chatter(20)[page], "tool_call_id": f"r{page}"}
        messages += [{"role": "assistant", "content": answer.text}, result]
    with record_passes() as passes:
        last = llm.chat(messages, session="agent", sampling=SHORT)
    read = llm.tokenizer.decode(llm.session("agent").tokens[last.usage.cached_tokens :])

    assert {each.reuse for each in [*usages[1:], last.usage]} == {"continued"}
    assert usages[0].retrieved_tokens == 0
    added_around = len(llm.tokenizer.encode(f"<|im_start|>user\n{INTRODUCTION}\n\n{QUESTION}<|im_end|>\n"))
    assert 0 < max(each.retrieved_tokens for each in usages) <= BUDGET // 2 + added_around + 4
    assert llm.tokenizer.decode(llm.session("agent").tokens).count(QUESTION) > 1
    assert sum(passes) < BUDGET + 60
    assert chatter(20)[11] in read
