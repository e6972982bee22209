"""A tiny random model with a real chat template, chats with it, and scripted answers."""

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
from zsmerge_llm.kvcache.cache_state import cache_state
from zsmerge_llm.sessions.conversations import Conversations

LARGE_CACHE = CacheConfig(slots=16_000, recent=8, stage=64)
"""A cache that holds every chat of the tests: nothing is compressed."""
SMALL_CACHE = CacheConfig(slots=96, recent=16, stage=16, observation_window=8)
"""A cache that every chat of the tests overflows."""
SHORT = SamplingParams(max_tokens=6)
SNAPSHOT_NBYTES = 42_000
"""Upper bound of the bytes of one snapshot of a `SMALL_CACHE`."""
SYSTEM = {
    "role": "system",
    "content": "You know all there is to know about islands, lighthouses and their keepers. " * 3,
}


def make_llm(name: str = "smollm2", *, cache: CacheConfig = SMALL_CACHE, seed: int = 0, **settings: Any) -> LLM:
    """Return an LLM of a tiny random model with the named chat template."""
    tokenizer = copy.deepcopy(template(name).tokenizer)
    model = tiny_model(seed=seed, vocab=len(tokenizer))
    model.config.max_position_embeddings = 1_000_000
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return LLM(model, tokenizer=tokenizer, chat_template=text, cache=cache, **settings)


def dialogue(*texts: str) -> list[dict[str, Any]]:
    """Return messages of user and assistant by turns."""
    return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def equal_caches(left: Cache, right: Cache) -> bool:
    """Return whether two caches are equal bit for bit, but for their free slots."""
    left_tensors, left_metadata = cache_state(left.trimmed())
    right_tensors, right_metadata = cache_state(right.trimmed())
    names = {*left_tensors, *right_tensors}
    return left_metadata == right_metadata and all(
        torch.equal(left_tensors[each], right_tensors[each]) for each in names
    )


class Chat:
    """One chat with an LLM: keeps its messages, and sends all of them with each request."""

    def __init__(self, llm: LLM, session: Any = None, messages: list[dict[str, Any]] | None = None) -> None:
        self.llm = llm
        self.session = session
        self.messages = list(messages or [])

    def ask(self, text: str, **settings: Any) -> Any:
        """Append a user message and return the answer to it."""
        self.messages.append({"role": "user", "content": text})
        return self.reply(**settings)

    def reply(self, **settings: Any) -> Any:
        """Return the answer to the messages so far, the last of which is the user's, and append it."""
        settings = {"sampling": SHORT, "session": self.session, **settings}
        result = self.llm.chat(self.messages, **settings)
        self.messages.append({"role": "assistant", "content": result.text})
        return result


@contextmanager
def scripted_ids(answers: dict[int, list[int]], parsed: dict[int, dict[str, Any]]) -> Iterator[None]:
    """Let the model answer request k, from 0, with the ids `answers[k]`, and let its session record `parsed[k]`.

    `parsed[k]` is what a parser of tool calls would make of the answer.
    """
    requests = iter(range(10**6))
    commit = Conversations.commit

    class Script:
        greedy = False  # nothing may be sampled ahead

        def __init__(self, *_: Any) -> None:
            self.ids = answers[next(requests)]
            self.index = 0

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.tensor(self.ids[self.index])

        def accept(self, token: int) -> None:
            assert token == self.ids[self.index], "the grammar does not allow this answer"
            self.index += 1

    commits = iter(range(10**6))

    def commit_parsed(self: Conversations, turn: Any, answer: Any, generated: Any) -> Any:
        return commit(self, turn, parsed[next(commits)], generated)

    decode = Engine.decode

    def unconstrained(self: Engine, *args: Any, constraints: Any = None, **kwargs: Any) -> Any:
        return decode(self, *args, **kwargs)  # the script ignores grammars

    with (
        mock.patch("zsmerge_llm.engine.engine.Sampler", Script),
        mock.patch.object(Conversations, "commit", commit_parsed),
        mock.patch.object(Engine, "decode", unconstrained),
    ):
        yield


@contextmanager
def record_passes() -> Iterator[list[int]]:
    """Yield a list that gets the number of tokens of each forward pass that writes to a cache."""
    passes: list[int] = []

    def recording(model: Any, step: ForwardPass, **inputs: Any) -> torch.Tensor:
        if step.layout.num_new:  # a pass of a probe alone writes nothing to the cache
            passes.append(step.layout.num_new)
        return forward(model, step, **inputs)

    with mock.patch("zsmerge_llm.engine.model_runner.forward", recording):
        yield passes
