"""A tiny random model with a real chat template, conversations with it, and a script that decides its answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.support.templates import FOLDER, template
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.attention.interface import forward
from zsmerge_llm.attention.passes import ForwardPass
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.sessions.conversations import Conversations

ROOMY = CacheConfig(slots=16_000, recent=8, stage=64)
"""A budget that no chat here uses up: nothing is compressed."""
TIGHT = CacheConfig(slots=96, recent=16, stage=16, observation_window=8)
"""A budget that every chat here overflows."""
SHORT = SamplingParams(max_tokens=6)
SNAPSHOT_NBYTES = 42_000
"""Bytes that one snapshot of a tight cache takes at most."""
SYSTEM = {
    "role": "system",
    "content": "You know all there is to know about islands, lighthouses and their keepers. " * 3,
}


def talker(name: str = "smollm2", *, cache: CacheConfig = TIGHT, seed: int = 0, **settings: Any) -> LLM:
    """An LLM of a tiny random model with the template of that name."""
    tokenizer = copy.deepcopy(template(name).tokenizer)
    model = tiny_model(seed=seed, vocab=len(tokenizer))
    model.config.max_position_embeddings = 1_000_000
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return LLM(model, tokenizer=tokenizer, chat_template=text, cache=cache, **settings)


def said(*words: str) -> list[dict[str, Any]]:
    """A conversation: user and assistant by turns."""
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(words)]


def equal_caches(left: Cache, right: Cache) -> bool:
    """Whether two caches are equal bit for bit."""
    left_tensors, left_metadata = left.state()
    right_tensors, right_metadata = right.state()
    names = {*left_tensors, *right_tensors}
    return left_metadata == right_metadata and all(
        torch.equal(left_tensors[each], right_tensors[each]) for each in names
    )


class Talk:
    """One user's conversation: remembers what was said. `tell` asks for the next answer."""

    def __init__(self, llm: LLM, session: Any = None, messages: list[dict[str, Any]] | None = None) -> None:
        self.llm = llm
        self.session = session
        self.messages = list(messages or [])

    def tell(self, text: str, **settings: Any) -> Any:
        """The answer to one more message, which is remembered with it."""
        self.messages.append({"role": "user", "content": text})
        return self.again(**settings)

    def again(self, **settings: Any) -> Any:
        """The answer to what was said so far, which ends with the user's message."""
        settings = {"sampling": SHORT, "session": self.session, **settings}
        result = self.llm.chat(self.messages, **settings)
        self.messages.append({"role": "assistant", "content": result.text})
        return result


@contextmanager
def scripted(answers: dict[int, list[int]], parsed: dict[int, dict[str, Any]]) -> Iterator[None]:
    """The model answers request k with the ids `answers[k]`; what is committed is `parsed[k]`, as a tool parser would.

    Requests count from 0; one that is not named is answered by the model itself.
    """
    count = iter(range(10**6))
    commit = Conversations.commit

    class Script:
        greedy = False  # nobody may draw ahead

        def __init__(self, *_: Any) -> None:
            self.number = next(count)
            self.ids = answers[self.number]
            self.at = 0

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.tensor(self.ids[self.at])

        def accept(self, token: int) -> None:
            assert token == self.ids[self.at], "a grammar wants it otherwise"
            self.at += 1

    asked = iter(range(10**6))

    def committed(self: Conversations, turn: Any, answer: Any, generated: Any) -> Any:
        return commit(self, turn, parsed[next(asked)], generated)

    decode = Engine.decode

    def unbound(self: Engine, *given: Any, constraints: Any = None, **named: Any) -> Any:
        return decode(self, *given, **named)  # the script is stronger than any grammar

    with (
        mock.patch("zsmerge_llm.engine.engine.Sampler", Script),
        mock.patch.object(Conversations, "commit", committed),
        mock.patch.object(Engine, "decode", unbound),
    ):
        yield


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the tokens that go through a model into a cache: a list of the numbers per forward pass."""
    passes: list[int] = []

    def counting(model: Any, step: ForwardPass, **inputs: Any) -> torch.Tensor:
        if step.layout.num_new:  # a probe alone puts nothing into the cache
            passes.append(step.layout.num_new)
        return forward(model, step, **inputs)

    with mock.patch("zsmerge_llm.engine.model_runner.forward", counting):
        yield passes
