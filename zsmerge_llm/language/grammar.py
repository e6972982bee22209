"""What an answer may look like, enforced token by token: JSON schemas, regular expressions, llguidance's Lark grammars.

A `Grammar` says what is wanted. `GrammarCompiler` belongs to one tokenizer and makes of it a `Constraint`, the state of one
answer: it masks logits, names tokens that are forced, and sees to it that the answer is complete by `max_tokens`.
Nothing heavy is imported before a grammar is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from zsmerge_llm.errors import ConfigError, InputError, ZSMergeError
from zsmerge_llm.language.completion import CompletionPlanner

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

KEPT = 32
"""Compiled grammars that are kept for the next request."""
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
"""JSON on one line, as chat templates and json.dumps write it. Given free whitespace, weak models run in place."""
COMBINING = ("allOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "patternProperties")


@dataclass(frozen=True)
class Grammar:
    """A form that an answer must have, as the start rule and further rules of a Lark grammar (llguidance's dialect).

    Make one with `Grammar.regex`, `Grammar.json_schema`, `Grammar.choice` or, for everything else, `Grammar.lark`.
    """

    source: str

    @classmethod
    def lark(cls, source: str) -> Grammar:
        """A context-free grammar with the rule `start`."""
        return cls(source)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A regular expression that the whole answer matches (Rust's syntax: no look-around, no back references)."""
        from llguidance import regex_to_lark

        return cls(f"start: TEXT\nTEXT: /{regex_to_lark(pattern)}/\n")

    @classmethod
    def choice(cls, *texts: str) -> Grammar:
        """One of these texts."""
        return cls(f"start: {' | '.join(map(json.dumps, texts))}\n")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any], lenient: bool = False) -> Grammar:
        """JSON that is valid under a schema. `lenient` ignores keywords that cannot be enforced."""
        return cls(f"start: {json_rule(schema, lenient)}\n")


def json_rule(schema: Mapping[str, Any], lenient: bool = False, **options: Any) -> str:
    """JSON of a schema as part of a Lark rule. Options are llguidance's, on top of `COMPACT`."""
    closed = schema if _combines(schema) else _closed(schema)
    return "%json " + json.dumps({**closed, "x-guidance": {**COMPACT, "lenient": lenient, **options}})


def _combines(schema: Any) -> bool:
    """Whether a keyword adds properties from elsewhere, so that objects must stay open for them."""
    if isinstance(schema, Mapping):
        return any(key in schema for key in COMBINING) or any(_combines(value) for value in schema.values())
    return isinstance(schema, list) and any(_combines(value) for value in schema)


