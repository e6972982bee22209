"""benchmarks/chat.py on tiny random models: how a chat is made, read and asked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.policies import POLICIES
from benchmarks.quality import chat as chat_benchmark
from benchmarks.quality import evaluator
from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.templates import template


def record(paragraphs: int = 6, questions: int = 3) -> dict[str, Any]:
    """A document of paragraphs of equal length, each with facts of its own."""
    texts = [
        " ".join(f"In town {number} the tower {asked} is {number}{asked} feet high." for asked in range(questions))
        for number in range(paragraphs)
    ]
    whole, qa = "\n\n".join(texts), []
    for number in range(paragraphs):
        for asked in range(questions):
            answer = f"{number}{asked} feet"
            qa.append({"q": f"How high is tower {asked}?", "a": [answer], "depth": whole.index(answer) / len(whole)})
    return {"id": "d1", "task": "toy", "file": "toy", "context": whole, "qa": qa}


@pytest.fixture(scope="module")
def bench() -> evaluator.Evaluator:
    return evaluator.Evaluator(make_llm(cache=LARGE_CACHE).engine, template("smollm2"))


def test_a_chat_asks_about_each_paragraph_and_at_last_about_the_first_third() -> None:
    made, asked_after = chat_benchmark.conversation(record())
    messages = made["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 6
    assert [message["content"] for message in messages[1::2]] == [f"{number}0 feet" for number in range(6)]
    assert [asked["a"][0] for asked in made["qa"]] == ["01 feet", "02 feet", "11 feet", "12 feet"]
    assert asked_after == [2, 2, 4, 4]
    assert all(asked["a"][0] in messages[at - 2]["content"] for asked, at in zip(made["qa"], asked_after, strict=True))


def test_questions_are_asked_after_their_paragraph_and_at_the_end(bench: evaluator.Evaluator) -> None:
    made = chat_benchmark.chat(bench.template, record(), 12)
    lines = chat_benchmark.measure(bench, POLICIES["full"], 96, made)
    assert [(line["setting"], line["question"]) for line in lines] == [
        *(("first", number) for number in range(4)),
        *(("later", number) for number in range(4)),
    ]
    assert lines[-1]["tokens_read"] == made.item.tokens
    assert lines[0]["tokens_read"] == sum(len(ids) for ids, _ in made.item.parts[:2])


@pytest.mark.parametrize("name", ["truncate", "streaming", "h2o", "zsmerge-chat"])
def test_policies_read_the_same_chat_in_the_memory_they_have(name: str, bench: evaluator.Evaluator) -> None:
    made = chat_benchmark.chat(bench.template, record(24), 4)
    *_, cache = chat_benchmark.turns(bench, POLICIES[name], 160, made.item)
    held = cache.full_nbytes() if cache.slots is None else cache.nbytes
    assert held <= evaluator.plain_bytes(bench.engine, 160) + (0 if cache.logits is None else cache.logits.nbytes)
    assert made.item.tokens > 2 * 288
    assert cache.seen == (288 if name == "truncate" else made.item.tokens)


def test_retrieval_searches_earlier_messages_only(bench: evaluator.Evaluator) -> None:
    made = chat_benchmark.chat(bench.template, record(24), 4)
    policy, budget = POLICIES["zsmerge-chat-retrieval"], evaluator.Budget(400)
    asked = made.item.questions[-1]
    for before in (2, 6):
        found = bench.passages(policy, budget, made.item, before, asked.text)
        assert found
        earlier = "\n\n".join(message["content"] for message in made.item.messages[:before])
        assert all(line in earlier for each in found for line in each.split("\n\n"))
    *_, cache = chat_benchmark.turns(bench, policy, 160, made.item)
    *_, plain = chat_benchmark.turns(bench, POLICIES["zsmerge-chat"], 160, made.item)
    assert cache.seen > plain.seen == made.item.tokens
    assert cache.nbytes == plain.nbytes


def test_the_library_compresses_after_each_answer(bench: evaluator.Evaluator) -> None:
    made = chat_benchmark.chat(bench.template, record(24), 4)
    for number, cache in enumerate(chat_benchmark.turns(bench, POLICIES["zsmerge-chat"], 160, made.item), start=1):
        if number % 2 == 0:
            assert all(max(layer.num_filled) <= (layer.config.slots or 0) for layer in cache.layers)


def test_the_report_compares_with_the_policy_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"budget": "512", "task": "chat-toy", "item": "d1", "setting": "later", "question": 0, "depth": 0.1}
    facts |= {"asked": 1, "exact": False, "cache_bytes": 1, "reading_bytes": 0}
    lines = [{**facts, "policy": name, "nll": nll} for name, nll in (("zsmerge-chat", 1.0), ("h2o", 3.0))]
    (tmp_path / "quality-chat-toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(chat_benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["chat.py", "--report", "--name", "toy"])

    chat_benchmark.main()

    assert "+2.00 [+2.00, +2.00]" in capsys.readouterr().out
