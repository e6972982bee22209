"""The library as its users call it: `read_document`, then questions about it, with its own look-up.

Only the answers are taken otherwise: the gold answer's likelihood is measured behind the very prompt that `LLM.chat`
would read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

from benchmarks.common import peak_rss, reset_peak_rss
from benchmarks.policies import POLICIES, Policy
from benchmarks.quality.answers import answer
from benchmarks.quality.evaluator import Budget, Evaluator, plain_bytes, prefill_bytes, row
from benchmarks.quality.tasks import Item, Question
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.messages import MessageHistory
from zsmerge_llm.retrieval.passage_search import DEFAULT_TOKENS, pinned_tail_tokens
from zsmerge_llm.retrieval.query_probe import GENERIC_QUESTION, chat_probe, conversation_probe, is_multi_turn
from zsmerge_llm.runtime import Runtime, assemble
from zsmerge_llm.sessions.conversations import Turn
from zsmerge_llm.types import Message

NAME = "item"
READS_LIKE = POLICIES["zsmerge-layer-budgets"]
"""What the library's cache takes at the peak of reading."""


def compressed(slots: int) -> CacheConfig:
    """Return the default configuration with so many slots."""
    return CacheConfig(slots=slots)


@dataclass
class Product:
    """The library with a budget of slots, as an evaluator's model.

    Attributes:
        config: makes its cache's configuration from the slots.
        retrieval_tokens: as for `LLM`.
        gated: whether the model's gates score what is read ahead, where it has any; else a probe does.
    """

    name: str
    evaluator: Evaluator
    config: Callable[[int], CacheConfig] = compressed
    retrieval_tokens: int | str = DEFAULT_TOKENS
    gated: bool = True
    runtimes: dict[int, Runtime] = field(default_factory=dict)

    def runtime(self, slots: int, read_ahead: bool) -> Runtime:
        """Return the library around the evaluator's model, with a cache of as many bytes as a plain one of `slots`.

        read_ahead: whether it is that of a document, which records fewer queries than a chat's.
        """
        engine, template = self.evaluator.engine, self.evaluator.template
        config = (lambda most: self.config(most).query_agnostic()) if read_ahead else self.config
        own = Policy(self.name, config).slots_for(engine.specs, plain_bytes(engine, slots))
        if own not in self.runtimes:
            loading = {"tokenizer": template.tokenizer, "chat_template": template.source(), "quantization": None}
            how = (self.config(own), "auto", False, loading, None, self.retrieval_tokens, None, 4 << 30, "auto", None)
            self.runtimes[own] = assemble(engine.model, *how)
            if not self.gated:
                own_engine = self.runtimes[own].engine
                own_engine.specs = tuple(replace(spec, gate=None) for spec in own_engine.specs)
        return self.runtimes[own]

    def unknown(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read a document or a conversation once, then ask every question of what was kept of it."""
        runtime = self.runtime(budget.slots(item.tokens), not item.texts)
        facts = self._read(runtime, item)
        for asked in item.questions:
            yield _ask(runtime, item.messages if item.texts else [], asked, facts)[0]
        runtime.conversations.store.remove(NAME)

    def turns(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read it once, then ask the questions one after another in one conversation, with the gold answers."""
        runtime = self.runtime(budget.slots(item.tokens), not item.texts)
        facts, said = self._read(runtime, item), [*(item.messages if item.texts else [])]
        names = {NAME}
        for asked in item.questions:
            line, turn, last = _ask(runtime, said, asked, facts)
            yield {**line, "setting": "turns"}
            generated = [*asked.opening, *asked.answer]
            text = str(runtime.tokenizer.decode(generated))
            runtime.engine.read(turn.cache, [*last, *asked.answer[:-1]])
            answered: Message = {"role": "assistant", "content": text}
            names.add(runtime.conversations.commit(turn, answered, generated).name)
            said = [*turn.transcript.history.messages, answered]
        for name in names:
            runtime.conversations.store.remove(name)

    def _read(self, runtime: Runtime, item: Item) -> dict[str, Any]:
        """Read an item into the session `NAME`; return what it cost."""
        reset_peak_rss()
        before, started = psutil.Process().memory_info().rss, time.perf_counter()
        cache = read_conversation(runtime, item) if item.texts else read_document(runtime, item)
        return {
            "slots": cache.slots,
            "cache_bytes": cache.nbytes,
            "reading_bytes": prefill_bytes(READS_LIKE, cache, runtime.engine.chunk),
            "peak_rss_growth": peak_rss() - before,
            "seconds": round(time.perf_counter() - started, 2),
            "tokens_read": cache.lengths[0],
        }


def _ask(
    runtime: Runtime, said: list[Message], asked: Question, facts: dict[str, Any]
) -> tuple[dict[str, Any], Turn, list[int]]:
    """Ask behind messages: the line, the turn, whose cache has read its prompt, and the last id still to be read.

    Where they end with a tool's result, the question is their own request's.
    """
    started = time.perf_counter()
    answers_result = bool(said) and said[-1]["role"] == "tool"
    turn = begin(runtime, said if answers_result else [*said, {"role": "user", "content": asked.message}])
    ids = [*turn.tokens[turn.cache.seen :], *asked.opening]
    read_prompt(runtime, turn, ids[:-1])
    found = answer(runtime.engine, runtime.template, turn.cache, ids[-1:], asked)
    costs = {"retrieved_tokens": turn.retrieved_tokens, "question_seconds": round(time.perf_counter() - started, 2)}
    return row(asked, found, {**facts, **costs}), turn, ids[-1:]


def read_document(runtime: Runtime, item: Item) -> Cache:
    """Read a document as `LLM.read_document` does, into the session `NAME`; return its cache."""
    documents = runtime.conversations.documents
    reading = documents.open(item.context, NAME, NAME)
    probe = chat_probe(runtime.template, GENERIC_QUESTION)
    runtime.engine.read(reading.cache, reading.new_ids, probe=probe)
    documents.keep(reading)
    return reading.cache


def read_conversation(runtime: Runtime, item: Item) -> Cache:
    """Read a conversation turn by turn as `LLM.chat` does, with the given answers as if they had been generated."""
    turn: Turn | None = None
    for number, message in enumerate(item.messages):
        if message["role"] != "assistant":
            continue
        turn = begin(runtime, item.messages[:number])
        read_prompt(runtime, turn, turn.tokens[turn.cache.seen :])
        said = runtime.template.encode_text(message["content"])
        if said[:-1]:
            runtime.engine.read(turn.cache, said[:-1])
        runtime.conversations.commit(turn, message, said)
    assert turn is not None, "a conversation has an answer"
    return turn.cache


def begin(runtime: Runtime, messages: list[Message]) -> Turn:
    """Return the turn of the session `NAME` that answers these messages."""
    history = MessageHistory().normalize(messages)
    return runtime.conversations.begin(history, history.messages, session=NAME)


def read_prompt(runtime: Runtime, turn: Turn, ids: list[int]) -> None:
    """Read ids that are new of a turn's prompt, as `LLM` does."""
    probe = conversation_probe(runtime.template, turn.transcript.history.messages)
    multi_turn = not turn.single_question and is_multi_turn(turn.messages)
    runtime.engine.read(
        turn.cache, ids, probe=probe, multi_turn=multi_turn, pinned_tail=pinned_tail_tokens(turn.retrieved_tokens)
    )
