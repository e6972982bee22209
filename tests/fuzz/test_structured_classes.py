"""Random pydantic classes by every method of both integrations: an instance, or an error of ours."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from typing import Any

import pytest
from langchain_zsmerge import ChatZSMerge
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.zsmerge import ZSMergeLLM

from tests.fuzz.random_classes import random_class
from tests.support.chat import make_llm
from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.errors import ShortenedOutputWarning, ZSMergeError

METHODS = ("json_schema", "function_calling", "json_mode")
TOKENS = 96


@cache
def model() -> LLM:
    return make_llm("smollm2", cache=CacheConfig.full())


def outcome(method: str, seed: int) -> str:
    """Return "valid", "shortened" (valid, with a warning) or "refused". Anything else is raised."""
    wanted = random_class(seed)
    settings: dict[str, Any] = {"llm": model(), "temperature": 1.0, "seed": seed, "max_tokens": TOKENS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if method == "structured_predict":
                made: Any = ZSMergeLLM(**settings).structured_predict(wanted, PromptTemplate("Make one."))
            else:
                made = ChatZSMerge(**settings).with_structured_output(wanted, method=method).invoke("Make one.")
        except ZSMergeError:
            return "refused"
    assert type(made) is wanted, f"{seed} by {method} gave {made!r}"
    shortened = any(issubclass(each.category, ShortenedOutputWarning) for each in caught)
    return "shortened" if shortened else "valid"


def count(method: str, seeds: range) -> Counter[str]:
    counted = Counter(outcome(method, seed) for seed in seeds)
    print(method, dict(counted))
    return counted


@pytest.mark.parametrize("method", [*METHODS, "structured_predict"])
def test_a_random_class_gives_an_instance_or_a_typed_error(method: str) -> None:
    counted = count(method, range(4))
    assert sum(counted.values()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 100])
@pytest.mark.parametrize("method", [*METHODS, "structured_predict"])
def test_two_hundred_random_classes_give_instances_or_typed_errors(method: str, first: int) -> None:
    counted = count(method, range(first, first + 100))
    assert method == "json_mode" or counted["refused"] <= 50  # JSON of any form rarely fits a class by chance
