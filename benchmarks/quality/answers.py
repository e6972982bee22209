"""Answers to one question: likelihood of the gold answer, a greedy answer, and how right it is."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.quality.ask import Score, ask
from benchmarks.quality.tasks import Question
from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate

Metric = Callable[[str, Sequence[str]], float]
"""An answer and the accepted ones → how right it is, 0 to 1."""
SPARE_TOKENS = 12
"""Tokens of a greedy answer beyond those of the gold answer, for another form of it."""


def contains_all(written: str, accepted: Sequence[str]) -> float:
    """Return the share of the accepted texts that stand in an answer."""
    return sum(each.lower() in written.lower() for each in accepted) / len(accepted)


def contains_any(written: str, accepted: Sequence[str]) -> float:
    """Return 1 if one of the accepted texts stands in an answer."""
    return float(any(each.lower() in written.lower() for each in accepted))


def token_f1(written: str, accepted: Sequence[str]) -> float:
    """Return the best F1 of an answer's words and an accepted answer's, as SQuAD has it (arXiv 1606.05250)."""
    return max(_f1(_words(written), _words(each)) for each in accepted)


def _f1(own: list[str], gold: list[str]) -> float:
    shared = (Counter(own) & Counter(gold)).total()
    return 2 * shared / (len(own) + len(gold)) if shared else 0.0


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def contains_facts(written: str, accepted: Sequence[str]) -> float:
    """Return the share of each fact's words that stand in an answer, averaged over the facts."""
    said = set(_words(written))
    facts = [words for words in map(_words, accepted) if words]
    return sum(sum(word in said for word in words) / len(words) for words in facts) / max(1, len(facts))


METRICS: dict[str, Metric] = {"all": contains_all, "any": contains_any, "f1": token_f1, "rubric": contains_facts}


def answer(
    engine: Engine, template: ChatTemplate, cache: Cache, ids: list[int], question: Question, gold: Score | None = None
) -> Score:
    """Return how likely the gold answer is behind a cache and `ids`, and how right the greedy answer.

    A question with options is answered by the likeliest of them, by mean log-likelihood per token. Nothing is decoded
    where the gold answer is the greedy one.

    Args:
        cache: of one row, that has read all that stands before `ids`. It stays as it is.
        gold: the gold answer's score, where it is known.
    """
    if question.options:
        right, *others = ask(engine, cache, [(ids, option) for option in question.options])
        return replace(right, score=float(all(right.nll < other.nll for other in others)))
    (found,) = [gold] if gold is not None else ask(engine, cache, [(ids, question.answer)])
    if question.metric is None:
        return found
    most = len(question.answer) + SPARE_TOKENS
    written = question.answer if found.exact else greedy(engine, cache.clone(), ids, question, most)
    text = str(template.tokenizer.decode(written, skip_special_tokens=True)).strip()
    score, f1 = METRICS[question.metric](text, question.accepted), token_f1(text, question.accepted)
    return replace(found, score=round(score, 4), f1=round(f1, 4), generated=text)


@torch.inference_mode()
def greedy(engine: Engine, cache: Cache, ids: list[int], question: Question, max_tokens: int) -> list[int]:
    """Read `ids` into a cache and return the greedy answer's ids."""
    engine.read(cache, ids, probe=question.probe or None)
    steps = engine.decode(cache, [SamplingParams(max_tokens=max_tokens)], [ids])
    return [token for (token,) in steps if token is not None]
