"""Conversations on models with recurrent layers: continued, branched, cancelled, kept on disk, shared with others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch

from tests.support.chat import Chat
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import SessionCorruptError, SessionMismatchError
from zsmerge_llm.testing.tiny_model import tiny_model as llama_and_tokenizer

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
families = pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "lfm2", "jamba"])


def make(family: str, folder: Path | None = None, slots: int = 64) -> LLM:
    _, tokenizer = llama_and_tokenizer()
    model = tiny_model(family, vocab=len(tokenizer))
    cache = CacheConfig(slots=slots, recent=8, stage=8)
    return LLM(model, tokenizer=tokenizer, cache=cache, sessions_dir=folder, retrieval_tokens=0, compile=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


@families
def test_a_conversation_reads_only_what_is_new_and_goes_on_after_a_restart(family: str, folder: Path) -> None:
    with make(family, folder) as llm:
        chat = Chat(llm, "a")
        chat.ask("the ship and the sea, the keeper of the light")
        second = chat.ask("and the captain?")
        assert second.usage.reuse == "continued"
        undisturbed = Chat(llm, "b", chat.messages)
        expected = chat.ask("what then?").text
        assert undisturbed.ask("what then?").text == expected
    with make(family, folder) as llm:
        again = Chat(llm, "a", chat.messages[:-2])
        result = again.ask("what then?")
    assert result.usage.reuse in ("continued", "restored")
    assert result.text == expected


@families
def test_a_branch_and_a_cancelled_turn_leave_the_conversation_as_it_was(family: str) -> None:
    with make(family) as llm:
        chat = Chat(llm, "a")
        chat.ask("the ship and the sea")
        before = list(chat.messages)
        expected = Chat(llm, None, before).ask("one more").text
        cancelled = Event()
        for piece in llm.stream([*before, {"role": "user", "content": "other"}], session="a", cancel=cancelled):
            cancelled.set()
            assert piece is not None
        assert Chat(llm, "a", before).ask("one more").text == expected


@families
def test_answers_beside_others_are_those_alone(family: str) -> None:
    questions = [f"question {number} about the ship" + " and the sea" * number for number in range(6)]
    with make(family) as llm:
        alone = [llm.chat(question, sampling=SHORT).text for question in questions]
    with make(family) as llm, ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda question: llm.chat(question, sampling=SHORT).text, questions))
    assert together == alone


def test_a_session_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    with make("qwen3_5") as llm:
        llm.chat("the ship", session="a", sampling=SHORT)
        llm.session("a").save(tmp_path / "a.zs")
    with make("olmo_hybrid") as llm, pytest.raises((SessionMismatchError, SessionCorruptError)):
        llm.load_session(tmp_path / "a.zs")


@pytest.mark.slow
@families
def test_memory_is_flat_over_fifty_thousand_tokens(family: str) -> None:
    engine = Engine(tiny_model(family), CacheConfig(slots=64, recent=8, stage=8), chunk=512, compile=False)
    cache = engine.new_cache()
    sizes = []
    for part in range(10):
        engine.read(cache, tokens(5000, seed=part))
        sizes.append(cache.nbytes)
    assert cache.seen == 50_000
    assert len(set(sizes)) == 1
    assert cache.logits is not None
    assert torch.isfinite(cache.logits).all()
