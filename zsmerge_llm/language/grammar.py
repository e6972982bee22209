"""Constrained decoding: JSON schemas, regular expressions and llguidance's Lark grammars, enforced token by token.

A `Grammar` describes all answers that are allowed. A `GrammarCompiler`, one for each tokenizer, compiles it to a
`GrammarConstraint`, the state of one answer: it masks logits, returns forced tokens, and has the answer complete within
`max_tokens`. Nothing heavy is imported before a grammar is used.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol, cast

from zsmerge_llm.errors import ConfigError, InputError, ZSMergeError
from zsmerge_llm.language.completion import CompletionPlanner
from zsmerge_llm.language.json_schema import check_numbers, enforceable

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MAX_COMPILED = 32
"""Compiled grammars that are cached for later requests."""
COMPACT_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}
"""JSON on one line, as chat templates and json.dumps write it. Free whitespace invites weak models to repeat it."""
COMBINING_KEYWORDS = ("allOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "patternProperties")
"""JSON schema keywords that add properties to an object from elsewhere."""


@dataclass(frozen=True)
class Grammar:
    """A set of allowed answers, as a Lark grammar in llguidance's dialect.

    Make one with `Grammar.regex`, `Grammar.json_schema`, `Grammar.choice` or, for everything else, `Grammar.lark`.
    """

    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise InputError(f"The source of a grammar must be text, not a {type(self.source).__name__}.")
        try:
            self.source.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"The source of a grammar is not valid Unicode ({error}).") from error

    @classmethod
    def lark(cls, source: str) -> Grammar:
        """Return the context-free grammar of a Lark source with the rule `start`."""
        return cls(source)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Match the whole answer with a regular expression (Rust's syntax: no look-around, no back references)."""
        from llguidance import regex_to_lark

        if not isinstance(pattern, str):
            raise InputError(f"A pattern must be text, not a {type(pattern).__name__}.")
        cls(pattern)  # valid Unicode
        return cls(f"start: TEXT\nTEXT: /{regex_to_lark(pattern)}/\n")

    @classmethod
    def choice(cls, *texts: str) -> Grammar:
        """Allow exactly these texts."""
        return cls(f"start: {' | '.join(map(json.dumps, texts))}\n")

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any], lenient: bool = False) -> Grammar:
        """Allow JSON that is valid under a schema. `lenient` ignores keywords that cannot be enforced."""
        return cls(f"start: {json_rule(schema, lenient)}\n")


def json_rule(schema: Mapping[str, Any], lenient: bool = False, **options: Any) -> str:
    """Return JSON of a schema as part of a Lark rule. Options are llguidance's, on top of `COMPACT_JSON`.

    Raises:
        InputError: a number in the schema is too small.
    """
    schema = enforceable(schema) if lenient else schema
    check_numbers(schema)
    closed = schema if _combines(schema) else _closed(schema)
    return "%json " + json.dumps({**closed, "x-guidance": {**COMPACT_JSON, "lenient": lenient, **options}})


def _combines(schema: Any) -> bool:
    """Return whether a keyword adds properties from elsewhere, so that objects must stay open for them."""
    if isinstance(schema, Mapping):
        return any(key in schema for key in COMBINING_KEYWORDS) or any(_combines(value) for value in schema.values())
    return isinstance(schema, list) and any(_combines(value) for value in schema)


