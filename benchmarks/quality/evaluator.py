"""Fill a cache by a policy and score answers from it: one function for each setting of the quality benchmark."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import psutil
import torch

from benchmarks.common import peak_rss, reset_peak_rss
from benchmarks.policies.base import STAGE, ModelFacts, Policy, plain
from benchmarks.quality.answers import answer
from benchmarks.quality.ask import Score, ask
from benchmarks.quality.rouge import rouge
from benchmarks.quality.tasks import Item, Question
from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.layer_budgets import LayerBudgets
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.attention_search import AttentionSearch
from zsmerge_llm.retrieval.calibration import calibration
from zsmerge_llm.retrieval.passage_search import PassageSearch, pinned_tail_tokens
from zsmerge_llm.retrieval.query_probe import GENERIC_QUESTION, chat_probe
from zsmerge_llm.retrieval.questions import Query, find_question
from zsmerge_llm.retrieval.selection import token_limit
from zsmerge_llm.retrieval.token_vectors import TokenVectors
from zsmerge_llm.runtime import token_vectors

FOLLOW_UPS = 2


@dataclass(frozen=True)
class Budget:
    """A number of slots, or a percentage of the document's tokens."""

    amount: float
    percent: bool = False

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.percent else f"{self.amount:g}"

    def slots(self, tokens: int) -> int:
        """Return the slots for a document of so many tokens."""
        return max(80, round(tokens * self.amount / 100)) if self.percent else int(self.amount)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Parse "512" or "25%"."""
        return cls(float(text.rstrip("%")), text.endswith("%"))


@dataclass
class Evaluator:
    """A model that runs every policy at the bytes of a plain cache of `budget` slots.

    rouge: whether summaries are also generated, not only scored.
    """

    engine: Engine
    template: ChatTemplate
    rouge: bool = True

    @cached_property
    def layer_budgets(self) -> tuple[float, ...]:
        """The model's measured layer budgets, mean 1."""
        return LayerBudgets(self.engine, lambda: calibration(self.template)).weights

    @cached_property
    def vectors(self) -> TokenVectors | None:
        """The vectors of the model's tokens, for a search by meaning."""
        return token_vectors(self.engine, self.template.tokenizer)

    @cached_property
    def generic_probe(self) -> list[int]:
        """The probe that stands for any question."""
        return chat_probe(self.template, GENERIC_QUESTION)

    def new_cache(self, policy: Policy, budget: Budget, tokens: int) -> Cache:
        """Return an empty cache under a policy for an item of so many tokens."""
        specs, slots = self.engine.specs, budget.slots(tokens)
        if policy.layer_budget_strength:
            policy = policy.with_layer_budgets(self.layer_budgets)
        if policy.config(1024).slots is not None:
            slots = policy.slots_for(specs, plain_bytes(self.engine, slots))
        return policy.new_cache(specs, slots, ModelFacts.of(self.engine, len(self.generic_probe)))

    def read(self, cache: Cache, policy: Policy, ids: list[int], probe: list[int], pinned_tail: int = 0) -> None:
        """Read in passes of equal length, so that each ends with a compression once the slots are full."""
        most = policy.chunk or len(ids)
        self.engine.chunk = -(-len(ids) // -(-len(ids) // most))
        self.engine.read(cache, ids, probe=probe or None, pinned_tail=pinned_tail)

    def read_shared(self, policy: Policy, budget: Budget, item: Item) -> Cache | None:
        """Return a cache of what all questions of a document share: the passes before the last, without a probe.

        None where a policy's cache depends on the question from the start.
        """
        if policy.probe is not None or policy.chunk is None or policy.newest_only or len(item.parts) > 1:
            return None
        longest = item.tokens + max(len(asked.asking) for asked in item.questions) - 1
        before = -(-longest // policy.chunk) - 1
        cache = self.new_cache(policy, budget, item.tokens)
        if before:
            self.read(cache, policy, item.parts[0][0][: before * -(-longest // (before + 1))], [])
        return cache

    def fill(
        self, policy: Policy, budget: Budget, item: Item, asked: Question | None = None, shared: Cache | None = None
    ) -> Cache:
        """Return a cache that has read the item and, with `asked`, the question but for its last token.

        shared: a cache that has read the item's first tokens already; a copy of it is filled.
        """
        cache = self.new_cache(policy, budget, item.tokens) if shared is None else copy.deepcopy(shared)
        ending = self.question_ids(policy, budget, item, asked)[:-1] if asked is not None else []
        pinned_tail = 0 if asked is None else pinned_tail_tokens(len(ending) + 1 - len(asked.asking))
        if policy.newest_only or policy.chunk is None or len(item.parts) == 1:
            parts = [([token for ids, _ in item.parts for token in ids] + ending, item.parts[-1][1])]
            if policy.newest_only:
                parts = [(parts[0][0][-budget.slots(item.tokens) :], [])]
        else:
            parts = [*item.parts, *([(ending, [])] if ending else [])]
        for ids, own in parts:
            new = ids if shared is None else ids[cache.seen :]
            self.read(cache, policy, new, self.probe(policy, asked.probe if asked is not None else own), pinned_tail)
        return cache

    def probe(self, policy: Policy, question_probe: list[int]) -> list[int]:
        """Return the probe that a policy takes: generic, the question's, or both."""
        generic = self.generic_probe if policy.probe in ("generic", "both") else []
        return generic + (question_probe if policy.probe in ("question", "both") else [])

    def passages(
        self, policy: Policy, budget: Budget, item: Item, before: int | None, asked: str, cache: Cache | None = None
    ) -> list[str]:
        """Return passages for a question from the first `before` messages (None: all; of a document, its text).

        Where the words find nothing in a document, its cache is asked (`Policy.attention_search`).
        """
        limit = token_limit(policy.retrieval_tokens, item.tokens, budget.slots(item.tokens))
        passages = PassageSearch(self.template, limit, self.vectors)
        found = passages.search(item.messages[:before], [Query(find_question(asked))], limit)
        if found or cache is None or not policy.attention_search:
            return found
        search = AttentionSearch(self.engine.query_attention, self.template)
        return search.search(cache, item.parts[0][0], find_question(asked), limit)

    def question_ids(
        self,
        policy: Policy,
        budget: Budget,
        item: Item,
        asked: Question,
        follows: bool = False,
        before: int | None = None,
        cache: Cache | None = None,
    ) -> list[int]:
        """Return the ids of a question, behind the passages that the policy retrieves for it.

        follows: whether it comes after another answer. before: in how many of the item's messages to search.
        """
        if not policy.retrieval_tokens:
            return asked.following if follows else asked.asking
        found = self.passages(policy, budget, item, before, asked.text, cache)
        return asked.with_passages(self.template, found, follows)

    def scores(
        self,
        policy: Policy,
        budget: Budget,
        item: Item,
        cache: Cache,
        questions: Sequence[Question],
        follows: bool = False,
        before: int | None = None,
    ) -> list[Score]:
        """Score the gold answers to questions, each asked of the same cache.

        Retrieved passages are read into a copy of it, as the library does: they are more than a cache has room for.
        """
        if not policy.retrieval_tokens:
            ids = [self.question_ids(policy, budget, item, each, follows) for each in questions]
            gold = ask(self.engine, cache, [(own, each.answer) for own, each in zip(ids, questions, strict=True)])
            asked = zip(ids, questions, gold, strict=True)
            return [answer(self.engine, self.template, cache, *each) for each in asked]
        found = []
        for each in questions:
            own = copy.deepcopy(cache)
            ids = self.question_ids(policy, budget, item, each, follows, before, own)
            self.engine.chunk = 512
            multi_turn = follows or len(item.parts) > 1
            self.engine.read(own, ids[:-1], probe=each.probe, multi_turn=multi_turn)
            found.append(answer(self.engine, self.template, own, ids[-1:], each))
        return found

    # -- the settings ------------------------------------------------------------------------------------------------

    def unknown(self, policy: Policy, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read the document once, then ask every question of the same cache."""
        cache, facts = self._measured(policy, budget, item, None)
        started = time.perf_counter()
        scores = self.scores(policy, budget, item, cache, item.questions)
        facts["question_seconds"] = round((time.perf_counter() - started) / len(scores), 2)
        for asked, score in zip(item.questions, scores, strict=True):
            yield row(asked, score, facts)

    def turns(self, policy: Policy, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read the document once, then ask the questions one after another in one conversation, with gold answers."""
        cache, facts = self._measured(policy, budget, item, None)
        for number, asked in enumerate(item.questions):
            ids = self.question_ids(policy, budget, item, asked, number > 0, cache=cache)
            self.engine.chunk = 512
            self.engine.read(cache, ids[:-1], probe=self.probe(policy, asked.probe) or None, multi_turn=number > 0)
            score = answer(self.engine, self.template, cache, ids[-1:], asked)
            yield {**row(asked, score, facts), "setting": "turns"}
            self.engine.read(cache, [*ids[-1:], *asked.answer])

    def known(self, policy: Policy, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read document and question as one prompt, then ask two other questions in the same chat."""
        shared = self.read_shared(policy, budget, item)
        for number, asked in enumerate(item.questions):
            cache, facts = self._measured(policy, budget, item, asked, shared)
            (score,) = ask(self.engine, cache, [(asked.asking[-1:], asked.answer)])
            yield row(asked, score, facts)
            others = [item.questions[(number + 1 + step) % len(item.questions)] for step in range(FOLLOW_UPS)]
            self.engine.chunk = 512
            self.engine.read(cache, [asked.asking[-1], *asked.answer])
            scores = self.scores(policy, budget, item, cache, others, follows=True)
            for other, later in zip(others, scores, strict=True):
                yield {**row(other, later, facts), "setting": "followup", "after": asked.index}

    def summary(self, policy: Policy, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read a plain prompt; score the reference, and the ROUGE of what the model generates."""
        (asked,) = item.questions
        cache, facts = self._measured(policy, budget, item, asked)
        (score,) = ask(self.engine, cache, [(asked.asking, asked.answer)])
        yield {**row(asked, score, facts), **(self._generated(cache, asked) if self.rouge else {})}

    def _generated(self, cache: Cache, asked: Question) -> dict[str, Any]:
        """Return a greedy continuation up to the stop text, and its ROUGE."""
        self.engine.chunk = 512
        self.engine.read(cache, asked.asking)
        ids: list[int] = []
        with torch.inference_mode():
            for (token,) in self.engine.decode(cache, [SamplingParams(max_tokens=64)], [asked.asking]):
                ids.append(token or 0)
                if asked.text in self.template.tokenizer.decode(ids):
                    break
        text = str(self.template.tokenizer.decode(ids, skip_special_tokens=True)).split(asked.text)[0].strip()
        return {"generated": text, **rouge(text, str(self.template.tokenizer.decode(asked.answer)))}

    def _measured(
        self, policy: Policy, budget: Budget, item: Item, asked: Question | None, shared: Cache | None = None
    ) -> tuple[Cache, dict[str, Any]]:
        """Return a filled cache and its cost (seconds: of the tokens that were not `shared`)."""
        reset_peak_rss()
        before, started = psutil.Process().memory_info().rss, time.perf_counter()
        cache = self.fill(policy, budget, item, asked, shared)
        return cache, {
            "slots": cache.slots,
            "cache_bytes": cache.full_nbytes(cache.lengths[0]) if cache.slots is None else cache.nbytes,
            "reading_bytes": prefill_bytes(policy, cache, self.engine.chunk),
            "peak_rss_growth": peak_rss() - before,
            "seconds": round(time.perf_counter() - started, 2),
            "tokens_read": cache.lengths[0],
        }


def row(asked: Question, score: Score, facts: dict[str, Any]) -> dict[str, Any]:
    """Return one line of the results."""
    scores = {name: value for name, value in asdict(score).items() if value is not None}
    scores["nll"] = round(score.nll, 5)
    kind = {"kind": asked.kind} if asked.kind else {}
    return {"question": asked.index, "depth": asked.depth, **kind, **scores, **facts}


def plain_bytes(engine: Engine, slots: int) -> int:
    """Return the byte budget: a cache of `slots` and its stage, without recorded queries."""
    return Policy("plain", plain).nbytes(engine.specs, slots)


def prefill_bytes(policy: Policy, cache: Cache, chunk: int) -> int:
    """Return the bytes of keys and values at the peak of prefill.

    A policy that ranks a finished prefill holds the full cache first. One that compresses while it reads holds its
    cache, and the largest layer's copy of it with a chunk. One whose layers vote holds a chunk for all of them.
    """
    full = cache.full_nbytes(cache.lengths[0])
    if policy.needs_full_cache:
        return full + (0 if cache.slots is None else cache.nbytes)
    largest = max(layer.nbytes for layer in cache.layers)
    passing = cache.full_nbytes(min(chunk, STAGE * 4))
    votes = policy.probe is not None and policy.eviction is None and cache.config.passage_share > 0
    return cache.nbytes + largest + (passing if votes else passing // len(cache.layers))
