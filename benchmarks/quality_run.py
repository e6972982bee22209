"""How quality.py fills a cache by a policy and scores answers from it: the settings, one function each."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import psutil
import torch
from common import forget_peak, peak_rss
from policies.base import STAGE, Policy, PolicyLayer, plain, rope_of, weighted
from quality_ask import Score, ask
from quality_rouge import rouge
from quality_tasks import Item, Question

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.layer_budgets import LayerBudgets
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.attention_search import AttentionSearch
from zsmerge_llm.retrieval.passage_search import PassageSearch, pinned_tail_tokens
from zsmerge_llm.retrieval.query_probe import GENERIC_QUESTION, chat_probe, find_question

FOLLOW_UPS = 2


@dataclass(frozen=True)
class Budget:
    """A number of slots, or a percentage of the document's tokens."""

    amount: float
    percent: bool = False

    def __str__(self) -> str:
        return f"{self.amount:g}%" if self.percent else f"{self.amount:g}"

    def slots(self, tokens: int) -> int:
        return max(80, round(tokens * self.amount / 100)) if self.percent else int(self.amount)

    @classmethod
    def parse(cls, text: str) -> Budget:
        return cls(float(text.rstrip("%")), text.endswith("%"))


@dataclass
class Reader:
    """A model on which every policy reads at the bytes of a plain cache of `budget` slots.

    rouge: whether summaries are also written, not only scored.
    """

    engine: Engine
    template: ChatTemplate
    rouge: bool = True

    @cached_property
    def profile(self) -> tuple[float, ...]:
        """What each layer's budget is worth to this model."""
        return LayerBudgets(self.engine, self.template).layer_budgets

    @cached_property
    def generic(self) -> list[int]:
        """The probe that stands for any question."""
        return chat_probe(self.template, GENERIC_QUESTION)

    def new_cache(self, policy: Policy, budget: Budget, tokens: int) -> Cache:
        specs = self.engine.specs
        slots = budget.slots(tokens)
        if policy.profiled:
            policy = replace(policy, budgets=weighted([1 + policy.profiled * (share - 1) for share in self.profile]))
        if policy.config(1024).slots is not None:
            slots = policy.slots_for(specs, plain_bytes(self.engine, slots))
        cache = policy.new_cache(specs, slots, rope_of(self.engine))
        for layer in cache.layers:
            assert isinstance(layer, PolicyLayer)
            layer.generic = len(self.generic)
        return cache

    def read(self, cache: Cache, policy: Policy, ids: list[int], probe: list[int], behind: int = 0) -> None:
        """Read in passes of equal length, so that each of them ends with a compression once the slots are full.
        behind: `tail` of `Engine.read`."""
        most = policy.chunk or len(ids)
        self.engine.chunk = -(-len(ids) // -(-len(ids) // most))
        self.engine.read(cache, ids, probe=probe or None, pinned_tail=behind)

    def begin(self, policy: Policy, budget: Budget, item: Item) -> Cache | None:
        """What reading a document has in common for all questions: the passes before the last one, without a probe."""
        if policy.probe is not None or policy.chunk is None or policy.newest_only or len(item.parts) > 1:
            return None
        longest = item.tokens + max(len(asked.asking) for asked in item.questions) - 1
        before = -(-longest // policy.chunk) - 1
        cache = self.new_cache(policy, budget, item.tokens)
        if before:
            self.read(cache, policy, item.parts[0][0][: before * -(-longest // (before + 1))], [])
        return cache

    def fill(
        self, policy: Policy, budget: Budget, item: Item, asked: Question | None = None, begun: Cache | None = None
    ) -> Cache:
        """A cache that has read the item; with `asked`, the question too, but for its last token. With `begun`, a copy
        of what has read the item's first tokens goes on."""
        cache = self.new_cache(policy, budget, item.tokens) if begun is None else copy.deepcopy(begun)
        ending = self.asking(policy, budget, item, asked)[:-1] if asked is not None else []
        behind = 0 if asked is None else pinned_tail_tokens(len(ending) + 1 - len(asked.asking))
        if policy.newest_only or policy.chunk is None or len(item.parts) == 1:
            parts = [([token for ids, _ in item.parts for token in ids] + ending, item.parts[-1][1])]
            if policy.newest_only:
                parts = [(parts[0][0][-budget.slots(item.tokens) :], [])]
        else:
            parts = [*item.parts, *([(ending, [])] if ending else [])]
        for ids, own in parts:
            new = ids if begun is None else ids[cache.seen :]
            self.read(cache, policy, new, self.probe(policy, asked.probe if asked is not None else own), behind)
        return cache

    def probe(self, policy: Policy, question: list[int]) -> list[int]:
        generic = self.generic if policy.probe in ("generic", "both") else []
        return generic + (question if policy.probe in ("question", "both") else [])

    def passages(
        self, policy: Policy, budget: Budget, item: Item, before: int | None, asked: str, cache: Cache | None = None
    ) -> list[str]:
        """What the first `before` messages (all of them where None; of a document: its text) say about a question; what
        a document's cache looks at (`Policy.glance`), where its words find nothing."""
        most = min(policy.retrieval_tokens, budget.slots(item.tokens) // 2)
        found = PassageSearch(self.template, most).search(item.said[:before], find_question(asked), most)
        if found or cache is None or not policy.glance:
            return found
        return AttentionSearch(self.engine.look, self.template).search(
            cache, item.parts[0][0], find_question(asked), most
        )

    def asking(
        self,
        policy: Policy,
        budget: Budget,
        item: Item,
        asked: Question,
        follows: bool = False,
        before: int | None = None,
        cache: Cache | None = None,
    ) -> list[int]:
        """The ids of a question, with the passages that the policy looks up for it (`before`: in so many messages)."""
        if not policy.retrieval_tokens:
            return asked.following if follows else asked.asking
        found = self.passages(policy, budget, item, before, asked.text, cache)
        return asked.behind(self.template, found, follows)

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
        """What answers to questions are worth, each asked of the same cache. Passages that are looked up are read
        into a copy of it, as the product does: they are more than a cache has room for."""
        if not policy.retrieval_tokens:
            asked = [(self.asking(policy, budget, item, each, follows), each.answer) for each in questions]
            return ask(self.engine, cache, asked)
        found = []
        for each in questions:
            own = copy.deepcopy(cache)
            ids = self.asking(policy, budget, item, each, follows, before, own)
            self.engine.chunk = 512
            multi_turn = follows or len(item.parts) > 1
            self.engine.read(own, ids[:-1], probe=each.probe, multi_turn=multi_turn)
            found += ask(self.engine, own, [(ids[-1:], each.answer)])
        return found

    # -- the settings ------------------------------------------------------------------------------------------------

    def unknown(self, policy: Policy, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read once; every question is asked of the same cache."""
        cache, facts = self._measured(policy, budget, item, None)
        scores = self.scores(policy, budget, item, cache, item.questions)
        for asked, score in zip(item.questions, scores, strict=True):
            yield row(asked, score, facts)

    def known(self, policy: Policy, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Document and question are one prompt; then two other questions follow in the same chat."""
        begun = self.begin(policy, budget, item)
        for number, asked in enumerate(item.questions):
            cache, facts = self._measured(policy, budget, item, asked, begun)
            (score,) = ask(self.engine, cache, [(asked.asking[-1:], asked.answer)])
            yield row(asked, score, facts)
            others = [item.questions[(number + 1 + step) % len(item.questions)] for step in range(FOLLOW_UPS)]
            self.engine.chunk = 512
            self.engine.read(cache, [asked.asking[-1], *asked.answer])
            scores = self.scores(policy, budget, item, cache, others, follows=True)
            for other, later in zip(others, scores, strict=True):
                yield {**row(other, later, facts), "setting": "followup", "after": asked.index}

    def summary(self, policy: Policy, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """A plain prompt: NLL of the reference, and ROUGE of what the model writes."""
        (asked,) = item.questions
        cache, facts = self._measured(policy, budget, item, asked)
        (score,) = ask(self.engine, cache, [(asked.asking, asked.answer)])
        yield {**row(asked, score, facts), **(self._written(cache, asked) if self.rouge else {})}

    def _written(self, cache: Cache, asked: Question) -> dict[str, Any]:
        """A greedy continuation up to the stop text, and its ROUGE."""
        self.engine.chunk = 512
        self.engine.read(cache, asked.asking)
        said: list[int] = []
        with torch.inference_mode():
            for (token,) in self.engine.decode(cache, [SamplingParams(max_tokens=64)], [asked.asking]):
                said.append(token or 0)
                if asked.text in self.template.tokenizer.decode(said):
                    break
        text = str(self.template.tokenizer.decode(said, skip_special_tokens=True)).split(asked.text)[0].strip()
        return {"said": text, **rouge(text, str(self.template.tokenizer.decode(asked.answer)))}

    def _measured(
        self, policy: Policy, budget: Budget, item: Item, asked: Question | None, begun: Cache | None = None
    ) -> tuple[Cache, dict[str, Any]]:
        """A filled cache, and what it cost (seconds: of the tokens that were not `begun`)."""
        forget_peak()
        before, started = psutil.Process().memory_info().rss, time.perf_counter()
        cache = self.fill(policy, budget, item, asked, begun)
        return cache, {
            "slots": cache.slots,
            "cache_bytes": cache.full_nbytes(cache.lengths[0]) if cache.slots is None else cache.nbytes,
            "reading_bytes": reading_bytes(policy, cache, self.engine.chunk),
            "peak_rss_growth": peak_rss() - before,
            "seconds": round(time.perf_counter() - started, 2),
            "tokens_read": cache.lengths[0],
        }


def row(asked: Question, score: Score, facts: dict[str, Any]) -> dict[str, Any]:
    """One line of the results."""
    return {
        "question": asked.index,
        "depth": asked.depth,
        **{name: round(value, 5) if name == "nll" else value for name, value in asdict(score).items()},
        **facts,
    }


def plain_bytes(engine: Engine, slots: int) -> int:
    """The budget: bytes of a cache of `slots` and its stage, without any buffer."""
    return Policy("plain", plain).nbytes(engine.specs, slots)


def reading_bytes(policy: Policy, cache: Cache, chunk: int) -> int:
    """Bytes of keys and values at the peak of reading: a policy that ranks a finished prefill holds the full cache
    first; one that compresses as it reads holds its cache, and the largest layer's copy of it with a chunk; one whose
    layers vote before they compress holds a chunk for all of them."""
    full = cache.full_nbytes(cache.lengths[0])
    if policy.whole:
        return full + (0 if cache.slots is None else cache.nbytes)
    largest = max(layer.nbytes for layer in cache.layers)
    passing = cache.full_nbytes(min(chunk, STAGE * 4))
    votes = policy.probe is not None and cache.config.passage_share > 0
    return cache.nbytes + largest + (passing if votes else passing // len(cache.layers))