def _closed(schema: Any) -> Any:
    """Forbid further properties in objects that list theirs: what is valid then is valid under the schema itself.

    A schema beside `anyOf`, `oneOf` or `$ref` shares its properties with it, so both stay open.
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
    """Compile grammars for one tokenizer and model. Cheap to construct; the first grammar reads the tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        vocab_size: size of the model's logits; may be larger than the tokenizer's.
        stop_ids: the tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, stop_ids: Collection[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.stop_ids = sorted(stop_ids) or [tokenizer.eos_token_id]
        self._compiled: dict[Grammar, LLMatcher] = {}
        self._lock = Lock()

    def constraint(self, grammar: Grammar, max_tokens: int | None = None) -> GrammarConstraint:
        """Return the state of one answer, complete within `max_tokens` where any allowed answer is known to fit.

        Raises:
            InputError: the grammar, schema or pattern is wrong, or has parts that cannot be enforced.
            ConfigError: the tokenizer cannot be used for grammars.
        """
        with self._lock:
            matcher = self._compiled.pop(grammar, None) or self._compile(grammar)
            self._compiled[grammar] = matcher
            if len(self._compiled) > MAX_COMPILED:
                del self._compiled[next(iter(self._compiled))]
        return GrammarConstraint(matcher.deep_copy(), self._planner, self.stop_ids[0], max_tokens)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar.source), log_level=0)
        if matcher.is_error():
            problem = matcher.get_error().strip().splitlines()
            raise InputError(
                f"This grammar or schema cannot be enforced: {' '.join(problem)[:300]} "
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
    def _planner(self) -> CompletionPlanner:
        return CompletionPlanner(self._tokenizer)


class Constraint(Protocol):
    """What one sequence of a decode loop may generate. Not shared between sequences."""

    @property
    def ended(self) -> bool:
        """Whether the end token was accepted."""

    @property
    def done(self) -> bool:
        """Whether nothing (more) can follow."""

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""

    @property
    def shortened(self) -> bool:
        """Whether a token was replaced so that the answer completes in time."""

    @property
    def completes(self) -> bool:
        """Whether the answer will be complete, as far as its tokens go."""

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits float32 [vocab] with -inf for tokens that cannot come next."""

    def accept(self, token: int) -> int:
        """Accept a sampled token, or another one with which the answer completes in time; return it."""

    def forced(self) -> list[int]:
        """Accept and return the tokens that must come next whatever the model prefers."""


class GrammarConstraint:
    """The `Constraint` of a grammar.

    While `max_tokens` is finite it keeps a plan: tokens that complete the answer from here and fit into what is left.
    A token after which no such plan is found is replaced by the next one of the plan. So an answer that has a plan at
    its beginning is always complete, however few tokens it may have.

    Args:
        matcher: llguidance's state, this answer's own.
        planner: finds plans.
        stop_id: the token that ends the answer where no plan is left.
        max_tokens: most tokens of the answer; None: no limit and no plan.
    """

    def __init__(self, matcher: LLMatcher, planner: CompletionPlanner, stop_id: int, max_tokens: int | None) -> None:
        self.ended = False
        self.shortened = False
        self.tokens_left = max_tokens
        self._matcher = matcher
        self._planner = planner
        self._stop_id = stop_id
        self._plan = None if max_tokens is None else planner.plan(matcher, max_tokens, thorough=True)
        self._plan_is_stale = False  # tokens were accepted that the plan does not account for
        self._steps_until_replan = 0

    @property
    def done(self) -> bool:
        return self.ended or self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        return self.ended or self._matcher.is_accepting()

    @property
    def completes(self) -> bool:
        return self.tokens_left is None or self._plan is not None

    @property
    def planned_tokens(self) -> int:
        """Tokens that the known way to complete the answer needs; 0 if none is known."""
        return len(self._plan or ())

    def spend(self, count: int) -> None:
        """Take tokens that are not part of the answer, such as reasoning, from its budget."""
        if self.tokens_left is not None:
            self.tokens_left -= count

    def mask(self, logits: Tensor) -> Tensor:
        import numpy as np
        import torch

        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=logits.shape[0], bitorder="little").view(bool)
        return torch.where(torch.from_numpy(allowed).to(logits.device), logits, -torch.inf)

    def mask_stop_tokens(self, logits: Tensor) -> Tensor:
        """Return logits float32 [vocab] with -inf for the tokens that end an answer."""
        return self._planner.mask_stop_tokens(logits)

    def accept(self, token: int) -> int:
        if not self._fits(token):
            token, self._plan = (self._plan[0], self._plan[1:]) if self._plan else (self._stop_id, [])
            self.shortened = True
        self._consume(token)
        return token

    def forced(self) -> list[int]:
        tokens: list[int] = []
        if not self.done and self.tokens_left != 0:
            for token in self._matcher.compute_ff_tokens():
                if self.tokens_left == 0 or not self._fits(token):
                    break
                self._consume(token)
                tokens.append(token)
        return tokens

    def _consume(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        self.ended = token == self._stop_id or self._planner.is_stop_token(token)
        self.spend(1)

    def _fits(self, token: int) -> bool:
        """Return whether the answer can still be completed in time after `token`, and update the plan for it.

        Four cases, the cheap ones first:
        1. There is no limit or no plan (the answer will be cut anyway), or the token ends the answer: it fits.
        2. The last plan left so many tokens free that this step cannot use them up (`CompletionPlanner.pause`): it
           fits unseen, and the plan is stale from then on, as the grammar has moved on without it.
        3. The token is the next one of the plan: the rest of the plan has one token less, as has the budget.
        4. Otherwise a plan is made for the state after the token, with one token less. It may be the old one, which
           is tried first unless it is stale. If none is found and the old one is stale, there has to be a fresh plan
           for the state before the token: `accept` takes its next token. Without any plan, case 1 holds from now on.
        """
        if self.tokens_left is None or self._plan is None or self._planner.is_stop_token(token):
            return True
        if self._steps_until_replan:
            self._steps_until_replan, self._plan_is_stale = self._steps_until_replan - 1, True
            return True
        if not self._plan_is_stale and self._plan[:1] == [token]:
            self._plan = self._plan[1:]
            return True
        after = self._matcher.deep_copy()
        after.consume_token(token)
        left = self.tokens_left - 1
        plan = self._planner.plan(after, left, known=None if self._plan_is_stale else self._plan)
        if plan is None and self._plan_is_stale:
            self._plan, self._plan_is_stale = self._planner.plan(self._matcher, self.tokens_left, thorough=True), False
        if plan is None:
            return self._plan is None
        self._plan, self._plan_is_stale = plan, False
        self._steps_until_replan = self._planner.pause(left - len(plan))
        return True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ZSMergeError(f"The grammar failed: {self._matcher.get_error()[:300]} Simplify it.")
