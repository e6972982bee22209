"""Impossible settings are refused at construction with an error that names the remedy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from zsmerge_llm import LLM, SchedulingConfig, errors
from zsmerge_llm.config import CacheConfig, SamplingParams, parse_bytes
from zsmerge_llm.errors import ConfigError, ZSMergeError


@pytest.mark.parametrize(
    "settings",
    [
        {"slots": 0},
        {"slots": -5},
        {"slots": 1.5},
        {"slots": True},
        {"slots": 64},  # sink 4 + recent 64 do not fit
        {"slots": 100, "residual": 60},
        {"sink": -1},
        {"recent": 0},
        {"stage": 0},
        {"alpha": 1.1},
        {"alpha": float("nan")},
        {"decay": -0.1},
        {"decay": float("inf")},
        {"pool_kernel": 4},
        {"policy": "best"},
        {"policy": object()},
    ],
)
def test_impossible_cache_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CacheConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": ("",)},
        {"max_tokens": None, "ignore_eos": True},
    ],
)
def test_impossible_sampling_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**settings)


def test_too_few_slots_are_refused_with_the_smallest_number() -> None:
    with pytest.raises(ConfigError, match="at least 69 slots"):
        CacheConfig(slots=50)


@pytest.mark.parametrize("slots", [8, 9, 64, 512, 1024, 18_000])
def test_presets_fill_their_budget(slots: int) -> None:
    for config in (CacheConfig.paper(slots), CacheConfig.h2o(slots), CacheConfig.streaming(slots)):
        assert config.sink + config.num_context + config.recent + config.residual == slots
        assert config.num_context >= 1
    assert CacheConfig.full().slots is None


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="budget"):
        CacheConfig().replace(budget=3)
    with pytest.raises(ConfigError, match="temprature"):
        SamplingParams().replace(temprature=3)


def test_a_single_stop_string_is_accepted() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("500 MB", 500_000_000), ("1.5K", 1500), ("7", 7), (9, 9)]
)
def test_sizes_are_parsed_with_their_units(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", -1, "1.2.3GB", None, True])
def test_invalid_sizes_are_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="2GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("call", "nearest"),
    [
        (lambda: LLM("smollm2", quantisation="int8"), "quantization"),  # type: ignore[call-arg]
        (lambda: LLM("smollm2", session_dir="x"), "sessions_dir"),  # type: ignore[call-arg]
        (lambda: SamplingParams(max_token=3), "max_tokens"),  # type: ignore[call-arg]
        (lambda: CacheConfig(slot=3), "slots"),  # type: ignore[call-arg]
        (lambda: SchedulingConfig(max_request=3), "max_requests"),  # type: ignore[call-arg]
        (lambda: LLM("smollm2").chat("x", temperatur=0.5), "temperature"),  # type: ignore[call-arg]
        (lambda: LLM("smollm2").chat("x", session_id="a"), "session"),  # type: ignore[call-arg]
        (lambda: LLM("smollm2").complete("x", respons_format={}), "response_format"),  # type: ignore[call-arg]
    ],
)
def test_a_wrong_name_of_a_setting_shows_the_nearest_one(call: Any, nearest: str) -> None:
    with pytest.raises(TypeError, match=rf"Did you mean {nearest}\?"):
        call()


def test_errors_are_of_the_classes_of_python_that_callers_catch() -> None:
    with pytest.raises(FileNotFoundError):
        LLM("./no-such-folder/model.gguf").warm_up()
    assert issubclass(errors.SessionNotFoundError, (FileNotFoundError, KeyError))
    assert issubclass(errors.DeadlineExceededError, TimeoutError)
    assert issubclass(errors.ContextLimitError, ValueError)
    assert issubclass(errors.MissingTemplateError, ValueError)
    assert str(errors.SessionNotFoundError("There is no 'x'.")) == "There is no 'x'."


def test_every_error_is_a_zsmerge_error_and_creating_an_llm_imports_no_torch() -> None:
    from zsmerge_llm import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and not issubclass(kind, Warning)]
    assert all(issubclass(kind, ZSMergeError) for kind in kinds)
    code = "import sys, zsmerge_llm; zsmerge_llm.LLM('smollm2'); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
