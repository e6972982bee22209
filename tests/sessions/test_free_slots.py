"""Idle conversations keep no free slots: short ones take few bytes, in memory and on disk, and go on as before."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.chat import Chat, make_llm
from zsmerge_llm import CacheConfig
from zsmerge_llm.sessions.session import load_session


def test_a_short_conversation_takes_few_bytes_in_memory_and_on_disk(tmp_path: Path) -> None:
    llm = make_llm("qwen2.5", cache=CacheConfig(slots=4096), retrieval_tokens=0)
    size = llm.engine.new_cache().nbytes
    result = Chat(llm, "it").ask("Hello.")
    kept = llm.session("it")
    path = kept.save(tmp_path / "it")

    assert result.usage.cache_bytes >= size, "while it is answered there is room for all slots"
    assert llm.store.nbytes < size / 4
    assert path.stat().st_size < size / 8
    saved = load_session(path)
    after, after_loading = (llm.engine.read(each.cache.clone(), list(range(5, 60))) for each in (kept, saved))
    assert torch.equal(after, after_loading)


def test_a_short_conversation_goes_on_as_one_whose_cache_was_never_kept() -> None:
    cache = CacheConfig(slots=96, recent=16, stage=16, observation_window=8)
    llm = make_llm("qwen2.5", cache=cache, retrieval_tokens=0)
    chat = Chat(llm, "it")
    chat.ask("Hello.")
    kept = llm.session("it")
    whole = llm.engine.new_cache(kept.cache.config)
    llm.engine.read(whole, kept.tokens[: kept.cache.seen])

    more = list(range(5, 25))
    torch.testing.assert_close(
        llm.engine.read(kept.cache.clone(), more), llm.engine.read(whole, more), atol=1e-4, rtol=1e-4
    )
