"""A question about a long document is answered from passages alone where words find them, else from what is held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chat import SHORT, SMALL_CACHE, Chat, equal_caches, make_llm
from zsmerge_llm import LLM, CacheConfig, config
from zsmerge_llm.kvcache.rope import PositionMap
from zsmerge_llm.sessions import file_format
from zsmerge_llm.sessions.documents import MIN_OVERFLOW

FACT = "The password of the harbour vault is falcon seven."
FOUND, UNKNOWN = "What is the password of the vault?", "Zzyx qwv?"
CACHE = SMALL_CACHE.replace(slots=256, recent=32)
"""Has room for all that a turn about passages reads."""
LINE_TOKENS = 42


def story(times: float) -> str:
    """Return a text with one fact and a question in it, about so many times as long as the cache's slots."""
    days = int(times * 256 / LINE_TOKENS)
    lines = [f"Rain fell on the quiet village all day long. Day {day}." for day in range(days)]
    lines[2:2] = ["How many lists are there, and when were all of the towns counted?"]
    return "\n\n".join([*lines[: len(lines) // 3], FACT, *lines[len(lines) // 3 :]])


def tokens_held(llm: LLM, name: str) -> set[int]:
    """Return the positions of all tokens that the first layer of a session's cache holds."""
    layer = llm.session(name).cache.layers[0]
    return set(layer.position[layer.multiplicity > 0].tolist())


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(cache=CACHE, retrieval_tokens=96)


@pytest.fixture
def document(llm: LLM) -> object:
    return llm.read_document(text=story(MIN_OVERFLOW), name="story")


def test_a_question_whose_words_are_found_is_answered_as_if_the_passages_were_the_document(
    llm: LLM, document: object
) -> None:
    answer = Chat(llm, document).ask(FOUND)
    assert answer.usage.retrieved_tokens > 0

    session = llm.session(answer.session)
    num_document = len(document.tokens)
    own = session.tokens[num_document:]
    before = len({each for each in tokens_held(llm, answer.session) if each < num_document})
    assert before < num_document // 8, "the cache holds something of the document"
    exact = llm._load().engine.new_cache(CacheConfig.full())
    alone = llm._load().engine.read(exact, [*session.tokens[:before], *own[: session.cache.seen - num_document]])
    assert torch.allclose(alone, session.cache.logits[0].float(), atol=1e-4)


def test_the_documents_own_session_stays_as_it_is(llm: LLM, document: object) -> None:
    before = llm.session("story").cache.clone()
    Chat(llm, document).ask(FOUND)
    assert equal_caches(before, llm.session("story").cache)


def test_a_follow_up_that_finds_nothing_goes_back_to_what_is_held_of_the_document(llm: LLM, document: object) -> None:
    num_document, chat = len(document.tokens), Chat(llm, document)
    chat.ask(FOUND)
    second = chat.ask(UNKNOWN)
    assert second.usage.cached_tokens == num_document
    third = chat.ask(UNKNOWN)
    assert third.usage.reuse == "continued"
    assert any(num_document // 2 <= each < num_document for each in tokens_held(llm, third.session))


def test_a_follow_up_whose_words_are_found_continues(llm: LLM, document: object) -> None:
    chat = Chat(llm, document)
    chat.ask(FOUND)
    assert chat.ask("Who has the password of the harbour vault?").usage.reuse == "continued"


def test_the_same_question_again_reads_nothing_again(llm: LLM, document: object) -> None:
    chat = Chat(llm, document)
    first = chat.ask(FOUND)
    del chat.messages[-1]
    second = chat.reply()
    assert second.text == first.text
    assert second.usage.prompt_tokens - second.usage.cached_tokens <= 8


def test_where_the_document_is_gone_a_conversation_about_passages_goes_on(llm: LLM) -> None:
    document = llm.read_document(text=story(MIN_OVERFLOW + 1), name="gone")
    chat = Chat(llm, document)
    chat.session = chat.ask(FOUND).session
    llm.store.remove("gone")
    assert chat.ask(UNKNOWN).usage.reuse == "continued"


@pytest.mark.parametrize("known", [False, True])
def test_a_cache_that_keeps_enough_or_knows_the_question_is_used_beside_passages(llm: LLM, known: bool) -> None:
    text = story(MIN_OVERFLOW if known else MIN_OVERFLOW / 2)
    how = {"probe": FOUND} if known else {}
    document = llm.read_document(text=text, name=f"kept {known}", **how)
    answer = Chat(llm, document).ask("Which password has the harbour vault?")
    assert answer.usage.retrieved_tokens > 0
    assert any(len(document.tokens) // 2 <= each < len(document.tokens) for each in tokens_held(llm, answer.session))


@pytest.mark.parametrize(
    "asked", ["What are all the passwords of the vault?", "What is the password of the vault, and who has it?"]
)
def test_a_question_for_several_things_is_asked_of_the_cache_and_the_passages(
    llm: LLM, document: object, asked: str
) -> None:
    answer = Chat(llm, document).ask(asked)
    assert answer.usage.retrieved_tokens > 0
    assert any(len(document.tokens) // 2 <= each < len(document.tokens) for each in tokens_held(llm, answer.session))


def test_a_conversation_about_passages_is_saved_and_continued_by_another_process(tmp_path: Path) -> None:
    first = make_llm(cache=CACHE, retrieval_tokens=96, sessions_dir=tmp_path)
    chat = Chat(first, first.read_document(text=story(MIN_OVERFLOW), name="story"))
    chat.session = chat.ask(FOUND).session
    first.close()
    second = make_llm(cache=CACHE, retrieval_tokens=96, sessions_dir=tmp_path)
    again = Chat(second, chat.session, chat.messages).ask("Who has the password of the harbour vault?")
    assert again.usage.reuse == "continued"


def test_positions_behind_a_document_of_which_only_the_beginning_is_held_are_those_behind_the_beginning() -> None:
    llm = make_llm(cache=CACHE)
    cache = llm._load().engine.new_cache()
    llm._load().engine.read(cache, range(5, 25))
    cache.skip_to(50_000)
    assert cache.seen == 50_000
    assert cache.dropped_tokens == 50_000 - 20
    positions = cache.position_maps[0].rope_positions(torch.tensor([0, 19, 50_000, 50_007]))
    assert positions.tolist() == [0, 19, 20, 27]


@given(
    held=st.integers(1, 500), skipped=st.integers(1, 100_000), read=st.lists(st.integers(600, 3000), max_size=4),
    head=st.integers(1, 500),
)  # fmt: skip
def test_remapping_behind_a_skipped_text_keeps_the_order_of_all_that_is_held(
    held: int, skipped: int, read: list[int], head: int
) -> None:
    end = held + skipped
    positions = PositionMap(((held, float(held)), (end, float(held))))
    for count in read:
        end += count
        near = end - 200
        position = float(positions.rope_positions(torch.tensor(near)))
        positions = positions.squeezed(head, near, int(min(held, head) + 1 + (position - min(held, head)) / 2), 4)
    texts = torch.cat([torch.arange(held), torch.arange(held + skipped, end + 1)])
    moved = positions.rope_positions(texts)
    assert bool((moved.diff() > 0).all())
    assert moved[:held].tolist() == list(range(held)) or head < held


@pytest.mark.parametrize(
    ("question", "alone"),
    [
        ("List all doors of the harbour vault whose password is 73321.", True),
        ("List all harbour vault passwords.", False),
    ],
)
def test_a_question_for_a_list_is_asked_of_passages_alone_only_if_it_names_an_identifier(
    llm: LLM, document: object, question: str, alone: bool
) -> None:
    answer = Chat(llm, document).ask(question)
    assert answer.usage.retrieved_tokens > 0
    num_document = len(document.tokens)
    held = any(num_document // 2 <= each < num_document for each in tokens_held(llm, answer.session))
    assert held is not alone


def test_a_document_of_an_older_format_which_recorded_as_many_queries_as_a_chat_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CACHE.replace(observation_window=32)
    with monkeypatch.context() as patch:
        patch.setattr(config, "QUERY_AGNOSTIC_WINDOW", 32)
        patch.setattr(file_format, "FORMAT", 9)
        older = make_llm(cache=cache)
        document = older.read_document(text=story(2), name="story")
        assert document.cache.config.observation_window == 32
        document.save(tmp_path / "story.zsmerge")
    later = make_llm(cache=cache)
    later.load_session(tmp_path / "story.zsmerge")
    answer = later.chat(FOUND, session="story", sampling=SHORT)
    assert answer.usage.reuse == "restored"
    assert later.session(answer.session).cache.config.observation_window == 32
