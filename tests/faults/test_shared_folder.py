"""Several processes keep their conversations in one folder: nothing that was answered is lost or read again."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.support.chat import Chat, make_llm
from zsmerge_llm import LLM

ROOT = Path(__file__).parents[2]
CONFLICT = "Another process keeps a conversation named 'it'"


def start(folder: Path) -> LLM:
    llm = make_llm(sessions_dir=folder, retrieval_tokens=0)
    llm.engine  # noqa: B018 - the folder is listed now
    return llm


def assert_another_process_continues(folder: Path, *chats: Chat) -> LLM:
    llm = start(folder)
    for chat in chats:
        chat.llm = llm
        assert chat.ask("Go on").usage.reuse == "continued"
    return llm


def test_processes_take_turns_in_one_conversation(tmp_path: Path) -> None:
    chat = Chat(start(tmp_path), "it")
    llms = [chat.llm, start(tmp_path), start(tmp_path)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(7):
            chat.llm = llms[turn % 3]
            assert chat.ask(f"Question {turn}").usage.reuse == ("continued" if turn else "new")
    assert len(list(tmp_path.glob("*.zsmerge"))) == 1


def test_conversations_of_one_name_are_all_kept_and_continued_and_that_is_said_once(tmp_path: Path) -> None:
    chats = [Chat(start(tmp_path), "it") for _ in range(3)]

    def take_turns() -> list[list[str]]:
        return [[chat.ask(f"{chats.index(chat)}: {turn}").usage.reuse for chat in chats] for turn in range(3)]

    with pytest.warns(UserWarning, match=CONFLICT) as caught:
        assert take_turns()[1:] == [["continued"] * 3] * 2
    assert 1 <= len(caught) <= 3  # once in each process

    assert_another_process_continues(tmp_path, *chats)


def test_an_edit_does_not_delete_what_another_process_has_answered(tmp_path: Path) -> None:
    one = Chat(start(tmp_path), "it")
    one.ask("Hello")
    two = Chat(start(tmp_path), "it", one.messages)
    two.ask("Where are you?")
    one.ask("Who are you?")  # from the same point, in another process

    assert_another_process_continues(tmp_path, one, two)


def test_a_turn_that_another_process_overtakes_becomes_a_conversation_of_its_own(tmp_path: Path) -> None:
    one = Chat(start(tmp_path), "it")
    one.ask("Hello")
    two = Chat(start(tmp_path), "it", one.messages)
    one.messages.append({"role": "user", "content": "Who are you?"})
    stream = one.llm.stream(one.messages, session="it")
    text = next(stream).text
    two.ask("Where are you?")
    with pytest.warns(UserWarning, match=CONFLICT):
        text += "".join(chunk.text for chunk in stream)
    one.messages.append({"role": "assistant", "content": text})
    assert_another_process_continues(tmp_path, one, two)


def test_other_names_are_free_of_each_other(tmp_path: Path) -> None:
    chats = [Chat(start(tmp_path), name) for name in ("one", "two", None)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(3):
            for chat in chats:
                assert chat.ask(f"{chat.session}: {turn}").usage.reuse == ("continued" if turn else "new")


def test_what_another_process_deletes_or_renames_is_noticed(tmp_path: Path) -> None:
    chat = Chat(start(tmp_path), "it")
    chat.ask("Hello")
    other = start(tmp_path)
    other.store.remove("it")
    assert list(tmp_path.iterdir()) == []
    assert chat.ask("Go on").usage.reuse == "continued"  # it was in memory, and is saved again
    assert "it" in start(tmp_path).store
    assert other.session("it").tokens == chat.llm.session("it").tokens


WORKER = """
import json, sys
from pathlib import Path
from tests.support.chat import Chat, make_llm
folder, number = Path(sys.argv[1]), sys.argv[2]
llm = make_llm(sessions_dir=folder, retrieval_tokens=0)
chats = [Chat(llm, f"name {index}") for index in range(3)]
reuse = []
for turn in range(6):
    for chat in chats:
        reuse.append(chat.ask(f"Process {number} asks {chat.session} the question {turn}").usage.reuse)
print(json.dumps([reuse, [chat.messages for chat in chats]]))
"""


@pytest.mark.slow
def test_processes_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, str(tmp_path), str(number)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    results = [json.loads(worker.communicate(timeout=200)[0].splitlines()[-1]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert [reuse[3:] for reuse, _ in results] == [["continued"] * 15] * 2

    llm = start(tmp_path)
    for _, conversations in results:
        for messages in conversations:
            assert Chat(llm, None, messages).ask("Go on").usage.reuse == "continued"
    assert not list(tmp_path.glob(".*"))
