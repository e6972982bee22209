"""The configuration of texts that are read before any question is known."""

from __future__ import annotations

from zsmerge_llm import CacheConfig


def test_it_is_its_own_and_records_no_more_queries_than_a_chat_of_the_same_configuration() -> None:
    for window in (1, 8, 32, 100):
        chat = CacheConfig(slots=512, observation_window=window)
        document = chat.query_agnostic()
        assert document.observation_window == min(window, 8)
        assert document.query_agnostic() == document
        assert document.slots == chat.slots


def test_policies_without_a_question_stay_as_they_are() -> None:
    for config in (CacheConfig.full(), CacheConfig.h2o(64), CacheConfig.streaming(64)):
        assert config.query_agnostic() == config