def _closed(schema: Any) -> Any:
    """Objects that name their properties get no others: what is valid then is valid under the schema itself.

    A schema that stands beside `anyOf`, `oneOf` or `$ref` shares its properties with it, and both stay open.
    """
    if not isinstance(schema, Mapping):
        return schema
    changed = dict(schema)
    shared = any(key in schema for key in ("anyOf", "oneOf", "$ref"))
    if schema.get("properties") and "additionalProperties" not in schema and not shared:
        changed["additionalProperties"] = False
    for key in ("properties", "$defs", "definitions"):
        if isinstance(part := schema.get(key), Mapping):
            changed[key] = {name: _closed(value) for name, value in part.items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            changed[key] = _closed(schema[key])
    for key in ("prefixItems", "anyOf", "oneOf"):
        if isinstance(part := schema.get(key), list) and not (key.endswith("Of") and "properties" in schema):
            changed[key] = [_closed(value) for value in part]
    return changed


class GrammarCompiler:
    """Grammars for one tokenizer and model. Cheap to make; the tokenizer is read when the first grammar is used.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: entries of the model's logits; may be more than the tokenizer has.
        stop_ids: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.stop_ids = sorted(stop_ids) or [tokenizer.eos_token_id]
        self._compiled: dict[Grammar, LLMatcher] = {}
        self._lock = Lock()

    def constraint(
        self, grammar: Grammar, max_tokens: int | None = None, kind: Callable[..., Constraint] | None = None
    ) -> Constraint:
        """The state of one answer of that form, complete after at most `max_tokens` where that is possible at all.

        `kind` makes it instead of `Constraint`, of the same arguments.

        Raises:
            InputError: the grammar, schema or pattern is wrong, or has parts that cannot be enforced.
            ConfigError: the tokenizer cannot be used for grammars.
        """
        with self._lock:
            matcher = self._compiled.pop(grammar, None) or self._compile(grammar)
            self._compiled[grammar] = matcher
            if len(self._compiled) > KEPT:
                del self._compiled[next(iter(self._compiled))]
        return (kind or Constraint)(matcher.deep_copy(), self._closing, self.stop_ids[0], max_tokens)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar.source), log_level=0)
        if matcher.is_error():
            problem = matcher.get_error().strip().splitlines()
            raise InputError(
                f"This form of answer cannot be enforced: {' '.join(problem)[:300]} "
                "Simplify the schema, pattern or grammar."
            )
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        size = max(self.vocab_size, len(self.tokenizer))
        try:
            return from_tokenizer(cast(Any, self.tokenizer), n_vocab=size, eos_token=self.stop_ids)
        except ValueError as error:
            raise ConfigError(
                f"Grammars, tools and response formats need a fast tokenizer (tokenizer.json): {error}. "
                "Pass another as tokenizer=."
            ) from error

    @cached_property
    def _closing(self) -> CompletionPlanner:
        return CompletionPlanner(self._tokenizer)


class Constraint:
    """One answer on its way through a grammar. Not shared between answers.

    `ended` is true when the end token was taken, `done` when nothing (more) can follow, `complete` when the answer
    may end here, `shortened` when another token than the model's was taken so that it ends in time.
    """

    def __init__(self, matcher: LLMatcher, closing: CompletionPlanner, end: int, max_tokens: int | None) -> None:
        self.ended = False
        self.shortened = False
        self._matcher = matcher
        self._closing = closing
        self._end = end
        self._left = max_tokens
        self._plan = None if max_tokens is None else closing.plan(matcher, max_tokens, thorough=True)
        self._stale = False  # tokens have come since the plan was made
        self._pause = 0  # so many more may come before it is made again

    @property
    def done(self) -> bool:
        return self.ended or self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        return self.ended or self._matcher.is_accepting()

    def mask(self, logits: Tensor) -> Tensor:
        """float32[vocab] with -inf for tokens that cannot come next."""
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=logits.shape[0], bitorder="little").view(bool)
        return torch.where(torch.from_numpy(allowed).to(logits.device), logits, -torch.inf)

    def accept(self, token: int) -> int:
        """Take the token that was drawn, or another one if with it the answer could not end in time; returns it."""
        if not self._fits(token):
            token, self._plan = (self._plan[0], self._plan[1:]) if self._plan else (self._end, [])
            self.shortened = True
        self._take(token)
        return token

    def forced(self) -> list[int]:
        """Tokens that must come next whatever the model says; taken already."""
        tokens: list[int] = []
        if not self.done and self._left != 0:
            for token in self._matcher.compute_ff_tokens():
                if self._left == 0 or not self._fits(token):
                    break
                self._take(token)
                tokens.append(token)
        return tokens

    def _take(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        self.ended = token == self._end or self._closing.is_end(token)
        if self._left is not None:
            self._left -= 1

    def _fits(self, token: int) -> bool:
        """Whether the answer can still be completed in time after `token`. Brings the plan up to date."""
        if self._left is None or self._plan is None or self._closing.is_end(token):
            return True  # without a plan the answer will be cut anyway
        if self._pause:
            self._pause, self._stale = self._pause - 1, True
            return True
        if not self._stale and self._plan[:1] == [token]:
            self._plan = self._plan[1:]
            return True
        after = self._matcher.deep_copy()
        after.consume_token(token)
        plan = self._closing.plan(after, self._left - 1, known=None if self._stale else self._plan)
        if plan is None and self._stale:
            self._plan, self._stale = self._closing.plan(self._matcher, self._left, thorough=True), False
        if plan is None:
            return self._plan is None
        self._plan, self._stale = plan, False
        self._pause = self._closing.pause(self._left - 1 - len(plan))
        return True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ZSMergeError(f"The grammar broke down: {self._matcher.get_error()[:300]} Simplify it.")
